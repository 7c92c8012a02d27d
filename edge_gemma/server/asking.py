"""The parts of a request that several protocols have.

Owns: reading tools, the choice among them, a format, sampling, how much thought is wanted. Does not know: which
protocol asks.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from edge_gemma.generation.constraint import Constraint
from edge_gemma.server.bodies import Fields

MOST_CHANCES = 20  # likeliest tokens beside each token
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_LEAST_P = 1e-9  # of top_p: the likeliest token alone, which clients mean by 0
# Reasoning effort -> tokens that a thought may have. OpenAI's "minimal" and "none" are no thought.
EFFORTS: dict[str, int | None] = {"low": 256, "medium": 1024, "high": None, "xhigh": None}


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """The tools' declarations in the form of chat completions."""
    tools = body.objects("tools")
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise body.wrong(f"tools[{number}]", tool, 'a tool of type "function"')
    return [declared(tool["function"]) for tool in tools]


def declared(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function's declaration without what the chat template has no place for."""
    known = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return {"type": "function", "function": known}


def read_tool_choice(body: Fields, tools: list[dict[str, Any]]) -> tuple[bool, str | None, list[dict[str, Any]]]:
    """Whether a tool has to be called, which one, and the tools that are left."""
    choice = body.take("tool_choice", (str, dict), "none, auto, required, or a tool")
    if choice in (None, "auto"):
        return False, None, tools
    if choice == "none":
        return False, None, []
    name = None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
    elif choice != "required":
        raise body.wrong("tool_choice", choice, "none, auto, required, or a tool")
    names = [tool["function"].get("name") for tool in tools]
    if not names or (isinstance(choice, dict) and name not in names):
        raise body.wrong("tool_choice", choice, f"one of the tools, which are {', '.join(map(str, names)) or 'none'}")
    return True, name, tools


def read_format(form: Fields | None, inside: str | None = None) -> Constraint | None:
    """What an answer has to be, in OpenAI's words. inside: the object in `form` that has the schema; None: `form`."""
    kind = form.text("type") if form is not None else None
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Constraint.json({"type": "object"})
    if kind != "json_schema":
        raise form.wrong("type", kind, "text, json_object or json_schema")
    holder = form if inside is None else form.object(inside) or Fields({}, form.path(inside))
    schema = holder.take("schema", dict, "a JSON Schema")
    if schema is None:
        raise holder.wrong("schema", None, "a JSON Schema")
    return Constraint.json(schema)


def read_sampling(body: Fields, names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """The settings of the sampling that are given. names: a protocol's own words for them."""
    given = ((name, body.number(names.get(name, name))) for name in _SAMPLING)
    settings = {name: value for name, value in given if value is not None}
    seed = body.whole("seed", -(2**63))
    if seed is not None:
        settings["seed"] = seed % 2**63
    if "top_k" in settings:
        settings["top_k"] = max(0, body.whole("top_k", -1))  # -1 is another word for "off"
    if settings.get("top_p") == 0:
        settings["top_p"] = _LEAST_P
    return settings


def read_chances(body: Fields) -> int | None:
    """How many likeliest tokens are told beside each token, None if nothing is."""
    top = body.whole("top_logprobs", 0, MOST_CHANCES)
    if not body.flag("logprobs"):
        if top:
            raise body.wrong("top_logprobs", top, "it beside logprobs: true")
        return None
    return top or 0


def with_effort(word: str | None) -> dict[str, Any]:
    """What `Ask` says of thinking for an effort. Without a word about it the model does not think: a Pi would answer
    minutes later.
    """
    return {"think": True, "think_budget": EFFORTS[word]} if word in EFFORTS else {}
