"""Beam search against all replies there are, against transformers, and through everything that uses it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.audio.recogniser import verbatim
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generation import beams
from edge_gemma.generation.beams import search
from edge_gemma.generation.generate import Generation
from edge_gemma.generation.sampler import Sampler, Sampling
from tests.fakes import BYTE, FakeTokenizer

PROMPT = [7, 8, 9]


class Tree:
    """A timeline whose logits hang on all tokens before: random ones, or those of `scripted`, by the reply so far."""

    def __init__(self, vocab: int, seed: int = 0, spread: float = 2.0, scripted=None, context: int = 1000) -> None:
        self.context, self.ids, self.runs = context, list(PROMPT), []
        self._vocab, self._seed, self._spread, self._scripted = vocab, seed, spread, scripted or {}

    @property
    def position(self) -> int:
        return len(self.ids)

    def after(self, tokens: tuple[int, ...]) -> np.ndarray:
        if tokens in self._scripted:
            chances = np.full(self._vocab, 1e-9)
            for token, chance in self._scripted[tokens].items():
                chances[token] = chance
            return np.log(chances / chances.sum()).astype(np.float32)
        draw = np.random.default_rng([self._seed, len(tokens), *tokens])
        return (draw.standard_normal(self._vocab) * self._spread).astype(np.float32)

    def prefill(self, ids: list[int]) -> np.ndarray:
        assert ids
        assert len(self.ids) + len(ids) <= self.context
        if self.interrupt_at in ids:
            raise KeyboardInterrupt
        self.ids += ids
        self.runs.append(len(ids))
        return self.after(tuple(self.ids[len(PROMPT) :]))

    interrupt_at = None  # a token
    step = None  # never used: a hypothesis is a prompt

    def rewind(self, position: int) -> None:
        assert 0 <= position <= self.position
        del self.ids[position:]

    def recall(self, ids: list[int], sounds: object) -> int:
        return 0

    def mark(self) -> None: ...


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


def found(tree: Tree, num_beams: int, limit: int, stop_ids=(0,), **sampling) -> list[int]:
    sampler = Sampler(Sampling(temperature=0, num_beams=num_beams, **sampling))
    return list(search(tree, tree.after(()), sampler=sampler, limit=limit, stop_ids=set(stop_ids)))


def likeliest_of_all(tree: Tree, vocab: int, limit: int) -> tuple[float, tuple[int, ...]]:
    """Every reply that ends with token 0 or at the limit, one by one."""
    best = (-math.inf, ())
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if 0 in tokens[:-1] or (tokens[-1] != 0 and length < limit):
                continue
            score = sum(log_softmax(tree.after(tokens[:i]))[t] for i, t in enumerate(tokens))
            best = max(best, (score, tokens))
    return best


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1 << 30), vocab=st.integers(2, 4), limit=st.integers(1, 4), spread=st.sampled_from([0.3, 2]))
def test_with_room_for_all_hypotheses_it_finds_the_likeliest_reply(seed, vocab, limit, spread):
    tree = Tree(vocab, seed, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beams, "MARGIN", math.inf)
        assert tuple(found(tree, 64, limit)) == likeliest_of_all(tree, vocab, limit)[1]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1 << 30), vocab=st.integers(2, 300), limit=st.integers(1, 12))
def test_one_hypothesis_is_greedy(seed, vocab, limit):
    tree, greedy = Tree(vocab, seed), []
    while len(greedy) < limit and (not greedy or greedy[-1] != 0):
        greedy.append(int(tree.after(tuple(greedy)).argmax()))
    assert found(tree, 1, limit) == greedy


GARDEN = {  # token 3 looks best first; what follows it does not
    (): {3: 0.6, 4: 0.4},
    (3,): {5: 0.4, 6: 0.3, 7: 0.3},
    (4,): {5: 0.9, 6: 0.1},
    **{(a, b): {0: 1.0} for a in (3, 4) for b in (5, 6, 7)},
}


def test_a_token_is_taken_back_that_made_the_rest_unlikely():
    assert found(Tree(10, scripted=GARDEN), 1, 9) == [3, 5, 0]
    assert found(Tree(10, scripted=GARDEN), 2, 9) == [4, 5, 0]


def test_a_hypothesis_far_below_the_best_costs_nothing():
    certain = {(): {3: 0.98, 4: 0.02}, (3,): {5: 0.99, 6: 0.01}, (3, 5): {0: 1.0}}
    tree = Tree(10, scripted=certain)
    assert found(tree, 8, 9) == [3, 5, 0]
    assert tree.runs == [1, 1]  # as many as greedy


def test_tokens_come_as_soon_as_all_agree():
    agree = {(): {3: 1.0}, (3,): {4: 0.5, 5: 0.5}, (3, 4): {6: 1.0}, (3, 5): {6: 1.0}}
    tree = Tree(10, scripted=agree | {(3, a, 6): {0: 0.6 if a == 5 else 0.2, 7: 0.3} for a in (4, 5)})
    sampler = Sampler(Sampling(temperature=0, num_beams=4))
    tokens = search(tree, tree.after(()), sampler=sampler, limit=9, stop_ids={0})
    assert next(tokens) == 3
    assert tree.runs == []
    assert next(tokens) == 5
    assert tree.position > len(PROMPT) + 2  # it took more than the token after to tell


def test_ties_go_to_the_lowest_ids_as_in_greedy_decoding():
    same = {tokens: dict.fromkeys(range(4), 0.25) for n in range(3) for tokens in itertools.product(range(4), repeat=n)}
    for num_beams in (1, 2, 8):
        assert found(Tree(4, scripted=same), num_beams, 3, stop_ids=()) == [0, 0, 0]


FORK = {(): {3: 0.6, 4: 0.4}} | {(first, *[5] * n): {5: 1.0} for first in (3, 4) for n in range(300)}


def test_hypotheses_that_differ_at_the_beginning_only_do_not_live_forever():
    """And an endless repetition after them is told while it goes on."""
    tree, sampler = Tree(10, scripted=FORK), Sampler(Sampling(temperature=0, num_beams=8))
    tokens = search(tree, tree.after(()), sampler=sampler, limit=300, stop_ids={0})
    assert next(tokens) == 3
    assert len(tree.runs) < 3 * beams.LOOK_BACK
    assert list(tokens) == [5] * 299
    assert sum(tree.runs) < 300 + beams.LOOK_BACK * beams.LOOK_BACK


def test_each_step_begins_where_the_last_one_ended():
    tree = Tree(10, scripted=FORK)
    found(tree, 2, 9)
    assert tree.runs == [run for n in range(1, 9) for run in (1, n)]


def test_ctrl_c_keeps_what_is_certain():
    script = {(): {BYTE + 65: 1.0}, (BYTE + 65,): {BYTE + 66: 0.5, BYTE + 67: 0.5}}
    tree, sampler = Tree(BYTE + 256, scripted=script), Sampler(Sampling(temperature=0, num_beams=3))
    generation = Generation(tree, PROMPT, tokenizer=FakeTokenizer(), sampler=sampler)
    tree.interrupt_at = BYTE + 67
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert (generation.result.finish_reason, generation.result.text) == ("interrupted", "A")


def test_the_rate_is_that_of_the_search():
    tree = Tree(BYTE + 256, scripted={(BYTE + 70,): {0: 1.0}, (): {BYTE + 70: 1.0}})
    sampler = Sampler(Sampling(temperature=0, num_beams=3))
    generation = Generation(tree, PROMPT, tokenizer=FakeTokenizer(), sampler=sampler, stop_ids={0})
    list(generation)
    t = generation.result.timings
    assert t.decode_tokens == 2
    assert t.ttft_s <= t.prefill_s + t.decode_s


def test_the_repetition_penalty_counts_each_hypothesis_own_tokens():
    again = {(): {3: 0.9, 4: 0.1}, (3,): {3: 0.55, 4: 0.45}, (3, 3): {0: 1.0}, (3, 4): {0: 1.0}, (4,): {0: 1.0}}
    assert found(Tree(10, scripted=again), 4, 9) == [3, 3, 0]
    assert found(Tree(10, scripted=again), 4, 9, repetition_penalty=2.0)[:2] == [3, 4]


def test_damaged_logits_are_an_error():
    tree = Tree(10)
    sampler = Sampler(Sampling(temperature=0, num_beams=2))
    with pytest.raises(EdgeGemmaError, match="verify the model"):
        list(search(tree, np.full(10, np.nan, np.float32), sampler=sampler, limit=3, stop_ids={0}))


@pytest.mark.parametrize(
    ("context", "max_tokens", "reason", "tokens"),
    [(1000, None, "stop", 2), (1000, 2, "length", 2), (1000, 1, "length", 1), (3, None, "context", 1)],
)
def test_a_generation_ends_as_without_beams(context, max_tokens, reason, tokens):
    tree = Tree(BYTE + 256, context=context)
    tree._scripted = {(): {BYTE + 65: 0.7, BYTE + 66: 0.3}, (BYTE + 65,): {BYTE + 67: 0.6, BYTE + 68: 0.4}}
    tree._scripted |= {(BYTE + 65, BYTE + 67): {0: 1.0}, (BYTE + 65, BYTE + 68): {0: 1.0}, (BYTE + 66,): {0: 1.0}}
    sampler = Sampler(Sampling(temperature=0, num_beams=3))
    generation = Generation(
        tree, PROMPT, tokenizer=FakeTokenizer(), sampler=sampler, max_tokens=max_tokens, stop_ids={0}
    )
    text = "".join(piece.text for piece in generation)
    assert (generation.result.finish_reason, generation.result.text, text) == (reason, "AC"[:tokens], "AC"[:tokens])


def test_beams_are_for_a_temperature_of_0_only():
    with pytest.raises(UsageError, match=r"num_beams is 4, expected 1 with a temperature of 0\.5"):
        Sampling(temperature=0.5, num_beams=4)
    config = {"do_sample": False, "num_beams": 4}
    assert Sampling.from_generation_config(config) == Sampling(temperature=0, num_beams=4)
    assert Sampling.from_generation_config(config, num_beams=1).num_beams == 1
    assert Sampling.from_generation_config(config, temperature=0.5).num_beams == 1  # who asks for chance gets it
    assert Sampling.from_generation_config({"num_beams": 4}).num_beams == 1
    assert Sampling.from_generation_config({"top_k": 5}, num_beams=4) == Sampling(0, 5, num_beams=4)
    with pytest.raises(UsageError, match=r"with a temperature of 0\.7"):
        Sampling.from_generation_config({}, num_beams=4, temperature=0.7)


def test_speech_is_written_down_with_the_checkpoints_beams_and_no_penalty():
    config = {"temperature": 0.7, "repetition_penalty": 1.3, "num_beams": 5}
    assert verbatim(config) == Sampling(temperature=0, num_beams=5)
    assert verbatim(config, num_beams=2).num_beams == 2
    assert verbatim({}).num_beams == 1


# --- over the real session --------------------------------------------------------------------------------------------


class Afresh:
    """A timeline that runs all of its tokens in a new session each time."""

    def __init__(self, engine, ids: list[int]) -> None:
        self.ids, self._engine, self.context = list(ids), engine, engine.context

    position = Tree.position

    def prefill(self, ids: list[int]) -> np.ndarray:
        self.ids += ids
        return self._engine.session().prefill(self.ids)

    def rewind(self, position: int) -> None:
        del self.ids[position:]


@pytest.mark.slow
@pytest.mark.parametrize(("slack", "seeds"), [(5, 3), (128, 1)])
def test_going_back_changes_nothing(tmp_path, monkeypatch, slack, seeds):
    """Sliding windows of 7 tokens, and rings that hold fewer rows than a hypothesis goes back."""
    from edge_gemma import Engine
    from edge_gemma.export.convert import export_checkpoint
    from tests.tiny import VOCAB, write_checkpoint
    from tests.tolerance import assert_rounding, decoder

    monkeypatch.setattr("edge_gemma.session.CHUNK", slack)
    export_checkpoint(write_checkpoint(tmp_path / "source", "e2b"), tmp_path / "model", "float")
    sampler, stops = Sampler(Sampling(temperature=0, num_beams=4)), {*range(0, VOCAB, 97)}
    with Engine.load(tmp_path / "model", context=200, kv_dtype="float32") as engine:
        for seed in range(seeds):
            prompt = [2, *np.random.default_rng(seed).integers(6, VOCAB, 11).tolist()]
            session, afresh = engine.session(), Afresh(engine, prompt)
            logits = session.prefill(prompt)
            ours = list(search(session, logits, sampler=sampler, limit=40, stop_ids=stops))
            logits = engine.session().prefill(prompt)
            assert ours == list(search(afresh, logits, sampler=sampler, limit=40, stop_ids=stops))
            again = session.ids
            session.rewind(len(prompt))
            expected = engine.session().prefill(again)
            assert_rounding(session.prefill(again[len(prompt) :]), expected, decoder(engine.config, len(again)))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["e2b", "gemma3"])
def test_transformers_finds_the_same(tmp_path, monkeypatch, kind):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    import transformers

    from edge_gemma import Engine
    from edge_gemma.export.convert import export_checkpoint
    from tests.tiny import VOCAB, write_checkpoint

    monkeypatch.setattr(beams, "MARGIN", math.inf)  # transformers has none
    assert beams.LOOK_BACK > 14  # nor that
    source = write_checkpoint(tmp_path / "source", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="eager")
    stops, longest = list(range(5, VOCAB, 23)), 0
    with Engine.load(export_checkpoint(source, tmp_path / "model", "float"), context=64, kv_dtype="float32") as engine:
        for seed in range(12):
            prompt = [2, *np.random.default_rng(seed).integers(6, VOCAB, 9).tolist()]
            with torch.no_grad():
                out = model.eval().generate(
                    torch.tensor([prompt]), num_beams=3, do_sample=False, length_penalty=0.0, max_new_tokens=14,
                    eos_token_id=stops, pad_token_id=0,
                )  # fmt: skip
            session = engine.session()
            sampler = Sampler(Sampling(temperature=0, num_beams=3))
            ours = search(session, session.prefill(prompt), sampler=sampler, limit=14, stop_ids=set(stops))
            expected = out[0, len(prompt) :].tolist()
            assert list(ours) == expected, seed
            longest = max(longest, len(expected))
    assert longest > 3
