"""Conversations with a model: messages go in, replies come out.

Owns: how messages become a prompt. `Chat` is for models with a chat template, `Continuation` for base models. Does not
know: what an interrupted reply leaves behind (conversation.py), screens, microphones.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from edge_gemma.arguments import integer, is_one_of, require
from edge_gemma.conversation import Bound, ChatEngine, Conversation, Pieces, Said, Think
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.generate import (
    Progress,
    Result,
    parts,
    shared,
)
from edge_gemma.generation.need import needed, question
from edge_gemma.generation.reply import Reply
from edge_gemma.generation.sampler import Sampling, Settings
from edge_gemma.text.fitting import LEAST_ROOM, fitting
from edge_gemma.text.message import Message, as_messages, sound_and_rate
from edge_gemma.text.prompt import THINKING, ChatFormat, Prompt, audio_marks
from edge_gemma.text.reply import Piece
from edge_gemma.text.session_file import Transcript
from edge_gemma.text.tool_declaration import Tool, checked

LEAST_KEPT = 64  # tokens of instructions that are worth a file
CONTINUATION_TOKENS = 128  # default limit of a base model's reply, which seldom ends by itself


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
        think: Think = False,
        think_budget: int | None = None,
        tools: Sequence[Tool] | None = None,
        history: Sequence[Message | Mapping[str, Any]] = (),
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        image_tokens: Any = "auto",
        progress: Progress | None = None,
    ) -> None:
        """tools: OpenAI's function declarations, or Python functions (text/tool_declaration.py), which are declared
        and not run. history: as in Conversation, but it may begin with a system message, which is then `system`. think,
        think_budget: as in Engine.chat. Raises UsageError too for tools or think if the chat template has no place for
        them, and for a budget without think, or one that leaves no token of max_tokens for an answer.
        """
        super().__init__(
            engine, history=history, sampling=sampling, max_tokens=max_tokens, stop=stop, image_tokens=image_tokens,
            progress=progress,
        )  # fmt: skip
        if engine.chat_template is None:
            raise UsageError("this is a base model without a chat template: use Engine.generate, or Continuation")
        require("system", system, isinstance(system, str | None), "a text")
        _check_thinking(think, think_budget)
        if self.messages and self.messages[0].role in ("system", "developer"):
            require("system", system, system is None, "none beside a history that begins with a system message")
            system = self.messages.pop(0).content
        self.system, self.think, self.think_budget = system, think, think_budget
        self.tools = None if tools is None else checked(tools)
        self.format = ChatFormat(engine.chat_template, engine.tokenizer)
        self.format.check(self.tools, bool(think), cut=think == "auto" or think_budget is not None)
        if think_budget and self.max_tokens is not None:
            room = max(0, self.max_tokens - self.format.marks - 1)
            told = f"at most {room} beside a max_tokens of {self.max_tokens}: an answer has to follow the thought"
            require("think_budget", think_budget, think_budget <= room, told)
        self._first = 0  # the oldest message still in the prompt
        self._kept: tuple[str | None, bool] | None = None  # the instructions that are on disk
        self.sounds_begun = 0  # how often `begin_sound` was called: only the last sound is prefilled
        self._sound_at: int | None = None  # where the present clip begins; None: the session does not hold it

    @property
    def can_think(self) -> bool:
        """Whether the chat template knows of thinking."""
        return self.format.takes(THINKING)

    @property
    def can_call(self) -> bool:
        """Whether the chat template knows of tools."""
        return self.format.takes("tools")

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
        think: Think = False,
        think_budget: int | None = None,
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
            engine, earlier=earlier, tools=tools, think=think, think_budget=think_budget, sampling=chosen,
            max_tokens=max_tokens, stop=stop,
        )  # fmt: skip
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
                asked, text = [*asked, *as_messages([entry], hear=hear, see=self._see, earlier=earlier)], None
            else:
                sound, rate = sound_and_rate(entry)
                heard = Message("user", text or "", media=("audio",), clips=hear(sound, rate=rate))
                asked, text = [*(asked if text is None else asked[:-1]), heard], None
        return asked

    def _pieces(self, asked: list[Message], bound: Bound, result: Result, stopping: threading.Event) -> Pieces:
        self._sound_at = None
        prompt, notice = self._fitted(asked)
        if notice:
            yield Piece("notice", notice)
        try:
            most = self._most_thought([*self.messages, *asked], result, stopping)
            if most == 0:
                prompt = self.format.without_thought(prompt, _last_turn([*self.messages, *asked]), self.tools)
            yield from self._reply(prompt, asked, bound, result, stopping, most)
        finally:
            self._keep_opening()

    def _most_thought(self, messages: list[Message], result: Result, stopping: threading.Event) -> int | None:
        """Tokens that the thought of a reply to `messages` may have; None: any number. result: told what they need.

        A message is asked about once: after a tool's result the model thinks on if it has thought before the call.
        """
        _check_thinking(self.think, self.think_budget if self.think else None)
        if self.think != "auto" or self.think_budget == 0:
            return self.think_budget if self.think else None
        if messages[-1].role == "user":
            thinks = self._need(messages, result, stopping) == "reasoning"
        else:
            thinks = any(message.reasoning for message in _last_turn(messages))
        return self.think_budget if thinks else 0

    def _need(self, messages: list[Message], result: Result, stopping: threading.Event) -> str | None:
        """What the last message needs first, in the model's word; None where the question has no room."""
        asked = self._prompt([*messages, Message("user", question(bool(self.tools)))], self._first)
        if len(asked) > self.session.context:
            return None
        return needed(
            self.session, asked.ids, asked.encoded, self._held, tokenizer=self.tokenizer, tools=bool(self.tools),
            result=result, stopping=stopping, progress=self._progress,
        )  # fmt: skip

    def _keep_opening(self) -> None:
        """Let later processes have what was computed of the instructions and tools, once they are long enough."""
        kept = self.system, bool(self.think)
        if self._kept != kept and (self.system or self.tools):
            opening = self.format.opening(self.system, tools=self.tools, think=bool(self.think))
            if len(opening) >= LEAST_KEPT and self.session.ids[: len(opening)] == opening:
                self.session.keep_on_disk(len(opening))
        self._kept = kept

    def _fitted(self, asked: list[Message]) -> tuple[Prompt, str]:
        """The prompt for `asked`, and a notice for the user if more turns are left out of it, else ""."""
        self.messages = as_messages(self.messages, hear=self._engine.hear, see=self._see)
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
            *encoded, (at, _) = prompt.encoded
            ids = prompt.ids[:at]
            keep = shared(self.session, ids, encoded, self._held)
            self.session.rewind(keep)
            self._held[:] = encoded
            for start, part in parts(ids, encoded, keep):
                if isinstance(part, list):
                    self.session.prefill(part)
                else:
                    self.session.prefill_soft(part, placeholder=ids[start], logits=False)
            self.session.mark()
            self._sound_at = at
            self.sounds_begun += 1
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
        return self.format.prompt([*system, *messages[first:]], tools=self.tools, think=bool(self.think))


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

    def _pieces(self, asked: list[Message], bound: Bound, result: Result, stopping: threading.Event) -> Pieces:
        context, text = self.session.context, asked[0].content
        if text or not self._ids:
            prompt = self._encode(text)
            if not prompt or len(prompt) + min(LEAST_ROOM, context // 4) > context:
                raise ContextFullError(
                    f"the text has {len(prompt)} tokens, the context holds {context} with what follows: "
                    "shorten it or give the model a larger context"
                )
        else:
            prompt, asked = self._ids, []
        if len(prompt) >= context:
            prompt = prompt[:1] + prompt[-(context // 2) :]
            yield Piece("notice", "the context is full: the oldest text was left out")
        try:
            yield from self._reply(Prompt(prompt), asked, bound, result, stopping)
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
    think: Think = False,
    think_budget: int | None = None,
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
        return Chat(
            engine, history=earlier.messages, system=system, think=think, think_budget=think_budget, tools=tools,
            **options,
        )  # fmt: skip
    given = {"a system prompt": system, "thinking": think or think_budget is not None, "tools": tools}
    if unused := [name for name, value in given.items() if value]:
        raise UsageError(f"without a chat template there is no place for {' and '.join(unused)}: leave that out")
    return Continuation(engine, history=earlier.messages, **options)


def _last_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """The last message of the user, and what follows it."""
    return messages[max((i for i, message in enumerate(messages) if message.role == "user"), default=0) :]


def _check_thinking(think: Any, budget: Any) -> None:
    """Raises UsageError for what is no such setting, and for a budget without a thought."""
    good = isinstance(think, bool) or is_one_of(think, ("auto",))
    require("think", think, good, 'True, False or "auto"')
    if budget is not None:
        integer("think_budget", budget, 0)
        require("think_budget", budget, bool(think), "none without think: leave it out, or let the model think")
