"""Drafts change no reply: with and without them every token, chance and reason is the same, and so is the session."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma import session as session_module
from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.generation.ahead import Ahead
from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.constraint import Constraint
from edge_gemma.generation.gain import LONGEST_DRAFT, Gain, Prices
from edge_gemma.generation.generate import Generation
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.text.message import Message
from tests.drafting import Rule, Told
from tests.embedded import FOLDER
from tests.fakes import BYTE, FakeTokenizer
from tests.tiny import write_checkpoint

TOKENIZER = FakeTokenizer()
END = TOKENIZER.special_tokens["<turn|>"]
LETTERS = [BYTE + b for b in b"abcdefgh <>|"]
LENGTHS = st.lists(st.integers(0, LONGEST_DRAFT), min_size=1, max_size=5).filter(any)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 64]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    seed=st.integers(0, 9),
)


def written(gain, *, seed=1, sampling=None, likely=LETTERS, prompt="ab ab ", context=300, stops=(), **options):
    """A reply on a timeline of its own. Returns (result, pieces, session)."""
    session = Rule(seed, likely, context)
    generation = Generation(
        session, TOKENIZER.encode(prompt, bos=True), tokenizer=TOKENIZER, stop_ids={END},
        sampler=Sampler(sampling or Sampling(temperature=0)), stop_strings=stops, drafts=gain, **options,
    )  # fmt: skip
    pieces = list(generation)
    return generation.result, pieces, session


def told(result):
    return (
        result.tokens, result.text, result.reasoning, result.tool_calls, result.finish_reason, result.chances,
    )  # fmt: skip


def same(lengths, **options):
    """With and without drafts; returns both results."""
    make = options.pop("bounds", lambda: None)
    plain, shown, session = written(None, bounds=make(), **options)
    drafted, shown_too, session_too = written(Told(lengths), bounds=make(), **options)
    assert told(drafted) == told(plain)
    assert shown_too == shown
    # nothing that was not written is left behind; what was run ahead and written may be
    everything = [*TOKENIZER.encode(options.get("prompt", "ab ab "), bos=True), *plain.tokens, END]
    assert session_too.ids == everything[: session_too.position]
    assert session.position <= session_too.position
    return plain, drafted, session, session_too


@given(
    LENGTHS, st.integers(0, 50), SAMPLINGS, st.integers(1, 120),
    st.sampled_from([(), ("b a",), ("zz", "a")]), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(8, 90),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_every_reply_is_the_same(lengths, seed, sampling, max_tokens, stops, chances, ends, context):
    likely = [*LETTERS, END] if ends else LETTERS
    same(
        lengths, seed=seed, sampling=sampling, max_tokens=max_tokens, stops=stops, chances=chances, likely=likely,
        context=context,
    )  # fmt: skip


@given(LENGTHS, st.integers(0, 30), SAMPLINGS, st.sampled_from(["regex", "json", "choice", "thought"]))
@settings(deadline=None, max_examples=60)
def test_every_bound_reply_is_the_same(lengths, seed, sampling, kind):
    answer = {
        "regex": lambda: Constraint.regex("(ab|c d){5,30}"),
        "json": lambda: Constraint.json({"type": "array", "items": {"enum": ["abab", "baba"]}, "minItems": 5}),
        "choice": lambda: Constraint.choice(["abcabcabc" * 5, "abcabcabd" * 5]),
        "thought": lambda: None,
    }[kind]()
    prompt = "<|channel>thought\n" if kind == "thought" else "ab ab "

    def bounds():
        return Bounds(
            TOKENIZER, answer=answer, stop_ids={END}, prompt_ids=TOKENIZER.encode_prompt(prompt),
            most_thought=20 if kind == "thought" else None,
        )  # fmt: skip

    same(lengths, seed=seed, sampling=sampling, bounds=bounds, max_tokens=150)


def test_drafts_save_passes_where_a_text_repeats():
    plain, drafted, session, session_too = same([15], max_tokens=200)
    assert drafted.timings.accepted_tokens > 100
    assert drafted.timings.drafted_tokens >= drafted.timings.accepted_tokens
    assert len(session_too.passes) < len(session.passes) / 4
    assert (plain.timings.drafted_tokens, plain.timings.accepted_tokens) == (0, 0)


def test_what_was_guessed_wrong_and_what_follows_an_end_is_no_pass_longer_than_allowed():
    for most in (1, 2, 5, 16, 17, 40):
        _, _, _, session = same([15], max_tokens=most)
        prompt = len(TOKENIZER.encode("ab ab ", bos=True))
        assert session.position <= prompt + most
        assert max(session.passes[1:], default=1) <= 16


def test_nothing_is_drafted_behind_a_stop_token():
    session = Rule(1, LETTERS)
    expected = [*TOKENIZER.encode("abc"), END, *TOKENIZER.encode("defgh")]
    ahead = Ahead(session, Told([15]), stop_ids={END}, expected=expected)
    session.prefill([2])
    ahead.run(expected[:1], most=15)
    assert session.ids == [2, *expected[:3]]


def test_a_draft_follows_tokens_that_are_certain():
    text = TOKENIZER.encode("abcdefgh")
    session = Rule(1, LETTERS)
    session.prefill([2])
    ahead = Ahead(session, Told([5]), expected=text)
    ahead.run(text[:3], most=9)
    assert session.ids == [2, *text]
    assert ahead.ids == [2, *text[:3]]
    passes = len(session.passes)
    logits = ahead.run(text[3:6], most=9)  # all of them were run ahead
    assert len(session.passes) == passes
    assert np.array_equal(logits, session.logits([2, *text[:6]]))
    other = TOKENIZER.encode("gx")  # one was, one was not
    logits = ahead.run(other, most=0)
    assert session.ids == ahead.ids == [2, *text[:7], other[1]]
    assert session.passes[passes:] == [1]
    assert np.array_equal(logits, session.logits(session.ids))


@given(st.data(), LENGTHS, st.integers(0, 20))
@settings(deadline=None)
def test_logits_are_those_of_one_token_after_another(data, lengths, seed):
    """Whatever is chosen, also against the logits."""
    session, alone = Rule(seed, LETTERS), Rule(seed, LETTERS)
    prompt = data.draw(st.lists(st.sampled_from(LETTERS[:3]), min_size=1, max_size=30))
    expected = data.draw(st.lists(st.sampled_from(LETTERS[:3]), max_size=30))
    session.prefill(prompt)
    alone.prefill(prompt)
    ahead = Ahead(session, Told(lengths), expected=expected)
    for _ in range(data.draw(st.integers(1, 12))):
        tokens = data.draw(st.lists(st.sampled_from(LETTERS[:3]), min_size=1, max_size=4))
        assert np.array_equal(ahead.run(tokens, most=data.draw(st.integers(0, 20))), alone.prefill(tokens))
        assert ahead.ids == alone.ids
    ahead.close()
    assert session.ids == alone.ids


@pytest.mark.parametrize("fail_at", range(1, 12))
def test_an_interruption_leaves_nothing_that_was_not_written(fail_at):
    session = Rule(1, LETTERS)
    prompt = TOKENIZER.encode("ab ab ", bos=True)
    whole, _, _ = written(None, max_tokens=80)

    def start(gain):
        return Generation(
            session, prompt, tokenizer=TOKENIZER, sampler=Sampler(Sampling(temperature=0)), max_tokens=80, drafts=gain
        )

    session.fail_at = fail_at
    generation = start(Told([15, 7]))
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert generation.result.finish_reason == "interrupted"
    assert generation.result.tokens == whole.tokens[: len(generation.result.tokens)]
    assert session.ids == [*prompt, *whole.tokens][: session.position]
    assert session.position <= len(prompt) + len(generation.result.tokens)
    session.fail_at = None
    again = start(Told([15, 7]))
    list(again)
    assert again.result.tokens == whole.tokens


@pytest.mark.parametrize("how", ["close", "stopping"])
@pytest.mark.parametrize("after", range(1, 30, 4))
def test_a_reply_that_is_left_in_a_draft_leaves_nothing_that_was_not_written(how, after):
    session, stopping = Rule(1, LETTERS), threading.Event()
    prompt = TOKENIZER.encode("ab ab ", bos=True)
    generation = Generation(
        session, prompt, tokenizer=TOKENIZER, sampler=Sampler(Sampling(temperature=0)), drafts=Told([15]),
        stopping=stopping,
    )  # fmt: skip
    for _ in itertools.islice(generation, after):
        pass
    if how == "close":
        generation.close()
    else:
        stopping.set()
        assert list(generation) == []
    tokens = generation.result.tokens
    assert len(tokens) == after
    assert generation.result.finish_reason == "interrupted"
    assert session.ids == [*prompt, *tokens][: session.position]


def test_beams_draft_nothing():
    gain = Told([15])
    beams = Sampling(temperature=0, num_beams=3)
    plain, _, _ = written(None, sampling=beams, max_tokens=40)
    drafted, _, _ = written(gain, sampling=beams, max_tokens=40)
    assert told(drafted) == told(plain)
    assert drafted.timings.drafted_tokens == 0


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = [("e2b", "q4"), ("e4b", "q4"), ("dense", "q8"), ("gemma3", "q8")]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def engine(request, tmp_path_factory):
    kind, recipe = request.param
    root = tmp_path_factory.mktemp(kind)
    folder = export_checkpoint(write_checkpoint(root / "source", kind), root / "model", recipe)
    with Engine.load(folder, threads=1, cache_size=0, context=500) as engine:
        yield engine


def continued(engine, gain, *, tokens, sampling, session=None):
    session = session or engine.session()
    prompt = np.random.default_rng(3).integers(20, 640, 60).tolist() * 3  # longer than every ring
    generation = Generation(
        session, prompt, tokenizer=engine.tokenizer, sampler=Sampler(sampling), max_tokens=tokens, drafts=gain,
        chances=2,
    )  # fmt: skip
    for _ in generation:
        pass
    return generation.result, session


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_model_writes_the_same_and_its_rings_are_those_of_a_session_that_never_drafted(engine, temperature):
    sampling = Sampling(temperature=temperature, seed=5)
    plain, alone = continued(engine, None, tokens=150, sampling=sampling)
    drafted, session = continued(engine, Told(), tokens=150, sampling=sampling)
    assert told(drafted) == told(plain)
    assert drafted.timings.drafted_tokens > 40
    assert drafted.timings.accepted_tokens < drafted.timings.drafted_tokens  # there were rewinds
    session.rewind(alone.position)
    assert session.ids == alone.ids
    more = [7, 300, 12, 9]
    assert np.array_equal(session.forward(more), alone.forward(more))


def test_chunks_shorter_than_a_draft(engine, monkeypatch):
    """A rewind may then be further than the rings reach back."""
    sampling = Sampling(temperature=0)
    plain, _ = continued(engine, None, tokens=80, sampling=sampling)
    monkeypatch.setattr(session_module, "CHUNK", 5)
    drafted, _ = continued(engine, Told([15]), tokens=80, sampling=sampling)
    assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("after", [1, 3, 9])
def test_work_that_is_called_off_leaves_a_session_that_can_go_on(engine, after):
    sampling = Sampling(temperature=0)
    plain, _ = continued(engine, None, tokens=60, sampling=sampling)
    calls = 0

    def between():
        nonlocal calls
        calls += 1
        if calls == after:
            raise EdgeGemmaError("called off")

    session = engine.session()
    continued(engine, None, tokens=1, sampling=sampling, session=session)
    engine.between = between
    try:
        with pytest.raises(EdgeGemmaError, match="called off"):
            continued(engine, Told([15]), tokens=60, sampling=sampling, session=session)
    finally:
        engine.between = lambda: None
    drafted, _ = continued(engine, Told([15]), tokens=60, sampling=sampling, session=session)
    assert drafted.tokens == plain.tokens


@pytest.fixture(scope="module")
def talkers():
    """The demonstration model without drafts, and with them wherever there is a match."""
    with (
        Engine.load(FOLDER, threads=1, cache_size=0, drafts=False) as plain,
        Engine.load(FOLDER, threads=1, cache_size=0) as drafting,
    ):
        assert plain.drafts() is None
        assert isinstance(drafting.drafts(), Gain)
        drafting.drafts = Told
        yield plain, drafting


TOOL = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2, "min_p": 0.05},
        {"think": True},
        {"think": True, "think_budget": 5},
        {"think": "auto"},
        {"tools": [TOOL]},
        {"tools": [TOOL], "think": True, "temperature": 0.7, "seed": 2},
        {"stop": ["e"]},
        {"max_tokens": 7},
        {"num_beams": 3},
    ],
    ids=str,
)
def test_a_conversation_is_the_same(talkers, options):
    chats = [engine.chat(**{"temperature": 0, "num_beams": 1, **options}) for engine in talkers]
    guessed = 0
    for said in ("Set a timer for 5 minutes.", "Set a timer for 5 minutes, please.", "What is a timer?"):
        plain, drafted = (chat.send(said).result() for chat in chats)
        assert told(drafted) == told(plain)
        assert drafted.need == plain.need
        guessed += drafted.timings.drafted_tokens
        if plain.tool_calls:
            plain, drafted = (chat.send(Message("tool", "done", name="set_timer")).result() for chat in chats)
            assert told(drafted) == told(plain)
    assert chats[0].messages == chats[1].messages
    assert bool(guessed) == (options.get("num_beams") != 3)


def test_a_bound_answer_is_the_same(talkers):
    schema = {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string", "maxLength": 9},
              "minItems": 4, "maxItems": 6}}, "required": ["names"], "additionalProperties": False}  # fmt: skip
    for seed in range(3):
        replies = [
            engine.chat(temperature=1.0, seed=seed, max_tokens=120).send(
                "Name some tools.", constraint=Constraint.json(schema)
            )
            for engine in talkers
        ]
        plain, drafted = (reply.result() for reply in replies)
        assert told(drafted) == told(plain)


# --- switching it off -------------------------------------------------------------------------------------------------


def test_who_wants_no_drafts_has_none():
    with pytest.raises(UsageError, match="drafts"):
        Engine.load(FOLDER, drafts="no")


def test_onnxruntime_has_none(made):
    with Engine.load(made("gemma3")[1], backend="onnx") as engine:
        assert engine.drafts() is None


def test_what_passes_cost_is_known_to_all_conversations_of_a_model():
    with Engine.load(FOLDER, threads=1, cache_size=0) as engine:
        first, second = engine.drafts(), engine.drafts()
        assert first is not second
        assert first.prices is second.prices
        assert isinstance(first.prices, Prices)
        assert not second.prices.ready
        engine.generate("Set a timer for 5 minutes.", temperature=0, num_beams=1).result()
        assert first.prices.ready
