"""Messages to prompt ids, and a model's reply back to answer, thoughts and tool calls.

Owns: `Message`, rendering with the checkpoint's own template (user text guarded, so that it cannot forge a control
token), and `ReplyParser`, which tells the parts of a reply apart as its tokens arrive. Does not know: sessions,
sampling, screens.

The chat template writes `<|channel>thought\\n...<channel|>` and `<|tool_call>call:NAME{...}<tool_call|>`, and replies
follow it. Vocabularies without these tokens (Gemma 3) have replies of answer text only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from edge_gemma.arguments import is_one_of, require, shown
from edge_gemma.errors import TemplateError, UsageError
from edge_gemma.template import Template
from edge_gemma.tool_call import QUOTE, ToolCall, call_text, parse_call

THINKING = "enable_thinking"  # the template's variable
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTokenizer(Protocol):
    """What of `edge_gemma.tokenizer.Tokenizer` is used here."""

    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    special_tokens: dict[str, int]

    def encode_prompt(self, text: str) -> list[int]: ...
    def guard(self, text: str) -> str: ...


@dataclass(frozen=True)
class Message:
    """One message. `content` is what was said; `reasoning` the model's thoughts, kept apart from it.

    A message of role "tool" carries a tool's result: `content`, with the tool's `name`. `media` says where the template
    puts placeholders: "image" before the text, "audio" after it, as Gemma was trained; what they stand for is not here.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    media: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError for anything that is not as it is declared."""
        require("a message's role", self.role, is_one_of(self.role, ROLES), f"one of {', '.join(ROLES)}")
        for name, kinds in {"content": str, "reasoning": str | None, "name": str | None}.items():
            require(f"a message's {name}", getattr(self, name), isinstance(getattr(self, name), kinds), "text")
        calls, media = self.tool_calls, self.media
        good = isinstance(calls, tuple) and all(map(_is_call, calls))
        require("a message's tool_calls", calls, good, "a tuple of ToolCall, of a name and a dict of arguments")
        good = isinstance(media, tuple) and all(is_one_of(kind, ("image", "audio")) for kind in media)
        require("a message's media", media, good, "a tuple of image and audio")

    def as_dict(self) -> dict[str, Any]:
        """As templates and session files have it: the form of OpenAI's chat messages."""
        entry: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            entry["reasoning"] = self.reasoning
        if self.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
            entry["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        if self.name is not None:
            entry["name"] = self.name
        return entry

    @classmethod
    def from_dict(cls, entry: Any) -> "Message":
        """The inverse of `as_dict`. Raises UsageError for anything else."""
        if not isinstance(entry, Mapping) or (unknown := [key for key in entry if key not in _KEYS]):
            what = f"the keys {shown(unknown)}" if isinstance(entry, Mapping) else type(entry).__name__
            raise UsageError(f"a message has {what}, expected an object with {', '.join(_KEYS)}")
        for key, kinds in _KEYS.items():
            if not isinstance(entry.get(key), kinds):
                raise UsageError(f"a message's {key} is {type(entry.get(key)).__name__}, which it cannot be")
        calls = tuple(_call(entry) for entry in entry.get("tool_calls") or ())
        return cls(entry["role"], entry["content"], entry.get("reasoning"), calls, entry.get("name"))


_ABSENT = type(None)
_KEYS: dict[str, tuple[type, ...]] = {
    "role": (str,),
    "content": (str,),
    "reasoning": (str, _ABSENT),
    "tool_calls": (list, _ABSENT),
    "name": (str, _ABSENT),
}


def _is_call(call: Any) -> bool:
    return isinstance(call, ToolCall) and isinstance(call.name, str) and isinstance(call.arguments, dict)


def _call(entry: Any) -> ToolCall:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError("a message's tool call has no function name")
    arguments: Any = function.get("arguments")
    if not isinstance(arguments, Mapping | str | None):
        raise UsageError(f"the arguments of the tool call {shown(function['name'])} are not an object")
    given: Any = dict(arguments) if isinstance(arguments, Mapping) else arguments
    return ToolCall(function["name"], given)


def check_messages(messages: Any) -> None:
    """Raises UsageError unless `messages` are Messages, several of them."""
    require("messages", messages, isinstance(messages, Sequence) and not isinstance(messages, str), "a list of Message")
    for i, message in enumerate(messages):
        good = isinstance(message, Message)
        require(f"message {i}", message, good, "a Message: Message.from_dict makes one of a dict")


def check_tools(tools: Any) -> None:
    """Raises UsageError unless `tools` are OpenAI's function declarations."""
    require("tools", tools, isinstance(tools, Sequence) and not isinstance(tools, str), "a list of declarations")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        good = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        require(f"tool {i}", tool, good, '{"type": "function", "function": {"name": ..., "parameters": ...}}')


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
        """Whether the template looks at a variable: without that, giving it means nothing."""
        return variable in self._template.variables

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, think: bool = False
    ) -> str:
        """The prompt as text, user text marked by `Tokenizer.guard`; ends where the reply begins.

        tools: OpenAI's function declarations. Raises TemplateError if the template refuses the messages, UsageError
        for what is no message or no declaration, and for tools or think if the template has no place for them.
        """
        check_messages(messages)
        check_tools(() if tools is None else tools)
        for given, variable, what in ((tools, "tools", "tools"), (think, THINKING, "thinking")):
            if given and not self.takes(variable):
                raise UsageError(f"this model's chat template has no {what}: leave that out, or take another model")
        if not messages:
            raise TemplateError("there is no message to render, expected at least one")
        try:
            guarded = [self._guarded_message(message) for message in messages]
            declared = [self._guarded(dict(tool)) for tool in tools] if tools else None
        except RecursionError:
            raise TemplateError("a message or tool is nested too deeply, expected JSON values") from None
        return self._template.render(
            messages=guarded,
            tools=declared,
            add_generation_prompt=True,
            **self._tokens,
            **{THINKING: think},
        )

    def prompt_ids(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, think: bool = False
    ) -> list[int]:
        """The prompt's ids. `<bos>` comes first even where the template leaves it out: without it Gemma degenerates."""
        ids = self._tokenizer.encode_prompt(self.render(messages, tools=tools, think=think))
        bos = self._tokenizer.bos_id
        return ids if bos < 0 or ids[:1] == [bos] else [bos, *ids]

    def _guarded_message(self, message: Message) -> dict[str, Any]:
        entry = message.as_dict()
        if message.media:
            before = [{"type": kind} for kind in message.media if kind == "image"]
            text = [{"type": "text", "text": message.content}] if message.content else []
            entry["content"] = [*before, *text, *({"type": kind} for kind in message.media if kind != "image")]
        return {"role": message.role, **{k: self._guarded(v) for k, v in entry.items() if k != "role"}}

    def _guarded(self, value: Any) -> Any:
        """Every text in it guarded, keys too; made of plain JSON types only."""
        if isinstance(value, str):
            return self._tokenizer.guard(value)
        if isinstance(value, Mapping):
            return {self._guarded(str(key)): self._guarded(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(entry) for entry in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TemplateError(f"a message or tool holds {type(value).__name__}, expected JSON values")


@dataclass(frozen=True)
class Piece:
    """A part of a reply, in the order it arrived. A malformed tool call is answer text with `malformed` set.

    A notice is not the model's: it tells the user what was done, for example that old turns were left out.
    """

    kind: Literal["answer", "thought", "tool_call", "notice"]
    text: str
    call: ToolCall | None = None
    malformed: bool = False


_HEADER = "thought\n"


@dataclass
class ReplyParser:
    """Tells answer, thoughts and tool calls apart by their control tokens, as the tokens arrive.

    prompt_ids: the prompt's end decides where the reply begins: inside a thought if it left a channel open.
    """

    tokenizer: ChatTokenizer
    prompt_ids: Sequence[int] = ()
    _thinking: bool = field(default=False, init=False)
    _header: str | None = field(default=None, init=False)  # the channel's name as far as it has come; None: passed
    _call: list[str | object] | None = field(default=None, init=False)  # a tool call's texts and quotes

    def __post_init__(self) -> None:
        special = self.tokenizer.special_tokens
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        self._open, self._close, self._open_call, self._close_call, self._quote = (special.get(n, -1) for n in names)
        for index in reversed(self.prompt_ids):
            if index in (self._open, self._close):
                self._thinking = index == self._open
                break

    def push(self, token: int, text: str) -> list[Piece]:
        """The pieces that a token completes. text: what the detokeniser made of it, "" for control tokens."""
        pieces = self._text(text)
        if token == self._open:
            self._thinking, self._header = True, ""
        elif token == self._close:
            pieces += self._end_thought()
        elif token == self._open_call and self._call is None:
            self._call = []
        elif token == self._close_call and self._call is not None:
            pieces.append(self._end_call("<tool_call|>"))
        elif token == self._quote and self._call is not None:
            self._call.append(QUOTE)
        return pieces

    def finish(self, text: str = "") -> list[Piece]:
        """What is left when the reply ends. text: what the detokeniser still held."""
        pieces = self._text(text)
        if self._call is not None:
            pieces.append(self._end_call(""))
        return pieces + self._end_thought()

    def _text(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._call is not None:
            self._call.append(text)
            return []
        if not self._thinking:
            return [Piece("answer", text)]
        if self._header is not None:
            self._header += text
            if _HEADER.startswith(self._header):
                return []
            text, self._header = self._header.removeprefix(_HEADER), None
        return [Piece("thought", text)] if text else []

    def _end_thought(self) -> list[Piece]:
        rest = (self._header or "").removeprefix(_HEADER.strip()).strip()
        self._thinking, self._header = False, None
        return [Piece("thought", rest)] if rest else []

    def _end_call(self, closing: str) -> Piece:
        parts, self._call = self._call or [], None
        if (call := parse_call(parts)) is not None:
            return Piece("tool_call", call_text(parts), call)
        return Piece("answer", f"<|tool_call>{call_text(parts)}{closing}", malformed=True)
