"""Round to nearest with searched scales: a scale is chosen by the error of its whole group.

Symmetric: w ~ scale * q with q in [-2^(b-1), 2^(b-1) - 1], one scale for each group of consecutive weights of a row.
For each group scales around "the largest weight takes the end of the range" are tried, of both signs. With integers q
fixed, the error sum m (w - s q)^2 is least at s = sum m w q / sum m q^2 and has then fallen by (sum m w q)^2 /
sum m q^2, so the try with the largest fall wins. m is how much each column matters (1, or the mean square of the
inputs it meets). The same idea as llama.cpp's `make_qx_quants`, written anew.
Groups with a minimum have their scales from minima.py.

Owns: scales and integers of whole rows. Does not know: what other columns' errors do together (feedback.py).
"""

from collections.abc import Sequence

import numba
import numpy as np

from edge_gemma.folder import layouts
from edge_gemma.quant import compiling, minima
from edge_gemma.quant.compiling import array, compiled
from edge_gemma.quant.rtn import round_to_nearest

Rounded = tuple[np.ndarray, ...]
"""Integers int8 [rows, columns] and scales [rows, groups], float16, or float32 for one a row; or, with a minimum,
integers, pairs uint8 [rows, groups, 2] and factors float32 [rows, blocks, 2]. layouts.py says what they come to.
"""

_TRIES = 10  # scales tried on each side of zero
# Where the largest weight lands, in steps: from well inside the range to cut off beyond its end. The end is among them.
_REACH = {2: (0.8, 2.6), 4: (5.0, 9.5)}


@compiled(
    array(np.float32, 2), array(np.float32, 1), numba.int64, numba.int64, numba.float32, numba.float32,
    array(np.float32, 2, written=True), fastmath={"reassoc", "contract", "nsz"},
)  # fmt: skip
def _search(
    weights: np.ndarray,
    importance: np.ndarray,
    lowest: int,
    group: int,
    near: np.float32,
    far: np.float32,
    scales: np.ndarray,
) -> bool:
    rows, columns = weights.shape
    if len(importance) != columns or scales.shape[0] != rows:
        return False
    highest = np.float32(-lowest - 1)
    low = np.float32(lowest)
    for row in range(rows):
        for g in range(scales.shape[1]):
            start = g * group
            stop = min(start + group, columns)
            w, m = weights[row, start:stop], importance[start:stop]
            largest = np.float32(0)
            for i in range(len(w)):
                largest = max(largest, abs(w[i]))
            best, scale = np.float32(0), np.float32(0)
            if largest > np.float32(1e-30):
                for t in range(2 * _TRIES):
                    reach = near + (far - near) * np.float32(t % _TRIES) / np.float32(_TRIES - 1)
                    inverse = (reach if t < _TRIES else -reach) / largest
                    above, below = np.float32(0), np.float32(0)
                    for i in range(len(w)):
                        q = min(max(np.rint(w[i] * inverse), low), highest)
                        above += m[i] * w[i] * q
                        below += m[i] * q * q
                    if above * above > best * below:
                        best, scale = above * above / below, above / below
            scales[row, g] = scale
    return True


@compiled(
    array(np.float32, 2), array(np.float32, 3), numba.int64, numba.int64, numba.int64,
    array(np.int8, 2, written=True),
)  # fmt: skip
def _nearest(weights: np.ndarray, lines: np.ndarray, lowest: int, highest: int, group: int, values: np.ndarray) -> bool:
    low, high = np.float32(lowest), np.float32(highest)
    for row in range(weights.shape[0]):
        for g in range(lines.shape[1]):
            scale, minimum = lines[row, g, 0], lines[row, g, 1]
            inverse = np.float32(0) if abs(scale) < np.float32(1e-30) else np.float32(1) / scale
            for i in range(g * group, min(g * group + group, weights.shape[1])):
                values[row, i] = np.int8(min(max(np.rint((weights[row, i] + minimum) * inverse), low), high))
    return True


def lines_of(scales: Sequence[np.ndarray], group: int) -> np.ndarray:
    """float32 [rows, groups, 2], scale and minimum (0 where there is none), of a Rounded's scales."""
    if len(scales) == 2:
        pairs, factors = scales
        return layouts.scales_and_minima(pairs, factors, group)
    return np.stack([scales[0].astype(np.float32), np.zeros(scales[0].shape, np.float32)], axis=-1)


def levels(bits: int, minimum: int) -> tuple[int, int]:
    """The least and the largest q of w ~ scale * q - minimum: from 0 where there is a minimum."""
    lowest = 0 if minimum else -layouts.zero_point(bits)
    return lowest, lowest + (1 << bits) - 1


def search_scales(
    weights: np.ndarray, bits: int, group: int, importance: np.ndarray | None = None, minimum: int = 0
) -> Rounded:
    """Quantise rows. As `round_to_nearest`, with scales that lose less; 8 bits lose too little to search for more.

    weights: float32 [rows, columns], finite; importance: float32 [columns], not negative; None: all columns alike;
    minimum: bits of a group's minimum, 4 or 8; 0: none.
    """
    if bits == 8:
        return round_to_nearest(weights, bits, group)
    m = np.ones(weights.shape[1], np.float32) if importance is None else importance
    stored: tuple[np.ndarray, ...]
    if minimum:
        stored = minima.search_minima(weights, bits, group, minimum, m)
    else:
        stored = (_searched(weights, bits, group, m),)
    values, (lowest, highest) = np.empty(weights.shape, np.int8), levels(bits, minimum)
    compiling.launch(_nearest, weights, lines_of(stored, group), lowest, highest, group or weights.shape[1], values)
    if minimum:
        values -= np.int8(layouts.zero_point(bits))
    return values, *stored


def _searched(weights: np.ndarray, bits: int, group: int, m: np.ndarray) -> np.ndarray:
    """Scales of groups without a minimum, as they are stored."""
    rows, columns = weights.shape
    width = group or columns
    scales = np.empty((rows, -(-columns // width)), np.float32)
    near, far = (np.float32(r) for r in _REACH[bits])
    if not compiling.launch(_search, weights, m, -(1 << (bits - 1)), width, near, far, scales):
        raise ValueError(f"weights {weights.dtype}{weights.shape} and importance {m.dtype}{m.shape} do not fit")
    return scales.astype(np.float16 if group else np.float32)
