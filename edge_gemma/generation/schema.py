"""JSON Schemas in other words that mean the same, where llguidance does not take the ones that were given.

Owns: `oneOf` whose alternatives exclude one another, as `anyOf`; formats that nobody defined. Does not know: how a
schema becomes a grammar.

Sources: JSON Schema 2020-12, core 10.2.1.3 (oneOf), validation 7.3 (the
formats that are defined; any other is a remark).
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

from edge_gemma.text.tool_grammar import target

# Where schemas stand within a schema.
_ONE = (
    "items", "additionalItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "contains", "not",
    "propertyNames", "if", "then", "else",
)  # fmt: skip
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_FORMATS = frozenset((
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
))  # fmt: skip
_MOST_COMPARED = 20_000  # pairs of alternatives of `oneOf`, in a schema
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def plainer(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without what llguidance refuses though it can be said otherwise. The one that is given stays."""
    pairs = sum(len(listed(node.get("oneOf"))) ** 2 // 2 for node in objects_in(schema))
    return cast(dict[str, Any], _rewritten(schema, schema)) if pairs <= _MOST_COMPARED else schema


def objects_in(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """All objects in a schema, each before those in it."""
    found: list[dict[str, Any]] = []
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            found.append(node)
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return found


def _rewritten(node: Any, root: dict[str, Any]) -> Any:
    if not isinstance(node, dict):
        return node
    new = dict(node)
    inner: Callable[[Any], Any] = functools.partial(_rewritten, root=root)
    for name in _ONE:
        if isinstance(new.get(name), dict):
            new[name] = inner(new[name])
    for name in _LISTS:
        if isinstance(new.get(name), list):
            new[name] = list(map(inner, new[name]))
    for name in MAPS:
        if isinstance(new.get(name), dict):
            new[name] = {key: inner(part) for key, part in new[name].items()}
    if isinstance(new.get("format"), str) and new["format"] not in _FORMATS:
        del new["format"]
    parts = new.get("oneOf")
    if isinstance(parts, list) and "anyOf" not in new and _exclude_each_other(parts, root):
        new["anyOf"] = new.pop("oneOf")
    return new


def _exclude_each_other(parts: list[Any], root: dict[str, Any]) -> bool:
    """Whether it can be seen that no value fits two of several schemas."""
    resolved = [_resolved(part, root) for part in parts]
    return all(_excludes(a, b, root) for a, b in itertools.combinations(resolved, 2))


def _resolved(part: Any, root: dict[str, Any]) -> Any:
    """A schema, or the one that its `$ref` names."""
    for _ in range(8):
        if not (isinstance(part, dict) and isinstance(part.get("$ref"), str)):
            break
        part = target(part["$ref"], root)
    return part


def _excludes(a: Any, b: Any, root: dict[str, Any]) -> bool:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    kinds = _kinds(a), _kinds(b)
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return True
    if _differ(a, b):
        return True
    if kinds != ({"object"}, {"object"}):
        return False
    names = [{name for name in listed(part.get("required")) if isinstance(name, str)} for part in (a, b)]
    properties = [part["properties"] if isinstance(part.get("properties"), dict) else {} for part in (a, b)]
    return any(
        _differ(_resolved(properties[0].get(name), root), _resolved(properties[1].get(name), root))
        for name in names[0] & names[1]
    )


def _kinds(part: Mapping[str, Any]) -> set[str]:
    """The types of JSON that a schema's `type` allows, whole numbers as numbers; none where it does not say."""
    given = part.get("type")
    several = given if isinstance(given, list) else [given]
    if not all(isinstance(kind, str) for kind in several):
        return set()
    return {"number" if kind == "integer" else str(kind) for kind in several}


def _differ(a: Any, b: Any) -> bool:
    """Whether two schemas name the values that fit, and have none in common."""
    named = [_named(part) if isinstance(part, dict) else None for part in (a, b)]
    if named[0] is None or named[1] is None:
        return False
    return not any(x == y for x in named[0] for y in named[1])


def _named(part: Mapping[str, Any]) -> list[Any] | None:
    """The values of `const` or `enum`, None where a schema has neither. True and 1 count as equal: that is careful."""
    if "const" in part:
        return [part["const"]]
    return part["enum"] if isinstance(part.get("enum"), list) else None


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []
