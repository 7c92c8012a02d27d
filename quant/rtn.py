"""Round-to-nearest quantisation: the baseline every other method has to beat.

Symmetric: w ~ scale * q with q in [-2^(b-1), 2^(b-1) - 1], one scale for each group of consecutive weights of a row.
"""

import numpy as np


def round_to_nearest(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows.

    weights: float32 [rows, columns], finite. Returns (values int8 [rows, columns], scales [rows, groups]); scales are
    float16 in groups and float32 for one scale a row (group 0), and `values` are rounded against the stored scale.

    The element of largest magnitude takes -2^(b-1), the end of the range that has one more step, so a scale carries
    that element's sign turned round (as llama.cpp's Q4_0 does); at 8 bits it takes -127. Of two as large the negative
    one counts, wherever they stand. A last group cut short by the row's end is scaled over what it has.
    """
    rows, columns = weights.shape
    width = group or columns
    groups = -(-columns // width)
    if columns % width:
        weights = np.pad(weights, ((0, 0), (0, groups * width - columns)))
    blocks = weights.reshape(rows, groups, width)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    largest = np.where(high > -low, high, low)  # with its sign
    lowest = -127 if bits == 8 else -(1 << (bits - 1))
    scales = (largest / np.float32(lowest)).astype(np.float16 if group else np.float32)
    stored = scales.astype(np.float32)
    inverse = np.divide(1, stored, out=np.zeros_like(stored), where=np.abs(stored) > 1e-30)
    scaled = blocks * inverse[:, :, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, lowest, (1 << (bits - 1)) - 1, out=scaled)
    return scaled.astype(np.int8).reshape(rows, groups * width)[:, :columns], scales
