"""Recorded steps: the same bits as the forward pass they were recorded from, whoever runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import NotRecordableError
from edge_gemma.session import Session
from tests import ROOT
from tests.tiny import write_checkpoint


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
        assert recorded._step._program is not None
        for session in (recorded, plain):
            session.rewind(125)
        assert np.array_equal(recorded.step(7), plain_step(plain, 7))


def test_the_mobile_mix_is_recorded_too(tmp_path: Path) -> None:
    with Engine.load(synthesize("tiny", tmp_path / "m", "mobile"), context=64) as engine:
        recorded, plain = engine.session(), engine.session()
        for token in (5, 6, 7):
            assert np.array_equal(recorded.step(token), plain_step(plain, token))
        assert recorded._step._program is not None


def test_several_rows_cannot_be_recorded() -> None:
    h, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    with program.record() as recorder, pytest.raises(NotRecordableError):
        kernels.add_rms_norm(h, h.copy(), weight, 1e-6)
    assert recorder.operations == []
    kernels.add_rms_norm(h, h.copy(), weight, 1e-6)
    assert recorder.operations == []  # nothing is written down any more


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
            recorded.run(0)
            assert np.array_equal(x, expected_x)
            assert all(np.array_equal(a, b) for a, b in zip(outs, expected, strict=True))
    finally:
        kernels.set_threads(None)


def test_independent_operations_do_not_wait() -> None:
    recorded, _, _ = chain(2)
    waits = recorded._rows[:, 3].tolist()
    assert waits == [0, 1, 1, 1]
    a, b, out = (np.ones((1, 64), np.float32) for _ in range(3))
    with program.record() as recorder:
        kernels.scale(a, 2.0)
        kernels.scale(b, 2.0)  # another array
        kernels.gelu_tanh_mul(a, b, out)  # reads both
        kernels.scale(a[:, :32], 3.0)  # writes part of what is being read
    assert recorder.program()._rows[:, 3].tolist() == [0, 0, 1, 1]


def test_one_thread_alone_does_everything_in_numbas_own_layer() -> None:
    """Nobody waits for a thread that has not come: more workers than threads, one after another."""
    script = """
import numpy as np
from tests.kernels.test_program import chain
from edge_gemma.kernels import compiler
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import NotRecordableError
recorded, x, outs = chain(5)
expected = x.copy()
x[...] = 0
for out in outs:
    out[...] = 1
recorded._counters[:] = 0
compiler.set_threads(1)
assert compiler.launch(program.replay, recorded._rows, recorded._counters, 0, 5)
import numba
print(numba.threading_layer(), np.array_equal(x, expected))
"""
    environment = {"NUMBA_THREADING_LAYER": "workqueue", "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.split() == ["workqueue", "True"], done.stderr
