"""Conversations with a model: messages go in, replies come out.

Owns: the transcript, what an interrupted reply leaves in it, writing one reply at a time. `Chat` is for models with a
chat template, `Continuation` for base models. Does not know: screens, microphones.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, Unpack

import numpy as np

from edge_gemma.arguments import integer, require, texts
from edge_gemma.errors import ContextFullError, EdgeGemmaError, UsageError
from edge_gemma.generation.generate import (
    Generation,
    Progress,
    Result,
    Sound,
    StreamTokenizer,
    parts,
    shared,
    stop_ids_of,
)
from edge_gemma.generation.reply import Reply
from edge_gemma.generation.sampler import Sampler, Sampling, Settings
from edge_gemma.session import Timeline
from edge_gemma.text.fitting import LEAST_ROOM, fitting
from edge_gemma.text.message import Message, as_messages, sound_and_rate
from edge_gemma.text.prompt import THINKING, ChatFormat, Prompt, audio_marks
from edge_gemma.text.reply import Piece
from edge_gemma.text.session_file import Kind, Transcript
from edge_gemma.text.tool_declaration import Tool, checked

CONTINUATION_TOKENS = 128  # default limit of a base model's reply, which seldom ends by itself

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
    def session(self, context: int | None = None) -> Timeline: ...  # noqa: D102


class Conversation:
    """The part that both kinds share: a transcript over one session. `last` is the result of the latest reply."""

    kind: ClassVar[Kind]
    system: str | None = None

    def __init__(
        self,
        engine: ChatEngine,
        *,
        history: Sequence[Message | Mapping[str, Any]] = (),
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """history: the messages of an earlier conversation of this kind, without its system message.

        Raises UsageError for arguments of other kinds.
        """
        if sampling is None:
            sampling = Sampling.from_generation_config(engine.generation_config)
        require("sampling", sampling, isinstance(sampling, Sampling), "a Sampling")
        self.session = engine.session()
        self.tokenizer = engine.tokenizer
        self.messages: list[Message] = as_messages(history, "history", hear=engine.hear)
        self.max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        self.last: Result | None = None
        self._engine, self._name = engine, engine.name
        self._sampler = Sampler(sampling)
        self._stop_ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        self._stop_strings, self._progress = texts("stop", stop), progress
        self._replying, self._sending = threading.Lock(), threading.Lock()
        self._unread: Reply | None = None
        self._latest: weakref.ref[Reply] | None = None
        self._held: list[Sound] = []  # the soft tokens that the session holds

    def send(self, *said: Said) -> Reply:
        """Send messages. Returns the reply, which is written while it is read.

        said: a text is a message of the user. So is a sound: samples of 16 kHz, (samples, rate), a Path, a file's
        bytes, or an open file. A sound is encoded at once and belongs to a text right before it. A Message, or a dict
        in OpenAI's form, may have any role; the results of several tools are sent together. Without an argument the
        model replies to the transcript. If nobody has begun to read the reply before, it is read to its end first.

        The transcript is whole however a reply ends. It keeps the text that was written; if there is none, it does not
        keep the messages either. Raises UsageError while another reply is being written, and for what is no message.
        Raises the error of a reply that nobody had read; nothing is sent then, and `send` may be called again. Reading
        the reply raises ContextFullError if the messages do not fit.
        """
        notes: list[str] = []
        asked = self._asked(said, notes.append)
        if not asked and not self.messages:
            raise UsageError("there is nothing to reply to, expected a message")
        if not self._sending.acquire(blocking=False):  # two threads would each forget the other's reply
            raise _busy()
        try:
            self._finish_unread()
            if self._replying.locked():
                raise _busy()
            self._unread = reply = Reply(functools.partial(self._begin, asked, notes))
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

    def _asked(self, said: Sequence[Said], note: Callable[[str], None]) -> list[Message]:
        """The messages that `said` stands for. note: called with what is wrong with a sound. Raises as `send`."""
        raise NotImplementedError

    def _pieces(self, asked: list[Message], result: Result, stopping: threading.Event) -> Generator[Piece, None, None]:
        """Write the reply to `asked`. Yields its pieces."""
        raise NotImplementedError

    def _begin(
        self, asked: list[Message], notes: list[str], result: Result, stopping: threading.Event
    ) -> Generator[Piece, None, None]:
        with self._alone():
            yield from (Piece("notice", note) for note in notes)
            yield from self._pieces(asked, result, stopping)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Held from a reply's first piece to its end: one session cannot write two replies at once."""
        if not self._replying.acquire(blocking=False):
            raise _busy()
        try:
            self._unread = None
            yield
        finally:
            self._replying.release()

    def _reply(
        self, prompt: Prompt, asked: list[Message], result: Result, stopping: threading.Event
    ) -> Iterator[Piece]:
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
            sounds=prompt.sounds,
            held=self._held,
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


def _busy() -> UsageError:
    return UsageError(
        "this conversation is writing a reply: read that to its end or call stop(), or talk in a second conversation"
    )


class Chat(Conversation):
    """A conversation in turns, through the checkpoint's chat template.

    When the context is full, the oldest turns are left out of the prompt. They stay in `messages`; the system prompt is
    never left out. Half of the context is freed at once, because all that remains has to be prefilled again.
    """

    kind = "chat"

    def __init__(
        self,
        engine: ChatEngine,
        *,
        system: str | None = None,
        think: bool = False,
        tools: Sequence[Tool] | None = None,
        history: Sequence[Message | Mapping[str, Any]] = (),
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """tools: OpenAI's function declarations, or Python functions (text/tool_declaration.py), which are declared
        and not run. history: as in Conversation, but it may begin with a system message, which is then `system`. Raises
        UsageError too for tools or think if the chat template has no place for them.
        """
        super().__init__(
            engine, history=history, sampling=sampling, max_tokens=max_tokens, stop=stop, progress=progress
        )
        if engine.chat_template is None:
            raise UsageError("this is a base model without a chat template: use Engine.generate, or Continuation")
        require("system", system, isinstance(system, str | None), "a text")
        require("think", think, isinstance(think, bool), "True or False")
        if self.messages and self.messages[0].role in ("system", "developer"):
            require("system", system, system is None, "none beside a history that begins with a system message")
            system = self.messages.pop(0).content
        self.system, self.think = system, think
        self.tools: Sequence[Mapping[str, Any]] | None = None if tools is None else checked(tools)
        self._format = ChatFormat(engine.chat_template, engine.tokenizer)
        self._format.check(self.tools, think)
        self._first = 0  # the oldest message still in the prompt
        self._sound_at: int | None = None  # where the present clip begins; None: the session does not hold it

    @property
    def can_think(self) -> bool:
        """Whether the chat template knows of thinking."""
        return self._format.takes(THINKING)

    @property
    def reserve(self) -> int:
        """Tokens a prompt leaves free for the answer."""
        longest = self.session.context if self.max_tokens is None else self.max_tokens
        return min(longest, self.session.context // 4)

    @classmethod
    def open(
        cls,
        engine: ChatEngine,
        path: Path | str,
        *,
        tools: Sequence[Tool] | None = None,
        think: bool = False,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Unpack[Settings],
    ) -> "Chat":
        """Resume the conversation in a file that `save` wrote. The arguments are those of `Engine.chat`.

        Raises UsageError if the file cannot be read or is no chat.
        """
        try:
            earlier = Transcript.load(path)
        except OSError as error:
            raise UsageError(f"the conversation cannot be read: {path}: {error.strerror or error}") from None
        chosen = Sampling.from_generation_config(engine.generation_config, **sampling)
        chat = open_conversation(
            engine, earlier=earlier, tools=tools, think=think, sampling=chosen, max_tokens=max_tokens, stop=stop
        )
        if not isinstance(chat, cls):
            raise UsageError(f"{path} is no chat, and the model has no chat template: take another model")
        return chat

    def belongs_to(self, engine: ChatEngine) -> bool:
        """Whether this chat was made by `engine`."""
        return self._engine is engine

    def _asked(self, said: Sequence[Said], note: Callable[[str], None]) -> list[Message]:
        hear = functools.partial(self._engine.hear, note=note)
        asked: list[Message] = []
        text = None  # that was given right before
        for entry in said:
            if isinstance(entry, str):
                asked.append(Message("user", text := entry))
            elif isinstance(entry, Message | Mapping):
                earlier = (*self.messages, *asked)
                asked, text = [*asked, *as_messages([entry], hear=hear, earlier=earlier)], None
            else:
                sound, rate = sound_and_rate(entry)
                heard = Message("user", text or "", media=("audio",), clips=hear(sound, rate=rate))
                asked, text = [*(asked if text is None else asked[:-1]), heard], None
        return asked

    def _pieces(self, asked: list[Message], result: Result, stopping: threading.Event) -> Generator[Piece, None, None]:
        self._sound_at = None
        prompt, notice = self._fitted(asked)
        if notice:
            yield Piece("notice", notice)
        yield from self._reply(prompt, asked, result, stopping)

    def _fitted(self, asked: list[Message]) -> tuple[Prompt, str]:
        """The prompt for `asked`, and a notice for the user if more turns are left out of it, else ""."""
        self.messages = as_messages(self.messages, hear=self._engine.hear)
        first, prompt = self._fit([*self.messages, *asked])
        left_out = sum(m.role == "user" for m in self.messages[self._first : first])
        self._first = first
        turns = "turn was" if left_out == 1 else f"{left_out} turns were"
        return prompt, f"the context is full: the oldest {turns} left out" if left_out else ""

    # Live speech (audio/spoken.py): the session prefills a sound before the message that holds it is sent.

    def begin_sound(self, room: int) -> str:
        """Bring `session` to where the user's next sound begins, so that its soft tokens can be prefilled there.

        room: soft tokens that have to fit. Returns a notice if turns are left out, else "". Raises as `send`.
        """
        self._finish_unread()
        with self._alone():
            dummy = Message("user", "", media=("audio",), clips=(np.empty((room, 0), np.float32),))
            prompt, notice = self._fitted([dummy])
            *sounds, (at, _) = prompt.sounds
            ids = prompt.ids[:at]
            keep = shared(self.session, ids, sounds, self._held)
            self.session.rewind(keep)
            self._held[:] = sounds
            for _, part in parts(ids, sounds, keep):
                if isinstance(part, list):
                    self.session.prefill(part)
                else:
                    self.session.prefill_soft(part, logits=False)
            self.session.mark()
            self._sound_at = at
        return notice

    def takes_sound(self, tokens: int) -> bool:
        """Whether `session` may prefill that many more soft tokens of the sound.

        It may not if they do not fit, or if the chat was used since `begin_sound`. Then `answer_sound` prefills the
        whole sound, and leaves out old turns if need be.
        """
        if self.session.position + tokens > self.session.context:
            self._sound_at = None
        return self._sound_at is not None

    def next_sound(self, clip: np.ndarray) -> None:
        """End `clip`, the soft tokens since the last such call, and begin another clip of the same message."""
        opening, _, closing = audio_marks(self.tokenizer)
        if self._sound_at is not None and self.takes_sound(2):
            self.session.prefill([closing, opening])
            self._sound_at += len(clip) + 2

    def answer_sound(self, message: Message) -> Reply:
        """The reply to a message whose clips were prefilled since `begin_sound`. Raises as `send`."""
        if (at := self._sound_at) is not None:
            at -= sum(len(clip) + 2 for clip in message.clips[:-1])
            for clip in message.clips:
                self._held.append((at, clip))
                at += len(clip) + 2
        return self.send(message)

    def reset(self) -> None:
        """As `Conversation.reset`. The next prompt begins with the next message."""
        super().reset()
        self._first, self._sound_at = 0, None

    def _fit(self, messages: list[Message]) -> tuple[int, Prompt]:
        """The first message that goes into the prompt, and the prompt."""
        prompt_from = functools.partial(self._prompt, messages)
        return fitting(messages, self._first, prompt_from, context=self.session.context, reserve=self.reserve)

    def _prompt(self, messages: list[Message], first: int) -> Prompt:
        system = [Message("system", self.system)] if self.system else []
        return self._format.prompt([*system, *messages[first:]], tools=self.tools, think=self.think)


class Continuation(Conversation):
    """A base model, which has no turns, continues a text. An empty text continues the last one."""

    kind = "continuation"

    def __init__(self, engine: ChatEngine, *, max_tokens: int | None = None, **options: Any) -> None:
        """options: as in Conversation."""
        super().__init__(engine, max_tokens=CONTINUATION_TOKENS if max_tokens is None else max_tokens, **options)
        said = [i for i, message in enumerate(self.messages) if message.role == "user"]
        self._ids = self._encode("".join(m.content for m in self.messages[said[-1] :])) if said else []

    def _asked(self, said: Sequence[Said], note: Callable[[str], None]) -> list[Message]:
        require("what is said", said, len(said) == 1 and isinstance(said[0], str), "one text, for a base model")
        return [Message("user", str(said[0]))]

    def _pieces(self, asked: list[Message], result: Result, stopping: threading.Event) -> Generator[Piece, None, None]:
        context, text = self.session.context, asked[0].content
        if text or not self._ids:
            prompt = self._encode(text)
            if not prompt or len(prompt) + min(LEAST_ROOM, context // 4) > context:
                raise ContextFullError(
                    f"the text has {len(prompt)} tokens, the context holds {context} with what follows: "
                    "shorten it or use a larger --context"
                )
        else:
            prompt, asked = self._ids, []
        if len(prompt) >= context:
            prompt = prompt[:1] + prompt[-(context // 2) :]
            yield Piece("notice", "the context is full: the oldest text was left out")
        try:
            yield from self._reply(Prompt(prompt), asked, result, stopping)
        finally:
            if result.tokens or asked:
                self._ids = prompt + result.tokens

    def reset(self) -> None:
        """As `Conversation.reset`. There is no last text to continue then."""
        super().reset()
        self._ids = []

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.bos_id >= 0)


def open_conversation(
    engine: ChatEngine,
    *,
    raw: bool = False,
    earlier: Transcript | None = None,
    system: str | None = None,
    think: bool = False,
    tools: Sequence[Tool] | None = None,
    **options: Any,
) -> Conversation:
    """A `Chat` for a model with a chat template; without one, or with `raw`, a `Continuation`.

    earlier: the conversation to resume; its system prompt is used if `system` is None. options: as in Conversation.
    Raises UsageError for an earlier conversation of the other kind, and for system, think or tools without a template.
    """
    earlier = earlier or Transcript()
    kind: type[Conversation] = Continuation if raw or engine.chat_template is None else Chat
    if earlier.kind not in (None, kind.kind):
        needs = {"chat": "a model with a chat template", "continuation": "a base model, which continues text"}
        raise UsageError(f"the conversation is a {earlier.kind}: go on with {needs[earlier.kind]}, or start a new one")
    if kind is Chat:
        system = earlier.system if system is None else system
        return Chat(engine, history=earlier.messages, system=system, think=think, tools=tools, **options)
    given = {"a system prompt": system, "thinking": think, "tools": tools}
    if unused := [name for name, value in given.items() if value]:
        raise UsageError(f"without a chat template there is no place for {' and '.join(unused)}: leave that out")
    return Continuation(engine, history=earlier.messages, **options)
