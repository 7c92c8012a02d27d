"""Where a JSON Schema leads: how deep, and whether its values have an end.

Owns: following `$ref`, what is required and what is nested, without recursion. Does not know: grammars.
"""

from collections import defaultdict
from typing import Any

from edge_gemma.generation.schema import MAPS, listed, objects_in
from edge_gemma.text.tool_grammar import target


def levels(schema: dict[str, Any], enough: int) -> int:
    """At most so many schemas stand in one another, where each `$ref` is followed once; counted up to `enough`."""
    followed: set[str] = set()
    pending: list[Any] = [schema]
    total = 0
    while pending and total < enough:
        deepest, references = _nesting(pending.pop())
        total += deepest
        for reference in references - followed:
            followed.add(reference)
            pending.append(target(reference, schema))
    return total


def _nesting(part: Any) -> tuple[int, set[str]]:
    """How many objects stand in one another within a schema, and its `$ref`s. Definitions count where they are used."""
    deepest, references = 0, set[str]()
    level = [part]
    while level:
        objects = [each for each in level if isinstance(each, dict)]
        deepest += bool(objects)
        references |= {each["$ref"] for each in objects if isinstance(each.get("$ref"), str)}
        level = [child for each in level if isinstance(each, list) for child in each if isinstance(child, dict | list)]
        level += [child for each in objects for child in _schemas_in(each)]
    return deepest, references


def _schemas_in(node: dict[str, Any]) -> list[Any]:
    children: list[Any] = []
    for key, value in node.items():
        if key in ("$defs", "definitions"):
            continue
        children += value.values() if key in MAPS and isinstance(value, dict) else [value]
    return [child for child in children if isinstance(child, dict | list)]


def is_endless(schema: dict[str, Any]) -> bool:
    """Whether every value of a schema would hold itself, through a `$ref` or what is required.

    Finds the least set of schemas that have a finite value, beginning with those that need no other one.
    """
    open_groups: dict[int, int] = {}  # of a schema: the groups of which none is known to have a finite value
    waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)  # schema -> the groups that it is in
    for node in objects_in(schema):
        groups = [group for group in _needs(node, schema) if all(isinstance(part, dict) for part in group)]
        open_groups[id(node)] = len(groups)
        for number, group in enumerate(groups):
            for part in group:
                waiting[id(part)].append((id(node), number))
    pending = [key for key, count in open_groups.items() if not count]
    finite, closed = set(pending), set[tuple[int, int]]()
    while pending:
        for group_of in waiting[pending.pop()]:
            if group_of in closed:
                continue
            closed.add(group_of)
            key = group_of[0]
            open_groups[key] -= 1
            if not open_groups[key]:
                finite.add(key)
                pending.append(key)
    return id(schema) not in finite


def _needs(node: dict[str, Any], root: dict[str, Any]) -> list[list[Any]]:
    """Groups of schemas: of each group one has to have a finite value, so that this one has."""
    reference = node.get("$ref")
    properties = node.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    needed = [properties.get(name) for name in listed(node.get("required")) if isinstance(name, str)]
    if isinstance(node.get("minItems"), int) and node["minItems"] > len(listed(node.get("prefixItems"))):
        needed.append(node.get("items"))
    needed += [*listed(node.get("allOf")), *([target(reference, root)] if isinstance(reference, str) else [])]
    alternatives = [listed(node[name]) for name in ("anyOf", "oneOf") if node.get(name)]
    return [*([part] for part in needed), *alternatives]
