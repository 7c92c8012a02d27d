"""Round to nearest with searched scales and minima, both integers of a few bits: the format of GGUF's Q2_K and Q4_K.

w ~ d s q - e m with q in [0, 2^b - 1] for each weight; s, m in [0, 2^n - 1] for each group; d, e float16 for 256
columns of a row. For each group steps and lowest levels around "the smallest and the largest weight take the ends" are
tried. With integers q fixed the error sum c (w - a q + z)^2 is a line's least squares: a and z have a closed form, and
so has how much the line explains; the try that explains most wins, and z < 0 is none (m has no sign). The largest a and
z of 256 columns then give d and e, and each group takes, of the integers around a / d and z / e, the pair that loses
least. c is how much each column matters, as in search.py. The same problem as llama.cpp's `make_qkx2_quants`.

Owns: integers, scales, minima and factors of whole rows. Does not know: what other columns' errors do together
(feedback.py).
"""

import numba
import numpy as np

from edge_gemma.folder.layouts import FACTOR_COLUMNS, factors_shape
from edge_gemma.kernels.compiled.convert import as_float, to_half
from edge_gemma.quant import compiling
from edge_gemma.quant.compiling import array, compiled

_STEPS = 8  # lengths of a step tried, from _SHORTEST of (largest - smallest) / (2^b - 1) to all of it
_SHORTEST = {2: 0.55, 4: 0.8}
_PLACES = 5  # lowest levels tried for each, from the smallest weight to where the highest level is the largest
_AROUND = 1  # integers tried on either side of a group's scale and minimum
_NOTHING = np.float32(1e-30)


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _line(w: np.ndarray, c: np.ndarray, levels: np.float32, shortest: np.float32) -> tuple[np.float32, np.float32]:
    """Step a and minimum z of one group: float32, not negative."""
    smallest, largest, everything, mean = np.float32(0), w[0], np.float32(0), np.float32(0)
    for i in range(len(w)):
        smallest, largest = min(smallest, w[i]), max(largest, w[i])
        everything += c[i]
        mean += c[i] * w[i]
    span = (largest - smallest) / levels
    if not everything > 0:
        return max(span, np.float32(0)), -smallest
    mean /= everything
    best, step, minimum = np.float32(-1), np.float32(0), max(-mean, np.float32(0))
    if not span > _NOTHING:
        return step, minimum
    for t in range(_STEPS * _PLACES):
        length = span * (shortest + (np.float32(1) - shortest) * np.float32(t // _PLACES) / np.float32(_STEPS - 1))
        start = smallest + (span - length) * levels * np.float32(t % _PLACES) / np.float32(_PLACES - 1)
        inverse = np.float32(1) / length
        ones, squares, products = np.float32(0), np.float32(0), np.float32(0)
        for i in range(len(w)):
            q = min(max(np.rint((w[i] - start) * inverse), np.float32(0)), levels)
            ones += c[i] * q
            squares += c[i] * q * q
            products += c[i] * q * w[i]
        middle = ones / everything
        spread, along = squares - ones * middle, products - ones * mean
        if spread > _NOTHING * everything and along > 0:
            slope = along / spread
            explained, z = along * slope + everything * mean * mean, slope * middle - mean
            if z < 0:
                slope, z = products / squares, np.float32(0)
                explained = products * slope
            if explained > best:
                best, step, minimum = explained, slope, z
    return step, minimum


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _lost(w: np.ndarray, c: np.ndarray, levels: np.float32, step: np.float32, minimum: np.float32) -> np.float32:
    lost, inverse = np.float32(0), np.float32(1) / step if step > _NOTHING else np.float32(0)
    for i in range(len(w)):
        q = min(max(np.rint((w[i] + minimum) * inverse), np.float32(0)), levels)
        e = w[i] - step * q + minimum
        lost += c[i] * e * e
    return lost


@numba.njit(error_model="numpy")
def _whole(value: np.float32, factor: np.float32, top: int) -> int:
    return int(min(max(np.rint(value / factor), 0), top)) if factor > 0 else 0


@numba.njit(error_model="numpy")
def _pair(
    w: np.ndarray,
    c: np.ndarray,
    levels: np.float32,
    step: np.float32,
    minimum: np.float32,
    d: np.float32,
    e: np.float32,
    top: int,
) -> tuple[int, int]:
    """The integers s, m of one group."""
    s, m = _whole(step, d, top), _whole(minimum, e, top)
    best, found_s, found_m = np.float32(np.inf), s, m
    for i in range(max(s - _AROUND, 0), min(s + _AROUND, top) + 1):
        for j in range(max(m - _AROUND, 0), min(m + _AROUND, top) + 1):
            lost = _lost(w, c, levels, np.float32(i) * d, np.float32(j) * e)
            if lost < best:
                best, found_s, found_m = lost, i, j
    return found_s, found_m


@compiled(
    array(np.float32, 2), array(np.float32, 1), numba.float32, numba.float32, numba.int64, numba.int64,
    array(np.uint8, 3, written=True), array(np.float32, 3, written=True),
)  # fmt: skip
def _search(
    weights: np.ndarray,
    importance: np.ndarray,
    levels: np.float32,
    shortest: np.float32,
    group: int,
    top: int,
    pairs: np.ndarray,
    factors: np.ndarray,
) -> bool:
    rows, columns = weights.shape
    if len(importance) != columns or pairs.shape[0] != rows or factors.shape[0] != rows:
        return False
    for row in range(rows):
        lines = np.empty((FACTOR_COLUMNS // group, 2), np.float32)
        for block in range(factors.shape[1]):
            first = block * (FACTOR_COLUMNS // group)
            count = min(len(lines), pairs.shape[1] - first)
            largest_step, largest_minimum = np.float32(0), np.float32(0)
            for g in range(count):
                start = (first + g) * group
                stop = min(start + group, columns)
                w, c = weights[row, start:stop], importance[start:stop]
                lines[g, 0], lines[g, 1] = _line(w, c, levels, shortest)
                largest_step, largest_minimum = max(largest_step, lines[g, 0]), max(largest_minimum, lines[g, 1])
            d = as_float(to_half(largest_step / np.float32(top)))
            e = as_float(to_half(largest_minimum / np.float32(top)))
            factors[row, block, 0], factors[row, block, 1] = d, e
            for g in range(count):
                start = (first + g) * group
                stop = min(start + group, columns)
                w, c = weights[row, start:stop], importance[start:stop]
                s, m = _pair(w, c, levels, lines[g, 0], lines[g, 1], d, e, top)
                pairs[row, first + g, 0], pairs[row, first + g, 1] = s, m
    return True


def search_minima(
    weights: np.ndarray, bits: int, group: int, minimum: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of rows, integers of `minimum` bits, and their factors.

    weights: float32 [rows, columns], finite; bits: 2 or 4; importance: float32 [columns], not negative.
    Returns (pairs uint8 [rows, groups, 2], factors float32 [rows, blocks, 2], values of float16). A last group, and
    a last block of 256 columns, are cut short by the row's end.
    """
    rows, columns = weights.shape
    pairs = np.empty((rows, -(-columns // group), 2), np.uint8)
    factors = np.empty((rows, factors_shape(rows, columns, minimum)[1], 2), np.float32)
    levels, shortest = np.float32((1 << bits) - 1), np.float32(_SHORTEST[bits])
    if not compiling.launch(_search, weights, importance, levels, shortest, group, (1 << minimum) - 1, pairs, factors):
        raise ValueError(f"weights {weights.dtype}{weights.shape} and importance {importance.shape} do not fit")
    return pairs, factors
