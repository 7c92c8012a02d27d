"""What a worker does: write down a segment of speech, answer a chat.

Owns: the model in a worker's process (`ModelCharge`), and that the same request gets the same result wherever and
whenever it is done. Does not know: processes, the journal, files of sound.
"""

import hashlib
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_gemma import __version__
from edge_gemma.archive.child import Do, Emit, NotStartedError
from edge_gemma.audio.cuts import Cut
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.folder import find
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.host.extras import imported

_SEEDS = 1 << 31


@dataclass(frozen=True)
class Hear:
    """A segment of speech to be written down: seconds start to end of a recording. samples: as in `cuts.Cut`."""

    task: Task
    start: float
    end: float
    samples: np.ndarray


@dataclass(frozen=True)
class Answer:
    """A chat to be answered. body: OpenAI's request. created: seconds since 1970, which the answer tells."""

    custom_id: str
    body: dict[str, Any]
    created: int


@dataclass(frozen=True)
class ModelCharge:
    """A model, and how it works. model: as -m has it. digest: of its manifest. slots: requests at a time.

    context, threads: as in Engine. name: another one for each command, so that they have processes of their own.
    """

    model: str | None
    digest: str
    slots: int
    context: int | None = None
    threads: int | None = None
    version: str = __version__
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    def check(self) -> None:
        """Raises NotStartedError, one line, where the results would not be those of the command's own machine."""
        if self.version != __version__:
            raise NotStartedError(
                f"edge_gemma {__version__} is installed there, the command has {self.version}: install the same"
            )
        folder = ModelFolder.open(find.resolve(self.model))
        if folder.manifest["digest"] != self.digest:
            raise NotStartedError(f"{folder.path} is another model than the command's: copy that one there")

    def open(self) -> Do:
        """As Charge.open."""
        self.check()
        engine = Engine.load(self.model, context=self.context, threads=self.threads)
        return _Workplace(engine, self.slots).do


class _Workplace:
    """A model that several threads work with. Their sessions step together."""

    def __init__(self, engine: Engine, most: int) -> None:
        """most: threads."""
        self._engine, self._most = engine, most
        self._idle: list[Transcriber] = []  # with their instruction read; the last used last
        self._choosing = threading.Lock()

    def do(self, work: Hear | Answer, emit: Emit) -> Any:
        """Returns the entry of a segment, or the body of an answer. Raises EdgeGemmaError."""
        return self._written(work) if isinstance(work, Hear) else answered(self._engine, work)

    def _written(self, work: Hear) -> dict[str, Any]:
        with self._choosing:
            transcriber = next((each for each in self._idle if each.task == work.task), None)
            if transcriber is not None:
                self._idle.remove(transcriber)
        transcriber = transcriber or Transcriber(self._engine, work.task)
        segment = transcriber.written(Cut(work.start, work.end, False, work.samples))
        with self._choosing:
            self._idle.append(transcriber)
            del self._idle[: -self._most]
        return {name: value for name, value in vars(segment).items() if value is not None}


def answered(engine: Engine, work: Answer) -> dict[str, Any]:
    """The body of a chat completion. Raises EdgeGemmaError for what cannot be answered.

    Without a seed in the request, it is made of the request's name: the same request has the same answer.
    """
    imported("starlette", "answering chats", "archives", UsageError)
    from edge_gemma.generation.generate import Result
    from edge_gemma.server.ask import Step, answer
    from edge_gemma.server.bodies import Fields
    from edge_gemma.server.openai_chat import ChatWriter, read_chat
    from edge_gemma.server.refusals import Refusal

    seed = int.from_bytes(hashlib.blake2b(work.custom_id.encode(), digest_size=8).digest(), "big") % _SEEDS
    fields = {"seed": seed} | {name: value for name, value in work.body.items() if value is not None}
    body = Fields(fields)
    try:
        body.refuse("stream", False)
        ask = read_chat(body)
    except Refusal as refusal:
        raise UsageError(str(refusal)) from None
    parts = list(answer(engine, ask, threading.Event()))
    steps = [part for part in parts if isinstance(part, Step)]
    result = parts[-1]
    assert isinstance(result, Result)
    return _lasting(ChatWriter(engine.name).whole(steps, result), work)


def _lasting(body: dict[str, Any], work: Answer) -> dict[str, Any]:
    """An answer without what is different each time: random names, times, what happened to be known already."""
    name = hashlib.blake2b(work.custom_id.encode(), digest_size=12).hexdigest()
    body = {key: value for key, value in body.items() if key != "timings"}
    body |= {"id": f"chatcmpl-{name}", "created": work.created}
    body["usage"].pop("prompt_tokens_details", None)
    for number, call in enumerate(body["choices"][0]["message"].get("tool_calls", [])):
        call["id"] = f"call_{name}_{number}"
    return body
