"""A message of a conversation: who said it, what was said, which tools were called.

Owns: `Message`, and OpenAI's form of it as a dict, read and written. Does not know: prompts, templates, how sound is
encoded.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.arguments import is_number, is_one_of, require, shown
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_call import ToolCall

SPEECH, PICTURE = "(speech)", "(picture)"  # what stands for them in a session file
Hear = Callable[[bytes], tuple[Any, ...]]  # a sound file's bytes -> its soft tokens: float32 [n, hidden_size] a clip
See = Callable[[bytes, str], Any]  # a picture file's bytes, OpenAI's `detail` -> float32 [n, hidden_size]
MEDIA = ("image", "video", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message. content: its text. reasoning: the model's, kept apart from the content.

    A message of role "tool" carries a tool's result as `content`, and the tool's `name`. media: the placeholders that
    the template writes, "image" and "video" before the text and "audio" after it, as Gemma was trained. clips: the soft
    tokens in the place of "audio", float32 [n, hidden_size] for each 30 s at most. pictures: those in the places of
    "image" and "video", in order: float32 [n, hidden_size], of a video a tuple of (text, float32 [n, hidden_size]), its
    frames and what stands before each. They are neither compared nor saved.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    media: tuple[str, ...] = ()
    clips: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    pictures: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raises UsageError for a field of another type than declared."""
        require("a message's role", self.role, is_one_of(self.role, ROLES), f"one of {', '.join(ROLES)}")
        for name, kinds in {"content": str, "reasoning": str | None, "name": str | None}.items():
            require(f"a message's {name}", getattr(self, name), isinstance(getattr(self, name), kinds), "text")
        calls, media = self.tool_calls, self.media
        good = isinstance(calls, tuple) and all(map(_is_call, calls))
        require("a message's tool_calls", calls, good, "a tuple of ToolCall, of a name and a dict of arguments")
        good = isinstance(media, tuple) and all(is_one_of(kind, MEDIA) for kind in media)
        require("a message's media", media, good, "a tuple of image, video and audio")
        good = isinstance(self.clips, tuple) and all(getattr(clip, "ndim", 0) == 2 for clip in self.clips)
        good = good and (not self.clips or media.count("audio") == 1)
        require("a message's clips", self.clips, good, "a tuple of soft tokens, beside one audio in media")
        shown = [kind for kind in media if kind != "audio"]
        good = isinstance(self.pictures, tuple) and len(self.pictures) in (0, len(shown))
        good = good and all(map(_is_picture, self.pictures, shown))
        require("a message's pictures", self.pictures, good, "a tuple of soft tokens for each image or video in media")

    @property
    def soft_tokens(self) -> int:
        """How many it has, of sounds and pictures."""
        frames = [frame[1] for video in self.pictures if isinstance(video, tuple) for frame in video]
        return sum(map(len, (*self.clips, *frames, *(p for p in self.pictures if not isinstance(p, tuple)))))

    def as_dict(self) -> dict[str, Any]:
        """As templates and session files have it: the form of OpenAI's chat messages."""
        before, after = f"{PICTURE} " * len(self.pictures), f" {SPEECH}" if self.clips else ""
        content = f"{before}{self.content}{after}".strip() if before or after else self.content
        entry: dict[str, Any] = {"role": self.role, "content": content}
        if self.reasoning is not None:
            entry["reasoning"] = self.reasoning
        if self.tool_calls:
            entry["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name is not None:
            entry["name"] = self.name
        return entry

    @classmethod
    def from_dict(
        cls, entry: Any, hear: Hear | None = None, names: Mapping[str, str] | None = None, see: See | None = None
    ) -> "Message":
        """The inverse of `as_dict`, and the rest of OpenAI's form.

        The content may be a list of parts: texts, which become lines; where `hear` is given sounds, which follow the
        text; where `see` is given pictures, which come before it, whatever their order. names: of the tools, by the ids
        of calls; a result with a `tool_call_id` and no name takes its tool's. Keys that hold nothing (None, or an empty
        list) are passed over. Raises UsageError for anything else, and what `hear` and `see` raise.
        """
        require("a message", entry, isinstance(entry, Mapping), f"an object with {', '.join(_KEYS)}")
        if unknown := [key for key, value in entry.items() if key not in _KEYS and not _is_nothing(value)]:
            raise UsageError(f"a message has the keys {shown(unknown)}, expected an object with {', '.join(_KEYS)}")
        for key, (kinds, expected) in _KEYS.items():
            require(f"a message's {key}", entry.get(key), isinstance(entry.get(key), kinds), expected)
        calls = tuple(_call(call) for call in entry.get("tool_calls") or ())
        content = "" if entry.get("content") is None and calls else entry.get("content")  # as clients send calls
        text, clips, pictures = _content(content, hear, see)
        if (clips or pictures) and entry["role"] != "user":
            what = "sound" if clips else "a picture"
            raise UsageError(f"there is {what} in a message of role {entry['role']}, expected it in one of role user")
        media = ("image",) * len(pictures) + (("audio",) if clips else ())
        name = _name(entry, names or {})
        return cls(entry["role"], text, entry.get("reasoning"), calls, name, media, clips, pictures)


_OPTIONAL_TEXT = (str, type(None)), "a text"
_KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "role": ((str,), f"one of {', '.join(ROLES)}"),
    "content": ((str, list, type(None)), "a text or a list of parts"),
    "reasoning": _OPTIONAL_TEXT,
    "tool_calls": ((list, type(None)), "a list of calls"),
    "name": _OPTIONAL_TEXT,
    "tool_call_id": _OPTIONAL_TEXT,
}


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict) and not value)


def _content(content: Any, hear: Hear | None, see: See | None) -> tuple[str, tuple[Any, ...], tuple[Any, ...]]:
    """The text of a message's content, the clips of its sounds, and its pictures."""
    if isinstance(content, str):
        return content, (), ()
    require("a message's content", content, isinstance(content, list), "a text or a list of parts")
    if not content:
        raise UsageError("a message's content is an empty list, expected a text or parts")
    lines: list[str] = []
    clips: list[Any] = []
    pictures: list[Any] = []
    for part in content:
        require("a part of a message", part, isinstance(part, Mapping), 'an object: {"type": "text", "text": ...}')
        if is_one_of(kind := part.get("type"), ("text",)):
            require("the text of a part", part.get("text"), isinstance(part.get("text"), str), "a text")
            lines.append(part["text"])
        elif hear is not None and is_one_of(kind, ("input_audio",)):
            clips += hear(_sound_file(part.get("input_audio")))
        elif see is not None and is_one_of(kind, ("image_url",)):
            pictures.append(see(*_picture_file(part.get("image_url"))))
        else:
            kinds = ["text", *["input_audio"] * (hear is not None), *["image_url"] * (see is not None)]
            raise UsageError(f"a message has a part of type {shown(kind)}, expected {' or '.join(kinds)}")
    return "\n".join(lines), tuple(clips), tuple(pictures)


def _sound_file(audio: Any) -> bytes:
    data = audio.get("data") if isinstance(audio, Mapping) else None
    require("a part of type input_audio", audio, isinstance(data, str), 'an object: {"data": base64, "format": ...}')
    return _decoded(str(data), "input_audio")


def _picture_file(image: Any) -> tuple[bytes, str]:
    """The file in a part of type image_url, and the detail that it is to be seen in."""
    image = {"url": image} if isinstance(image, str) else image
    url, detail = (image.get("url"), image.get("detail") or "auto") if isinstance(image, Mapping) else (None, "auto")
    good = isinstance(url, str) and url.startswith("data:")
    require("a part of type image_url", image, good, 'an object: {"url": "data:image/...;base64,..."}: none is fetched')
    require("the detail of an image_url", detail, is_one_of(detail, ("low", "auto", "high")), "low, auto or high")
    head, comma, data = str(url).partition(",")
    require("the url of a part of type image_url", head, bool(comma) and head.endswith(";base64"), "base64 data")
    return _decoded(data, "image_url"), detail


def _decoded(data: str, kind: str) -> bytes:
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise UsageError(f"the data of a part of type {kind} is not base64: {error}") from None


def _is_picture(rows: Any, kind: str) -> bool:
    if kind == "image":
        return getattr(rows, "ndim", 0) == 2
    return (
        isinstance(rows, tuple)
        and bool(rows)
        and all(len(frame) == 2 and getattr(frame[1], "ndim", 0) == 2 for frame in rows)
    )


def _name(entry: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """A message's name: for the result of a tool, that of the tool."""
    name, index = entry.get("name"), entry.get("tool_call_id")
    require("a message's tool_call_id", index, index is None or entry["role"] == "tool", "it in one of role tool")
    if name is None and index is not None and index not in names:
        raise UsageError(
            f"a message answers the call {shown(index)}, which no message before it has: give its tool's name"
        )
    return names[index] if name is None and index is not None else name


def _is_call(call: Any) -> bool:
    return isinstance(call, ToolCall) and isinstance(call.name, str) and isinstance(call.arguments, dict)


def _call(entry: Any) -> ToolCall:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError("a message's tool call has no function name")
    arguments: Any = function.get("arguments")
    if not isinstance(arguments, Mapping | str | None):
        raise UsageError(f"the arguments of the tool call {shown(function['name'])} are not an object")
    index = entry.get("id")
    require(f"the id of the tool call {shown(function['name'])}", index, isinstance(index, str | None), "a text")
    given: Any = dict(arguments) if isinstance(arguments, Mapping) else arguments
    return ToolCall(function["name"], given, index)


def check_messages(messages: Any, name: str = "messages") -> None:
    """Raises UsageError unless `messages`, which the caller calls `name`, are a list of Messages."""
    _check_list(messages, name)
    for i, message in enumerate(messages):
        good = isinstance(message, Message)
        require(f"message {i}", message, good, "a Message: Message.from_dict makes one of a dict")


def as_messages(
    messages: Any, name: str = "messages", *, hear: Hear | None = None, see: See | None = None,
    earlier: Iterable[Any] = (),
) -> list[Message]:  # fmt: skip
    """Messages and dicts in OpenAI's form as Messages.

    name: as the caller calls them. hear, see: as in `Message.from_dict`. earlier: messages before them, for the ids of
    calls. Raises UsageError for anything else, and what `hear` and `see` raise.
    """
    _check_list(messages, name)
    made: list[Message] = []
    names = _names(earlier)
    for entry in messages:
        made.append(Message.from_dict(entry, hear, names, see) if isinstance(entry, Mapping) else entry)
        names |= _names(made[-1:])
    check_messages(made)
    return made


def _names(messages: Iterable[Any]) -> dict[str, str]:
    """The tools' names by the ids of their calls."""
    several = (message.tool_calls for message in messages if isinstance(message, Message))
    return {call.id: call.name for calls in several for call in calls if call.id is not None}


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
