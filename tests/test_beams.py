"""Beam search against all replies there are, against transformers, and through everything that uses it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma import beams
from edge_gemma.audio.scribe import verbatim
from edge_gemma.beams import search
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.generate import Generation
from edge_gemma.sampler import Sampler, Sampling
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
        self.ids += ids
        self.runs.append(len(ids))
        return self.after(tuple(self.ids[len(PROMPT) :]))

    step = None  # never used: a hypothesis is a prompt

    def rewind(self, position: int) -> None:
        assert 0 <= position <= self.position
        del self.ids[position:]

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
    with pytest.raises(UsageError, match=r"temperature of 1\.0: beams need --temperature 0"):
        Sampling.from_generation_config({}, num_beams=4)


def test_speech_is_written_down_with_the_checkpoints_beams_and_no_penalty():
    config = {"temperature": 0.7, "repetition_penalty": 1.3, "num_beams": 5}
    assert verbatim(config) == Sampling(temperature=0, num_beams=5)
    assert verbatim(config, num_beams=2).num_beams == 2
    assert verbatim({}).num_beams == 1


# --- over the real session --------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["e2b", "gemma3"])
def test_transformers_finds_the_same(tmp_path, monkeypatch, kind):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    import transformers

    from edge_gemma import Engine
    from edge_gemma.export.convert import export_checkpoint
    from tests.tiny import VOCAB, write_checkpoint

    monkeypatch.setattr(beams, "MARGIN", math.inf)  # transformers has none
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
