"""Finds matrices of a float checkpoint that lie on a grid: they were trained for few bits and published as floats.

Owns: which formats are looked for, reading a matrix block by block. Does not know: how a grid is found (quant/grid.py).
"""

from functools import partial
from itertools import pairwise

import numpy as np

from edge_gemma.export.checkpoint import Checkpoint
from edge_gemma.export.packed import Integers, PackedMatrix, Scales
from edge_gemma.export.source_file import GlanceError
from edge_gemma.quant.grid import on_grid

_ROWS = 8  # looked at first: a matrix of random weights is given up after these
_BLOCK_WEIGHTS = 1 << 18
# (bits, group) from the smallest on: one scale a row as the QAT checkpoints have, blocks of 32 as GGUF's Q4_0.
_FORMATS = ((2, 0), (4, 0), (4, 32), (8, 0))


def grid_matrix(checkpoint: Checkpoint, name: str, most_bits: int, *, glance: bool = False) -> PackedMatrix | None:
    """The matrix as integers and scales that restore every weight, in at most this many bits; None if it lies on no
    grid.

    A matrix on a grid is read whole, any other a few rows only. With `glance` a few rows are read at most; reading the
    matrix then raises GlanceError if the rest lies on no grid.
    """
    info = checkpoint.tensors[name]
    if len(info.shape) != 2 or info.dtype not in ("BF16", "F16", "F32"):
        return None
    rows, columns = info.shape
    for bits, group in _FORMATS:
        if bits > most_bits or (group == 0 and columns < 64):  # a short row is on some grid by chance
            continue
        step = max(_ROWS, _BLOCK_WEIGHTS // columns)
        edges = [0, min(_ROWS, rows)] if glance else [0, *range(min(_ROWS, rows), rows, step), rows]
        if all(_on_grid(checkpoint, name, bits, group, start, stop) is not None for start, stop in pairwise(edges)):
            read = partial(_read, checkpoint, name, bits, group)
            return PackedMatrix((rows, columns), bits, group, f"found on a grid of {bits} bits in {info.dtype}", read)
    return None


def _on_grid(
    checkpoint: Checkpoint, name: str, bits: int, group: int, start: int, stop: int
) -> tuple[Integers, Scales] | None:
    weights = checkpoint.rows(name, start, stop)
    if not np.isfinite(weights).all():
        return None
    return on_grid(weights, bits, checkpoint.tensors[name].dtype, group)


def _read(checkpoint: Checkpoint, name: str, bits: int, group: int, start: int, stop: int) -> tuple[Integers, Scales]:
    found = _on_grid(checkpoint, name, bits, group, start, stop)
    if found is None:
        raise GlanceError(name, "is not on the grid its first rows lie on")
    return found
