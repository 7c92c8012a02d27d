"""A message of a conversation: who said it, what was said, which tools were called.

Owns: `Message` and its form as a dict. Does not know: prompts, templates, files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.arguments import is_number, is_one_of, require, shown
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_call import ToolCall

SPEECH = "(speech)"  # stands for it in a session file
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. `content` is what was said; `reasoning` the model's thoughts, kept apart from it.

    A message of role "tool" carries a tool's result: `content`, with the tool's `name`. `media` says where the template
    puts placeholders: "image" before the text, "audio" after it, as Gemma was trained. `clips` are the soft tokens that
    an "audio" stands for: float32 [n, hidden_size] for each 30 s at most. They are neither compared nor saved.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    media: tuple[str, ...] = ()
    clips: tuple[Any, ...] = field(default=(), compare=False, repr=False)

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
        good = isinstance(self.clips, tuple) and all(getattr(clip, "ndim", 0) == 2 for clip in self.clips)
        good = good and (not self.clips or media.count("audio") == 1)
        require("a message's clips", self.clips, good, "a tuple of soft tokens, beside one audio in media")

    def as_dict(self) -> dict[str, Any]:
        """As templates and session files have it: the form of OpenAI's chat messages."""
        content = f"{self.content} {SPEECH}".lstrip() if self.clips else self.content
        entry: dict[str, Any] = {"role": self.role, "content": content}
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
        if entry.get("content") is None and entry.get("tool_calls"):
            entry = {**entry, "content": ""}  # as OpenAI's clients send calls
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


def check_messages(messages: Any, name: str = "messages") -> None:
    """Raises UsageError unless `messages`, which the caller calls `name`, are a list of Messages."""
    _check_list(messages, name)
    for i, message in enumerate(messages):
        good = isinstance(message, Message)
        require(f"message {i}", message, good, "a Message: Message.from_dict makes one of a dict")


def as_messages(messages: Any, name: str = "messages") -> list[Message]:
    """Messages and dicts in OpenAI's form as Messages. name: as the caller calls them. Raises UsageError."""
    _check_list(messages, name)
    made = [Message.from_dict(entry) if isinstance(entry, Mapping) else entry for entry in messages]
    check_messages(made)
    return made


def sound_and_rate(entry: Any) -> tuple[Any, Any]:
    """A sound in a conversation, and the samples a second given with it, or None. Raises UsageError for messages."""
    if isinstance(entry, list | tuple) and entry and isinstance(entry[0], str | Message | Mapping):
        raise UsageError(f"what is said is a {type(entry).__name__}, expected each by itself: send(*messages)")
    if not isinstance(entry, tuple) or len(entry) != 2 or all(map(is_number, entry)):
        return entry, None
    if is_number(entry[0]):
        raise UsageError("a sound is (rate, samples), expected (samples, rate)")
    return entry


def _check_list(messages: Any, name: str) -> None:
    require(name, messages, isinstance(messages, Sequence) and not isinstance(messages, str), "a list of messages")
