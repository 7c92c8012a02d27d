"""Whether a call's arguments are as their declaration wants them.

Owns: the part of JSON Schema that declarations use: types, enums, required, nested objects and lists, alternatives,
bounds, references inside the schema. A keyword that is not known here is passed over, and so is `pattern`: a pattern
may take longer than a life, and the tool checks what it is given itself. Does not know: tools, calls.
"""

from collections.abc import Mapping
from typing import Any

from edge_gemma.arguments import is_number, shown

_DEPTH = 64  # of references and nesting
_STEPS = 20_000  # alternatives that refer to themselves would be tried 2 ** 64 times
_EXPECTED = {
    "string": "a text", "integer": "an integer", "number": "a number", "boolean": "true or false",
    "object": "an object", "array": "a list", "null": "null",
}  # fmt: skip
_BOUNDS = {
    "minimum": lambda value, bound: value >= bound, "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound, "exclusiveMaximum": lambda value, bound: value < bound,
}  # fmt: skip
_SIZES = {
    "minLength": (str, 1), "minItems": (list, 1), "maxLength": (str, -1), "maxItems": (list, -1),
}  # fmt: skip


def problem(arguments: Any, parameters: Mapping[str, Any]) -> str | None:
    """What is wrong with a call's arguments, in a line for the model; None if they fit.

    parameters: the JSON Schema of an object. Names that it does not declare are refused unless it allows them
    ("additionalProperties").
    """
    return _Check({"additionalProperties": False} | dict(parameters)).value("the arguments", arguments, None, 0)


def whole_numbers(arguments: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that fit, with integers where integers are declared: JSON's 5.0 is one, Python's is none."""
    properties: Mapping[str, Any] = parameters.get("properties") or {}
    for name, value in arguments.items():
        kind = properties[name].get("type") if isinstance(properties.get(name), Mapping) else None
        if isinstance(value, float) and isinstance(kind, str) and kind.lower() == "integer":
            arguments[name] = int(value)
    return arguments


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._steps = root, 0

    def value(self, what: str, value: Any, schema: Any, depth: int) -> str | None:
        """schema: None for the root, which references may come back to."""
        schema = self._root if schema is None else schema
        self._steps += 1
        if depth > _DEPTH or self._steps > _STEPS:
            return f"{what}: the declaration refers to itself"
        if not isinstance(schema, Mapping):
            return None if schema is not False else f"{what} is not allowed"
        if isinstance(reference := schema.get("$ref"), str):
            return self.value(what, value, self._at(reference), depth + 1)
        if value is None and schema.get("nullable"):
            return None
        return (
            self._type(what, value, schema)
            or self._alternatives(what, value, schema, depth)
            or self._bounds(what, value, schema)
            or self._inside(what, value, schema, depth)
        )

    def _at(self, reference: str) -> Any:
        """What a reference of this schema means; one that leads nowhere allows everything."""
        at: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            at = at.get(name.replace("~1", "/").replace("~0", "~"), {}) if isinstance(at, Mapping) else {}
        return at if reference.startswith("#") else {}

    def _type(self, what: str, value: Any, schema: Mapping[str, Any]) -> str | None:
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds or []
        names = [str(kind).lower() for kind in kinds]
        if names and not any(_is(value, name) for name in names):
            return f"{what} is {shown(value)}, expected {' or '.join(_EXPECTED.get(name, name) for name in names)}"
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and not any(_same(value, choice) for choice in choices):
            return f"{what} is {shown(value)}, expected one of {', '.join(map(str, choices))}"
        return None

    def _alternatives(self, what: str, value: Any, schema: Mapping[str, Any], depth: int) -> str | None:
        for every in schema.get("allOf") or ():
            if told := self.value(what, value, every, depth + 1):
                return told
        for word in ("anyOf", "oneOf"):
            if some := schema.get(word):
                found = [self.value(what, value, one, depth + 1) for one in some]
                if None not in found:
                    return found[0]
        return None

    def _bounds(self, what: str, value: Any, schema: Mapping[str, Any]) -> str | None:
        for word, holds in _BOUNDS.items():
            if is_number(value) and is_number(bound := schema.get(word)) and not holds(value, bound):
                return f"{what} is {shown(value)}, expected {word} {bound}"
        for word, (kind, sign) in _SIZES.items():
            if isinstance(value, kind) and is_number(bound := schema.get(word)) and sign * (len(value) - bound) < 0:
                return f"{what} has a length of {len(value)}, expected {word} {bound}"
        return None

    def _inside(self, what: str, value: Any, schema: Mapping[str, Any], depth: int) -> str | None:
        if isinstance(value, list) and (items := schema.get("items")) is not None:
            each = (self.value(f"{what}[{i}]", item, items, depth + 1) for i, item in enumerate(value))
            return next((told for told in each if told), None)
        if not isinstance(value, Mapping):
            return None
        known, rest = schema.get("properties") or {}, schema.get("additionalProperties", True)
        where = "" if what == "the arguments" else f"{what}."
        if missing := [name for name in schema.get("required") or () if name not in value]:
            return f"{where}{missing[0]} is missing: it is required"
        for name, item in value.items():
            if name not in known and rest is False:
                expected = f"one of {', '.join(known)}" if known else "no arguments"
                return f"there is no parameter {shown(f'{where}{name}')}, expected {expected}"
            if told := self.value(f"{where}{name}", item, known.get(name, rest), depth + 1):
                return told
        return None


def _is(value: Any, kind: str) -> bool:
    if kind == "integer":
        return is_number(value) and value == value and float(value).is_integer() if _small(value) else is_number(value)
    if kind == "number":
        return is_number(value)
    kinds: dict[str, Any] = {"string": str, "boolean": bool, "object": Mapping, "array": list, "null": type(None)}
    return isinstance(value, kinds.get(kind, object))


def _small(value: Any) -> bool:
    """Whether it has a float at all: an integer of 400 digits has none."""
    return not isinstance(value, int) or abs(value) < 1 << 1000


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)
