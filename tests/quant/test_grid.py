"""Grids in float weights: those that are there are found to the last bit, random weights have none."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.quant.grid import find_grid, on_grid
from tests.tiny import _bfloat16


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


ROUND = {"BF16": bfloat16, "F16": lambda v: v.astype(np.float16).astype(np.float32), "F32": lambda v: v}


def quantised(seed: int, bits: int, rows: int, columns: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers as training leaves them (bell-shaped, both ends reached now and then) and scales of either sign."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    values = np.clip(np.rint(rng.normal(0, half / 3, (rows, columns))), -half, half - 1).astype(np.int8)
    scales = rng.uniform(0.5, 2, (rows, columns // (group or columns))) * rng.choice([1, -1]) / 100
    return values, scales.astype(np.float16 if group in (16, 32) else np.float32).astype(np.float32)


@settings(deadline=None, max_examples=60)
@example(3, 8, 3, 5, 32, "BF16")  # 127 steps are rounded to 126.5
@example(1, 8, 7, 7, 32, "F16")  # the smallest weight of a group is above 8 steps
@given(
    st.integers(0, 1 << 30), st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(2, 7),
    st.sampled_from([0, 32, 256]), st.sampled_from(["BF16", "F16", "F32"]),
)  # fmt: skip
def test_a_grid_is_found_and_restores_every_weight(seed, bits, rows, blocks, group, dtype):
    columns = (group or 128) * blocks
    values, scales = quantised(seed, bits, rows, columns, group)
    weights = ROUND[dtype](values * np.repeat(scales, group or columns, axis=1))
    integers, found = on_grid(weights, bits, dtype, group)
    assert found.shape == scales.shape
    assert np.abs(integers.astype(int)).max() <= 1 << (bits - 1)
    if group in (16, 32):
        assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert np.array_equal(ROUND[dtype](integers * np.repeat(found, group or columns, axis=1)), weights)
    assert find_grid(weights, dtype, group).bits <= bits


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_very_integers_and_scales_come_back(dtype, bits):
    """Where both neighbours of zero occur in a row, nothing else fits; float32 leaves nothing of the scale open."""
    values, scales = quantised(1, bits, 40, 1536, 0)
    grid = find_grid(ROUND[dtype](values * scales), dtype)
    assert grid.bits == bits
    assert np.array_equal(grid.integers * np.sign(grid.scales), values * np.sign(scales))
    assert np.allclose(np.abs(grid.scales), np.abs(scales), rtol={"BF16": 2**-8, "F16": 2**-11, "F32": 2**-23}[dtype])


@pytest.mark.parametrize("group", [0, 32])
def test_random_weights_have_none(group):
    weights = bfloat16(np.random.default_rng(0).normal(0, 0.02, (64, 512)).astype(np.float32))
    assert find_grid(weights, "BF16", group) is None


def test_one_weight_beside_the_grid_is_enough():
    values, scales = quantised(3, 4, 5, 640, 0)
    weights = bfloat16(values * scales)
    assert find_grid(weights).bits == 4
    weights[3, 7] = scales[3, 0] * 1.5
    assert find_grid(weights) is None


def test_zeros_and_single_steps():
    weights = np.zeros((3, 64), np.float32)
    assert find_grid(weights).bits == 2
    assert not find_grid(weights).scales.any()
    weights[1, 5], weights[2, 6] = 3.0, -0.25
    grid = find_grid(weights)
    assert grid.bits == 2
    assert np.array_equal(bfloat16(grid.integers * grid.scales), weights)


def test_widths_that_are_no_whole_groups_have_no_grid():
    assert on_grid(np.ones((2, 40), np.float32), 4, "BF16", 32) is None
