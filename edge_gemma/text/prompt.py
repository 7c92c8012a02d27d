"""Messages to the ids of a prompt, through the checkpoint's own chat template.

Owns: rendering (user text guarded, so that it cannot forge a control token), tool declarations. Does not know:
sessions, sampling, screens.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from edge_gemma.errors import TemplateError, UsageError
from edge_gemma.text.message import Message, check_messages
from edge_gemma.text.template_sandbox import Template
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.text.tool_declaration import Tool, declared

THINKING = "enable_thinking"  # the template's variable
THOUGHT = "thought\n"  # the name of the channel that thoughts are in, after <|channel>


class ChatTokenizer(Protocol):
    """The part of `edge_gemma.text.tokenizer.Tokenizer` that prompts use."""

    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    special_tokens: dict[str, int]

    def encode_prompt(self, text: str) -> list[int]: ...
    def guard(self, text: str) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, with placeholders for soft tokens. encoded: their (position, float32 [n, hidden_size])."""

    ids: list[int]
    encoded: tuple[tuple[int, Any], ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.ids)


NO_SPEECH = "this model was not made for speech: expected Gemma 4 E2B or E4B, exported with its audio"
_NO_SIGHT = "this model was not made for pictures: expected Gemma 4 E2B or E4B, exported with its vision"
_MARKS = {
    "audio": ("<|audio>", "<|audio|>", "<audio|>"),
    "image": ("<|image>", "<|image|>", "<image|>"),
    "video": ("<|image>", "<|video|>", "<image|>"),
}
Block = list[
    tuple[list[int], int, Any, int]
]  # of one placeholder: ids before soft tokens, their own, they, the id after


def media_marks(tokenizer: ChatTokenizer, kind: str) -> tuple[int, int, int]:
    """The ids before soft tokens of a kind of media, in their place, and after. Raises UsageError if there are none."""
    opening, placeholder, closing = (tokenizer.special_tokens.get(name) for name in _MARKS[kind])
    if opening is None or placeholder is None or closing is None:
        raise UsageError(NO_SPEECH if kind == "audio" else _NO_SIGHT)
    return opening, placeholder, closing


def audio_marks(tokenizer: ChatTokenizer) -> tuple[int, int, int]:
    """As `media_marks` for sound."""
    return media_marks(tokenizer, "audio")


class ChatFormat:
    """A checkpoint's chat template with its tokenizer."""

    def __init__(self, template: str, tokenizer: ChatTokenizer) -> None:
        """Raises TemplateError if `template` is not a Jinja template."""
        self._template = Template(template)
        self._tokenizer = tokenizer
        spelling = {index: piece for piece, index in tokenizer.special_tokens.items()}
        ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
        self._tokens = {f"{name}_token": spelling.get(index, "") for name, index in ids.items()}

    def takes(self, variable: str) -> bool:
        """Whether the template uses a variable."""
        return variable in self._template.variables

    @property
    def marks(self) -> int:
        """The most tokens that a thought has beside its own: those that open it and close it."""
        return len(self._tokenizer.encode_prompt(f"<|channel>{THOUGHT}\n<channel|>"))

    def check(self, tools: Sequence[Any] | None, think: bool, *, cut: bool = False) -> None:
        """Raises UsageError for tools or think if the template has no place for them.

        cut: thoughts are left out or cut, which takes Gemma 4's marks of a thought; an error too without them.
        """
        for given, variable, what in ((tools, "tools", "tools"), (think, THINKING, "thinking")):
            if given and not self.takes(variable):
                raise UsageError(f"this model's chat template has no {what}: leave that out, or take another model")
        if cut and not {"<|channel>", "<channel|>"} <= self._tokenizer.special_tokens.keys():
            raise UsageError("this model's thoughts cannot be cut, expected Gemma 4's <|channel>: leave the limit out")

    def render(self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, think: bool = False) -> str:
        """The prompt as text. It ends where the reply begins; the user's text is marked by `Tokenizer.guard`.

        tools: OpenAI's function declarations, or Python functions. Raises TemplateError if the template refuses the
        messages; UsageError for other things than messages and tools, and as `check`.
        """
        check_messages(messages)
        functions = None if tools is None else declared(tools)
        self.check(functions, think)
        if not messages:
            raise TemplateError("there is no message to render, expected at least one")
        try:
            guarded = [self._guarded_message(message) for message in _named(messages)]
            guarded_tools = [self._guarded(dict(tool)) for tool in functions] if functions else None
        except RecursionError:
            raise TemplateError("a message or tool is nested too deeply, expected JSON values") from None
        return self._template.render(
            messages=guarded,
            tools=guarded_tools,
            add_generation_prompt=True,
            **self._tokens,
            **{THINKING: think},
        )

    def prompt_ids(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, think: bool = False
    ) -> list[int]:
        """The prompt's ids. `<bos>` comes first even if the template leaves it out: Gemma degenerates without it."""
        ids = self._tokenizer.encode_prompt(self.render(messages, tools=tools, think=think))
        bos = self._tokenizer.bos_id
        return ids if bos < 0 or ids[:1] == [bos] else [bos, *ids]

    def opening(self, system: str | None, *, tools: Sequence[Tool] | None = None, think: bool = False) -> list[int]:
        """The ids that every conversation with these begins with, whatever the user says. Raises as `render`."""
        before = [Message("system", system)] if system else []
        one, other = (self.prompt_ids([*before, Message("user", word)], tools=tools, think=think) for word in "ab")
        return [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, think: bool = False
    ) -> Prompt:
        """As `prompt_ids`, but with a placeholder for each soft token of the messages' clips and pictures.

        Raises as `render`; also TemplateError if the template has another number of places for them, and UsageError
        for a place of a picture or a sound that is not there.
        """
        for message in messages:
            for kind, there in (("audio", message.clips), ("image", message.pictures), ("video", message.pictures)):
                if kind in message.media and not there:
                    what = {"audio": "sound", "image": "an image"}.get(kind, "a video")
                    raise UsageError(f"a message has a place for {what} and none is there: give its soft tokens")
        ids = self.prompt_ids(messages, tools=tools, think=think)
        blocks = [block for message in messages if message.media for block in self._blocks(message)]
        if not blocks:
            return Prompt(ids)
        places = {block[0][1] for block in blocks}
        if (found := sum(index in places for index in ids)) != len(blocks):
            raise TemplateError(
                f"the chat template has {found} places for {len(blocks)} sounds and pictures: expected Gemma 4's"
            )
        expanded: list[int] = []
        encoded: list[tuple[int, Any]] = []
        following = iter(blocks)
        for index in ids:
            if index not in places:
                expanded.append(index)
                continue
            block = next(following)
            if block[0][1] != index:
                raise TemplateError("the chat template writes sounds and pictures in another order: expected Gemma 4's")
            for before, placeholder, rows, after in block:
                expanded += before
                encoded.append((len(expanded), rows))
                expanded += [*[placeholder] * len(rows), after]
        return Prompt(expanded, tuple(encoded))

    def _blocks(self, message: Message) -> Iterator[Block]:
        """What stands in the place of each of a message's media, in the order in which the template writes them."""
        shown = (kind for kind in message.media if kind != "audio")
        for kind, picture in zip(shown, message.pictures, strict=True):
            opening, placeholder, closing = media_marks(self._tokenizer, kind)
            frames = [("", picture)] if kind == "image" else picture
            yield [
                ([*self._tokenizer.encode_prompt(text), opening] if text else [opening], placeholder, rows, closing)
                for text, rows in frames
            ]
        if message.clips:
            opening, placeholder, closing = audio_marks(self._tokenizer)
            yield [([opening], placeholder, clip, closing) for clip in message.clips]

    def without_thought(self, prompt: Prompt, messages: Sequence[Message], tools: Sequence[Tool] | None) -> Prompt:
        """A prompt that was rendered with think, with the end that the template gives it without.

        Its beginning stays, and with it all that a session holds. messages: those of its last turn are enough. The
        templates of Gemma 4 E2B and E4B end it before a thought, the larger models' with an empty one.
        """
        opened, _ = self._last_thought(prompt.ids)
        _, empty = self._last_thought(self.prompt_ids(messages, tools=tools))
        return replace(prompt, ids=[*opened, *empty])

    def _last_thought(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A prompt without the thought that it ends in or with, if that has no words, and its tokens."""
        special = self._tokenizer.special_tokens
        header = self._tokenizer.encode_prompt(f"<|channel>{THOUGHT}")
        for end in (header, [*header, special.get("<channel|>", -1)]):
            if ids[-len(end) :] == end:
                return ids[: -len(end)], end
        return ids, []

    def _guarded_message(self, message: Message) -> dict[str, Any]:
        entry = message.as_dict()
        for i, call in enumerate(entry.get("tool_calls", ())):
            call.setdefault("id", f"call_{i}")  # of calls without an id Gemma's template takes the last for all results
        if message.media:
            before = [{"type": kind} for kind in message.media if kind != "audio"]
            text = [{"type": "text", "text": message.content}] if message.content else []
            entry["content"] = [*before, *text, *({"type": kind} for kind in message.media if kind == "audio")]
        return {"role": message.role, **{k: self._guarded(v) for k, v in entry.items() if k != "role"}}

    def _guarded(self, value: Any) -> Any:
        """`value` with every text guarded, also the keys of objects. Raises TemplateError unless it is JSON."""
        if isinstance(value, str):
            return self._tokenizer.guard(value)
        if isinstance(value, Mapping):
            return {self._guarded(str(key)): self._guarded(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(entry) for entry in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TemplateError(f"a message or tool holds {type(value).__name__}, expected JSON values")


def _named(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages; results of tools that have no name have that of their call, by their order."""
    calls: Iterator[ToolCall] = iter(())
    for message in messages:
        if message.role == "assistant":
            calls = iter(message.tool_calls)
        elif message.role == "tool" and (call := next(calls, None)) is not None and message.name is None:
            message = replace(message, name=call.name)
        yield message
