"""Round to nearest with searched scales: what a group of weights loses is made small, not just its largest weight kept.

Symmetric: w ~ scale * q with q in [-2^(b-1), 2^(b-1) - 1], one scale for each group of consecutive weights of a row.
For each group scales around "the largest weight takes the end of the range" are tried, of both signs. With integers q
fixed, the error sum m (w - s q)^2 is least at s = sum m w q / sum m q^2 and has then fallen by (sum m w q)^2 /
sum m q^2, so the try with the largest fall wins. m is how much each column matters (1, or the mean square of the
inputs it meets). The same idea as llama.cpp's `make_qx_quants`, written anew.

Owns: scales and integers of whole rows. Does not know: what other columns' errors do together (feedback.py).
"""

import hashlib
from pathlib import Path

import numba
import numpy as np

from edge_gemma.kernels import jit
from edge_gemma.quant.rtn import round_to_nearest

_TRIES = 10  # scales tried on each side of zero
# Where the largest weight lands, in steps: from well inside the range to cut off beyond its end. The end is among them.
_REACH = {2: (0.8, 2.6), 4: (5.0, 9.5)}
KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # compiled code is kept under it


@jit.kernel(
    jit.array(np.float32, 2), jit.array(np.float32, 1), numba.int64, numba.int64, numba.float32, numba.float32,
    jit.array(np.int8, 2, written=True), jit.array(np.float32, 2, written=True),
    parallel=True, fastmath={"reassoc", "contract", "nsz"}, key=KEY,
)  # fmt: skip
def _search(weights, importance, lowest, group, near, far, values, scales):
    rows, columns = weights.shape
    if values.shape != weights.shape or len(importance) != columns or scales.shape[0] != rows:
        return False
    highest = np.float32(-lowest - 1)
    low = np.float32(lowest)
    for row in numba.prange(rows):
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


@jit.kernel(
    jit.array(np.float32, 2), jit.array(np.float32, 2), numba.int64, numba.int64, jit.array(np.int8, 2, written=True),
    parallel=True, key=KEY,
)  # fmt: skip
def _nearest(weights, scales, lowest, group, values):
    low, highest = np.float32(lowest), np.float32(-lowest - 1)
    for row in numba.prange(weights.shape[0]):
        for g in range(scales.shape[1]):
            scale = scales[row, g]
            inverse = np.float32(0) if abs(scale) < np.float32(1e-30) else np.float32(1) / scale
            for i in range(g * group, min(g * group + group, weights.shape[1])):
                values[row, i] = np.int8(min(max(np.rint(weights[row, i] * inverse), low), highest))
    return True


def search_scales(
    weights: np.ndarray, bits: int, group: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows. As `round_to_nearest`, with scales that lose less; 8 bits lose too little to search for more.

    weights: float32 [rows, columns], finite; importance: float32 [columns], not negative; None: all columns alike.
    Returns (values int8 [rows, columns], scales float16 or float32 [rows, groups]).
    """
    if bits == 8:
        return round_to_nearest(weights, bits, group)
    rows, columns = weights.shape
    width = group or columns
    scales = np.empty((rows, -(-columns // width)), np.float32)
    values = np.empty(weights.shape, np.int8)
    m = np.ones(columns, np.float32) if importance is None else importance
    near, far = (np.float32(r) for r in _REACH[bits])
    if not jit.launch(_search, weights, m, -(1 << (bits - 1)), width, near, far, values, scales):
        raise ValueError(f"weights {weights.dtype}{weights.shape} and importance {m.dtype}{m.shape} do not fit")
    stored = scales.astype(np.float16 if group else np.float32)
    jit.launch(_nearest, weights, stored.astype(np.float32), -(1 << (bits - 1)), width, values)
    return values, stored
