"""Calls that keep their declaration: whatever is said between the call's tokens is read, and fits by jsonschema."""

import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma import Constraint
from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.string_pattern import characters
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.text.tool_declaration import declared
from edge_gemma.text.tool_grammar import call_grammar
from tests.noise import TOKENIZER, Noise, said

CALL = TOKENIZER.special_tokens["<|tool_call>"]
NAMES = st.sampled_from(["city", "Days", "c d", "é", "名", 'x"y', "😀", "a.b", "{", "B", "b"])


def tool(name: str, parameters: dict) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def calls_of(tools: list[dict], seed: int, **options) -> tuple[str, list[ToolCall], str]:
    """A reply that begins with a call: its text, its calls, how it ended."""
    session = Noise(seed, first=CALL)
    result = said(seed, session=session, tools=tools, **options)
    return result.text, list(result.tool_calls), result.finish_reason


# --- what a call may be -----------------------------------------------------------------------------------------------


def limited(kind: str, low: str, high: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(
        lambda pair, names: {"type": kind, **{n: v for n, v in zip((low, high), pair, strict=True) if n in names}},
        st.tuples(values, values).map(sorted), st.sets(st.sampled_from([low, high])),
    )  # fmt: skip


LEAVES = st.one_of(
    limited("string", "minLength", "maxLength", st.integers(0, 6)),
    limited("integer", "minimum", "maximum", st.integers(-500, 500)),
    limited("number", "minimum", "maximum", st.floats(-50, 50).map(lambda x: round(x, 2))),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, {"type": ["string", "null"]}, {"type": "object"},
                     {"type": "integer", "minimum": 0, "multipleOf": 7}, {"type": "array"},
                     {"type": "number", "exclusiveMinimum": 3}]),
    st.lists(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=4), min_size=1,
             max_size=4).map(lambda values: {"enum": values}),
    st.lists(st.text(max_size=5), min_size=1, max_size=4).map(lambda values: {"type": "string", "enum": values}),
    st.sampled_from([{"enum": [{"a": [1, "x"]}, ["y", True]]}, {"const": "a <turn|> b"}]),
)  # fmt: skip


def objects(parts: st.SearchStrategy) -> st.SearchStrategy:
    def schema(properties, needed):
        required = [name for name in properties if name in needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(schema, st.dictionaries(NAMES, parts, max_size=6), st.sets(NAMES))


SCHEMAS = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        objects(parts),
        st.builds(lambda items, limits: {**limits, "items": items}, parts,
                  limited("array", "minItems", "maxItems", st.integers(0, 4))),
        st.lists(parts, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        parts.map(lambda part: {"type": "object", "additionalProperties": part}),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(schemas=st.lists(objects(SCHEMAS), min_size=1, max_size=3), seed=st.integers(0, 1000), greedy=st.booleans())
def test_every_call_is_read_and_fits_its_declaration(schemas, seed, greedy):
    tools = [tool(name, schema) for name, schema in zip(("now", "ns.get-x", "set_2"), schemas, strict=False)]
    sampling = Sampling(temperature=0) if greedy else None
    text, calls, reason = calls_of(tools, seed, max_tokens=400, sampling=sampling)
    if reason == "length" and not calls:
        return  # cut inside the call
    assert "<|tool_call>" not in text
    schema_of = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    for call in calls:
        jsonschema.Draft202012Validator(schema_of[call.name]).validate(call.arguments)


def test_most_calls_are_finished():
    """Or the test above would say nothing."""
    parameters = {"type": "object", "properties": {"a": {"type": "string"}, "b": {}}, "required": ["a", "b"]}
    assert sum(bool(calls_of([tool("f", parameters)], seed)[1]) for seed in range(30)) > 25


def test_optional_arguments_come_in_every_combination():
    parameters = {"type": "object", "properties": {name: {"type": "boolean"} for name in "abc"}, "required": ["b"]}
    seen = {tuple(calls_of([tool("f", parameters)], seed)[1][0].arguments) for seed in range(80)}
    assert seen == {("b",), ("a", "b"), ("b", "c"), ("a", "b", "c")}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"x": {"const": 1}}, "required": ["x"]}}}, {"x": 1}),
        ({"properties": {"x": {"const": 1}}, "anyOf": [{"required": ["x"]}]}, {"x": 1}),
        ({"properties": {"x": {"pattern": "^(?:ab|a/b)$", "type": "string", "maxLength": 2}}, "required": ["x"]},
         {"x": "ab"}),
        (None, {}),
        ({"type": "object", "properties": {}}, {}),
        ({"type": "OBJECT", "properties": {"x": {"type": "STRING", "enum": ["a<|turn>b"]}}, "required": ["x"]},
         {"x": "a<|turn>b"}),
        ({"type": "object", "required": ["x"], "properties": {"x": {"$ref": "#/$defs/one"}},
          "$defs": {"one": {"const": 1}}}, {"x": 1}),
        ({"type": "object", "required": ["x"], "properties": {"x": {"allOf": [{"type": "object"}, {
            "properties": {"y": {"const": None}}, "required": ["y"]}]}}}, {"x": {"y": None}}),
        ({"type": "object", "required": ["x"], "properties": {"x": {"type": "array", "minItems": 2, "maxItems": 2,
                                                                    "items": {"const": ""}}}}, {"x": ["", ""]}),
    ],
)  # fmt: skip
def test_what_is_declared_as_one_thing_is_called_so(parameters, expected):
    _, calls, _ = calls_of([tool("f", parameters)], 1)
    assert calls[0] == ToolCall("f", expected)


def test_a_value_with_keys_of_its_own_may_have_several():
    parameters = {
        "properties": {"x": {"type": "object", "additionalProperties": {"type": "boolean"}}},
        "required": ["x"],
    }
    made = [calls_of([tool("f", parameters)], seed) for seed in range(20)]
    sizes = {len(call.arguments["x"]) for _, calls, _ in made for call in calls}
    assert max(sizes) > 1
    assert all(calls or reason == "length" for _, calls, reason in made)


def test_a_declaration_that_holds_itself_ends():
    node = {"type": "object", "properties": {"value": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"]}  # fmt: skip
    parameters = {"type": "object", "properties": {"list": node}, "required": ["list"], "$defs": {"node": node}}
    for seed in range(10):
        _, calls, reason = calls_of([tool("f", parameters)], seed)
        assert reason == "length" or isinstance(calls[0].arguments["list"]["value"], bool)


def test_a_tool_that_cannot_be_called_is_left_out():
    endless = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    tools = [tool("no spaces", {}), tool("endless", endless)]
    assert call_grammar(tools, TOKENIZER.special_tokens) is None
    grammar = call_grammar([*tools, tool("good", {})], TOKENIZER.special_tokens)
    assert "good" in grammar
    assert "endless" not in grammar
    assert call_grammar([tool("good", {})], {}) is None  # Gemma 3


@pytest.mark.parametrize(
    "odd",
    [{"type": "integer", "minimum": 5, "maximum": 2}, {"type": "string", "minLength": 9, "maxLength": 1},
     {"type": "number", "minimum": True}, {"type": "number", "maximum": float("nan")}, {"type": 7}, {"type": "file"},
     {"enum": []}, {"type": "array", "items": 3}, {"properties": 3}, {"type": "array", "minItems": 10**9},
     {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, {"$ref": "nowhere"}, {"anyOf": "x"},
     {"type": "string", "pattern": "(?=x)"}, {"type": "number", "minimum": 1e300}, {"enum": "abc"},
     {"anyOf": [1, None]}, {"type": "number", "exclusiveMinimum": 1, "maximum": 1}, {"type": "integer", "maximum": 2.5},
     {"type": "integer", "minimum": 1, "maximum": 3, "multipleOf": 50}, {"anyOf": 3}, {"anyOf": {"a": 1}},
     {"allOf": [{"properties": [1]}]}, {"properties": [1], "allOf": ["x", {"properties": {"a": {}}}]},
     {"enum": [float("nan"), [float("inf")], "a"]}, {"enum": ["x" * 300_000]}, {"type": "string", "pattern": "a{"},
     {"enum": [f"{n} years" for n in range(20_000)]}, {"type": "string", "format": "date", "pattern": "x"},
     {"$ref": "#/properties/odd"}],
)  # fmt: skip
def test_an_odd_declaration_does_not_stop_anyone(odd):
    parameters = {"type": "object", "properties": {"odd": odd, "x": {"type": "boolean"}}, "required": ["x"]}
    for seed in range(5):
        _, calls, reason = calls_of([tool("f", parameters)], seed)
        assert reason == "length" or calls[0].arguments["x"] in (True, False)


@pytest.mark.parametrize("part", [{}, {"type": "string"}])
def test_a_tool_of_very_many_arguments_is_not_bound(part):
    """llguidance would overflow the stack, which ends the process."""
    many = tool("f", {"type": "object", "properties": {f"p{i}": part for i in range(4000)}})
    assert call_grammar([many], TOKENIZER.special_tokens) is None
    some = tool("f", {"type": "object", "properties": {f"p{i}": part for i in range(100)}})
    assert call_grammar([some], TOKENIZER.special_tokens) is not None


def test_of_a_declaration_that_is_too_much_the_names_are_kept():
    endless = {"anyOf": [{"allOf": [{"$ref": "#/properties/odd"}]}, {"type": "null"}]}
    parameters = {"type": "object", "properties": {"odd": endless, "x": {"type": "boolean"}}, "required": ["x"]}
    for seed in range(5):
        _, calls, reason = calls_of([tool("f", parameters)], seed)
        assert reason == "length" or {"x"} <= calls[0].arguments.keys() <= {"odd", "x"}


KEPT = [
    "^[a-z]{3,5}$", "^ab|c$", "[0-9]{2}", r"^\d+-\w$", "^a/[b.-]+$", r"^[^\d\s,]{2}$",
    r"^[^\w]{2}$", r"^\W$", r"^[\D-]$", "^(?:x|yy){2}$", r"^\S \S$",
    "^$", "^.b?$", r"^\u00e9\/\x41[\]\\[-]$", "^[^a-z]{1,3}$", "^(?P<n>x)$", r"^[a\[&~-]$", "^(ab|a/b)$",
]  # fmt: skip
NOT_KEPT = ["(?=x)", r"^(x)\1$", r"\bx", "a$b", "[]a]", "a{", "(?i)a", "^\ud800$", "", "x" * 5000, 7, "(", "[a--b]"]


@settings(max_examples=150, deadline=None)
@given(pattern=st.sampled_from(KEPT), seed=st.integers(0, 500))
def test_a_pattern_is_kept(pattern, seed):
    schema = {"type": "string", "pattern": pattern}
    _, calls, reason = calls_of([tool("f", {"properties": {"x": schema}, "required": ["x"]})], seed)
    assert reason == "length" or calls
    assert all(re.search(pattern, call.arguments["x"]) for call in calls)


@pytest.mark.parametrize("pattern", NOT_KEPT)
def test_a_pattern_that_cannot_be_kept_binds_nothing(pattern):
    assert characters({"pattern": pattern}) == characters({})
    assert characters({"pattern": pattern, "maxLength": 3}) == characters({"maxLength": 3})
    assert characters({"pattern": pattern, "format": "date"}) == characters({"format": "date"})


def test_a_pattern_that_contradicts_the_length_counts_alone():
    assert characters({"pattern": "^[a-z]{3}$", "minLength": 5}) == characters({"pattern": "^[a-z]{3}$"})
    assert " & " in characters({"pattern": "^[a-z]{3}$", "minLength": 3})


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31", "24-01-01"]),
        ("time", ["07:30:00", "23:59:59.5Z", "00:00:00+02:00"], ["24:00:00", "7:30", "07:30"]),
        ("date-time", ["2024-02-29T07:30:00Z", "2024-01-01T07:30:00"], ["2024-01-01", "2024-01-01 07:30:00"]),
        ("email", ["a.b+c@x-y.org"], ["a", "a@b", "a.@x.org", "a b@x.org", "a@-x.org"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"]),
        ("ipv4", ["255.0.10.1", "0.0.0.0"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
        ("uri", ["https://x.org/y?z=%20#a", "urn:x"], ["x", "http://a b", "http://%x"]),
        ("of tomorrow", ["", "anything"], []),
    ],
)  # fmt: skip
def test_formats(name, right, wrong):
    bounds = Bounds(TOKENIZER, tools=[tool("f", {"properties": {"x": {"type": "string", "format": name}}})])
    bounds.accept(CALL)
    for token in TOKENIZER.encode_prompt('call:f{x:<|"|>'):
        bounds.accept(token)
    quote = TOKENIZER.special_tokens['<|"|>']
    for text in (*right, *wrong):
        after = bounds
        for token in TOKENIZER.encode(text):
            after = after.after(token) if token in set(bounds_allowed(after)) else None
            if after is None:
                break
        assert (after is not None and quote in set(bounds_allowed(after))) == (text in right), text


def bounds_allowed(bounds: Bounds) -> list[int]:
    allowed = bounds.allowed()
    assert allowed is not None
    return allowed.tolist()


def test_a_call_that_cannot_be_followed_any_further_goes_on_free():
    schema = {"type": "string", "pattern": "a.{2000}b"}
    choice = Constraint.choice(["yes", "no"])
    for answer in (None, choice):
        bounds = Bounds(TOKENIZER, tools=[tool("f", {"properties": {"x": schema}})], answer=answer, stop_ids={1})
        bounds.accept(CALL)
        for token in TOKENIZER.encode_prompt('call:f{x:<|"|>' + "a ab" * 200):
            bounds.allowed()
            bounds.accept(token)
        assert bounds.allowed() is None
        assert bounds.forced() == []
        bounds.accept(TOKENIZER.special_tokens["<tool_call|>"])
        assert (bounds.allowed() is None) == (answer is None)
        if answer:
            assert 1 in bounds.allowed()


# --- in a conversation ------------------------------------------------------------------------------------------------


def set_timer(minutes: int, label: str = "") -> str:
    """Set a timer.

    Args:
      minutes: how long
      label: its name
    """
    return f"{minutes} {label}"


def test_text_before_and_after_a_call_is_free():
    bounds = Bounds(TOKENIZER, tools=declared([set_timer]))
    assert bounds.allowed() is None
    assert bounds.forced() == []
    bounds.accept(CALL)
    assert TOKENIZER.decode(bounds.forced()) == "call:set_timer{"
    for token in TOKENIZER.encode_prompt("minutes:10}"):
        assert token in bounds.allowed()
        bounds.accept(token)
    assert bounds.allowed().tolist() == [TOKENIZER.special_tokens["<tool_call|>"]]
    bounds.accept(TOKENIZER.special_tokens["<tool_call|>"])
    assert bounds.allowed() is None


def test_beams_keep_the_declaration():
    sampling = Sampling(temperature=0, num_beams=3)
    _, calls, reason = calls_of(declared([set_timer]), 3, sampling=sampling, max_tokens=40)
    assert reason == "length" or isinstance(calls[0].arguments["minutes"], int)


def test_the_real_model_calls_as_it_should():
    import edge_gemma

    with edge_gemma.load("demo") as engine:
        for beams in (1, 3):
            reply = engine.chat(tools=[set_timer], num_beams=beams).send("set a timer for ten minutes")
            assert [(call.name, call.arguments["minutes"]) for call in reply.tool_calls] == [("set_timer", 10)]


def test_a_call_may_stand_before_a_bound_answer():
    bounds = Bounds(TOKENIZER, tools=declared([set_timer]), answer=Constraint.choice(["yes", "no"]), stop_ids={1})
    starts = {TOKENIZER.decode([token], skip_special=False)[0] for token in bounds.allowed()}
    assert starts == {"<", "y", "n"}
    bounds.accept(CALL)
    for token in TOKENIZER.encode_prompt("call:set_timer{minutes:10}<tool_call|>"):
        bounds.accept(token)
    assert {1, CALL} <= set(bounds.allowed().tolist())  # the results come first, or another call, or the answer
    bounds.accept(TOKENIZER.encode("yes")[0])
    assert CALL not in bounds.allowed()
