"""A token leaves nothing behind: decoding allocates the logits that it returns, rows of the embedding tables and a few
small objects, and gives them back. Activations have their places since the first token.
"""

import copy
import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_gemma.engine import Engine
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.model.linear import DenseMatrix, Matrix
from tests.tiny import write_checkpoint

STEPS = 50
VOCABULARY = 262_144  # as released models have it: a second array of logits would be a megabyte


def with_rows(head: Matrix, rows: int) -> Matrix:
    """The head with so many rows, its own again and again."""
    head = copy.copy(head)
    head.rows = rows
    if isinstance(head, DenseMatrix):
        head.values = np.resize(head.values, (rows, head.values.shape[1]))
    else:
        head.packed = np.resize(head.packed, (rows // 8, *head.packed.shape[1:]))
        head.scales = np.resize(head.scales, (rows // 8, *head.scales.shape[1:]))
    return head


@pytest.mark.parametrize("recipe", ["q4", "float"])
def test_a_step_gives_back_what_it_allocates(tmp_path: Path, recipe: str) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    with Engine.load(export_checkpoint(tmp_path / "in", tmp_path / "out", recipe)) as engine:
        decoder = engine._model.decoder
        decoder.weights = dataclasses.replace(decoder.weights, lm_head=with_rows(decoder.weights.lm_head, VOCABULARY))
        session = engine.session()
        session.prefill([2] * 20)
        tracemalloc.start()
        for _ in range(STEPS):  # what is kept of the latest steps is known after some
            assert session.step(7).shape == (VOCABULARY,)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(STEPS):
            session.step(7)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    logits = 4 * VOCABULARY
    print(f"{peak - before} bytes at most, {logits} of them logits")
    assert after - before < 2_000  # ids may grow by one list allocation
    assert peak - before < logits + 8_000  # and the row that enters the head, rows of the tables
