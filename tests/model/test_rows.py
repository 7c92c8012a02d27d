"""Rows of packed matrices, bit for bit against NumPy's unpacking (edge_gemma/folder/layouts.py)."""

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.folder import layouts


def matrix(rows: int, k: int, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows + k + bits + group)
    w = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k)).astype(np.int8)
    groups = -(-k // group) if group else 1
    return w, rng.uniform(-1, 1, (rows, groups)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 32, 256])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (3, 37), (1, 600), (5, 1024)])
def test_records_are_the_oracle(bits: int, group: int, rows: int, k: int) -> None:
    records = layouts.pack_rows(*matrix(rows, k, bits, group), bits, group)
    out = np.full((rows, k), np.nan, np.float32)
    kernels.dequantize_records(records, bits, group, out)
    assert np.array_equal(out, layouts.dequantize_rows(records, k, bits, group))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("k", [5, 96, 417])
def test_rows_of_panels_are_the_oracle(bits: int, group: int, k: int) -> None:
    w, scales = matrix(19, k, bits, group)
    packed, packed_scales = layouts.pack_panels(w, bits), layouts.pack_scales(scales, group, k)
    ids = np.array([18, 0, 7, 8, 7])
    out = np.full((len(ids), k), np.nan, np.float32)
    stored = packed_scales.view(np.uint16) if group else packed_scales
    kernels.gather_panels(packed, stored, ids, bits, group, out)
    assert np.array_equal(out, layouts.dequantize_panels(packed, packed_scales, bits, group, ids, k))


def test_what_does_not_fit_is_refused() -> None:
    records = layouts.pack_rows(*matrix(2, 64, 4, 32), 4, 32)
    for bits, group, shape in [
        (8, 32, (2, 64)),
        (4, 16, (2, 64)),
        (4, 32, (3, 64)),
        (4, 32, (2, 70)),
        (3, 32, (2, 64)),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            kernels.dequantize_records(records, bits, group, np.empty(shape, np.float32))
    packed = layouts.pack_panels(matrix(8, 64, 4, 32)[0], 4)
    scales = np.ones((1, 2, 8), np.float16).view(np.uint16)
    for ids in ([8], [-1]):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.gather_panels(packed, scales, np.array(ids), 4, 32, np.empty((1, 64), np.float32))
