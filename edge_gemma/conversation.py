"""A transcript over one session: replies come one at a time, whatever happens on the way.

Owns: what an interrupted reply leaves behind, that nobody talks at the same time. Does not know: how messages become a
prompt (chat.py), screens, files.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from edge_gemma.arguments import integer, require, texts
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.gain import Gain
from edge_gemma.generation.generate import (
    Encoded,
    Generation,
    Progress,
    Result,
    StreamTokenizer,
    stop_ids_of,
)
from edge_gemma.generation.reply import Reply
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.model.drafter import Drafter
from edge_gemma.session import Timeline
from edge_gemma.text.message import Message, as_messages
from edge_gemma.text.prompt import Prompt
from edge_gemma.text.reply import Piece
from edge_gemma.text.session_file import Kind, Transcript

Think = bool | Literal["auto"]  # whether the model thinks before it answers; "auto": if it says that it needs to
Bound = Constraint | None  # what an answer must be
Pieces = Generator[Piece, None, None]
Said = str | Message | Mapping[str, Any] | Any  # what `send` takes; Any: samples, as audio/samples.py has them


class ChatEngine(Protocol):
    """The part of `edge_gemma.engine.Engine` that a conversation uses."""

    @property
    def tokenizer(self) -> StreamTokenizer: ...  # noqa: D102
    @property
    def chat_template(self) -> str | None: ...  # noqa: D102
    @property
    def generation_config(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    def hear(  # noqa: D102
        self, source: Any, *, rate: int | None = None, note: Callable[[str], None] = ...
    ) -> tuple[np.ndarray, ...]: ...
    def watch(self, source: Any) -> tuple[tuple[str, np.ndarray], ...]: ...  # noqa: D102
    def see(self, source: Any, tokens: Any = ..., *, note: Callable[[str], None] = ...) -> np.ndarray: ...  # noqa: D102
    def session(self, context: int | None = None, *, shared: bool = False) -> Timeline: ...  # noqa: D102
    def drafts(self) -> Gain | None: ...  # noqa: D102
    @property
    def drafter(self) -> Drafter | None: ...  # noqa: D102


class Conversation:
    """The part that both kinds share: a transcript over one session. `last` is the result of the latest reply."""

    kind: ClassVar[Kind]
    system: str | None = None
    think: Think = False
    tools: Sequence[Mapping[str, Any]] | None = None

    def __init__(
        self,
        engine: ChatEngine,
        *,
        history: Sequence[Message | Mapping[str, Any]] = (),
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        image_tokens: Any = "auto",
        progress: Progress | None = None,
    ) -> None:
        """history: the messages of an earlier conversation of this kind, without its system message. image_tokens: as
        in Engine.see.

        Raises UsageError for arguments of other kinds.
        """
        if sampling is None:
            sampling = Sampling.from_generation_config(engine.generation_config)
        require("sampling", sampling, isinstance(sampling, Sampling), "a Sampling")
        self._engine, self._name = engine, engine.name
        self.image_tokens = image_tokens
        self.session = engine.session(shared=True)
        self.tokenizer = engine.tokenizer
        self.messages: list[Message] = as_messages(history, "history", hear=engine.hear, see=self._see)
        self.max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        self.last: Result | None = None
        self.chances: int | None = None  # as in Generation
        self.must_call, self.only = False, ""  # whether a reply has to begin with a call, and of which tool
        self._sampler, self._drafts = Sampler(sampling), engine.drafts()
        self._stop_ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        self._stop_strings, self._progress = texts("stop", stop), progress
        self._replying, self._sending = threading.Lock(), threading.Lock()
        self._unread: Reply | None = None
        self._latest: weakref.ref[Reply] | None = None
        self._held: list[Encoded] = []  # the soft tokens that the session holds

    def send(
        self, *said: Said, images: Sequence[Any] = (), videos: Sequence[Any] = (), constraint: Bound = None
    ) -> Reply:
        """Send messages. Returns the reply, which is written while it is read.

        said: a text is a message of the user. So is a sound: samples of 16 kHz, (samples, rate), a Path, a file's
        bytes, or an open file. A sound is encoded at once and belongs to a text right before it. A Message, or a dict
        in OpenAI's form, may have any role; the results of several tools are sent together. Without an argument the
        model replies to the transcript. If nobody has begun to read the reply before, it is read to its end first.
        images, videos: shown beside the last of the user's messages, each as in Engine.see and Engine.watch. They are
        encoded at once. constraint: what the answer must be. A thought before it is free, and tools may be called
        instead.

        The transcript is whole however a reply ends. It keeps the text that was written; if there is none, it does not
        keep the messages either. Raises UsageError while another reply is being written, and for what is no message.
        Raises the error of a reply that nobody had read; nothing is sent then, and `send` may be called again. Reading
        the reply raises ContextFullError if the messages do not fit.
        """
        notes: list[str] = []
        require("constraint", constraint, isinstance(constraint, Constraint | None), "a Constraint")
        asked = self._with_pictures(self._asked(said, notes.append), images, videos, notes.append)
        if not asked and not self.messages:
            raise UsageError("there is nothing to reply to, expected a message")
        if not self._sending.acquire(blocking=False):  # two threads would each forget the other's reply
            raise busy()
        try:
            self._finish_unread()
            if self._replying.locked():
                raise busy()
            self._unread = reply = Reply(functools.partial(self._begin, asked, notes, constraint))
            self._latest = weakref.ref(reply)
            return reply
        finally:
            self._sending.release()

    def stop(self) -> None:
        """End the latest reply, as `Reply.stop` does, from any thread. It works without holding the reply itself.

        An unread reply never runs. Nothing happens if there is no reply, or if it has ended.
        """
        reply = self._latest() if self._latest else None
        if reply is not None:
            reply.stop()

    def reset(self) -> None:
        """Forget the messages. An unread reply never runs. The session is kept for what the next prompt shares.

        Raises UsageError while a reply is being written.
        """
        unread = self._unread
        with self._alone():
            self.messages, self.last = [], None
            if unread is not None:
                unread.stop()

    def transcript(self, model: str | None = None) -> Transcript:
        """The messages so far, as they are saved. model: its name, for readers of the file."""
        return Transcript(tuple(as_messages(self.messages)), self.system, model, self.kind)

    def save(self, path: Path | str) -> None:
        """Write the messages so far to a file that `open` reads, whole or not at all. A file there is replaced.

        A reply that nobody has begun to read is read to its end first. If it fails, the file is written without it, and
        its error is raised then. A reply that is half read is not in the file. Raises UsageError if the file cannot be
        written.
        """
        failed: EdgeGemmaError | None = None
        try:
            self._finish_unread()
        except EdgeGemmaError as error:
            failed = error
        try:
            self.transcript(self._name).save(path)
        except OSError as error:
            raise UsageError(f"the conversation cannot be saved: {path}: {error.strerror or error}") from None
        if failed is not None:
            raise failed

    def _finish_unread(self) -> None:
        """Read the latest reply to its end if nobody has begun to read it. Raises its error, named as its own."""
        if (unread := self._unread) is None:
            return
        try:
            unread.result()
        except EdgeGemmaError as error:
            raise type(error)(f"the reply before this, which nobody had read, failed: {error}") from None

    def _with_pictures(
        self, asked: list[Message], images: Sequence[Any], videos: Sequence[Any], note: Callable[[str], None]
    ) -> list[Message]:
        for name, given in (("images", images), ("videos", videos)):
            require(name, given, isinstance(given, list | tuple), "a list")
        if not images and not videos:
            return asked
        asked = asked or [Message("user", "")]
        last = asked[-1]
        if last.role != "user":
            raise UsageError(f"pictures stand beside a message of role {last.role}, expected one of role user")
        pictures: list[Any] = [self._engine.see(image, self.image_tokens, note=note) for image in images]
        pictures += [self._engine.watch(video) for video in videos]
        media = ("image",) * len(images) + ("video",) * len(videos) + last.media
        return [*asked[:-1], replace(last, media=media, pictures=(*pictures, *last.pictures))]

    def _see(self, file: bytes, detail: str) -> np.ndarray:
        """The soft tokens of a picture in OpenAI's form."""
        return self._engine.see(file, self.image_tokens if detail == "auto" else detail)

    def _asked(self, said: Sequence[Said], note: Callable[[str], None]) -> list[Message]:
        """The messages that `said` stands for. note: called with what is wrong with a sound. Raises as `send`."""
        raise NotImplementedError

    def _pieces(self, asked: list[Message], bound: Bound, result: Result, stopping: threading.Event) -> Pieces:
        """Write the reply to `asked`. Yields its pieces."""
        raise NotImplementedError

    def _begin(
        self, asked: list[Message], notes: list[str], bound: Bound, result: Result, stopping: threading.Event
    ) -> Pieces:
        with self._alone():
            yield from (Piece("notice", note) for note in notes)
            yield from self._pieces(asked, bound, result, stopping)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Held from a reply's first piece to its end: one session cannot write two replies at once."""
        if not self._replying.acquire(blocking=False):
            raise busy()
        try:
            self._unread = None
            yield
        finally:
            self._replying.release()

    def _reply(
        self,
        prompt: Prompt,
        asked: list[Message],
        bound: Bound,
        result: Result,
        stopping: threading.Event,
        most_thought: int | None = None,
    ) -> Iterator[Piece]:
        """most_thought: as in Bounds."""
        bounds = Bounds(
            self.tokenizer, answer=bound, tools=self._tools_to_call(), must_call=self.must_call,
            thinks=bool(self.think) and most_thought != 0,
            stop_ids=self._stop_ids, prompt_ids=prompt.ids, most_thought=most_thought,
        )  # fmt: skip
        generation = Generation(
            self.session,
            prompt.ids,
            tokenizer=self.tokenizer,
            sampler=self._sampler,
            max_tokens=self.max_tokens,
            stop_ids=self._stop_ids,
            stop_strings=self._stop_strings,
            progress=self._progress,
            mark=True,
            result=result,
            stopping=stopping,
            encoded=prompt.encoded,
            held=self._held,
            bounds=bounds,
            chances=self.chances,
            drafts=self._drafts,
            drafter=self._engine.drafter,
        )
        before, self.messages = self.messages, [*self.messages, *asked]
        try:
            yield from generation
        finally:
            self.last = result
            if result.tokens or result.finish_reason == "stop":
                reply = Message("assistant", result.text, result.reasoning or None, result.tool_calls)
                self.messages.append(reply)
            else:
                self.messages = before

    def _tools_to_call(self) -> Sequence[Mapping[str, Any]] | None:
        """The declarations of the tools that a reply may call."""
        if not self.only or not self.tools:
            return self.tools
        return [tool for tool in self.tools if tool["function"]["name"] == self.only]


def busy() -> UsageError:
    """What is raised while another reply is being written."""
    return UsageError(
        "this conversation is writing a reply: read that to its end or call stop(), or talk in a second conversation"
    )
