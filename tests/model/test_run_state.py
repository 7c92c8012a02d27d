"""Activations share memory: what a layer or a chunk before has left there never shows."""

from pathlib import Path

import numpy as np
import pytest

from edge_gemma.config import GemmaConfig
from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import synthesize
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.run_state import RunState
from tests.tiny import KINDS, tiny_config, write_checkpoint


def spoil(state: RunState) -> None:
    """NaN in every float, -1 in every integer."""
    for memory in (*vars(state).values(), *(array for form in state._int8 for array in form)):
        if isinstance(memory, np.ndarray):
            memory.fill(np.nan if memory.dtype == np.float32 else -1)


def assert_memory_does_not_show(folder: Path) -> None:
    with Engine.load(folder, context=256) as engine:
        decoder, ids = engine._model.decoder, np.arange(3, 30) % engine.config.vocab_size
        state = RunState(decoder.config, 40)
        for n, keep in ((27, 0), (27, 1), (5, 5), (1, 1)):
            fresh, used = (KVCache(decoder.config, 64, 64, "float32") for _ in range(2))
            expected = decoder.forward(ids[:n], fresh, keep, state=RunState(decoder.config, n))
            spoil(state)
            got = decoder.forward(ids[:n], used, keep, state=state)
            assert np.array_equal(got, expected)
            assert not any(np.shares_memory(got, a) for a in vars(state).values() if isinstance(a, np.ndarray))
            for layer, theirs in fresh.layers.items():
                assert np.array_equal(used.layers[layer].k, theirs.k)
                assert np.array_equal(used.layers[layer].v, theirs.v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["float", "q4"])
def test_what_the_memory_held_does_not_show(tmp_path: Path, kind: str, recipe: str) -> None:
    write_checkpoint(tmp_path / "in", kind)
    assert_memory_does_not_show(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe))


def test_what_the_memory_held_does_not_show_in_the_mobile_mix(tmp_path: Path) -> None:
    assert_memory_does_not_show(synthesize("tiny", tmp_path / "m", "mobile"))


def test_rounded_activations_that_live_together_lie_apart() -> None:
    state = RunState(GemmaConfig.from_text_config(tiny_config("e2b")), 4)
    first, second = state.int8(0, 3, 64, 2), state.int8(1, 3, 64, 1)
    assert [a.shape for a in first] == [(3, 64), (3, 2), (3, 2)]
    assert [a.dtype for a in first] == [np.int8, np.float32, np.int32]
    assert not any(np.shares_memory(a, b) for a in first for b in second)
    again = state.int8(0, 4, 32, 1)
    assert all(np.shares_memory(a, b) for a, b in zip(first, again, strict=True))
    wider = state.int8(0, 4, 96, 3)
    assert [a.shape for a in wider] == [(4, 96), (4, 3), (4, 3)]
