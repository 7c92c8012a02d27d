"""Packed layouts: round trips, the documented place of every field, and refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import ModelFolderError
from edge_gemma.folder import layouts as qf

SIZES = [(1, 1), (7, 5), (8, 32), (9, 33), (16, 64), (21, 100)]


def integers(rows, k, bits, seed=0):
    return np.random.default_rng(seed).integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k)).astype(np.int8)


@pytest.mark.parametrize("bits", qf.BITS)
@pytest.mark.parametrize(("rows", "k"), SIZES)
def test_every_field_lies_where_the_diagram_says(rows, k, bits):
    w = integers(rows, k, bits)
    packed = qf.pack_panels(w, bits)
    assert packed.shape == qf.packed_shape(rows, k, bits)
    assert packed.nbytes % 64 == 0
    fields, offset = 8 // bits, 0 if bits == 8 else 1 << (bits - 1)
    for r in range(packed.shape[0] * 8):
        for col in range(qf.padded_k(k)):
            chunk, rest = divmod(col, 4 * fields)
            byte = int(packed[r // 8, chunk, r % 8, rest % 4])
            u = (byte >> (bits * (rest // 4))) & ((1 << bits) - 1)
            value = u - offset if bits < 8 else (u ^ 128) - 128
            assert value == (w[r, col] if r < rows and col < k else 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 130), st.sampled_from(qf.BITS), st.integers(0, 2**32 - 1))
def test_panels_and_records_round_trip(rows, k, bits, seed):
    w = integers(rows, k, bits, seed)
    packed = qf.pack_panels(w, bits)
    assert np.array_equal(qf.unpack_panels(packed, bits, rows, k), w)
    ids = np.random.default_rng(seed).integers(0, rows, 5)
    assert np.array_equal(qf.panel_rows(packed, bits, ids, k), w[ids])
    for group in qf.GROUPS:
        scales = (
            np.random.default_rng(seed).random((rows, -(-k // group) if group else 1)).astype(qf.scales_dtype(group))
        )
        panel_scales = qf.pack_scales(scales, group, k)
        assert panel_scales.shape == qf.scales_shape(rows, k, bits, group)
        assert np.array_equal(qf.unpack_scales(panel_scales, rows)[:, : scales.shape[1]], scales.astype(np.float32))
        records = qf.pack_rows(w, scales, bits, group)
        assert records.shape == (rows, qf.record_bytes(k, bits, group))
        got_w, got_scales = qf.unpack_rows(records, k, bits, group)
        assert np.array_equal(got_w, w)
        assert np.array_equal(got_scales, scales.astype(np.float32))
        expected = w * (np.repeat(scales, group, 1)[:, :k] if group else scales).astype(np.float32)
        assert np.array_equal(qf.dequantize_rows(records, k, bits, group), expected)
        assert np.array_equal(qf.dequantize_panels(packed, panel_scales, bits, group, ids, k), expected[ids])


def test_a_run_of_panels_is_the_matrix_of_its_rows():
    w = integers(40, 64, 4)
    assert np.array_equal(qf.unpack_panels(qf.pack_panels(w, 4)[2:4], 4, 16, 64), w[16:32])


def test_record_layout_is_scales_then_fields_low_bits_first():
    record = qf.pack_rows(np.array([[-8, 7, 1, 0]], np.int8), np.array([[0.5]], np.float32), 4, 0)
    assert record.tobytes() == np.float32(0.5).tobytes() + bytes([0xF0, 0x89])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qf.packed_shape(8, 32, 3), "3 bits"),
        (lambda: qf.scales_shape(8, 32, 4, 64), "groups of 64"),
        (lambda: qf.packed_shape(0, 32, 4), "0 x 32"),
        (lambda: qf.pack_panels(np.full((1, 1), 8, np.int8), 4), "expected -8 to 7"),
        (lambda: qf.pack_panels(np.zeros((1, 1)), 4), "expected int8"),
        (lambda: qf.unpack_panels(np.zeros((1, 4, 8, 4), np.uint8), 4, 9, 32), "expected uint8"),
        (lambda: qf.panel_rows(np.zeros((1, 4, 8, 4), np.uint8), 4, np.array([8])), "of 8 rows"),
        (lambda: qf.panel_rows(np.zeros((1, 4, 8, 4), np.uint8), 4, np.array([-1])), "of 8 rows"),
        (lambda: qf.pack_scales(np.full((8, 1), 1e6), 32), "does not fit float16"),
        (lambda: qf.pack_scales(np.ones((8, 3)), 32, 64), "at most 2"),
        (lambda: qf.pack_scales(np.ones((8, 2)), 0), "one group"),
        (lambda: qf.unpack_scales(np.ones((1, 1, 8)), 9), "9 rows"),
        (lambda: qf.pack_rows(np.zeros((2, 40), np.int8), np.ones((2, 1)), 4, 32), "expected 2 a row"),
        (lambda: qf.unpack_rows(np.zeros((2, 7), np.uint8), 40, 4, 32), "expected uint8"),
    ],
)
def test_wrong_sizes_are_one_line_errors(call, words):
    with pytest.raises(ModelFolderError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
