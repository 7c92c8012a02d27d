"""Declared tools as the grammar of a call in Gemma 4's dialect: `call:NAME{key:value,...}`, then `<tool_call|>`.

Owns: what a parameter's schema allows in the dialect, so that `tool_call.py` reads every call of the grammar. Does not
know: how a grammar is followed.

Bound are names, types, enums, what is required, numbers' and lengths' limits, nested objects and arrays, `anyOf`,
`allOf` and `$ref` within the declaration. Keys come in the order in which chat templates write them. Other keywords
(`pattern`, `format`) are not: whoever runs the tool checks them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_gemma.arguments import is_number
from edge_gemma.text.tool_call import CALL_NAME

_PLAIN_KEY = re.compile(r"\w[\w.\-]*")
_DEPTH = 12  # objects and arrays in one another
_LOOSE_DEPTH = 3  # the same, where a parameter's schema says nothing
_LONGEST = 4096  # characters or entries: a larger limit is none
_LARGEST = 10**15  # a number whose limits are not declared
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LOOSE_TYPES = ("string", "number", "boolean", "null", "array", "object")
_COMMA = ' "," '
_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,40}/"


def call_grammar(tools: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, int]) -> str | None:
    """The grammar of one call of any of the tools, as llguidance reads Lark, from after `<|tool_call>` on.

    tools: OpenAI's declarations. None where the vocabulary has no calls, and where no tool can be called.
    """
    marks = [special_tokens.get(name) for name in ("<|tool_call>", "<tool_call|>", '<|"|>')]
    opening, closing, quote = marks
    if opening is None or closing is None or quote is None:
        return None
    rules = _Rules(f"<[{quote}]>")
    calls = [rules.call(tool["function"]) for tool in tools]
    some = [call for call in calls if call is not None]
    if not some:
        return None
    return "\n".join([f"start: ({' | '.join(some)}) <[{closing}]>", *rules.lines, ""])


class _Rules:
    """The rules of a grammar as it grows. quote: the token around strings."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._root: Any = {}
        self._named: dict[tuple[int, int], str | None] = {}  # what a schema at a depth has become; None: not yet
        self._alive: list[Any] = []  # schemas made here, whose ids must not be used again
        self.lines: list[str] = []

    def call(self, function: Mapping[str, Any]) -> str | None:
        """The rule of a tool's call; None for one that cannot be called."""
        name, schema = function["name"], function.get("parameters")
        self._root = schema if isinstance(schema, Mapping) else {"type": "object", "properties": {}}
        if not CALL_NAME.fullmatch(name):
            return None
        given = {"properties": {}} if not self._root else self._root
        arguments = self._object(self._merged(given), 0)
        return None if arguments is None else self._rule(f"{_text(f'call:{name}')} {arguments}")

    def _rule(self, expression: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _value(self, schema: Any, depth: int) -> str | None:
        """The rule of a value; None where it would be nested too deeply."""
        if depth > _DEPTH or schema is False:
            return None
        if not isinstance(schema, Mapping):
            schema = {}
        key = (id(schema), depth)
        if key not in self._named:
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
            return _any_of([*map(self._literal, values), *map(_text, nullable)])
        for word in ("anyOf", "oneOf"):
            if several := schema.get(word):
                rest = {name: entry for name, entry in schema.items() if name != word}
                parts = [{**rest, **part} for part in several if isinstance(part, Mapping)]
                return _any_of(self._value(part, depth) for part in parts)
        types = schema.get("type")
        kinds = [types] if isinstance(types, str) else types if isinstance(types, list) else _kinds(schema)
        return _any_of(self._of_type(str(kind).lower(), schema, depth) for kind in [*kinds, *nullable])

    def _of_type(self, kind: str, schema: Mapping[str, Any], depth: int) -> str | None:
        match kind:
            case "string":
                return f"{self._quote} {_characters(schema)} {self._quote}"
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
        least, most = _limit(schema, "minItems") or 0, _limit(schema, "maxItems")
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
        """An object whose keys are not declared: one entry or none, since the same key must not come twice."""
        value = self._value(schema, depth + 1) if schema not in ({}, True) else self._loose_rule(depth + 1)
        return '"{" "}"' if value is None else f'"{{" ({_KEY} ":" {value})? "}}"'

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
        merged: dict[str, Any] = {name: entry for name, entry in schema.items() if name != "allOf"}
        for part in schema["allOf"]:
            if isinstance(part, Mapping) and isinstance(part.get("$ref"), str):
                part = target(part["$ref"], self._root)
            if not isinstance(part, Mapping):
                continue
            both = {
                "properties": {**(merged.get("properties") or {}), **(part.get("properties") or {})},
                "required": [*_required(merged), *_required(part)],
            }
            merged |= {**part, **{name: entry for name, entry in both.items() if entry}}
        return merged


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


def _characters(schema: Mapping[str, Any]) -> str:
    """A string's characters, as a terminal."""
    least, most = _limit(schema, "minLength") or 0, _limit(schema, "maxLength")
    if most is not None and least <= most:
        return f"/(?s:.){{{least},{most}}}/"
    return f"/(?s:.){{{least},}}/" if least else "/(?s:.)*/"


def _limit(schema: Mapping[str, Any], name: str) -> int | None:
    value = schema.get(name)
    return value if type(value) is int and 0 <= value <= _LONGEST else None


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
    if type(step) is int and 0 < step < _LONGEST and high // step * step >= low:
        schema["multipleOf"] = step
    return schema


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
