"""A string's `pattern`, `format` and length as an expression of a grammar's terminal.

Owns: JSON Schema's regular expressions in llguidance's form, and those of the common formats. A part that llguidance
cannot follow binds nothing. Does not know: quotes around the string, what the string is for.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from edge_gemma.text.grammar_check import problem_of

LONGEST = 4096  # characters or entries: a larger limit is none
_LONGEST_PATTERN = 1000  # characters
_ANYTHING = "(?s:.)*"
_TOKEN = re.compile(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[pP]\{\w+\}|\\.|\(\?P?<\w+>|\(\?:|\(\?|.", re.DOTALL)
# What Python's and JavaScript's readings of a class of characters have in common, and what either has.
_CLASSES = {r"\d": "0-9", r"\w": "0-9A-Za-z_", r"\s": r" \t-\r"}
_EITHER = {r"\d": r"\d", r"\w": r"\w\p{N}", r"\s": r"\s\x{1c}-\x{1f}\x{feff}"}
_SAME = {r"\n", r"\r", r"\t", r"\f", r"\v"}
_NO_LINE_END = r"[^\n\r\x{2028}\x{2029}]"

_DAY_OF_MONTH = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_LEAP_YEAR = "(?:[12][0-9](?:0[48]|[2468][048]|[13579][26])|(?:1[26]|2[048])00)"
_DATE = f"(?:[12][0-9]{{3}}-(?:{_DAY_OF_MONTH})|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+\-](?:0[0-9]|1[0-4]):[0-5][0-9])?"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[A-Za-z0-9_%+\-]+(?:\.[A-Za-z0-9_%+\-]+)*@{_HOST}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "uri": r"[A-Za-z][A-Za-z0-9+.\-]*:(?:[A-Za-z0-9\-._~:\x{2f}?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+",
}


def characters(schema: Mapping[str, Any]) -> str:
    """The expression of a terminal: the characters that a string may have. What contradicts the rest binds nothing."""
    length = _length(schema)
    found = [part for part in (_pattern(schema.get("pattern")), _format(schema.get("format"))) if part]
    together = " & ".join([*found, length] if length else found)
    kept = (expression for expression in [together, *found] if found and _is_kept(expression))
    return next(kept, length or f"/{_ANYTHING}/")


def limit(schema: Mapping[str, Any], name: str) -> int | None:
    """A limit of a length; None where there is none that can be kept."""
    value = schema.get(name)
    return value if type(value) is int and 0 <= value <= LONGEST else None


def _length(schema: Mapping[str, Any]) -> str | None:
    least, most = limit(schema, "minLength") or 0, limit(schema, "maxLength")
    if most is not None and least <= most:
        return f"/(?s:.){{{least},{most}}}/"
    return f"/(?s:.){{{least},}}/" if least else None


def _pattern(pattern: Any) -> str | None:
    if not isinstance(pattern, str) or not pattern or len(pattern) > _LONGEST_PATTERN:
        return None
    found = whole(pattern)
    return None if found is None else f"/{found}/"


def _format(name: Any) -> str | None:
    found = _FORMATS.get(name) if isinstance(name, str) else None
    return None if found is None else f"/{found}/"


@lru_cache(maxsize=256)
def _is_kept(expression: str) -> bool:
    return problem_of(f"start: T\nT: {expression}\n") is None


def whole(pattern: str) -> str | None:
    """llguidance's regular expression of the texts in which a pattern of JSON Schema is found; None if there is none.

    What is meant differently by Python and by JavaScript is narrowed to what both mean.
    """
    branches: list[str] = []
    try:
        for tokens in _branches(pattern):
            starts, ends = tokens[:1] == ["^"], tokens[-1:] == ["$"]
            inner = tokens[1 if starts else 0 : -1 if ends else None]
            text = "".join(_translated(inner))
            branches.append(f"{'' if starts else _ANYTHING}(?:{text}){'' if ends else _ANYTHING}")
    except _NotBound:
        return None
    return "|".join(branches)


class _NotBound(Exception):
    """The pattern has something that no grammar can follow, or that has several meanings."""


def _branches(pattern: str) -> Iterator[list[str]]:
    """The tokens between the bars that are in no group."""
    branch: list[str] = []
    depth, in_class = 0, False
    for found in _TOKEN.finditer(pattern):
        token = found[0]
        if in_class:
            in_class = token != "]"
        elif token == "[":
            in_class = True
        elif token[0] == "(":
            depth += 1
        elif token == ")":
            depth -= 1
        elif token == "|" and depth == 0:
            yield branch
            branch = []
            continue
        branch.append(token)
    yield branch


def _translated(tokens: list[str]) -> Iterator[str]:
    before, opened, negated = "", -1, False  # opened: where a class began, -1 outside of one
    for at, token in enumerate(tokens):
        if opened >= 0:
            first = at == opened + 1 + negated
            if token == "]" and not first:
                opened = -1
                yield token
            elif token == "^" and at == opened + 1:
                negated = True
                yield token
            else:
                yield _in_class(token, before, first, negated)
        elif token == "[":
            opened, negated = at, False
            yield token
        else:
            yield _outside(token)
        before = token


def _in_class(token: str, before: str, first: bool, negated: bool) -> str:
    if token == "]" or (token == "-" and before == "-"):
        raise _NotBound
    if token in _CLASSES:
        return _EITHER[token] if negated else _CLASSES[token]
    if token.lower() in _CLASSES:
        return token if negated else _without(token)
    if token == "-" and not first:
        return token
    return r"\x{8}" if token == r"\b" else _character(token)


def _without(token: str) -> str:
    return f"[^{_EITHER[token.lower()]}]"


def _outside(token: str) -> str:
    if token in ("^", "$", "(?"):
        raise _NotBound
    if token in _CLASSES:
        return f"[{_CLASSES[token]}]"
    if token.lower() in _CLASSES:
        return _without(token)
    if token == ".":
        return _NO_LINE_END
    if token[:2] == "(?":
        return "(?:"
    return token if token in "()|*+?{},]}" else _character(token)


def _character(token: str) -> str:
    """One character, or a class that is the same everywhere."""
    if token in _SAME or token[:2] in (r"\p", r"\P"):
        return token
    if token[0] == "\\":
        code = token[2:]
        if len(token) > 2:
            if 0xD800 <= int(code, 16) < 0xE000:
                raise _NotBound
            return f"\\x{{{code}}}"
        if token[1:].isalnum():
            raise _NotBound
        token = token[1:]
    if 0xD800 <= ord(token) < 0xE000:
        raise _NotBound
    return token if token.isascii() and token.isalnum() else f"\\x{{{ord(token):x}}}"
