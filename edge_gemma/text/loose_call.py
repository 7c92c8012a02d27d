"""Tool calls in other forms than Gemma 4's own, as models write them when nothing binds them.

Read is what has one meaning: strings in single, double or curly quotes, plain words as strings (`{city:Oslo}`),
`key=value`, a comma too many, `call:now` without braces, `now(zone="UTC")` as in Python, `{"name": ..., "arguments":
...}` as in JSON, a fence around the whole, and several calls one after the other or in a list. All else is no call.

Owns: these forms. Does not know: replies, templates, tools.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_gemma.text.tool_call import CALL_NAME, SPACE, WORDS, CallReader, Malformed, ToolCall, number

_FENCE = re.compile(r"\s*```[a-z_]*\s(.*)```\s*", re.DOTALL)
_PREFIX = re.compile(r"\s*call\s*:\s*")
_NAME = re.compile(r"\s*([^\W\d][\w.\-/:]*+(?<=\w))\s*")
_BETWEEN = re.compile(r"[\s,;]*")
# A string may hold its own quote after a backslash, and an apostrophe within a word.
_STRINGS = {
    '"': re.compile(r'"((?:[^"\\\0]|\\[^\0])*+)"'),
    "'": re.compile(r"'((?:[^'\\\0]|\\[^\0]|(?<=\w)'(?=\w))*+)'"),
    "“": re.compile(r"“([^“”\0]*+)”"),
}
_ESCAPE = re.compile(r"\\(u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", **{mark: mark for mark in "\"'\\/`"}}
_KEY = re.compile(r"\s*([^\s:=,;(){}\[\]\"'“”`\0]++(?:[ \t]++[^\s:=,;(){}\[\]\"'“”`\0]++)*+)")
# A plain word or several. A colon may stand in a time and in an address only: elsewhere it would follow a key.
_WORD = re.compile(r"\s*((?=[\w\-+./~#@])(?:[^:=,;(){}\[\]\"'“”`\0\n]|(?<=\w)'(?=\w)|(?<=\d):(?=\d)|:(?=//))++)")
_NUMBER_LIKE = re.compile(r"[+\-.]*\d[\d._]*+(?:[eE][+\-]?\d*+)?")
_NO_WORDS = {"nan", "inf", "infinity", "undefined", "nil"}  # values that JSON has not
_LOWER_WORDS = {word.lower(): value for word, value in WORDS.items()}

_NAME_KEYS = ("name", "tool", "tool_name", "function", "function_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "params", "tool_input")
_OTHER_KEYS = {"id", "type", "index"}


def loose_calls(parts: Sequence[str | object]) -> list[tuple[str, ToolCall]]:
    """The calls that texts and QUOTEs between a call's tokens stand for, each with its own text. Empty for no call.

    The text has to be whole: of one that was cut, less may be left than was meant.
    """
    try:
        return _LooseReader(parts).calls()
    except (Malformed, ValueError):
        return []


class _LooseReader(CallReader):
    trailing_comma = True

    def __init__(self, parts: Sequence[str | object]) -> None:
        super().__init__(parts)
        self._has_words = False  # whether there is a string without quotes
        if fenced := _FENCE.fullmatch(self.text):
            self.text = fenced[1]

    def calls(self) -> list[tuple[str, ToolCall]]:
        found = list(self._several())
        if len(found) > 1 and self._has_words:  # whether a word ended where the next call begins is not certain
            raise Malformed
        return found

    def _several(self) -> Iterator[tuple[str, ToolCall]]:
        listed = self.accept("[")
        self.match(SPACE)
        while self.at < len(self.text) and not self.text.startswith("]", self.at):
            start, taken = self.at, self.taken
            call = _call_of(self.object(0)) if self.text.startswith("{", self.at) else self._named()
            yield self._written(start, taken), call
            self.match(_BETWEEN)
        if self.accept("]") != listed:
            raise Malformed
        self.end()

    def _named(self) -> ToolCall:
        """`call:NAME`, with arguments or without, or NAME with arguments."""
        prefix = _PREFIX.match(self.text, self.at)
        self.at = prefix.end() if prefix else self.at
        name = self.match(_NAME)
        if self.text.startswith("{", self.at):
            arguments = self.object(0)
        elif self.accept("("):
            arguments = self._in_parentheses()
        elif prefix:
            arguments = {}
        else:
            raise Malformed
        if not prefix and name == "call":
            raise Malformed
        return ToolCall(name, arguments)

    def _in_parentheses(self) -> dict[str, Any]:
        if not self.accept("{"):
            return self.members(")", 0)
        arguments = self.members("}", 0)
        if not self.accept(")"):
            raise Malformed
        return arguments

    def _written(self, start: int, taken: int) -> str:
        """The text from a place to here. taken: strings before it."""
        strings = iter(self.strings[taken : self.taken])
        return re.sub("\0", lambda _: f'<|"|>{next(strings)}<|"|>', self.text[start : self.at]).strip()

    def key(self) -> str:
        if self.accept("\0"):
            key = self.string()
        elif self.text[self.at : self.at + 1] in _STRINGS:
            key = self._quoted()
        else:
            key = self.match(_KEY)
        if not self.accept(":") and not self.accept("="):
            raise Malformed
        return key

    def value(self, depth: int) -> Any:
        self.match(SPACE)
        start = self.text[self.at : self.at + 1]
        if start in {"\0", "[", "{"}:
            return super().value(depth)
        return self._quoted() if start in _STRINGS else self._word()

    def _quoted(self) -> str:
        """A string in quotes, with JSON's escapes and Python's; a backslash before anything else is one."""
        quote = self.text[self.at]
        text = self.match(_STRINGS[quote])
        return text if quote == "“" else _ESCAPE.sub(_meant, text)

    def _word(self) -> Any:
        word = self.match(_WORD).rstrip()
        if _NUMBER_LIKE.fullmatch(word):
            return number(word)
        if word.lower() in _LOWER_WORDS:
            return _LOWER_WORDS[word.lower()]
        if word.lower().lstrip("+-") in _NO_WORDS:
            raise Malformed
        self._has_words = True
        return word


def _meant(escape: re.Match[str]) -> str:
    """What an escape stands for. Raises Malformed for half of a character."""
    code = escape[1]
    if len(code) == 1:
        return _ESCAPES.get(code, f"\\{code}")
    text = str(json.loads(f'"\\{code}"'))
    if not text.isascii() and any("\ud800" <= character < "\ue000" for character in text):
        raise Malformed
    return text


def _call_of(entry: Mapping[str, Any]) -> ToolCall:
    """The call that an object describes: its name and its arguments under one of their keys."""
    inner = entry.get("function")
    if isinstance(inner, Mapping):
        if not entry.keys() <= {"function", *_OTHER_KEYS}:
            raise Malformed
        return _call_of({key: value for key, value in inner.items() if key != "function"})
    names, arguments = ([key for key in keys if key in entry] for keys in (_NAME_KEYS, _ARGUMENT_KEYS))
    if len(names) != 1 or len(arguments) > 1 or not entry.keys() <= {*names, *arguments, *_OTHER_KEYS}:
        raise Malformed
    name, given = entry[names[0]], entry[arguments[0]] if arguments else {}
    if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise Malformed
    if isinstance(given, str):  # as OpenAI's clients send it
        reader = CallReader([given])
        given = reader.object(0)
        reader.end()
    if not isinstance(given, dict | None):
        raise Malformed
    return ToolCall(name, given or {})
