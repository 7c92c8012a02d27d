"""Declared tools as the grammar of a call in Gemma 4's dialect: `call:NAME{key:value,...}`, then `<tool_call|>`.

Owns: what a parameter's schema allows in the dialect, so that `tool_call.py` reads every call of the grammar. Does not
know: how a grammar is followed.

Bound are names, types, enums, what is required, numbers' and lengths' limits, `pattern`, the common `format`s, nested
objects and arrays, `anyOf`, `allOf` and `$ref` within the declaration. Keys come in the order in which chat templates
write them. Other keywords (`uniqueItems`) are not: whoever runs the tool checks them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from edge_gemma.arguments import is_number
from edge_gemma.text.grammar_check import problem_of
from edge_gemma.text.string_pattern import LONGEST, characters, limit
from edge_gemma.text.tool_call import CALL_NAME

_PLAIN_KEY = re.compile(r"\w[\w.\-]*")
_DEPTH = 12  # objects and arrays in one another
_LOOSE_DEPTH = 3  # the same, where a parameter's schema says nothing
_LONG_LIST = 20_000  # characters of an enum: a longer one is too much for llguidance, and binds nothing
_MOST_SCHEMAS = 1000  # of a declaration: llguidance overflows the stack, and ends the process, above 2,500
_CHECKED_MARKS = 1, 2  # any two tokens: llguidance's vocabulary of bytes has few
_LARGEST = 10**15  # a number whose limits are not declared
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LOOSE_TYPES = ("string", "number", "boolean", "null", "array", "object")
_COMMA = ' "," '
_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,40}/"


def call_grammar(tools: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, int]) -> str | None:
    """The grammar of one call of any of the tools, as llguidance reads Lark, from after `<|tool_call>` on.

    tools: OpenAI's declarations. Of a tool whose declaration llguidance cannot follow, the name and the names of the
    arguments are bound. None where the vocabulary has no calls, where no tool can be called, and where all of them are
    too much for llguidance.
    """
    opening, closing, quote = (special_tokens.get(name) for name in ("<|tool_call>", "<tool_call|>", '<|"|>'))
    if opening is None or closing is None or quote is None:
        return None
    return _grammar_of(json.dumps([tool["function"] for tool in tools]), closing, quote)


@lru_cache(maxsize=16)  # each reply asks for it
def _grammar_of(functions: str, closing: int, quote: int) -> str | None:
    named = [_followed(function) for function in json.loads(functions)]
    try:
        return None if problem_of(_grammar(named, *_CHECKED_MARKS) or "") else _grammar(named, closing, quote)
    except _TooLarge:  # more arguments than schemas may be
        return None


def _followed(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function as llguidance can follow it: as it is, or with any value for each argument."""
    try:
        if not problem_of(_grammar([function], *_CHECKED_MARKS) or 'start: ""'):
            return function
    except (_TooLarge, RecursionError):
        pass
    parameters = function["parameters"]
    names, required = parameters.get("properties"), set(_required(parameters))
    properties: dict[str, Any] = {name: {} for name in names} if isinstance(names, Mapping) else {}
    return {**function, "parameters": {"properties": properties, "required": [n for n in properties if n in required]}}


def _grammar(functions: Sequence[Mapping[str, Any]], closing: int, quote: int) -> str | None:
    rules = _Rules(f"<[{quote}]>")
    calls = [rules.call(function) for function in functions]
    some = [call for call in calls if call is not None]
    return "\n".join([f"start: ({' | '.join(some)}) <[{closing}]>", *rules.lines, ""]) if some else None


class _TooLarge(Exception):
    """A declaration leads to too many schemas, or on and on to itself."""


class _Rules:
    """The rules of a grammar as it grows. quote: the token around strings."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._root: Any = {}
        self._named: dict[tuple[int, int], str | None] = {}  # what a schema at a depth has become; None: not yet
        self._alive: list[Any] = []  # schemas made here, whose ids must not be used again
        self._terminals: dict[str, str] = {}
        self._seen = 0  # schemas
        self.lines: list[str] = []

    def call(self, function: Mapping[str, Any]) -> str | None:
        """The rule of a tool's call; None for one that cannot be called."""
        name, schema = function["name"], function.get("parameters")
        self._root, self._seen = (schema if isinstance(schema, Mapping) else {}), 0
        if not CALL_NAME.fullmatch(name):
            return None
        arguments = self._arguments(self._root)
        return None if arguments is None else self._rule(f"{_text(f'call:{name}')} ({arguments})")

    def _arguments(self, schema: Mapping[str, Any]) -> str | None:
        """An object, whatever else a tool's schema may allow."""
        self._count()
        if isinstance(schema.get("$ref"), str) and isinstance(meant := target(schema["$ref"], self._root), Mapping):
            return self._arguments(meant)
        schema = self._merged(schema)
        if alternatives := self._alternatives(schema):
            return _any_of(map(self._arguments, alternatives))
        return self._object(schema if schema else {"properties": {}}, 0)

    def _count(self) -> None:
        self._seen += 1
        if self._seen > _MOST_SCHEMAS:
            raise _TooLarge

    def _rule(self, expression: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _terminal(self, expression: str) -> str:
        if expression not in self._terminals:
            self._terminals[expression] = name = f"T{len(self._terminals)}"
            self.lines.append(f"{name}: {expression}")
        return self._terminals[expression]

    def _value(self, schema: Any, depth: int) -> str | None:
        """The rule of a value; None where it would be nested too deeply."""
        if depth > _DEPTH or schema is False:
            return None
        if not isinstance(schema, Mapping):
            schema = {}
        key = (id(schema), depth)
        if key not in self._named:
            self._count()
            self._alive.append(schema)
            self._named[key] = None
            expression = self._expression(schema, depth)
            self._named[key] = None if expression is None else self._rule(expression)
        return self._named[key]

    def _expression(self, schema: Mapping[str, Any], depth: int) -> str | None:
        if isinstance(schema.get("$ref"), str) and (meant := target(schema["$ref"], self._root)) is not None:
            return self._value(meant, depth)
        schema = self._merged(schema)
        nullable = ["null"] if schema.get("nullable") is True else []
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else [v for v in schema["enum"] if _fits(v, schema)]
            listed = _any_of([*map(self._literal, filter(_is_json, values)), *map(_text, nullable)])
            if listed is None or len(listed) < _LONG_LIST:
                return listed
            schema = {name: entry for name, entry in schema.items() if name not in ("const", "enum")}
        if alternatives := self._alternatives(schema):
            return _any_of(self._value(part, depth) for part in alternatives)
        types = schema.get("type")
        kinds = [types] if isinstance(types, str) else types if isinstance(types, list) else _kinds(schema)
        return _any_of(self._of_type(str(kind).lower(), schema, depth) for kind in [*kinds, *nullable])

    def _alternatives(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What `anyOf` or `oneOf` allow, each with the rest of the schema."""
        for word in ("anyOf", "oneOf"):
            if isinstance(several := schema.get(word), list) and several:
                rest = {name: entry for name, entry in schema.items() if name != word}
                parts = [part for part in several if isinstance(part, Mapping)]
                return [
                    {**rest, **part} if "$ref" in part else self._merged({**rest, "allOf": [part]}) for part in parts
                ]
        return []

    def _of_type(self, kind: str, schema: Mapping[str, Any], depth: int) -> str | None:
        match kind:
            case "string":
                return f"{self._quote} {self._terminal(characters(schema))} {self._quote}"
            case "integer" | "number":
                return _number(kind, schema)
            case "boolean":
                return '("true" | "false")'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema, depth)
            case "object":
                return self._object(schema, depth)
        return self._loose(depth)

    def _loose(self, depth: int) -> str | None:
        """Any value."""
        depth = max(depth, _DEPTH - _LOOSE_DEPTH)
        kinds = _LOOSE_TYPES if depth < _DEPTH else _LOOSE_TYPES[:4]
        return _any_of(self._of_type(kind, {}, depth) for kind in kinds)

    def _array(self, schema: Mapping[str, Any], depth: int) -> str | None:
        item = self._item(schema, depth)
        least, most = limit(schema, "minItems") or 0, limit(schema, "maxItems")
        if item is None or most == 0:
            return '"[" "]"' if least == 0 else None
        if most is not None and most < least:
            most = None
        more = "" if most == 1 else f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _item(self, schema: Mapping[str, Any], depth: int) -> str | None:
        given = schema.get("items", {})
        if isinstance(given, Mapping) and given:
            return self._value(given, depth + 1)
        return None if given is False or depth >= _DEPTH else self._loose_rule(depth + 1)

    def _loose_rule(self, depth: int) -> str | None:
        """A rule of any value, one for each depth."""
        key = (0, max(depth, _DEPTH - _LOOSE_DEPTH))
        if key not in self._named:
            expression = self._loose(depth)
            self._named[key] = None if expression is None else self._rule(expression)
        return self._named[key]

    def _object(self, schema: Mapping[str, Any], depth: int) -> str | None:
        properties, required = schema.get("properties"), _required(schema)
        if not isinstance(properties, Mapping):
            properties = {}
            if not required and (depth or "additionalProperties" in schema):
                return self._pairs(schema.get("additionalProperties", {}), depth)
        known = {**{name: {} for name in required}, **{str(name): entry for name, entry in properties.items()}}
        entries = []
        for name in sorted(known, key=lambda name: (name.lower(), name)):
            part = known[name]
            self._count()
            value = self._loose_rule(depth + 1) if part in ({}, True) else self._value(part, depth + 1)
            if value is None and name in required:
                return None
            if value is not None:
                entries.append((f"{self._key(name)} {value}", name in required))
        return f'"{{" {self._members(entries)} "}}"'

    def _members(self, entries: list[tuple[str, bool]]) -> str:
        """Entries in their order, those that are not required left out or not, with commas between them."""
        rest, beginnings = "", list[str]()
        for entry, needed in reversed(entries):
            if needed:
                beginnings = []
            beginnings.append(f"{entry} {rest}")
            rest = self._rule(f'"," {entry} {rest}' if needed else f'("," {entry})? {rest}')
        alternatives = f"({' | '.join(reversed(beginnings))})" if beginnings else ""
        return alternatives + ("" if not alternatives or any(needed for _, needed in entries) else "?")

    def _pairs(self, schema: Any, depth: int) -> str:
        """An object whose keys are not declared. An argument must not come twice: of those there is one or none."""
        value = self._value(schema, depth + 1) if schema not in ({}, True) else self._loose_rule(depth + 1)
        if value is None:
            return '"{" "}"'
        entry = f'{_KEY} ":" {value}'
        return f'"{{" ({entry})? "}}"' if depth == 0 else f'"{{" ({entry} ("," {entry}){{0,}})? "}}"'

    def _key(self, name: str) -> str:
        if _PLAIN_KEY.fullmatch(name):
            return _text(f"{name}:")
        return f'{self._string(name)} ":"'

    def _string(self, text: str) -> str:
        return f"{self._quote} {_text(text)} {self._quote}" if text else f"{self._quote} {self._quote}"

    def _literal(self, value: Any) -> str:
        """A value of an enum, as the dialect writes it."""
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, Mapping):
            pairs = (f"{self._key(str(name))} {self._literal(entry)}" for name, entry in value.items())
            return f'"{{" {_COMMA.join(pairs)} "}}"'
        if isinstance(value, list | tuple):
            return f'"[" {_COMMA.join(map(self._literal, value))} "]"'
        return _text(json.dumps(value))

    def _merged(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema with what `allOf` says in it."""
        if not isinstance(schema.get("allOf"), list):
            return schema
        merged: Mapping[str, Any] = {name: entry for name, entry in schema.items() if name != "allOf"}
        for part in schema["allOf"]:
            if isinstance(part, Mapping) and isinstance(part.get("$ref"), str):
                part = target(part["$ref"], self._root)
            if isinstance(part, Mapping):
                merged = self._both(merged, part)
        return merged

    def _both(self, schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
        """What both schemas say; where they say two things of one keyword, the part's."""
        both = {
            "properties": {**_mapping(schema.get("properties")), **_mapping(part.get("properties"))},
            "required": [*_required(schema), *_required(part)],
        }
        return {**schema, **part, **{name: entry for name, entry in both.items() if entry}}


def _any_of(parts: Iterable[str | None]) -> str | None:
    some = [part for part in dict.fromkeys(parts) if part is not None]
    return " | ".join(some) if some else None


def _text(text: str) -> str:
    """A text as Lark writes it: one in quotes, or as a regular expression where it holds what cannot stand there."""
    text = text.encode("utf-8", "replace").decode()
    if text.isprintable():
        return json.dumps(text, ensure_ascii=False)
    return f"/{pattern_of(text)}/"


def pattern_of(text: str) -> str:
    """The regular expression of one text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _number(kind: str, schema: Mapping[str, Any]) -> str:
    """A number as JSON writes it. It always has limits, so that it has an end; those that contradict count as none."""
    given = {name: schema[name] for name in _LIMITS if is_number(schema.get(name)) and abs(schema[name]) < _LARGEST**2}
    if kind == "integer":
        return "%json " + json.dumps(_integers(given, schema.get("multipleOf")))
    low = max((given[name] for name in _LIMITS[::2] if name in given), default=None)
    high = min((given[name] for name in _LIMITS[1::2] if name in given), default=None)
    if low is not None and high is not None and low >= high:
        given = {"minimum": low, "maximum": high} if low == high else {}
    if not given.keys() & {*_LIMITS[::2]}:
        given["minimum"] = min(-_LARGEST, int(high or 0) - _LARGEST)
    if not given.keys() & {*_LIMITS[1::2]}:
        given["maximum"] = max(_LARGEST, int(low or 0) + _LARGEST)
    return "%json " + json.dumps({"type": "number", **given})


def _integers(given: Mapping[str, float], step: Any) -> dict[str, Any]:
    """The schema of whole numbers within limits."""
    lows = [math.ceil(given["minimum"])] if "minimum" in given else []
    lows += [math.floor(given["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in given else []
    highs = [math.floor(given["maximum"])] if "maximum" in given else []
    highs += [math.ceil(given["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in given else []
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        low = high = None
    low = min(-_LARGEST, (high or 0) - _LARGEST) if low is None else low
    high = max(_LARGEST, low + _LARGEST) if high is None else high
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    if type(step) is int and 0 < step < LONGEST and high // step * step >= low:
        schema["multipleOf"] = step
    return schema


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _required(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """The type that a schema without one means."""
    if "properties" in schema or "additionalProperties" in schema:
        return ["object"]
    return ["array"] if "items" in schema else ["any"]


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether an enum's value is of the type beside it."""
    types = schema.get("type")
    kinds = [str(kind).lower() for kind in (types if isinstance(types, list) else [types])] if types else []
    of = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    kind = of.get(type(value), "null")
    return not kinds or kind in kinds or (kind == "integer" and "number" in kinds)


def target(reference: str, root: Any) -> Any:
    """What a `$ref` within the same schema means: the schema there, None where there is none."""
    found = root if reference.startswith("#") else None
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found
