"""A conversation agent, as homes have it: short questions, each in a conversation that has a name.

Owns: the conversations, tools that are run for an answer. Does not know: protocols, sound.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.chat import Chat
from edge_gemma.conversation import Conversation
from edge_gemma.engine import Engine
from edge_gemma.generation.generate import Result
from edge_gemma.generation.sampler import Sampling
from edge_gemma.server.ask import Ask, Step, answer
from edge_gemma.server.desk import Desk
from edge_gemma.server.moderation import RefusedResult
from edge_gemma.server.refusals import Refusal
from edge_gemma.server.turns import Turns
from edge_gemma.text.reply import Piece
from edge_gemma.tools.assistant import Assistant
from edge_gemma.tools.builtin import fitting
from edge_gemma.tools.function import RunnableTool
from edge_gemma.tools.toolbox import CallResult, Toolbox

MOST = 64  # conversations that are remembered
FORGET_S = 600.0  # after the last answer
_MESSAGES = 40  # of a conversation; older ones are forgotten
_CHARACTERS = 4000  # of a question
_NAME = 200  # characters
_TOKENS = 512  # of an answer
_Name = tuple[str, str]  # of a conversation: the client, and what it calls it


@dataclass(frozen=True)
class Tools:
    """What the agent may use. own: always declared; built_in: as many as a model has room for."""

    own: Sequence[RunnableTool] = ()
    built_in: Sequence[RunnableTool] = ()


@dataclass
class _Kept:
    messages: list[dict[str, Any]] = field(default_factory=list)
    at: float = 0.0  # time.monotonic of the last answer


class Agent:
    """Answers questions. Its coroutines belong to the desk's event loop."""

    def __init__(self, desk: Desk, *, system: str | None = None, tools: Tools | None = None) -> None:
        """system: instructions for all conversations. tools: those with effects are refused, nobody can be asked."""
        self._desk, self._system, self._tools = desk, system, tools
        self._kept: OrderedDict[_Name, _Kept] = OrderedDict()  # the longest unused first

    async def answer(self, text: str, name: str | None, client: str) -> AsyncGenerator[str | Result, None]:
        """The answer in pieces, and its result.

        name: of the conversation, which is this client's own; without one nothing is remembered.
        Raises as Desk.answer, and Refusal for a question that is too long.
        """
        if not text.strip() or len(text) > _CHARACTERS:
            raise Refusal(400, f"the text has {len(text)} characters, expected 1 to {_CHARACTERS}")
        if name is not None and len(name) > _NAME:
            raise Refusal(400, f"conversation_id has {len(name)} characters, expected at most {_NAME}")
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self._system}] if self._system else []
        ask = Ask(messages=[*system, *self._history(client, name), asked], max_tokens=_TOKENS)
        how = self._acts if self._tools is not None else answer
        async with aclosing(self._desk.answer(ask, client, how)) as parts:
            async for part in parts:
                if isinstance(part, Step):
                    if part.piece.kind == "answer" and part.piece.text:
                        yield part.piece.text
                    continue
                if name is not None and part.text and not isinstance(part, RefusedResult):
                    self._keep((client, name), [asked, {"role": "assistant", "content": part.text}])
                yield part

    def _history(self, client: str, name: str | None) -> list[dict[str, Any]]:
        old = time.monotonic() - FORGET_S
        while self._kept and next(iter(self._kept.values())).at < old:
            self._kept.popitem(last=False)
        kept = self._kept.get((client, name)) if name is not None else None
        return list(kept.messages) if kept else []

    def _keep(self, name: _Name, messages: list[dict[str, Any]]) -> None:
        kept = self._kept.setdefault(name, _Kept())
        kept.messages = [*kept.messages, *messages][-_MESSAGES:]
        kept.at = time.monotonic()
        self._kept.move_to_end(name)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)

    def _acts(
        self, engine: Engine, ask: Ask, stopping: threading.Event, opened: Callable[[Conversation], None]
    ) -> Iterator[Step | Result]:
        """As `ask.answer`, with tools that are run."""
        assert self._tools is not None
        sampling = Sampling.from_generation_config(engine.generation_config, **ask.settings)
        chat = Chat(engine, history=ask.messages, sampling=sampling, max_tokens=ask.max_tokens)
        opened(chat)
        own, fit = list(self._tools.own), list[RunnableTool]()
        if chat.can_call:
            fit, _ = fitting(chat, self._tools.built_in, beside=own)
        tools = [*own, *fit] if chat.can_call else []
        turn = Assistant(chat, _Toolbox(tools, self._desk.turns)).send()
        for event in turn.events():
            if event.kind == "text":
                yield Step(Piece("answer", event.text))
            if stopping.is_set():
                turn.stop()
        chat.session.share()
        yield turn.result()


class _Toolbox(Toolbox):
    """While tools run, others compute."""

    def __init__(self, tools: Sequence[RunnableTool], turns: Turns) -> None:
        super().__init__(tools)
        self._turns = turns

    def run(self, *given: Any, **options: Any) -> Iterator[tuple[int, CallResult]]:
        over = super().run(*given, **options)
        while True:
            with self._turns.rest():
                found = next(over, None)
            if found is None:
                return
            yield found
