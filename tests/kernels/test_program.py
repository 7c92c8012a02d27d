"""Recorded steps: the same bits as the forward pass they were recorded from, whoever runs them."""

from pathlib import Path

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import WAITS
from edge_gemma.session import Session
from tests.tiny import write_checkpoint
from tests.tolerance import assert_attention_rounding


def plain_step(session: Session, token: int) -> np.ndarray:
    """A token through the forward pass."""
    return session._decoder.logits(session._run([token], keep=1))[0]


@pytest.mark.parametrize("kind", ["e2b", "gemma3"])
@pytest.mark.parametrize("recipe", ["float", "q8", "q4"])
def test_steps_are_the_forward_pass(tmp_path: Path, kind: str, recipe: str) -> None:
    """Past the sliding window, past a block of keys, after rewinding."""
    write_checkpoint(tmp_path / "in", kind)
    with Engine.load(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe), context=400) as engine:
        recorded, plain = engine.session(), engine.session()
        for session in (recorded, plain):
            session.prefill([2] * 120)
        tokens = np.random.default_rng(0).integers(engine.config.vocab_size, size=30).tolist()
        for token in tokens:
            assert np.array_equal(recorded.step(token), plain_step(plain, token))
        assert list(recorded.batch.passes._few) == [(1, 1, True)]
        for session in (recorded, plain):
            session.rewind(125)
        assert np.array_equal(recorded.step(7), plain_step(plain, 7))


def test_the_mobile_mix_is_recorded_too(tmp_path: Path) -> None:
    with Engine.load(synthesize("tiny", tmp_path / "m", "mobile"), context=64) as engine:
        recorded, plain = engine.session(), engine.session()
        for token in (5, 6, 7):
            assert np.array_equal(recorded.step(token), plain_step(plain, token))
        assert list(recorded.batch.passes._few) == [(1, 1, True)]


@pytest.mark.parametrize("kind", ["e2b", "gemma3"])
@pytest.mark.parametrize("recipe", ["float", "q8", "q4", "mobile"])
def test_a_few_tokens_together_are_each_alone(tmp_path: Path, kind: str, recipe: str) -> None:
    """Every number of rows, also with rows that have no token; past the window, to the context's last place."""
    with Engine.load(small_model(tmp_path, kind, recipe), context=240) as engine:
        together, alone = engine.session(), engine.session()
        for session in (together, alone):
            session.prefill([2] * 110)
            session.step(3)
        rng = np.random.default_rng(1)
        for n in (2, 3, 4, 5, 8, 7, 16, 11, 9, 16, 16, 16, 16):
            tokens = rng.integers(engine.config.vocab_size, size=n).tolist()
            expected = [alone.step(token) for token in tokens]
            assert np.array_equal(together.forward(tokens), expected), n
        assert together.position == 240
        assert sorted(together.batch.passes._few) == [(1, 1, True), *((n, n, False) for n in (2, 4, 8, 16))]


def small_model(folder: Path, kind: str, recipe: str) -> Path:
    if recipe == "mobile":
        return synthesize("tiny", folder / "out", "mobile")
    write_checkpoint(folder / "in", kind)
    return export_checkpoint(folder / "in", folder / "out", recipe)


def test_a_rewind_undoes_a_few_tokens(tmp_path: Path) -> None:
    with Engine.load(small_model(tmp_path, "e2b", "q4"), context=200) as engine:
        tried, plain = engine.session(), engine.session()
        for session in (tried, plain):
            session.prefill([5] * 90)
            session.step(6)
        for n, kept in [(4, 2), (16, 0), (8, 5), (3, 3), (2, 1)]:
            tokens = list(range(10, 10 + n))
            rows = tried.forward(tokens)
            tried.rewind(tried.position - n + kept)
            expected = [plain.step(token) for token in tokens[:kept]]
            assert np.array_equal(rows[:kept], np.array(expected).reshape(rows[:kept].shape))
        assert np.array_equal(tried.step(9), plain.step(9))


def test_keys_of_several_tokens_are_recorded_from_one_position_on() -> None:
    """They are stored, and attended to, from wherever the position says by then."""
    rng, position = np.random.default_rng(3), np.zeros(1, np.int64)
    cache, k, v, q = np.zeros((2, 64, 1, 64), np.float32), *rng.standard_normal((3, 5, 1, 64)).astype(np.float32)
    out, expected = np.empty_like(q), np.empty_like(q)
    with program.record() as recorder:
        kernels.store_kv(k, v, *cache, position)
        kernels.attention(q, *cache, position, 0, 0.125, out)
    recorded = recorder.program()
    for first in (5, 10, 40):
        k *= -1.5
        position[0] = first
        recorded.run()
        assert np.array_equal(cache[0, first : first + 5], k)
        kernels.attention.definition(q, *cache, position, 0, 0.125, expected)
        assert_attention_rounding(out, expected, 64, first + 5, spread=60)


def chain(length: int) -> tuple[program.Program, np.ndarray, list[np.ndarray]]:
    """x = (x + y) * 1/2 and z = x + x in turn: every operation needs the one before. Many chunks each."""
    x = np.zeros((1, 3 * 4096 + 5), np.float32)
    outs = [np.ones_like(x) for _ in range(length)]
    with program.record() as recorder:
        for out in outs:
            kernels.add_scaled(x, out, 1.0, 0.5)
            kernels.add_scaled(out, x, 1.0, 1.0)
    return recorder.program(), x, outs


@pytest.mark.parametrize("threads", [1, None])
def test_operations_wait_for_what_they_read(threads: int | None) -> None:
    recorded, x, outs = chain(300)
    expected_x, expected = np.zeros_like(x), [np.ones_like(x) for _ in outs]
    for out in expected:
        expected_x[...] = (expected_x + out) * np.float32(0.5)
        out += expected_x
    kernels.set_threads(threads)
    try:
        for _ in range(20):
            x[...] = 0
            for out in outs:
                out[...] = 1
            recorded.run()
            assert np.array_equal(x, expected_x)
            assert all(np.array_equal(a, b) for a, b in zip(outs, expected, strict=True))
    finally:
        kernels.set_threads(None)


def test_independent_operations_do_not_wait() -> None:
    recorded, _, _ = chain(2)
    waits = recorded._list.rows[:, WAITS].tolist()
    assert waits == [0, 1, 1, 1]
    a, b, out = (np.ones((1, 64), np.float32) for _ in range(3))
    with program.record() as recorder:
        kernels.scale(a, 2.0)
        kernels.scale(b, 2.0)  # another array
        kernels.gelu_tanh_mul(a, b, out)  # reads both
        kernels.scale(a[:, :32], 3.0)  # writes part of what is being read
    assert recorder.program()._list.rows[:, WAITS].tolist() == [0, 0, 1, 1]
