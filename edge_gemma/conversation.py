"""Talking with a model: turns in, streamed replies out, whatever happens on the way.

Owns: the transcript, which part of it still fits the context, what an interrupted reply leaves behind. Two kinds:
`Chat` for models with a chat template, `Continuation` for base models. Does not know: screens, files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from edge_gemma.chat import ChatFormat, Message, Piece
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generate import Generation, Progress, Result, StreamTokenizer, stop_ids_of
from edge_gemma.sampler import Sampler, Sampling
from edge_gemma.timeline import Timeline

CONTINUATION_TOKENS = 128  # a base model seldom stops by itself
_LEAST_ROOM = 16  # tokens an answer must have, or the message counts as too long


class ChatEngine(Protocol):
    """What of `edge_gemma.engine.Engine` is used here."""

    @property
    def tokenizer(self) -> StreamTokenizer: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def generation_config(self) -> dict[str, Any]: ...
    def session(self, context: int | None = None) -> Timeline: ...


class Conversation:
    """What both kinds share: a transcript over one session. `last` is the latest reply's result."""

    def __init__(
        self,
        engine: ChatEngine,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        self.session = engine.session()
        self.tokenizer = engine.tokenizer
        self.messages: list[Message] = []
        self.max_tokens = max_tokens
        self.last: Result | None = None
        self._sampler = Sampler(sampling or Sampling.from_generation_config(engine.generation_config))
        self._stop_ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        self._stop_strings, self._progress = tuple(stop_strings), progress

    def send(self, text: str) -> Iterator[Piece]:
        """Say `text`; the reply's pieces as they come. Close the iterator to stop the reply where it is.

        However it ends, the transcript is whole: what was said of the reply is kept, and where nothing was, `text` is
        taken back too. Raises ContextFullError if `text` alone does not fit.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Start anew; the session is kept for what the next prompt shares with it."""
        self.messages, self.last = [], None

    def _reply(self, prompt: list[int], asked: list[Message]) -> Iterator[Piece]:
        generation = Generation(
            self.session,
            prompt,
            tokenizer=self.tokenizer,
            sampler=self._sampler,
            max_tokens=self.max_tokens,
            stop_ids=self._stop_ids,
            stop_strings=self._stop_strings,
            progress=self._progress,
            mark=True,
        )
        before, self.messages = self.messages, [*self.messages, *asked]
        try:
            yield from generation
        finally:
            self.last = result = generation.result
            if result.tokens or result.finish_reason == "stop":
                reply = Message("assistant", result.text, result.reasoning or None, result.tool_calls)
                self.messages.append(reply)
            else:
                self.messages = before


class Chat(Conversation):
    """Turns through the checkpoint's chat template.

    When the context is full the oldest turns are left out of the prompt (they stay in `messages`), never the system
    turn: until half of the context is free, for whatever is left has to be run again, and not at every turn.
    """

    def __init__(
        self,
        engine: ChatEngine,
        *,
        system: str | None = None,
        think: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        messages: Sequence[Message] = (),
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """messages: an earlier conversation to go on with, its system turn left out."""
        super().__init__(engine, sampling=sampling, max_tokens=max_tokens, stop_strings=stop_strings, progress=progress)
        if engine.chat_template is None:
            raise UsageError("this is a base model without a chat template: use Continuation")
        self.system, self.think, self.tools = system, think, tools
        self.messages = list(messages)
        self._format = ChatFormat(engine.chat_template, engine.tokenizer)
        self._first = 0  # the oldest message still in the prompt

    @property
    def reserve(self) -> int:
        """Tokens a prompt leaves free for the answer."""
        return min(self.max_tokens or self.session.context, self.session.context // 4)

    def send(self, text: str) -> Iterator[Piece]:
        return self.reply(Message("user", text))

    def reply(self, *asked: Message) -> Iterator[Piece]:
        """As `send`, for messages of any role: a tool's result, or several at once. None: go on from the transcript."""
        first, prompt = self._fit([*self.messages, *asked])
        left_out = sum(m.role == "user" for m in self.messages[self._first : first])
        self._first = first
        if left_out:
            turns = "turn was" if left_out == 1 else f"{left_out} turns were"
            yield Piece("notice", f"the context is full: the oldest {turns} left out")
        yield from self._reply(prompt, list(asked))

    def reset(self) -> None:
        super().reset()
        self._first = 0

    def _fit(self, messages: list[Message]) -> tuple[int, list[int]]:
        """The first message that goes into the prompt, and the prompt's ids."""
        context, needed = self.session.context, self.reserve
        later_turns = [i for i, m in enumerate(messages) if i > self._first and m.role == "user"]
        for start in (self._first, *later_turns):
            prompt = self._prompt(messages, start)
            if len(prompt) + needed <= context:
                return start, prompt
            needed = context // 2
        if len(prompt) + min(self.reserve, _LEAST_ROOM) > context:
            raise ContextFullError(
                f"this message makes a prompt of {len(prompt)} tokens, the context holds {context} with the answer: "
                "shorten it or use a larger --context"
            )
        return start, prompt

    def _prompt(self, messages: list[Message], first: int) -> list[int]:
        system = [Message("system", self.system)] if self.system else []
        return self._format.prompt_ids([*system, *messages[first:]], tools=self.tools, think=self.think)


class Continuation(Conversation):
    """A base model has no turns: it goes on with the text it is given. An empty text goes on with the last one."""

    def __init__(self, engine: ChatEngine, *, max_tokens: int | None = None, **options: Any) -> None:
        """options: as in Conversation."""
        super().__init__(engine, max_tokens=max_tokens or CONTINUATION_TOKENS, **options)
        self._ids: list[int] = []

    def send(self, text: str) -> Iterator[Piece]:
        context = self.session.context
        if text or not self._ids:
            prompt, asked = self.tokenizer.encode(text, bos=self.tokenizer.bos_id >= 0), [Message("user", text)]
            if not prompt or len(prompt) + min(_LEAST_ROOM, context // 4) > context:
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
            yield from self._reply(prompt, asked)
        finally:
            if self.last is not None and (self.last.tokens or asked):
                self._ids = prompt + self.last.tokens

    def reset(self) -> None:
        super().reset()
        self._ids = []


def open_conversation(engine: ChatEngine, *, raw: bool = False, **options: Any) -> Conversation:
    """`Chat` for a model with a chat template, else (or with `raw`) `Continuation`, chat options left out."""
    if raw or engine.chat_template is None:
        return Continuation(engine, **{k: v for k, v in options.items() if k not in _CHAT_ONLY})
    return Chat(engine, **options)


_CHAT_ONLY = ("system", "think", "tools", "messages")
