"""Python functions as tools: what their annotations and docstrings say, in OpenAI's form."""

from functools import partial
from typing import Literal, Optional

import pytest

from edge_gemma.errors import UsageError
from edge_gemma.text.message import Message
from edge_gemma.text.prompt import ChatFormat
from edge_gemma.text.tool_declaration import declaration, declared
from tests.fakes import FakeTokenizer
from tests.tiny import CHAT_TEMPLATE


def set_timer(minutes: float, label: str = "tea", *, repeat: bool = False) -> str:
    """Set a timer
    that rings.

    It rings once.

    Args:
        minutes: how long,
            in minutes
        label (str): what for

    Returns:
        label: what was set
    """
    return f"{minutes} {label} {repeat}"


class Kitchen:
    def oven(self, degrees: int) -> None:
        """Heat the oven."""


def test_a_function_is_declared_as_it_is_written():
    assert declaration(set_timer) == {
        "type": "function",
        "function": {
            "name": "set_timer",
            "description": "Set a timer that rings.",
            "parameters": {
                "type": "object",
                "properties": {
                    "minutes": {"type": "number", "description": "how long, in minutes"},
                    "label": {"type": "string", "description": "what for"},
                    "repeat": {"type": "boolean"},
                },
                "required": ["minutes"],
            },
        },
    }


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (bool, {"type": "boolean"}),
        (dict, {"type": "object"}),
        (dict[str, int], {"type": "object"}),
        (list, {"type": "array"}),
        (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        (Literal["on", "off"], {"type": "string", "enum": ["on", "off"]}),
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
        (int | None, {"type": "integer", "nullable": True}),
        (Optional[list[str]], {"type": "array", "items": {"type": "string"}, "nullable": True}),  # noqa: UP045
        ("float", {"type": "number"}),
    ],
)
def test_annotations(annotation, schema):
    def tool(x): ...

    tool.__annotations__ = {"x": annotation}
    assert declaration(tool)["function"]["parameters"]["properties"] == {"x": schema}


def no_annotation(x): ...
def several(*x: int): ...
def any_name(**x: int): ...
def by_place(x: int, /): ...
def either(x: int | str): ...
def binary(x: bytes): ...
def mixed(x: Literal["a", 1]): ...
def unknown(x: "Nothing"): ...  # noqa: F821


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (no_annotation, "the parameter x of the tool no_annotation has no annotation, expected str, int"),
        (several, r"the parameter x of the tool several is \*x: int, expected one that is given by name"),
        (any_name, r"is \*\*x: int, expected one"),
        (by_place, "is x: int, expected one that is given by name"),
        (either, r"the parameter x of the tool either is annotated int \| str, expected"),
        (binary, "is annotated <class 'bytes'>, expected"),
        (mixed, "is annotated typing.Literal"),
        (unknown, "the annotations of the tool unknown cannot be read: name 'Nothing' is not defined"),
        (lambda x: x, "a tool's name is '<lambda>', expected a function with a name: def, not lambda"),
        (partial(binary, b""), "a tool's name is '', expected a function with a name"),
        (str, "tool 0 is <class 'str'>, expected a function, or"),
    ],
)
def test_what_cannot_be_declared_is_told_in_a_line(tool, told):
    with pytest.raises(UsageError, match=told) as error:
        declared([tool])
    assert "\n" not in str(error.value)


def test_methods_and_declarations_stand_side_by_side():
    given = {"type": "function", "function": {"name": "f"}}
    oven, same = declared([Kitchen().oven, given])
    assert oven["function"]["parameters"]["required"] == ["degrees"]
    assert same is given


def test_the_template_writes_a_function_as_it_writes_its_declaration():
    render = partial(ChatFormat(CHAT_TEMPLATE, FakeTokenizer()).render, [Message("user", "Hi")])
    assert render(tools=[set_timer]) == render(tools=[declaration(set_timer)])
    assert "set_timer" in render(tools=[set_timer])
