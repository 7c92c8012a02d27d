"""A tool call as Gemma 4 writes it: `call:NAME{key:value,...}`.

Owns: its grammar. Strings stand between `<|"|>` tokens, so they may hold quotes, braces and newlines; keys are bare;
numbers, true, false and null are JSON's; objects and lists nest. A string in JSON's own quotes is taken too: models
write those at times. Does not know: replies, templates, tools, other ways to write a call (loose_call.py).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.arguments import require, shown

QUOTE = object()  # stands for the token <|"|>
DEPTH = 64  # objects and arrays in one another
CALL_NAME = re.compile(r"[\w.\-/:]+")
_NAME = re.compile(rf"\s*call:\s*({CALL_NAME.pattern})\s*")
_KEY = re.compile(r"\s*([^\s:{}\[\],\"\0]++(?:\s++[^\s:{}\[\],\"\0]++)*+)\s*+:")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,4298})(\.\d+)?([eE][+-]?\d{1,4})?(?![\w.])")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORD = re.compile(r"[A-Za-z]+(?![\w.])")
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. arguments: JSON values by name. id: a client's; a result names its call by it.

    Arguments may also be given as OpenAI's clients send them: the text of a JSON object, where an empty text means no
    arguments. Templates get a mapping, because Gemma 4's of July 2026 refuse a text. Raises UsageError for a text that
    is no JSON object.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        given: Any = self.arguments
        if given is None or isinstance(given, str):
            object.__setattr__(self, "arguments", _decoded(self.name, given or "{}"))

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, but with the arguments as an object, not as JSON text."""
        index = {} if self.id is None else {"id": self.id}
        return index | {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _decoded(name: str, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    good = isinstance(arguments, dict)
    require(f"the text of the arguments of the tool call {shown(name)}", text, good, "a JSON object")
    return arguments


def call_text(parts: Sequence[str | object]) -> str:
    """The call as the model wrote it."""
    return "".join(part if isinstance(part, str) else '<|"|>' for part in parts)


def parse_call(parts: Sequence[str | object]) -> ToolCall | None:
    """The call that texts and QUOTEs stand for, None if they are no call."""
    try:
        return CallReader(parts).call()
    except (Malformed, ValueError):
        return None


class Malformed(Exception):
    """The text is no call."""


class CallReader:
    """Recursive descent over text in which each string between QUOTEs is one opaque character."""

    trailing_comma = False  # whether a list or an object may end with one

    def __init__(self, parts: Sequence[str | object]) -> None:
        self.strings: list[str] = []
        bare: list[str] = []
        inside: list[str] | None = None
        for part in parts:
            if part is QUOTE:
                if inside is None:
                    inside = []
                else:
                    self.strings.append("".join(inside))
                    bare.append("\0")
                    inside = None
            elif inside is None:
                bare.append(str(part).replace("\0", "�"))
            else:
                inside.append(str(part))
        if inside is not None:
            raise Malformed
        self.text, self.at, self.taken = "".join(bare), 0, 0

    def call(self) -> ToolCall:
        name = self.match(_NAME)
        arguments = self.object(0)
        self.end()
        return ToolCall(name, arguments)

    def end(self) -> None:
        """Raises Malformed if there is more than white space left."""
        self.match(SPACE)
        if self.at != len(self.text):
            raise Malformed

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if not found:
            raise Malformed
        self.at = found.end()
        return found[1] if pattern.groups == 1 else found[0]

    def accept(self, character: str) -> bool:
        self.match(SPACE)
        if self.text.startswith(character, self.at):
            self.at += len(character)
            return True
        return False

    def string(self) -> str:
        self.taken += 1
        return self.strings[self.taken - 1]

    def key(self) -> str:
        if self.accept("\0"):
            key = self.string()
        elif self.text.startswith('"', self.at):
            key = json.loads(self.match(_STRING))
        else:
            return self.match(_KEY)
        if not self.accept(":"):
            raise Malformed
        return key

    def object(self, depth: int) -> dict[str, Any]:
        if depth > DEPTH or not self.accept("{"):
            raise Malformed
        return self.members("}", depth)

    def members(self, closing: str, depth: int) -> dict[str, Any]:
        """Keys and values, to the closing bracket."""
        result: dict[str, Any] = {}
        while self.goes_on(closing, first=not result):
            key = self.key()
            if key in result and depth == 0:  # which one is meant? In a value the last counts, as in JSON
                raise Malformed
            result[key] = self.value(depth + 1)
        return result

    def array(self, depth: int) -> list[Any]:
        result: list[Any] = []
        while self.goes_on("]", first=not result):
            result.append(self.value(depth + 1))
        return result

    def goes_on(self, closing: str, *, first: bool) -> bool:
        """Whether an entry follows; its comma is passed, and the closing bracket after the last."""
        if self.accept(closing):
            return False
        if not first and not self.accept(","):
            raise Malformed
        return first or not self.trailing_comma or not self.accept(closing)

    def value(self, depth: int) -> Any:
        if depth > DEPTH:
            raise Malformed
        if self.accept("\0"):
            return self.string()
        if self.accept("["):
            return self.array(depth)
        start = self.text[self.at : self.at + 1]
        if start == "{":
            return self.object(depth)
        if start == '"':
            return json.loads(self.match(_STRING))
        if start.isalpha():
            word = self.match(_WORD)
            if word not in WORDS:
                raise Malformed
            return WORDS[word]
        return number(self.match(_NUMBER))


def number(text: str) -> float:
    """A number as JSON writes it. Raises Malformed."""
    found = _NUMBER.fullmatch(text)
    if not found:
        raise Malformed
    value = float(text) if found[2] or found[3] else int(text)
    if value in (float("inf"), float("-inf")):
        raise Malformed
    return value
