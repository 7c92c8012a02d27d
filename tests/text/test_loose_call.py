"""Calls in forms that models write when nothing binds them: read where they have one meaning, else text."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.text.loose_call import loose_calls
from edge_gemma.text.tool_call import QUOTE, ToolCall, parse_call

PARTS = [
    "call", ":", "f", "g.x", "{", "}", "(", ")", "[", "]", "=", ",", ";", "'", '"', "“", "”", "\\", "1", "-2.5", "07",
    "true", "Oslo", "a", "b c", "name", "arguments", "```", "\n", " ", "nan", "\0", "é", "\ud800", QUOTE,
]  # fmt: skip


def read(*parts: str | object) -> list[ToolCall]:
    return [call for _, call in loose_calls(parts)]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f", {}),
        ("call : f ()", {}),
        ("f{}", {}),
        ("call:f{a:'Oslo', b:\"x\"}", {"a": "Oslo", "b": "x"}),
        ("call:f{a:'it's a \"day\"', 'b c':“x, y”}", {"a": 'it\'s a "day"', "b c": "x, y"}),
        ("call:f{a:'\\'\\n\\u00e9\\ud83d\\ude00\\q\\\\'}", {"a": "'\né😀\\q\\"}),
        ("call:f{a:'two\nlines'}", {"a": "two\nlines"}),
        ("call:f{a=1, b='x', c=[1, 'y',],}", {"a": 1, "b": "x", "c": [1, "y"]}),
        ("call:f{city:New York, when: 07:30 am\n}", {"city": "New York", "when": "07:30 am"}),
        ("call:f{a:https://x.org/y?z, b:it's, c:-}", {"a": "https://x.org/y?z", "b": "it's", "c": "-"}),
        ("call:f{a:2026-11-29, b:5pm, c:-1.5e3, d:TRUE, e:none}", {"a": "2026-11-29", "b": "5pm", "c": -1500.0,
                                                                "d": True, "e": None}),
        ("f(a=1, b=[True, None], c={'d': 'x'})", {"a": 1, "b": [True, None], "c": {"d": "x"}}),
        ("call:f({\"a\": 1})", {"a": 1}),
        ("```tool_code\nf(a=1)\n```", {"a": 1}),
        ('{"name": "f", "arguments": {"a": 1}}', {"a": 1}),
        ("{'tool': 'f', 'args': None, 'id': 'c1'}", {}),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": [1, \\"x\\"]}"}}', {"a": [1, "x"]}),
    ],
)  # fmt: skip
def test_a_call_in_another_form(text, arguments):
    assert parse_call([text]) is None
    [(written, call)] = loose_calls([text])
    assert call == ToolCall("f", arguments)
    assert written in text


@pytest.mark.parametrize(
    "text",
    ["call:f{a:1}call:f{a:1}", "call:f{a:1};\n call:f{a:1} ", "[f(a=1), f(a=1)]", "f(a=1)\nf(a=1)",
     '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "parameters": {"a": 1}}]'],
)  # fmt: skip
def test_several_calls(text):
    assert read(text) == [ToolCall("f", {"a": 1})] * 2


def test_what_stands_between_the_tokens_of_a_string_is_a_string():
    text = '\'},call:g{}{"name":"g"}'
    assert read("call:f{a:", QUOTE, text, QUOTE, ",} call:f") == [ToolCall("f", {"a": text}), ToolCall("f")]


@pytest.mark.parametrize(
    "text",
    [
        "call:f{a:Oslo},call:g{}",  # copied from someone, perhaps
        "call:f{a:x b:2}", "call:f{a:x b=2}", "call:f{a:b:c}", "call:f{a:C:\\x}", "call:f{a:x.}y", "call:f{a:'x'y}",
        "call:f{a:'x}", "call:f{a:“x}", "call:f{a:NaN}", "call:f{a:-Infinity}", "call:f{a:.5}", "call:f{a:1_000}",
        "call:f{a:'\\ud800'}", "f", "call{}", "f(1)", "f('x')", "f(a=1", "f a=1)", "f({a:1},b=2)", "[f()", "f()]",
        "[f()]]", "call:f.", "call:f please", '{"a": 1}', '{"name": "f", "city": "Oslo"}', '{"name": "two words"}',
        '{"name": "f", "tool": "g"}', '{"name": "f", "args": 1}', '{"name": "f", "args": "x"}', "[]", "``````",
        '{"name": "f", "args": "{\\"a\\": NaN}"}', '{"function": {"name": "f"}, "arguments": {}}', "call:f{a:1,,}",
    ],
)  # fmt: skip
def test_what_may_mean_several_things_stays_text(text):
    assert loose_calls([text]) == []


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.from_regex(r"[a-z]\w{0,5}", fullmatch=True), VALUES, max_size=4), st.integers(1, 3))
def test_what_python_and_json_write_is_read_back(arguments, count):
    many = [ToolCall("some_tool", arguments)] * count
    objects = [{"name": "some_tool", "arguments": arguments}] * count
    assert read(json.dumps(objects)) == many
    assert read(json.dumps(objects, ensure_ascii=False, indent=2)) == many
    pairs = ", ".join(f"{name}={json.dumps(value)}" for name, value in arguments.items())
    assert read(*[f"some_tool({pairs})"] * count) == many


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(PARTS)))
@example(["call:f{a:" + "[" * 5000])
@example(["f(" + "{a:" * 5000])
def test_it_takes_anything(parts):
    calls = loose_calls(parts)
    if (strict := parse_call(parts)) is not None and calls:
        assert [call for _, call in calls] == [strict]


@pytest.mark.parametrize(
    "text",
    ["call:f{a", "call:f{a:'x", "call:f{a:x'", "```\n``` ", "call:f ", "f(a=1),", "call:f{a:'\\n", "call:f{a b ",
     "call:f{a:1.", "call:f.", "call:f{a:x  ", "[{"],
)  # fmt: skip
def test_its_time_grows_with_the_text_only(text):
    start = time.perf_counter()
    for tail in (text[-1], text[-2:], text[len(text) // 2 :], text):
        for parts in ([text + tail * 50_000], [text + " " * 50_000], [text + tail * 50_000 + "\0x"]):
            loose_calls(parts)
            parse_call(parts)
    assert time.perf_counter() - start < 10
