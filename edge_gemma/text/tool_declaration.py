"""A Python function declared as a tool, in OpenAI's form: from its name, annotations and docstring.

Owns: what an annotation means in JSON Schema, reading Google-style docstrings. Does not know: running tools, prompts.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from edge_gemma.arguments import is_one_of, require, shown
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_call import CALL_NAME

Tool = Mapping[str, Any] | Callable[..., Any]

_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
_EXPECTED = "str, int, float, bool, list, dict, Literal[...] or one of them with None"
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*")
_PARAMETER = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def declared(tools: Any) -> list[Mapping[str, Any]]:
    """Declarations of tools: made for Python functions, else as given. Raises UsageError for anything else."""
    several = isinstance(tools, Sequence) and not isinstance(tools, str)
    require("tools", tools, several, "a list of functions or declarations")
    return [declaration(t) if callable(t) and not isinstance(t, type) else _given(i, t) for i, t in enumerate(tools)]


def checked(tools: Any) -> list[Mapping[str, Any]]:
    """As `declared`. Raises UsageError too for a name that no call can have, two equal names, and what is not JSON."""
    made = declared(tools)
    names = [tool["function"]["name"] for tool in made]
    for number, tool in enumerate(made):
        _check(number, tool)
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two tools have the name {shown(name)}, expected each name once")
    return made


def _given(number: int, tool: Any) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    good = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    expected = 'a function, or {"type": "function", "function": {"name": ..., "parameters": ...}}'
    require(f"tool {number}", tool, good, expected)
    return tool


def _check(number: int, tool: Mapping[str, Any]) -> None:
    kind, function = tool.get("type", "function"), tool["function"]
    name, about, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    require(f"the type of tool {number}", kind, is_one_of(kind, ("function",)), "function")
    require(f"the name of tool {number}", name, bool(CALL_NAME.fullmatch(name)), "letters, digits, _ . - / and :")
    require(f"the description of tool {number}", about, isinstance(about, str | None), "a text")
    require(f"the parameters of tool {number}", parameters, isinstance(parameters, Mapping | None), "a JSON Schema")
    try:
        json.dumps(tool)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"tool {number} is {shown(tool)}, expected JSON values in it: {error}") from None


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
