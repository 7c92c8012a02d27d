"""One tool: its declaration, its arguments, what becomes of its result."""

import json
import threading
import time
from typing import Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_gemma
from edge_gemma.errors import UsageError
from edge_gemma.text.tool_declaration import declared
from edge_gemma.tools import schema
from edge_gemma.tools.function import RunnableTool, as_text


@edge_gemma.tool(timeout=5, confirm=True)
def paint(wall: str, color: Literal["red", "blue"] = "red", coats: int = 1, at: list[float] | None = None) -> dict:
    """Paint a wall

    Args:
        wall: which one
    """
    return {"wall": wall, "color": color, "coats": coats, "at": at}


def outcome(tool: RunnableTool, **arguments) -> str:
    running = tool.start(arguments)
    assert running.wait(10)
    return running.text


def test_a_tool_stays_a_function_and_is_declared_as_one():
    assert paint("north")["color"] == "red"
    assert (paint.name, paint.description, paint.timeout, paint.confirm) == ("paint", "Paint a wall", 5.0, True)
    assert declared([paint]) == [paint.declaration] == declared([paint.__wrapped__])
    assert edge_gemma.tool(Painter().work).start({"hours": 2}).wait(5)


def test_what_is_left_on_a_function_does_not_replace_what_a_tool_does():
    def work(hours: int) -> int:
        """Work"""
        return hours

    work.start = work.problem = work.outcome = None
    assert outcome(edge_gemma.tool(work), hours=2) == "2"


class Painter:
    def work(self, hours: int) -> int:
        """Work"""
        return hours


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "wall is missing: it is required"),
        ({"wall": 1}, "wall is 1, expected a text"),
        ({"wall": "n", "color": "green"}, "color is 'green', expected one of red, blue"),
        ({"wall": "n", "coats": 1.5}, "coats is 1.5, expected an integer"),
        ({"wall": "n", "coats": True}, "coats is True, expected an integer"),
        ({"wall": "n", "at": [1, "x"]}, "at[1] is 'x', expected a number"),
        ({"wall": "n", "size": 3}, "there is no parameter 'size', expected one of wall, color, coats, at"),
        ({"wall": None}, "wall is None, expected a text"),
    ],
)
def test_arguments_are_checked(arguments, told):
    assert outcome(paint, **arguments) == f"error: {told}"


def test_whole_floats_are_integers_and_integers_are_numbers():
    assert json.loads(outcome(paint, wall="n", coats=2.0, at=[1, 2.5]))["at"] == [1, 2.5]
    assert json.loads(outcome(paint, wall="n", at=None))["at"] is None


LOOP = {"type": "object", "properties": {"next": {"$ref": "#"}, "self": {"$ref": "#/properties/self"}}}


def test_references_are_followed_and_loops_end():
    assert schema.problem({"next": {"next": {}}}, LOOP) is None
    assert schema.problem({"next": {"next": 3}}, LOOP | {"required": []}) == "next.next is 3, expected an object"
    assert schema.problem({"self": 1}, LOOP) == "self: the declaration refers to itself"
    deep: dict = {}
    for _ in range(200):
        deep = {"next": deep}
    assert "refers to itself" in schema.problem(deep, LOOP)
    begun = time.perf_counter()
    many = {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 3}}}
    assert "refers to itself" in schema.problem({"a": 1}, many)
    assert time.perf_counter() - begun < 5
    elsewhere = {"type": "object", "properties": {"a": {"$ref": "http://x/y"}, "b": {"$ref": "#/no/where"}}}
    assert schema.problem({"a": 1, "b": []}, elsewhere) is None


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "integer", "minimum": 3},
            {"type": "number", "exclusiveMaximum": 5},
            {"enum": [1, "a", None]},
            {"type": "boolean"},
            {"type": ["string", "null"], "maxLength": 2},
            {"const": 7},
            {"type": "null"},
            {},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda x: {"type": "array", "items": x, "maxItems": 2}, inner),
        st.builds(lambda x, y: {"anyOf": [x, y]}, inner, inner),
        st.builds(lambda x, y: {"allOf": [x, y]}, inner, inner),
        st.builds(
            lambda x, more: {"type": "object", "properties": {"a": x}, "required": ["a"], "additionalProperties": more},
            inner,
            st.booleans() | inner,
        ),
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats(-2, 8, width=16) | st.sampled_from(["", "a", "abc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(SCHEMAS, VALUES)
def test_it_agrees_with_the_reference(inner, value):
    whole = {"type": "object", "properties": {"x": inner}, "required": ["x"]}
    good = jsonschema.Draft202012Validator(whole).is_valid({"x": value})
    assert (schema.problem({"x": value}, whole) is None) == good


@pytest.mark.parametrize(
    "parameters",
    [{"required": 3}, {"properties": [1]}, {"allOf": 5}, {"anyOf": 1}, {"properties": {"a": {"type": 3}}}, []],
)
def test_a_declaration_that_is_no_schema_is_a_result(parameters):
    declared = {"type": "function", "function": {"name": "odd", "description": "", "parameters": parameters}}
    assert outcome(RunnableTool(lambda **given: "ok", declared=declared), a=1).startswith("error: ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "ok"), ("a", "a"), ("", '""'), ({"a": [1, "é"]}, '{"a": [1, "é"]}'), (True, "true"), (1.5, "1.5"),
        ({1, 2}, "error: the result is {1, 2}, expected a text or JSON values"),
        (b"x", "error: the result is b'x', expected a text or JSON values"),
    ],
)  # fmt: skip
def test_any_json_value_is_a_result(value, text):
    assert as_text(value) == text


def test_a_result_that_holds_itself_is_an_error():
    loop: list = []
    loop.append(loop)
    assert as_text(loop).startswith("error: the result is")


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt("no"), RecursionError("no"), KeyError()]
)
def test_whatever_a_tool_raises_is_its_result(error):
    def bad() -> None:
        """Fail"""
        raise error

    told = outcome(edge_gemma.tool(bad))
    assert told.startswith("error: ")
    assert told.removeprefix("error: ")


def test_an_error_that_cannot_say_what_it_is_has_a_name():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    @edge_gemma.tool
    def bad() -> None:
        """Fail"""
        raise ExceptionGroup("several", [Mute()])

    assert outcome(bad) == "error: Mute"


def test_a_call_stays_what_the_model_wrote_whatever_the_tool_does_with_it():
    @edge_gemma.tool
    def take(items: list[int]) -> int:
        """Take all"""
        count = len(items)
        items.clear()
        return count

    arguments = {"items": [1, 2]}
    assert outcome(take, **arguments) == "2"
    assert arguments == {"items": [1, 2]}


def test_an_integer_is_given_as_one_however_the_model_wrote_it():
    assert json.loads(outcome(paint, wall="n", coats=2.0, at=[1.0])) == {
        "wall": "n", "color": "red", "coats": 2, "at": [1.0]
    }  # fmt: skip
    assert '"coats": 2,' in outcome(paint, wall="n", coats=2.0)


def test_a_coroutine_is_run():
    @edge_gemma.tool
    async def later(n: int) -> int:
        """Later"""
        return n + 1

    assert outcome(later, n=1) == "2"


def test_ten_megabytes_are_cut():
    @edge_gemma.tool
    def much() -> list[str]:
        """Much"""
        return ["x" * 100] * 100_000

    begun = time.perf_counter()
    told = outcome(much)
    assert time.perf_counter() - begun < 5
    assert len(told) < 8100
    assert told.endswith("(cut: these are 8000 of 10400000 characters)")


def test_a_tool_that_never_returns_is_left_behind_in_a_thread_that_does_not_hold_the_program():
    released = threading.Event()

    @edge_gemma.tool(timeout=0.05)
    def hang() -> None:
        """Hang"""
        released.wait(60)

    assert outcome(hang) == "error: hang did not answer within 0.05 seconds"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "hang")
    assert outcome(hang) == "error: hang is still busy with an earlier call that took too long"
    released.set()
    time.sleep(0.1)
    assert outcome(hang) == "ok"  # it is free again


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"confirm": 1}, "confirm is 1"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_limits_are_checked(options, told):
    with pytest.raises(UsageError, match=told):
        edge_gemma.tool(**options)(paint.__wrapped__)


def test_what_cannot_be_declared_is_told_at_once():
    with pytest.raises(UsageError, match="the parameter x of the tool f has no annotation"):

        @edge_gemma.tool
        def f(x): ...
