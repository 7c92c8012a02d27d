"""Answers keep their constraint: JSON schemas by jsonschema's judgement, regular expressions by `re`'s, choices."""

import contextlib
import gc
import json
import re
import resource
import time
import weakref
from functools import partial

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_gemma import Constraint, UsageError
from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.matcher import Matcher
from edge_gemma.generation.sampler import Sampling
from edge_gemma.text.tokenizer import Tokenizer
from tests.embedded import FOLDER
from tests.fakes import FakeEngine
from tests.noise import STOPS, TOKENIZER, Noise, said

AGE = {"type": "integer", "minimum": 0, "maximum": 150}
GREEDY, BEAMS = Sampling(temperature=0), Sampling(temperature=0, num_beams=3)

# --- JSON schemas -----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c d", "é", "名", 'x"y', "😀", "type"])
LENGTH = st.integers(0, 6)


def with_limits(kind: str, low: str, high: str, values: st.SearchStrategy) -> st.SearchStrategy:
    """Schemas of a type with none, one or both of its limits."""
    both = st.tuples(values, values).map(sorted)
    chosen = st.sets(st.sampled_from([low, high]))
    return st.builds(
        lambda pair, names: {"type": kind, **{n: v for n, v in zip((low, high), pair, strict=True) if n in names}},
        both, chosen,
    )  # fmt: skip


LEAVES = st.one_of(
    with_limits("string", "minLength", "maxLength", LENGTH),
    with_limits("integer", "minimum", "maximum", st.integers(-500, 500)),
    with_limits("number", "minimum", "maximum", st.integers(-50, 50)),
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {}, {"type": ["string", "null"]}, {"type": "string", "format": "date"},
         {"type": "string", "pattern": "^[a-f]{2,4}$"}, {"type": "integer", "minimum": 0, "multipleOf": 7}]
    ),
    st.lists(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.text(max_size=5).map(lambda text: {"const": text}),
)  # fmt: skip


def objects(parts: st.SearchStrategy) -> st.SearchStrategy:
    def schema(properties, needed, more):
        required = [name for name in properties if name in needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}

    return st.builds(schema, st.dictionaries(NAMES, parts, max_size=4), st.sets(NAMES), st.just(False) | parts)


SCHEMAS = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        objects(parts),
        st.builds(lambda items, limits: {**limits, "items": items}, parts, with_limits("array", "minItems", "maxItems",
                                                                                       st.integers(0, 4))),
        st.lists(parts, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
    ),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("sampling", [None, GREEDY, BEAMS, Sampling(top_k=0, top_p=1.0, seed=1)])
@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_every_finished_answer_fits_its_schema(sampling, schema, seed):
    try:
        constraint = Constraint.json(schema)
    except UsageError:
        assume(False)
    limit = 25 if sampling is BEAMS else 300
    result = said(seed, answer=constraint, sampling=sampling, max_tokens=limit)
    assert result.finish_reason in ("stop", "length")
    if result.finish_reason == "stop":
        jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))


def test_most_answers_finish():
    """Or the test above would say nothing."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"items": {}}}, "required": ["a", "b"]}
    reasons = [said(seed, answer=Constraint.json(schema)).finish_reason for seed in range(30)]
    assert reasons.count("stop") > 20


def test_the_real_model_keeps_a_schema(demo):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": AGE, "ok": {"enum": [True]}},
        "required": ["name", "age", "ok"],
        "additionalProperties": False,
    }
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"temperature": 1.0, "seed": 5}):
        reply = demo.generate("who are you", constraint=Constraint.json(schema), max_tokens=80, **options)
        assert reply.finish_reason == "stop", options
        jsonschema.validate(json.loads(reply.text), schema)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Constraint.json, False), "something fits"),
        (partial(Constraint.json, "{"), "cannot be read"),
        (partial(Constraint.json, {"a": object()}), "cannot be read"),
        (partial(Constraint.json, {"const": float("nan")}), "cannot be read"),
        (partial(Constraint.json, []), "an object"),
        (partial(Constraint.json, {"type": "strin"}), "strin"),
        (partial(Constraint.json, {"properties": {"a": {"not": {}}}}), "not"),
        (partial(Constraint.json, {"$ref": "#"}), "no end"),
        (partial(Constraint.json, {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "no end"),
        (partial(Constraint.json, {"$ref": "#/x", "x": {"allOf": [{"$ref": "#/y"}]}, "y": {"$ref": "#/x"}}), "no end"),
        (partial(Constraint.json, {"minItems": 1, "items": {"$ref": "#"}}), "no end"),
        (partial(Constraint.json, {"enum": []}), "empty"),
        (partial(Constraint.json, {"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (partial(Constraint.json, {"$ref": "http://x.invalid/y"}), "x.invalid"),
        (partial(Constraint.json, {"pattern": "(?=a)"}), "look-around"),
        (partial(Constraint.json, "[" * 100_000), "cannot be read"),
        (partial(Constraint.regex, "["), "unclosed"),
        (partial(Constraint.regex, r"(a)\1"), "backreferences"),
        (partial(Constraint.regex, 3), "a text"),
        (partial(Constraint.regex, "\ud800"), "a text"),
        (partial(Constraint.regex, "a" * 2_000_000), "at most"),
        (partial(Constraint.regex, r"[^\x00-\U0010ffff]"), "nothing fits"),
        (partial(Constraint.choice, []), "one text or more"),
        (partial(Constraint.choice, "yes"), "a list"),
        (partial(Constraint.choice, ["yes", 1]), "a text"),
        (partial(Constraint.lark, 'begin: "a"'), "start"),
        (partial(Constraint.lark, 'start: start "a"'), "nothing fits"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_a_line(make, words):
    with pytest.raises(UsageError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("bomb", ["(a{1000}){1000}", "(.*a){20}", "((a|b|ab)*c){1,900}", r"(\w+\s?){1,50}"])
def test_a_regex_bomb_takes_little(bomb):
    before = resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.suppress(UsageError):
        said(1, answer=Constraint.regex(bomb), max_tokens=60)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 150_000  # kB


def chain(wrapped, length: int) -> dict:
    """A schema whose `$ref`s lead from one to the next."""
    names = [f"#/$defs/a{i}" for i in range(length + 1)]
    defs = {f"a{i}": wrapped({"$ref": names[i + 1]}) for i in range(length)}
    return {"$defs": {**defs, f"a{length}": {"type": "integer"}}, "$ref": names[0]}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda part: {"type": "object", "properties": {"x": part}, "required": ["x"]},
        lambda part: {"anyOf": [{"type": "object", "properties": {"x": part}}, {"type": "null"}]},
        lambda part: {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": part}}},
        lambda part: {"allOf": [part]},
    ],
)
def test_a_schema_that_leads_too_deep_is_refused(wrapped):
    """llguidance would overflow the stack, which ends the process."""
    Constraint.json(chain(wrapped, 80))
    with pytest.raises(UsageError, match="schemas deep"):
        Constraint.json(chain(wrapped, 3000))


@pytest.mark.parametrize(
    "bomb",
    [
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(9000)},
         "required": [f"p{i}" for i in range(9000)]},
        {"type": "object", "properties": {f"p{j}": {"oneOf": [{"const": i} for i in range(150)]} for j in range(150)}},
        {"oneOf": [{"const": i} for i in range(20_000)]},
        chain(lambda part: {"anyOf": [part, part]}, 60), {"const": 10**400},
        {"type": "integer", "multipleOf": 999983}, {"type": "integer", "maximum": 10**400, "multipleOf": 10**400},
    ],
)  # fmt: skip
def test_a_schema_bomb_takes_little(bomb):
    before = time.process_time()
    with contextlib.suppress(UsageError):
        Constraint.json(bomb)
    assert time.process_time() - before < 5


def test_a_schema_that_holds_itself_where_it_may_end_is_kept():
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    result = said(2, answer=Constraint.json(schema))
    jsonschema.validate(json.loads(result.text), schema)


# --- regular expressions and choices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [None, GREEDY, BEAMS])
@pytest.mark.parametrize(
    "pattern",
    ["[0-9]{3}-[A-Z]{2,5}", "(yes|no|maybe)( [a-z]{1,3}){2}", "[😀-😿]{2}é?[一-三]{1,2}", "", "a{0,3}", "ab?c*d+|x",
     '"[^"]{0,9}"', "^[a-c]{2}$", "<[|]turn>[a-z]{1,4}", "x(?s:.){3}"],
)  # fmt: skip
def test_a_text_fits_its_regex(pattern, sampling):
    finished = 0
    for seed in range(8):
        result = said(seed, answer=Constraint.regex(pattern), sampling=sampling, max_tokens=40)
        finished += result.finish_reason == "stop"
        if result.finish_reason == "stop":
            assert re.fullmatch(pattern.replace("(?s:.)", "[^~]"), result.text), (pattern, result.text)
        assert not set(result.tokens) & set(TOKENIZER.special_tokens.values())
    assert finished >= 4


@pytest.mark.parametrize("sampling", [None, GREEDY, BEAMS])
def test_an_answer_is_one_of_the_choices(sampling):
    texts = ["yes", "no", "maybe later 😀", "a|b.*", "tab\tnew\nline", "<|turn>", "yes indeed", "ü", "\\", "2+2=4"]
    chosen = {said(seed, answer=Constraint.choice(texts), sampling=sampling).text for seed in range(60)}
    assert chosen <= set(texts)
    assert len(chosen) > 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=5))
def test_any_text_can_be_a_choice(texts):
    assert said(len(texts[0]), answer=Constraint.choice(texts)).text in texts


# --- in a reply -------------------------------------------------------------------------------------------------------


def test_what_is_certain_runs_in_one_pass():
    schema = {"type": "object", "properties": {"temperature": {"enum": [1, 2]}, "humidity": {"enum": [3, 4]}},
              "required": ["temperature", "humidity"]}  # fmt: skip
    session = Noise(1)
    result = said(1, session=session, answer=Constraint.json(schema))
    assert json.loads(result.text)["humidity"] in (3, 4)
    assert len(result.tokens) > 12
    assert len(session.passes) == 4  # the prompt, what stands before the first choice, before the second, and this one
    assert session.ids == [*TOKENIZER.encode("hello", bos=True), *result.tokens][: session.position]


def test_a_cut_answer_says_so_and_a_whole_one_does_not():
    constraint = Constraint.choice(["certainly not"])
    whole = said(1, answer=constraint)
    n = len(whole.tokens)
    assert (whole.text, whole.finish_reason) == ("certainly not", "stop")
    assert said(1, answer=constraint, max_tokens=n).finish_reason == "stop"
    cut = said(1, answer=constraint, max_tokens=n - 1)
    assert cut.finish_reason == "length"
    assert whole.text.startswith(cut.text)
    full = said(1, answer=constraint, session=Noise(1, context=len(TOKENIZER.encode("hello", bos=True)) + n - 2))
    assert full.finish_reason == "context"


def test_stop_strings_still_end_an_answer():
    result = said(1, answer=Constraint.choice(["one, two"]), stop_strings=[","])
    assert (result.text, result.finish_reason) == ("one", "stop")


def test_an_answer_ends_only_where_its_grammar_does():
    matcher = Bounds(TOKENIZER, answer=Constraint.regex("ab(cd)?"), stop_ids=STOPS)
    for text, may_end in (("a", False), ("b", True), ("c", False), ("d", True)):
        for token in [] if matcher.complete else [*TOKENIZER.encode(text)]:
            matcher.accept(token)
        allowed = matcher.allowed()
        assert (set(allowed.tolist()) >= STOPS) == may_end, text
    assert matcher.complete


@pytest.mark.parametrize(("grammar", "text"), [('start: "ab" <[1]>', "ab"), ("start: <[1]>", "")])
def test_a_grammar_may_name_the_token_that_ends_the_reply(grammar, text):
    assert 1 in STOPS
    result = said(1, answer=Constraint.lark(grammar))
    assert (result.text, result.finish_reason) == (text, "stop")


def test_a_thought_is_free_and_the_answer_is_bound():
    engine = FakeEngine("<|channel>thought\nfive? no.\n<channel|>two")
    chat = open_chat(engine, think=True)
    reply = chat.send("1 + 1", constraint=Constraint.choice(["one", "two"]))
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("five? no.", "two", "stop")


def test_a_thought_must_be_followed_by_an_answer():
    bounds = Bounds(TOKENIZER, answer=Constraint.choice(["yes"]), stop_ids=STOPS, thinks=True)
    opening, closing = (TOKENIZER.special_tokens[name] for name in ("<|channel>", "<channel|>"))
    assert opening in bounds.allowed()
    bounds.accept(opening)
    assert not STOPS & set(bounds.allowed().tolist())
    assert len(bounds.allowed()) == TOKENIZER.vocab_size - len(STOPS)
    bounds.accept(closing)
    assert bounds.forced() == TOKENIZER.encode("yes")
    assert bounds.complete


def test_without_thinking_there_is_no_thought():
    engine = FakeEngine("<|channel>thought\nfive? no.\n<channel|>two")
    reply = open_chat(engine).send("1 + 1", constraint=Constraint.choice(["two", "three"]))
    assert reply.reasoning == ""
    assert reply.text in ("two", "three")


def test_the_reply_after_is_free_again():
    chat = open_chat(FakeEngine("anything at all"))
    assert chat.send("a", constraint=Constraint.choice(["yes"])).text == "yes"
    assert chat.send("b").text == "anything at all"


def test_a_constraint_is_a_constraint():
    with pytest.raises(UsageError, match="constraint"):
        open_chat(FakeEngine("a")).send("a", constraint="yes|no")


def test_copies_go_on_by_themselves():
    matcher = Matcher(TOKENIZER, Constraint.choice(["ab", "cd"]).grammar)
    copy = matcher.copy()
    matcher.accept(TOKENIZER.encode("a")[0])
    assert copy.allowed().sum() > matcher.allowed().sum() == 1
    assert np.array_equal(copy.allowed(), Matcher(TOKENIZER, Constraint.choice(["ab", "cd"]).grammar).allowed())


def test_a_vocabulary_goes_with_its_engine():
    tokenizer = Tokenizer.load(FOLDER / "tokenizer.model")
    bounds = Bounds(tokenizer, answer=Constraint.choice(["yes"]))
    assert bounds.forced()
    gone = weakref.ref(tokenizer)
    del tokenizer, bounds
    gc.collect()
    assert gone() is None


def open_chat(engine, **options):
    from edge_gemma.chat import Chat

    return Chat(engine, sampling=GREEDY, **options)


@pytest.fixture(scope="module")
def demo():
    import edge_gemma

    with edge_gemma.load("demo") as engine:
        yield engine
