"""A drafter in the reply loop: it changes no reply and leaves nothing behind, it is asked with the right row, and only
where that pays."""

import threading

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.export.synth import synthesize
from edge_gemma.export.synth_drafter import synthesize_drafter
from edge_gemma.generation.ahead import Ahead
from edge_gemma.generation.gain import DRAFTED, Gain, Prices
from edge_gemma.generation.generate import Generation
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.session import Session
from tests.drafting import Told

PROMPT = [2, *np.random.default_rng(3).integers(60, 1000, 50).tolist()]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("drafter-loop")
    return synthesize("tiny", root / "model"), synthesize_drafter("tiny", root / "drafter")


@pytest.fixture(scope="module")
def engine(folders):
    """A random model in integers (several rows give the bits of one) with a random drafter."""
    with Engine.load(folders[0], draft=folders[1], context=300, threads=1, cache_size=0) as opened:
        yield opened


def written(engine, gain, *, session=None, tokens=100, sampling=GREEDY, drafter=True, **options):
    session = session or engine.session()
    generation = Generation(
        session, PROMPT, tokenizer=engine.tokenizer, sampler=Sampler(sampling), max_tokens=tokens, drafts=gain,
        chances=2, drafter=engine.drafter if drafter else None, **options,
    )  # fmt: skip
    for _ in generation:
        pass
    return generation.result, session


def caches(session):
    """The bytes of all keys and values that are still seen."""
    n = session.position
    for layer in session.settled().layers.values():
        first = max(0, n - layer.window) if layer.window else 0
        yield from (part.tobytes() for part in layer.rows(first, n))


class Knowing:
    """In place of `Session.draft`: the tokens that will come, but for some. It asks the drafter too, and checks the row
    and the token that it is asked with."""

    def __init__(self, engine, monkeypatch, will_come, wrong=0.3):
        self.calls = self.right = 0
        self._engine, self._real, self._will_come = engine, Session.draft, will_come
        self._rng, self._wrong = np.random.default_rng(1), wrong
        monkeypatch.setattr(Session, "draft", lambda session, *args: self(session, *args))

    def __call__(self, session, drafter, hidden, token, most, choose):
        drafts = self._real(session, drafter, hidden, token, most, choose)
        assert len(drafts) == most
        alone = self._engine.session()
        np.testing.assert_array_equal(hidden, alone.hidden(session.ids, last=1)[-1])
        assert [*session.ids, token] == self._will_come[: session.position + 1]
        self.calls += 1
        coming = self._will_come[session.position + 1 :][:most]
        coming = [*coming, *drafts[len(coming) :]]
        return [known if self._rng.random() > self._wrong else known ^ 1 for known in coming]


SAMPLINGS = pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.0, seed=5), Sampling(temperature=0.7, top_k=9, repetition_penalty=1.2,
    seed=1)], ids=["greedy", "drawn", "penalty"],
)  # fmt: skip


@SAMPLINGS
def test_a_reply_is_the_same_and_the_caches_are_those_of_a_session_that_never_drafted(engine, sampling):
    plain, alone = written(engine, None, sampling=sampling)
    gain = Told([4, 2, 7, 0, 1, 15])
    drafted, session = written(engine, gain, sampling=sampling)
    assert (drafted.tokens, drafted.text, drafted.chances) == (plain.tokens, plain.text, plain.chances)
    assert DRAFTED in gain.told
    assert drafted.timings.drafted_tokens > 60
    session.rewind(alone.position)
    assert session.ids == alone.ids
    assert list(caches(session)) == list(caches(alone))


@SAMPLINGS
def test_drafts_that_come_are_taken_and_the_drafter_is_asked_with_the_row_of_the_last_token(
    engine, sampling, monkeypatch
):
    plain, alone = written(engine, None, sampling=sampling)
    knowing = Knowing(engine, monkeypatch, [*PROMPT, *plain.tokens])
    drafted, session = written(engine, Told([3, 5, 1]), sampling=sampling)
    assert (drafted.tokens, drafted.chances) == (plain.tokens, plain.chances)
    assert knowing.calls > 10
    assert 30 < drafted.timings.accepted_tokens < drafted.timings.drafted_tokens
    session.rewind(alone.position)
    assert list(caches(session)) == list(caches(alone))


def test_the_first_token_after_a_prompt_and_after_a_plain_pass_is_drafted_too(engine, monkeypatch):
    plain, _ = written(engine, None, tokens=12)
    knowing = Knowing(engine, monkeypatch, [*PROMPT, *plain.tokens], wrong=0.0)
    positions = []
    real = Session.draft
    monkeypatch.setattr(Session, "draft", lambda s, *args: positions.append(s.position) or real(s, *args))
    gain = Told([2, 0, 3])
    gain.choose = lambda offers, tokens=1: (len(offers) - 1, min(next(gain._lengths), offers[-1][1]))
    written(engine, gain, tokens=12)
    assert knowing.calls == len(positions)
    assert positions[:3] == [len(PROMPT), len(PROMPT) + 4, len(PROMPT) + 8]  # 2 drafts, none, 3, 2


def test_random_sequences_of_the_loop_leave_no_trace(engine, monkeypatch):
    """300 passes, each followed by what was drafted, a part of it, or something else."""
    rng = np.random.default_rng(300)
    drafting, alone, runs, accepted = engine.session(), engine.session(), 0, 0
    while runs < 300:
        for session in (drafting, alone):
            session.rewind(0)
        prompt = rng.integers(60, 1000, int(rng.integers(1, 60))).tolist()
        drafting.prefill(prompt)
        alone.prefill(prompt)
        ahead = Ahead(drafting, Told([4, 1, 0, 9, 15]), drafter=engine.drafter)
        tokens = rng.integers(60, 1000, 1).tolist()
        while alone.position + 40 < engine.context:
            np.testing.assert_array_equal(ahead.run(tokens, most=20), [alone.step(token) for token in tokens][-1])
            assert ahead.ids == alone.ids
            runs += 1
            kept = ahead._draft[: int(rng.integers(0, len(ahead._draft) + 1))]  # what comes next
            others = rng.integers(60, 1000, int(rng.integers(0 if kept else 1, 3))).tolist()
            tokens = [*kept, *others] if rng.random() < 0.5 else kept[:1] or others
        accepted += ahead.accepted
        ahead.close()
        assert drafting.ids == alone.ids
        assert list(caches(drafting)) == list(caches(alone))
    assert accepted > 100


@pytest.mark.parametrize("after", [1, 3, 6, 9])
def test_work_that_is_called_off_leaves_a_session_that_can_go_on(engine, after):
    plain, _ = written(engine, None, tokens=60)
    session, calls = engine.session(), 0
    written(engine, None, tokens=1, session=session)

    def between():
        nonlocal calls
        calls += 1
        if calls == after:
            raise EdgeGemmaError("called off")

    engine.between = between
    try:
        with pytest.raises(EdgeGemmaError, match="called off"):
            written(engine, Told([4]), tokens=60, session=session)
    finally:
        engine.between = lambda: None
    assert written(engine, Told([4]), tokens=60, session=session)[0].tokens == plain.tokens


def test_nothing_is_drafted_behind_a_stop_token(engine, monkeypatch):
    plain, _ = written(engine, None, tokens=20)
    Knowing(engine, monkeypatch, [*PROMPT, *plain.tokens], wrong=0.0)
    passes, real = [], Session.hidden
    monkeypatch.setattr(Session, "hidden", lambda s, ids, last=None: passes.append(ids) or real(s, ids, last))
    stop = next(token for i, token in enumerate(plain.tokens) if i > 3 and token not in plain.tokens[:i])
    ended, session = written(engine, Told([15]), tokens=40, stop_ids={stop})
    assert ended.finish_reason == "stop"
    assert ended.tokens == plain.tokens[: plain.tokens.index(stop)]
    assert session.position <= len(PROMPT) + len(ended.tokens)
    run = [token for ids in passes if ids[: len(PROMPT)] != PROMPT[: len(ids)] for token in ids]
    assert len(run) > 3
    assert stop not in run


def test_behind_several_tokens_that_are_certain_no_drafter_is_asked(engine, monkeypatch):
    monkeypatch.setattr(Session, "draft", lambda *_: pytest.fail("was asked"))
    session, gain = engine.session(), Told([4])
    session.prefill(PROMPT)
    ahead = Ahead(session, gain, drafter=engine.drafter)
    ahead.run([700, 701, 702], most=9)
    assert gain.told == []


def test_beams_ask_no_drafter(engine, monkeypatch):
    monkeypatch.setattr(Session, "draft", lambda *_: pytest.fail("was asked"))
    generation = Generation(
        engine.session(), PROMPT, tokenizer=engine.tokenizer, max_tokens=20, drafts=Told([15]), drafter=engine.drafter,
        sampler=Sampler(Sampling(temperature=0, num_beams=3)),
    )  # fmt: skip
    list(generation)
    assert generation.result.timings.drafted_tokens == 0


def test_a_session_that_decodes_with_others_has_no_row(engine):
    """Its tokens go through in common passes; a draft would take it out of them."""
    sessions = [engine.session() for _ in range(2)]
    for session in sessions:
        session.prefill(PROMPT)
        np.testing.assert_array_equal(session.row, engine.session().hidden(PROMPT)[-1])
    sessions[0].batch.steps([(session, 77) for session in sessions])
    assert all(session.row is None for session in sessions)
    sessions[0].step(78)
    np.testing.assert_array_equal(sessions[0].row, engine.session().hidden([*PROMPT, 77, 78])[-1])


def test_nothing_is_drafted_in_company(engine):
    """A pass with other sessions' tokens says nothing of prices; alone again, drafts come back."""
    session, other = engine.session(), engine.session()
    for each in (session, other):
        each.prefill([5, 6, 7] * 12)
    gain = Told([3])
    ahead = Ahead(session, gain)
    for turn, company in enumerate([False, True, True, False, False]):
        if company:
            session.batch.steps([(session, 5), (other, 5)])
            assert session.accompanied
            session.rewind(session.position - 1)
        drafted, priced = ahead.drafted, list(gain.told)
        ahead.run([5 + turn % 3], 9)
        if company:
            assert (ahead.drafted, gain.told) == (drafted, priced)
        ahead.close()
        assert not session.accompanied
    assert ahead.drafted > 0


# --- whether it pays --------------------------------------------------------------------------------------------------


def ready(costs):
    """Prices of a machine, in steps of a second: costs of passes by their rows; a drafter's token takes 0.05."""
    prices = Prices()
    for rows, seconds in costs.items():
        for _ in range(3):
            prices.add(rows, seconds)
    prices.add_drafts(1, 0.05)
    return prices


CHEAP = {2: 1.1, 4: 1.2, 8: 2.0, 16: 4.0, 1: 1.0}


def test_a_drafter_that_fails_is_asked_a_few_times_and_then_rarely(engine, monkeypatch):
    """A random drafter is never right about a text that is drawn, nor does that repeat itself."""
    gain = Gain(ready(CHEAP))
    monkeypatch.setattr(gain.prices, "add", lambda *_, **__: None)  # the times of this machine
    monkeypatch.setattr(gain.prices, "add_drafts", lambda *_, **__: None)
    asked = []
    real = Session.draft
    monkeypatch.setattr(Session, "draft", lambda s, d, h, t, most, c: asked.append(most) or real(s, d, h, t, most, c))
    drawn = Sampling(temperature=1.0, seed=2)
    result, _ = written(engine, gain, tokens=200, sampling=drawn)
    plain, _ = written(engine, None, tokens=200, sampling=drawn)
    assert result.tokens == plain.tokens
    assert 5 < len(asked) < 40
    assert result.timings.drafted_tokens < 20


def test_a_drafter_that_is_right_is_drafted_from_soon(engine, monkeypatch):
    plain, _ = written(engine, None, tokens=150)
    Knowing(engine, monkeypatch, [*PROMPT, *plain.tokens], wrong=0.1)
    gain = Gain(ready(CHEAP))
    monkeypatch.setattr(gain.prices, "add", lambda *_, **__: None)
    monkeypatch.setattr(gain.prices, "add_drafts", lambda *_, **__: None)
    result, _ = written(engine, gain, tokens=150)
    assert result.tokens == plain.tokens
    assert result.timings.accepted_tokens > 80


# --- the doors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 4}, {"stop": ["e"]}, {"max_tokens": 3}], ids=str)
def test_a_conversation_is_the_same(folders, options, monkeypatch):
    with (
        Engine.load(folders[0], threads=1, cache_size=0, context=600) as plain,
        Engine.load(folders[0], draft=folders[1], threads=1, cache_size=0, context=600) as drafting,
    ):
        assert isinstance(drafting.drafts(), Gain)
        gains = []
        monkeypatch.setattr(drafting, "drafts", lambda: gains.append(Told([3, 1, 0, 7])) or gains[-1])
        settings = {"temperature": 0, "max_tokens": 40, **options}
        chats = [engine.chat(**settings) for engine in (plain, drafting)]
        for said in ("Hello there.", "Hello there, again."):
            one, other = (chat.send(said).result() for chat in chats)
            assert (other.tokens, other.text, other.finish_reason) == (one.tokens, one.text, one.finish_reason)
        assert chats[0].messages == chats[1].messages
        assert DRAFTED in gains[0].told


def test_a_reply_may_be_stopped_from_another_thread(engine):
    stopping = threading.Event()
    generation = Generation(
        engine.session(), PROMPT, tokenizer=engine.tokenizer, sampler=Sampler(GREEDY), drafts=Told([7]),
        drafter=engine.drafter, stopping=stopping,
    )  # fmt: skip
    for _ in generation:
        if len(generation.result.tokens) > 10:
            stopping.set()
    result = generation.result
    assert result.finish_reason == "interrupted"
    session = generation._session
    assert session.ids == [*PROMPT, *result.tokens][: session.position]


def test_a_drafter_beside_drafts_that_are_off_is_refused(folders):
    with pytest.raises(UsageError, match=r"draft is a drafter, and drafts is False.*leave one of them out"):
        Engine.load(folders[0], draft=folders[1], drafts=False)
