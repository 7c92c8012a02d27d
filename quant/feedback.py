"""Rounding with error feedback: later columns make up for the rounding errors of earlier ones.

A matrix W that meets inputs x should keep W x, not W: the loss is tr(E H E^T) with E = W - Q and H the mean of x x^T.
Columns are rounded in order; with H = M D M^T, M unit upper triangular, column i is rounded not at W_i but at
W_i + sum_{j<i} E_j M_ji, which is where its own loss is least given the losses before it. This is GPTQ (Frantar et al.,
2022, arXiv:2210.17323) in the form of QuIP's LDLQ (Chee et al., 2023, arXiv:2307.13304, theorem 6: the same integers,
and no inverse of H). Then a few sweeps of coordinate descent over groups: each group's scale, and its minimum where it
has one, is set to the best value that can be stored, with all else fixed, and each of its integers moved where that
lowers the loss.

A group's weights are scale * q - minimum here, whatever the format: without a minimum it is 0 and q has a sign.

Owns: integers, scales and minima of a block of rows. Does not know: where H comes from (calibrate.py), files.
"""

from dataclasses import dataclass

import numba
import numpy as np

from edge_gemma.folder import layouts
from edge_gemma.kernels.compiled.convert import as_float, to_half
from edge_gemma.quant import compiling
from edge_gemma.quant.compiling import array, compiled
from edge_gemma.quant.search import Rounded, levels, lines_of, search_scales

Array = np.ndarray

_DAMPING = 0.01  # of the mean diagonal of H, added to it: directions the text never showed still count a little
_RIDGE = 0.1  # likewise, where drift is undone: it is known from few tokens
_UNDO = 0.5  # of the drift: undoing all of it fits the text rather than the model (docs/LOG.md#rounding-after-training)
_SWEEPS = 2
_BLOCK = 64  # columns rounded between two matrix products: whole groups
_LANES = 64  # rows rounded side by side; with 16 the checks before each inner loop cost more than the loop


@dataclass(frozen=True)
class Curvature:
    """What is known of the inputs of a run of columns. float32 [k, k] each.

    hessian: H, damped and scaled to a mean diagonal of 1; feedback: its factor M - 1; shift: what to add to W, as W
    times it, before W is rounded (None: nothing).
    """

    hessian: Array
    feedback: Array
    shift: Array | None = None

    @classmethod
    def of(cls, hessian: Array, drift: Array | None = None, damping: float = 0.0) -> "Curvature":
        """hessian: float32 [k, k], x^T x of the inputs x; all zero where the text never reached them.

        drift: (z - x)^T x, z the inputs in the float model. The products should be those of W and z, not of W and x:
        the weights nearest to that are W + W drift (H + ridge)^-1. (GPTAQ, Li et al., 2025, undoes the
        same drift column by column.)
        """
        k = len(hessian)
        mean = float(np.trace(hessian, dtype=np.float64)) / k
        h = hessian / np.float32(mean) if mean > 0 else np.eye(k, dtype=np.float32)
        h[np.arange(k), np.arange(k)] += np.float32(_DAMPING + damping)
        upper = np.linalg.cholesky(h[::-1, ::-1].astype(np.float64))[::-1, ::-1]  # H = U U^T
        feedback = (upper / np.diagonal(upper)).astype(np.float32)
        np.fill_diagonal(feedback, 0)
        shift = None
        if drift is not None and mean > 0:
            ridge = h.astype(np.float64) + _RIDGE * np.eye(k)
            shift = (_UNDO * np.linalg.solve(ridge, drift.T / mean).T).astype(np.float32)
        return cls(h, np.ascontiguousarray(feedback), shift)


@compiled(
    array(np.float32, 2), array(np.float32, 2), array(np.float32, 2), array(np.float32, 3),
    numba.int64, numba.int64, numba.int64, numba.int64,
    array(np.int8, 2, written=True), array(np.float32, 2, written=True),
    fastmath={"reassoc", "contract", "nsz"},
)  # fmt: skip
def _round_block(
    carried: Array, weights: Array, feedback: Array, lines: Array, start: int, group: int, lowest: int, highest: int,
    values: Array, errors: Array,
) -> bool:  # fmt: skip
    """Columns start, start + 1, ... of every row; carried float32 [rows, width] is what earlier columns ask for.

    lines: float32 [rows, groups, 2], scales and minima. Columns are rounded one after another, _LANES rows side by
    side.
    """
    low, high = np.float32(lowest), np.float32(highest)
    rows, width = carried.shape
    w, wanted = np.empty((width, _LANES), np.float32), np.empty((width, _LANES), np.float32)
    q, e = np.empty((width, _LANES), np.float32), np.empty((width, _LANES), np.float32)
    scale, inverse = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    minimum = np.zeros(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        lanes = min(_LANES, rows - first)
        if lanes < _LANES:
            w[:], wanted[:], scale[:], minimum[:], inverse[:] = 0, 0, 0, 0, 0
        for r in range(lanes):
            for i in range(width):
                w[i, r] = weights[first + r, start + i]
                wanted[i, r] = w[i, r] + carried[first + r, i]
        for i in range(width):
            if i == 0 or (start + i) % group == 0:
                for r in range(lanes):
                    scale[r] = lines[first + r, (start + i) // group, 0]
                    minimum[r] = lines[first + r, (start + i) // group, 1]
                    inverse[r] = np.float32(1) / scale[r] if abs(scale[r]) > np.float32(1e-30) else np.float32(0)
            for r in range(_LANES):
                q[i, r] = min(max(np.rint((wanted[i, r] + minimum[r]) * inverse[r]), low), high)
                e[i, r] = w[i, r] - scale[r] * q[i, r] + minimum[r]
            for j in range(i + 1, width):
                coupling = feedback[start + i, start + j]
                for r in range(_LANES):
                    wanted[j, r] += e[i, r] * coupling
        for r in range(lanes):
            for i in range(width):
                values[first + r, start + i] = np.int8(q[i, r])
                errors[first + r, start + i] = e[i, r]
    return True


@numba.njit(error_model="numpy")
def _storable(value: np.float32, unit: np.float32, top: int) -> np.float32:
    """The nearest scale or minimum that can be stored: a float16, or units 0 to top where top > 0."""
    if top == 0:
        return as_float(to_half(value))
    return unit * min(max(np.rint(value / unit), np.float32(0)), np.float32(top)) if unit > 0 else np.float32(0)


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _search_line(
    hessian: Array, start: int, begin: int, end: int, part: int, q: Array, g: Array, along: Array, t: Array,
    line: Array, units: Array, top: int,
) -> None:  # fmt: skip
    """The scale (part 0, along q) or minimum (part 1, along -1) that loses least, one for each lane with units; the
    slope g follows."""
    width = len(g)
    gain, weight, shrunk = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    t[begin:] = 0
    for i in range(begin, end):
        for r in range(_LANES):
            along[i, r] = q[i, r] if part == 0 else np.float32(-1)
        for j in range(begin, width):
            coupling = hessian[start + i, start + j]
            for r in range(_LANES):
                t[j, r] += along[i, r] * coupling
    for i in range(begin, end):
        for r in range(_LANES):
            gain[r] += along[i, r] * g[i, r]
            weight[r] += along[i, r] * t[i, r]
    for r in range(len(units)):
        better = line[r]
        if weight[r] > np.float32(1e-30):
            better = _storable(better + gain[r] / weight[r], units[r], top)
        shrunk[r] = line[r] - better
        line[r] = better
    for j in range(begin, width):
        for r in range(_LANES):
            g[j, r] += shrunk[r] * t[j, r]


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _move_integers(
    hessian: Array,
    start: int,
    begin: int,
    end: int,
    low: np.float32,
    high: np.float32,
    scale: Array,
    q: Array,
    g: Array,
) -> None:
    """Each integer in turn to where it loses least; the slope g follows."""
    width, moved = len(g), np.empty(_LANES, np.float32)
    for i in range(begin, end):
        own = hessian[start + i, start + i]
        for r in range(_LANES):
            step = own * scale[r]
            wished = q[i, r] + (g[i, r] / step if abs(scale[r]) > np.float32(1e-30) else np.float32(0))
            best = min(max(np.rint(wished), low), high)
            moved[r] = (q[i, r] - best) * scale[r]
            q[i, r] = best
        for j in range(i + 1, width):
            coupling = hessian[start + i, start + j]
            for r in range(_LANES):
                g[j, r] += moved[r] * coupling


@compiled(
    array(np.float32, 2), array(np.float32, 2), array(np.float32, 3),
    numba.int64, numba.int64, numba.int64, numba.int64, numba.int64, numba.int64,
    array(np.int8, 2, written=True), array(np.float32, 3, written=True), array(np.float32, 2, written=True),
    fastmath={"reassoc", "contract", "nsz"},
)  # fmt: skip
def _improve_block(
    slope: Array, hessian: Array, units: Array, start: int, group: int, lowest: int, highest: int, free: int, top: int,
    values: Array, lines: Array, errors: Array,
) -> bool:  # fmt: skip
    """Columns start, start + 1, ... of every row, whole groups: each group's scale and minimum, then its integers.

    slope: float32 [rows, width], E H of these columns; hessian: [k, k]; lines: float32 [rows, groups, 2], scales and
    minima, of which the first `free` may change, to what _storable gives for units of the same shape. _LANES rows side
    by side.
    """
    low, high = np.float32(lowest), np.float32(highest)
    rows, width = slope.shape
    g, q = np.empty((width, _LANES), np.float32), np.empty((width, _LANES), np.float32)
    before, t = np.empty((width, _LANES), np.float32), np.empty((width, _LANES), np.float32)
    along, line = np.empty((width, _LANES), np.float32), np.zeros((2, _LANES), np.float32)
    scale, minimum = line[0], line[1]
    for first in range(0, rows, _LANES):
        lanes = min(_LANES, rows - first)
        if lanes < _LANES:
            g[:], q[:], line[:] = 0, 0, 0
        for r in range(lanes):
            for i in range(width):
                g[i, r] = slope[first + r, i]
                q[i, r] = np.float32(values[first + r, start + i])
        for begin in range(0, width, group):
            end = min(begin + group, width)
            at = (start + begin) // group
            for r in range(lanes):
                scale[r], minimum[r] = lines[first + r, at, 0], lines[first + r, at, 1]
            for i in range(begin, end):
                for r in range(_LANES):
                    before[i, r] = q[i, r] * scale[r] - minimum[r]
            for part in range(free):  # a line search along q for the scale, along -1 for the minimum
                _search_line(
                    hessian,
                    start,
                    begin,
                    end,
                    part,
                    q,
                    g,
                    along,
                    t,
                    line[part],
                    units[first : first + lanes, at, part],
                    top,
                )
            _move_integers(hessian, start, begin, end, low, high, scale, q, g)
            for r in range(lanes):
                lines[first + r, at, 0], lines[first + r, at, 1] = scale[r], minimum[r]
            for i in range(begin, end):
                for r in range(_LANES):
                    before[i, r] -= q[i, r] * scale[r] - minimum[r]
        for r in range(lanes):
            for i in range(width):
                values[first + r, start + i] = np.int8(q[i, r])
                errors[first + r, start + i] += before[i, r]
    return True


def round_with_feedback(
    weights: Array, curvature: Curvature, bits: int, group: int, sweeps: int = _SWEEPS, minimum: int = 0
) -> Rounded:
    """Quantise rows so that their products with the calibration text's inputs stay what they were.

    weights: float32 [rows, columns], finite; minimum: as for search_scales. The same on any number of threads; callers
    may run blocks of rows side by side.
    """
    weights = np.ascontiguousarray(weights) if curvature.shift is None else weights + weights @ curvature.shift
    columns = weights.shape[1]
    width, (lowest, highest), hessian = group or columns, levels(bits, minimum), curvature.hessian
    values, *stored = search_scales(weights, bits, group, np.ascontiguousarray(np.diagonal(hessian)), minimum)
    lines, errors = lines_of(stored, group), np.zeros_like(weights)
    blocks = [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]
    for start, stop in blocks:
        carried = errors[:, :start] @ curvature.feedback[:start, start:stop]
        _round_block(carried, weights, curvature.feedback, lines, start, width, lowest, highest, values, errors)
    units = np.zeros_like(lines)
    if minimum:
        units = layouts.scales_and_minima(np.ones_like(stored[0]), stored[1], group)
    free, top = (2 if minimum else 1 if group else 0), (1 << minimum) - 1  # one scale a row stays
    for start, stop in blocks * sweeps:
        slope = errors @ hessian[start:stop].T
        _improve_block(slope, hessian, units, start, width, lowest, highest, free, top, values, lines, errors)
    if not minimum:
        return values, lines[..., 0].astype(stored[0].dtype)
    pairs = np.rint(np.divide(lines, units, out=np.zeros_like(lines), where=units > 0)).astype(np.uint8)
    return values - np.int8(layouts.zero_point(bits)), pairs, stored[1]


def compile_kernels() -> None:
    """Compile the kernels once, before several threads need them."""
    for each in (_round_block, _improve_block):
        compiling.make_ready(each)
