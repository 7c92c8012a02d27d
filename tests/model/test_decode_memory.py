"""A token leaves nothing behind: decoding allocates the logits that it returns, rows of the embedding tables and a few
small objects, and gives them back. Activations have their places since the first token.
"""

import tracemalloc
from pathlib import Path

import pytest

from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from tests.tiny import write_checkpoint

STEPS = 50


@pytest.mark.parametrize("recipe", ["q4", "float"])
def test_a_step_gives_back_what_it_allocates(tmp_path: Path, recipe: str) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    with Engine.load(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe)) as engine:
        session = engine.session()
        session.prefill([2] * 20)
        for _ in range(5):
            session.step(7)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(STEPS):
            session.step(7)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    logits = 4 * engine.config.vocab_size
    print(f"{peak - before} bytes at most, {logits} of them logits")
    assert after - before < 2_000  # ids may grow by one list allocation
    assert peak - before < logits + 6_000
