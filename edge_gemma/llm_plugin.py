"""The models of this package in `llm` (llm.datasette.io), in this process and without a server.

Owns: which models `llm` lists, its prompts read into an `Ask`, answers as its events. Does not know: how an answer is
made (server/ask.py), how `llm` keeps conversations and runs tools.

`llm` imports this module at every start, so an engine is imported only for a prompt.
"""

import asyncio
import functools
import json
import logging
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click
import llm
from llm.parts import AttachmentPart, ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.folder import find
from edge_gemma.folder.file_names import AUDIO_BATCH, TEMPLATE, VISION

if TYPE_CHECKING:
    from edge_gemma.engine import Engine
    from edge_gemma.generation.generate import Result
    from edge_gemma.server.ask import Ask
    from edge_gemma.server.turns import Turns
    from edge_gemma.text.reply import Piece

log = logging.getLogger(__name__)

PREFIX = "edge-gemma"
_KINDS = (
    "aac", "aiff", "flac", "m4a", "mp3", "mp4", "mpeg", "ogg", "opus", "wav", "wave", "webm", "x-aiff", "x-flac",
    "x-m4a", "x-vorbis+ogg", "x-wav",
)  # fmt: skip
SOUNDS = frozenset(f"audio/{kind}" for kind in _KINDS)
PICTURES = frozenset(f"image/{kind}" for kind in ("avif", "bmp", "gif", "jpeg", "png", "tiff", "webp"))
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_LATELY_HEARD = 8  # sounds whose soft tokens are kept: a conversation sends them again with every message


class PromptError(llm.ModelError, click.ClickException):
    """An error told in one line, by `llm chat` too, which shows others with a traceback."""


class Given(llm.Options):
    """What `-o NAME VALUE` sets. None: the checkpoint's own setting, or none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    think: bool | Literal["auto"] | None = None
    think_budget: int | None = None
    context: int | None = None


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Tell `llm` the models; the default has the alias "edge-gemma"."""
    default, sources = offered()
    for name, source in sources.items():
        register(Model(name, source), AsyncModel(name, source), aliases=(PREFIX,) if name == default else None)


def offered() -> tuple[str, dict[str, Path | str]]:
    """The default's name, and what Engine.load takes for each name."""
    sources: dict[str, Path | str] = {find.EMBEDDED_NAME: find.EMBEDDED}
    sources |= {entry.name: entry.path for entry in find.named()}
    default = os.environ.get(find.MODEL_VARIABLE) or find.EMBEDDED_NAME
    if default not in sources:
        short = Path(default).name
        name = default if not short or short in sources else short
        return name, sources | {name: default}
    return default, sources


class _Model:
    """What both kinds of model share. What they say of themselves is read from the chat template and file names."""

    def __init__(self, name: str, source: Path | str) -> None:
        """source: as in Engine.load."""
        self.model_id = f"{PREFIX}/{name}"
        self.source = source
        self.can_stream = self.supports_schema = True
        template = _template(Path(source))
        self.supports_conversation = template is not None
        self.supports_tools = "tools" in (template or "")
        folder, unknown = Path(source), not Path(source).is_dir()
        hears = unknown or (folder / AUDIO_BATCH).is_file()
        sees = unknown or (folder / VISION).is_file()
        attachment_types = [*(SOUNDS if hears else ()), *(PICTURES if sees else ())]
        self.attachment_types: set[str] | frozenset[str] = frozenset(attachment_types)

    def __str__(self) -> str:
        return f"Edge Gemma: {self.model_id}"

    def events(self, prompt: llm.Prompt, response: Any, stopping: threading.Event) -> Iterator[StreamEvent]:
        """An answer as it is written. Raises PromptError."""
        try:
            from edge_gemma.generation.generate import Result
            from edge_gemma.server.ask import answer

            engine, senses = _opened(self.source, _given(prompt).context)
            ask = _ask(prompt, senses, chat=engine.chat_template is not None)
            for step in answer(engine, ask, stopping):
                if isinstance(step, Result):
                    _tell(step, response)
                else:
                    yield from _events(step.piece, response)
        except EdgeGemmaError as error:
            raise PromptError(str(error)) from None
        except MemoryError:
            raise PromptError("there is not enough memory: a smaller model or context needs less") from None


def _template(folder: Path) -> str | None:
    """The chat template, None for a base model. A file that is converted first is taken for a model with tools."""
    if not folder.is_dir():
        return "tools"
    try:
        return (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


class Model(_Model, llm.Model):
    """A model."""

    class Options(Given):
        """As `Given`."""

    def execute(self, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any) -> Iterator[StreamEvent]:
        """As llm.Model has it. It streams in any case. Raises PromptError."""
        yield from self.events(prompt, response, threading.Event())


class AsyncModel(_Model, llm.AsyncModel):
    """The same for asyncio: a thread computes, a piece at a time."""

    class Options(Given):
        """As `Given`."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """As llm.AsyncModel has it. Raises PromptError."""
        stopping = threading.Event()
        events = self.events(prompt, response, stopping)
        try:
            while (event := await asyncio.to_thread(_next, events, stopping)) is not None:
                yield event
        finally:
            stopping.set()


def _next(events: Iterator[StreamEvent], stopping: threading.Event) -> StreamEvent | None:
    """The next event, None after the last. Raises Stopped within a layer once `stopping` is set."""
    from edge_gemma.server.turns import ASKED

    with _turns().turn(ASKED, stopping):
        return next(events, None)


@functools.cache
def _turns() -> "Turns":
    """Which of asyncio's threads computes."""
    from edge_gemma.server.turns import Turns

    return Turns()


_opening = threading.Lock()


class Senses(NamedTuple):
    """A sound file's bytes to its soft tokens, a picture file's to its own: what was met lately is known."""

    hear: Callable[[bytes], tuple[Any, ...]]
    see: Callable[[bytes], Any]


def _opened(source: Path | str, context: int | None) -> "tuple[Engine, Senses]":
    """The engine, and its senses. Both are kept until the process ends. Raises as Engine.load."""
    with _opening:  # two threads would each open it
        return _open(source, context)


@functools.cache
def _open(source: Path | str, context: int | None) -> "tuple[Engine, Senses]":
    from edge_gemma import kernels
    from edge_gemma.engine import Engine

    kernels.announce_compiling(_tell_compiling)
    engine = Engine.load(source, context=context)
    engine.between, engine.meeting = _turns().between, _turns().meeting
    return engine, Senses(functools.lru_cache(_LATELY_HEARD)(engine.hear), engine.see)


@functools.cache
def _tell_compiling() -> None:
    log.warning("compiling the kernels for this machine: 10 to 60 seconds, once")


def _ask(prompt: llm.Prompt, senses: Senses, *, chat: bool) -> "Ask":
    """What a prompt asks for. chat: whether the model has a chat template. Raises UsageError."""
    from edge_gemma.generation.constraint import Constraint
    from edge_gemma.server.ask import Ask

    given = _given(prompt)
    if not chat and prompt.system:
        raise UsageError("a base model has no place for a system prompt: leave it out, or take another model")
    settings: Any = {name: getattr(given, name) for name in _SAMPLING if getattr(given, name) is not None}
    schema: Any = prompt.schema  # llm makes a dict of it
    stop = [given.stop] if isinstance(given.stop, str) else given.stop or ()
    return Ask(
        messages=_messages(prompt.messages, senses) if chat else (),
        prompt=None if chat else prompt.prompt,
        tools=[_declaration(tool) for tool in prompt.tools],
        think=given.think or False,
        think_budget=given.think_budget,
        wants_thoughts=True,
        constraint=Constraint.json(schema) if schema else None,
        max_tokens=given.max_tokens,
        stop=tuple(stop),
        settings=settings,
    )


def _given(prompt: llm.Prompt) -> Given:
    assert isinstance(prompt.options, Given)
    return prompt.options


def _declaration(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema or _NOTHING}
    return {"type": "function", "function": function}


_NOTHING = {"type": "object", "properties": {}}


def _messages(messages: Iterable[llm.Message], senses: Senses) -> list[Any]:
    """Messages in OpenAI's form; those with sound or pictures as Messages, with their soft tokens. Raises as
    Engine.hear and Engine.see.
    """
    from edge_gemma.text.message import Message

    made: list[Any] = []
    for message in messages:
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        files = [part.attachment for part in message.parts if isinstance(part, AttachmentPart) and part.attachment]
        calls = [_call(part) for part in message.parts if isinstance(part, ToolCallPart)]
        thoughts = "".join(part.text for part in message.parts if isinstance(part, ReasoningPart))
        if files:
            kinds = [_kind(file) for file in files]
            contents = [(kind, file.content_bytes()) for kind, file in zip(kinds, files, strict=True)]
            clips = tuple(clip for kind, data in contents if kind == "audio" for clip in senses.hear(data))
            pictures = tuple(senses.see(data) for kind, data in contents if kind == "image")
            media = ("image",) * len(pictures) + (("audio",) if clips else ())
            made.append(Message(message.role, text, media=media, clips=clips, pictures=pictures))
        elif text or calls:
            entry = {"role": message.role, "content": text, "reasoning": thoughts or None, "tool_calls": calls}
            made.append(entry)
        made += [_result(part) for part in message.parts if isinstance(part, ToolResultPart)]
    return made


def _kind(attachment: llm.Attachment) -> str:
    """ "audio" or "image". Raises UsageError for anything else."""
    kind = attachment.resolve_type()
    if kind not in SOUNDS | PICTURES:
        raise UsageError(f"an attachment is {kind}, expected sound such as audio/wav or a picture: leave it out")
    return kind.partition("/")[0]


def _call(part: ToolCallPart) -> dict[str, Any]:
    return {"id": part.tool_call_id, "function": {"name": part.name, "arguments": part.arguments}}


def _result(part: ToolResultPart) -> dict[str, Any]:
    return {"role": "tool", "name": part.name, "tool_call_id": part.tool_call_id, "content": part.output}


def _events(piece: "Piece", response: Any) -> Iterator[StreamEvent]:
    """The events of a piece. A call is noted in `response`."""
    if piece.kind == "notice":
        log.warning("%s", piece.text)
    elif piece.kind == "tool_call" and piece.call is not None:
        index = f"call_{secrets.token_hex(8)}"
        call = llm.ToolCall(piece.call.name, piece.call.arguments, index)
        response.add_tool_call(call)
        yield StreamEvent("tool_call_name", call.name, tool_call_id=index)
        yield StreamEvent("tool_call_args", json.dumps(call.arguments), tool_call_id=index)
    elif piece.text:
        yield StreamEvent("reasoning" if piece.kind == "reasoning" else "text", piece.text)


def _tell(result: "Result", response: Any) -> None:
    """Note in `response` how an answer ended, and its numbers."""
    times = result.timings
    details = {"prompt_tokens_details": {"cached_tokens": times.reused_tokens}} if times.reused_tokens else None
    response.set_usage(input=times.reused_tokens + times.prefill_tokens, output=len(result.tokens), details=details)
    response.response_json = {
        "finish_reason": result.finish_reason,
        "ttft_s": round(times.ttft_s, 3),
        "prefill_s": round(times.prefill_s, 3),
        "decode_s": round(times.decode_s, 3),
    }
