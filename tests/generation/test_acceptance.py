"""Which drafts are taken: every token is distributed as the target has it, whatever drafted, and no draft leaves a
trace in the session."""

import re
from itertools import product

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.export.synth import synthesize
from edge_gemma.export.synth_drafter import synthesize_drafter
from edge_gemma.generation.acceptance import Taken, accept, matching, sure
from edge_gemma.generation.mtp import DrafterDrafts
from edge_gemma.generation.sampler import Sampler, Sampling, candidates
from tests import ROOT

TOKENS = 3
GRID = 12  # every chance below is a multiple of 1/12, so that so many random numbers hit each case as often as it comes
UNIFORM = [(i + 0.5) / GRID for i in range(GRID)]
# Distributions in quarters or thirds; their quotients and what one has over another are multiples of 1/12 too.
SOME = [(4, 8, 0), (0, 4, 8), (4, 4, 4), (12, 0, 0), (8, 0, 4)]


def distribution(parts):
    """Ids in no order, those of no chance left out."""
    ids = [i for i in reversed(range(len(parts))) if parts[i]]
    return np.array(ids, np.int64), np.array([parts[i] / GRID for i in ids])


@pytest.mark.parametrize(("q", "p"), [*product(SOME, SOME)])
def test_the_first_token_is_drawn_from_the_target(q, p):
    found = np.zeros(TOKENS)
    for draft in range(TOKENS):
        for judged, drawn in product(UNIFORM, UNIFORM):
            numbers = iter((judged, drawn))
            taken = accept([draft], [distribution(q)], lambda _: distribution(p), lambda n=numbers: next(n))
            found[draft if taken.accepted else taken.token] += q[draft] / GRID / GRID**2
    np.testing.assert_allclose(found, np.array(p) / GRID, atol=1e-12)


def test_the_second_token_is_drawn_from_the_target_after_the_first():
    first_q, first_p = (4, 8, 0), (4, 4, 4)
    then_q = {0: (4, 4, 4), 1: (8, 0, 4), 2: (12, 0, 0)}  # given the first draft
    then_p = {0: (0, 4, 8), 1: (4, 8, 0), 2: (8, 0, 4)}
    found = np.zeros((TOKENS, TOKENS))
    for drafts in product(range(TOKENS), repeat=2):
        weight = first_q[drafts[0]] * then_q[drafts[0]][drafts[1]] / GRID**2
        after = [distribution(first_p), distribution(then_p[drafts[0]]), distribution((12, 0, 0))]
        before = [distribution(first_q), distribution(then_q[drafts[0]])]
        for numbers in product(UNIFORM, repeat=3):
            rest = iter(numbers)
            taken = accept(drafts, before, after.__getitem__, lambda n=rest: next(n))
            if taken.accepted:  # else the second token belongs to the next round
                found[drafts[0], drafts[1] if taken.accepted > 1 else taken.token] += weight / GRID**3
    reached = np.minimum(first_q, first_p) / np.float64(GRID)
    expected = reached[:, None] * np.array([then_p[i] for i in range(TOKENS)]) / GRID
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_last_token_is_drawn_from_the_target_when_all_are_taken():
    found = np.zeros(TOKENS)
    for numbers in product(UNIFORM, repeat=2):
        rest = iter(numbers)
        both = [sure(1), distribution((4, 0, 8))]
        taken = accept([1], [sure(1)], both.__getitem__, lambda n=rest: next(n))
        assert taken.accepted == 1
        found[taken.token] += 1 / GRID**2
    np.testing.assert_allclose(found, np.array((4, 0, 8)) / GRID, atol=1e-12)


def test_a_drawn_text_has_the_distribution_of_the_target():
    """20,000 texts of two tokens, all of them drafted by candidates of other logits: chi-square over the 36 texts."""
    rng = np.random.default_rng(22)
    p_logits, q_logits = (rng.normal(0, 1.2, (7, 6)).astype(np.float32) for _ in range(2))  # row: the token before
    sampling, rounds = Sampling(temperature=0.9, top_k=5, top_p=0.97), 20_000

    def expected(last):
        ids, chances = candidates(p_logits[last], sampling)
        row = np.zeros(6)
        row[ids] = chances
        return row

    counts = np.zeros((6, 6))
    for _ in range(rounds):
        text = []
        while len(text) < 2:
            last = text[-1] if text else 6
            drafts, before = [], []
            for _ in range(2):
                before.append(candidates(q_logits[drafts[-1] if drafts else last], sampling))
                drafts.append(int(rng.choice(before[-1][0], p=before[-1][1])))
            after = [candidates(p_logits[token], sampling) for token in (last, *drafts)]
            taken = accept(drafts, before, after.__getitem__, rng.random)
            text += [*drafts[: taken.accepted], taken.token]
        counts[text[0], text[1]] += 1
    wanted = rounds * np.array([expected(6)[i] * expected(i) for i in range(6)])
    assert not counts[wanted == 0].any()
    possible = wanted > 0
    chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize(("drafts", "said", "taken"), [
    ([], [5], Taken(0, 5)), ([5], [4], Taken(0, 4)), ([5, 6], [5, 7], Taken(1, 7)), ([5, 6], [5, 6, 8], Taken(2, 8)),
])  # fmt: skip
def test_matching_asks_the_target_once_for_every_token(drafts, said, taken):
    asked = []

    def sample(at):
        asked.append(at)
        return said[at]

    assert matching(drafts, sample) == taken
    assert asked == [*range(len(said))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A random model in integers (several rows give the bits of one) with a random drafter."""
    root = tmp_path_factory.mktemp("drafted")
    synthesize("tiny", root / "model")
    synthesize_drafter("tiny", root / "drafter")
    with Engine.load(root / "model", draft=root / "drafter", context=200, threads=1) as opened:
        yield opened


def caches(session):
    """The bytes of all keys and values that are still seen."""
    n = session.position
    session._settle()
    for layer in session._cache.layers.values():
        first = max(0, n - layer.window) if layer.window else 0
        yield from (part.tobytes() for part in layer.rows(first, n))


def test_500_random_sequences_leave_no_trace(engine):
    """Rounds of drafting, verifying and going back, far beyond the sliding window (32): the logits and the caches of a
    session that never drafted, bit for bit."""
    rng = np.random.default_rng(500)
    drafting, plain = engine.session(), engine.session()
    source = DrafterDrafts(engine.drafter, Sampling(temperature=1.0), seed=1)
    drafted, length = 0, 6
    for sequence in range(500):
        if drafting.position + 40 > engine.context or sequence % 50 == 0:
            for session in (drafting, plain):
                session.rewind(0)
            prompt = rng.integers(60, 1000, int(rng.integers(1, 60))).tolist()
            hidden = drafting.hidden(prompt, last=1)[-1]
            plain.prefill(prompt)
        for _ in range(int(rng.integers(1, 4))):
            token = int(rng.integers(60, 1000))
            drafts = source.draft(drafting, hidden, token, int(rng.integers(0, length + 1))).tokens
            drafted += len(drafts)
            rows = drafting.hidden([token, *drafts])
            accepted = int(rng.integers(0, len(drafts) + 1))
            drafting.rewind(drafting.position - len(drafts) + accepted)
            hidden = rows[accepted]
            for taken in (token, *drafts[:accepted]):
                expected = plain.step(taken)
            np.testing.assert_array_equal(drafting.logits(rows)[accepted], expected)
        assert drafting.ids == plain.ids
        if sequence % 10 == 0:
            assert list(caches(drafting)) == list(caches(plain))
    assert drafted > 2000


def test_drafts_do_not_fill_the_prefix_cache(tmp_path):
    """Passes over drafts that are taken back leave what a session that decodes token by token leaves."""
    synthesize("tiny", tmp_path / "model")
    with Engine.load(tmp_path / "model", context=400, threads=1, cache_size=8) as engine:
        session = engine.session(shared=True)
        session.prefill([*range(70, 90)])
        for token in range(100, 150):
            start = session.position
            session.hidden([token, 7, 8, 9])
            session.rewind(start + 1)
        assert session.position == 70
        runs = [run for found in engine._model._prefixes._runs.values() for run in found]
        assert [run.tokens.tolist() for run in runs] == [[*range(70, 90)]]
        session.share()
        again = engine.session(shared=True)
        assert again.recall([*range(70, 90), *range(100, 150), 3]) == 70


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=1.2, top_k=40, seed=5)])
def test_a_drafted_text_is_the_plain_text(engine, sampling):
    """`matching` with the target's sampler: the same tokens for the same seed, whatever was drafted."""
    prompt, length = [*range(70, 80)], 60
    plain, sampler, expected = engine.session(), Sampler(sampling), []
    logits = plain.prefill(prompt)
    for _ in range(length):
        expected.append(sampler.sample(logits))
        logits = plain.step(expected[-1])

    def right(at):
        """Drafts: the right ones, from some place on others."""
        drafts = expected[at : at + 4]
        return drafts[: at % 5] + [token ^ 1 for token in drafts[at % 5 :]]

    session, sampler = engine.session(), Sampler(sampling)
    text = [sampler.sample(session.prefill(prompt))]
    passes = 0
    while len(text) < length:
        drafts = right(len(text))
        rows = session.forward([text[-1], *drafts])
        taken = matching(drafts, lambda at, rows=rows: sampler.sample(rows[at]))
        session.rewind(session.position - len(drafts) + taken.accepted)
        text += [*drafts[: taken.accepted], taken.token]
        passes += 1
    assert text[:length] == expected
    assert passes < length * 0.6


def test_the_page_of_drafters_runs(engine, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "DRAFTERS.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "gemma-4-e2b").symlink_to(engine.path)
    (tmp_path / "gemma-4-e2b-drafter").symlink_to(engine.path.parent / "drafter")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    session, text = engine.session(), []
    logits = session.prefill(engine.tokenizer.encode("Once upon a time"))
    while len(text) < 40:
        text.append(int(logits.argmax()))
        logits = session.step(text[-1])
    assert names["text"][:40] == text
    assert capsys.readouterr().out.strip()


def test_drafts_say_what_they_were_drawn_from(engine):
    session = engine.session()
    hidden = session.hidden([70, 80, 90], last=1)[-1]
    likeliest = DrafterDrafts(engine.drafter).draft(session, hidden, 100, 4)
    assert [(ids.tolist(), chances.tolist()) for ids, chances in likeliest.drawn_from] == [
        ([token], [1.0]) for token in likeliest.tokens
    ]
    sampling = Sampling(temperature=1.0, top_k=3)
    firsts = [DrafterDrafts(engine.drafter, sampling, seed).draft(session, hidden, 100, 1) for seed in range(400)]
    ids, chances = firsts[0].drawn_from[0]
    assert (len(ids), ids[0]) == (3, likeliest.tokens[0])
    np.testing.assert_allclose(chances.sum(), 1)
    drawn = np.array([(ids == draft.tokens[0]).argmax() for draft in firsts])
    counts = np.bincount(drawn, minlength=3)
    chi_square = ((counts - 400 * chances) ** 2 / (400 * chances)).sum()
    assert chi_square < 14, counts  # two degrees of freedom: one in a thousand
    assert session.ids == [70, 80, 90]
