"""A Python function declared as a tool, in OpenAI's form: from its name, annotations and docstring.

Owns: what an annotation means in JSON Schema, reading Google-style docstrings. Does not know: running tools, prompts.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from edge_gemma.arguments import require, shown
from edge_gemma.errors import UsageError

Tool = Mapping[str, Any] | Callable[..., Any]

_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
_EXPECTED = "str, int, float, bool, list, dict, Literal[...] or one of them with None"
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*")
_PARAMETER = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def declared(tools: Any) -> list[Mapping[str, Any]]:
    """Declarations as they are given, those of Python functions made here. Raises UsageError for anything else."""
    several = isinstance(tools, Sequence) and not isinstance(tools, str)
    require("tools", tools, several, "a list of functions or declarations")
    return [declaration(t) if callable(t) and not isinstance(t, type) else _checked(i, t) for i, t in enumerate(tools)]


def _checked(number: int, tool: Any) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    good = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    expected = 'a function, or {"type": "function", "function": {"name": ..., "parameters": ...}}'
    require(f"tool {number}", tool, good, expected)
    return tool


def declaration(function: Callable[..., Any]) -> dict[str, Any]:
    """OpenAI's declaration of a Python function: {"type": "function", "function": {name, description, parameters}}.

    The docstring's first paragraph is the description; lines "name: text" under "Args:" describe parameters. Those
    without a default are required. Raises UsageError for a function without a name, and for a parameter whose
    annotation is missing or cannot be told in JSON.
    """
    name = getattr(function, "__name__", "")
    require("a tool's name", name, name.isidentifier(), "a function with a name: def, not lambda")
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function)
    except Exception as error:  # annotations in quotes are evaluated, and may do anything
        raise UsageError(f"the annotations of the tool {name} cannot be read: {error}") from None
    summary, described = _docstring(inspect.getdoc(function) or "")
    properties = {p.name: _parameter(name, p, hints, described.get(p.name)) for p in parameters}
    required = [p.name for p in parameters if p.default is p.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": schema}}


def _parameter(
    tool: str, parameter: inspect.Parameter, hints: Mapping[str, Any], description: str | None
) -> dict[str, Any]:
    what = f"the parameter {parameter.name} of the tool {tool}"
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise UsageError(f"{what} is {parameter}, expected one that is given by name")
    if parameter.name not in hints:
        raise UsageError(f"{what} has no annotation, expected {_EXPECTED}")
    schema = _schema(what, hints[parameter.name])
    return schema | ({"description": description} if description else {})


def _schema(what: str, annotation: Any) -> dict[str, Any]:
    """JSON Schema of an annotation. what: the parameter, for the error."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        some = [argument for argument in arguments if argument is not types.NoneType]
        if len(some) == 1:
            return _schema(what, some[0]) | {"nullable": True}
    elif origin is Literal and len({type(value) for value in arguments}) == 1 and type(arguments[0]) in _TYPES:
        return {"type": _TYPES[type(arguments[0])], "enum": list(arguments)}
    elif origin is list and len(arguments) == 1:
        return {"type": "array", "items": _schema(what, arguments[0])}
    elif isinstance(plain := origin or annotation, type) and plain in _TYPES:
        return {"type": _TYPES[plain]}
    raise UsageError(f"{what} is annotated {shown(annotation)}, expected {_EXPECTED}")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph in a line, and what "Args:" says of each parameter."""
    lines = text.splitlines()
    sections = [i for i, line in enumerate(lines) if _SECTION.fullmatch(line)]
    summary = "\n".join(lines[: sections[0] if sections else len(lines)]).split("\n\n")[0]
    described: dict[str, str] = {}
    starts = [i for i in sections if lines[i].startswith(("Args", "Arguments", "Parameters"))]
    name = ""
    for line in lines[starts[0] + 1 :] if starts else ():
        if line.strip() and not line.startswith((" ", "\t")):
            break
        if found := _PARAMETER.fullmatch(line.strip()):
            name = found[1]
            described[name] = found[2]
        elif name and line.strip():
            described[name] += " " + line.strip()
    return " ".join(summary.split()), described
