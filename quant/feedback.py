"""Rounding with error feedback: what one column's rounding loses, the columns after it make up for.

A matrix W that meets inputs x should keep W x, not W: the loss is tr(E H E^T) with E = W - Q and H the mean of x x^T.
Columns are rounded in order; with H = M D M^T, M unit upper triangular, column i is rounded not at W_i but at
W_i + sum_{j<i} E_j M_ji, which is where its own loss is least given the losses before it. This is GPTQ (Frantar et al.,
2022, arXiv:2210.17323) in the form of QuIP's LDLQ (Chee et al., 2023, arXiv:2307.13304, theorem 6: the same integers,
and no inverse of H). Then a few sweeps of coordinate descent over groups: each group's scale is set to its best value
with all else fixed, and each of its integers moved where that lowers the loss.

Owns: integers and scales of a block of rows. Does not know: where H comes from (calibrate.py), files.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from edge_gemma.kernels import jit
from edge_gemma.kernels.convert import as_float, to_half
from edge_gemma.quant.search import KEY as SEARCH_KEY
from edge_gemma.quant.search import search_scales

_DAMPING = 0.01  # of the mean diagonal of H, added to it: directions the text never showed still count a little
_RIDGE = 0.1  # likewise, where drift is undone: it is known from few tokens
_UNDO = 0.5  # of the drift: undoing all of it fits the text rather than the model (docs/LOG.md)
_SWEEPS = 2
_BLOCK = 32  # columns rounded between two matrix products
_KEY = SEARCH_KEY + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Curvature:
    """What is known of the inputs of a run of columns. float32 [k, k] each.

    hessian: H, damped and scaled to a mean diagonal of 1; feedback: its factor M - 1; shift: what to add to W, as W
    times it, before W is rounded (None: nothing).
    """

    hessian: np.ndarray
    feedback: np.ndarray
    shift: np.ndarray | None = None

    @classmethod
    def of(cls, hessian: np.ndarray, drift: np.ndarray | None = None, damping: float = 0.0) -> "Curvature":
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


@jit.kernel(
    jit.array(np.float32, 2, written=True), jit.array(np.float32, 2), jit.array(np.float32, 2),
    jit.array(np.float32, 2), numba.int64, numba.int64, numba.int64,
    jit.array(np.int8, 2, written=True), jit.array(np.float32, 2, written=True),
    fastmath={"reassoc", "contract", "nsz"}, key=_KEY,
)  # fmt: skip
def _round_block(carried, weights, feedback, scales, start, group, lowest, values, errors):
    """Columns start, start + 1, ... of every row; carried float32 [rows, width] is what earlier columns ask for."""
    low, highest = np.float32(lowest), np.float32(-lowest - 1)
    rows, width = carried.shape
    for row in range(rows):
        wanted = carried[row]
        for i in range(width):
            column = start + i
            scale = scales[row, column // group]
            q = np.float32(0)
            if abs(scale) > np.float32(1e-30):
                q = min(max(np.rint((weights[row, column] + wanted[i]) / scale), low), highest)
            error = weights[row, column] - scale * q
            values[row, column] = np.int8(q)
            errors[row, column] = error
            coupling = feedback[column, start + i + 1 : start + width]
            ahead = wanted[i + 1 :]
            for j in range(len(ahead)):
                ahead[j] += error * coupling[j]
    return True


@jit.kernel(
    jit.array(np.float32, 2), jit.array(np.float32, 2), numba.int64, numba.int64, numba.boolean,
    jit.array(np.int8, 2, written=True), jit.array(np.float32, 2, written=True), jit.array(np.float32, 2, written=True),
    jit.array(np.float32, 2, written=True),
    fastmath={"reassoc", "contract", "nsz"}, key=_KEY,
)  # fmt: skip
def _improve_block(slope, hessian, start, lowest, rescale, values, scales, errors, change):
    """One group of every row: its scale, then each integer; change float32 [rows, width]: by how much errors moved.

    slope: float32 [rows, k], E H; hessian: [k, k]; scales: float32 [rows, 1] of this group.
    """
    low, highest = np.float32(lowest), np.float32(-lowest - 1)
    rows, width = change.shape
    g = np.empty(width, np.float32)
    for row in range(rows):
        for i in range(width):
            g[i] = slope[row, start + i]
            change[row, i] = 0
        scale = scales[row, 0]
        if rescale:
            gain, weight = np.float32(0), np.float32(0)
            for i in range(width):
                q = np.float32(values[row, start + i])
                gain += q * g[i]
                coupling, total = hessian[start + i, start : start + width], np.float32(0)
                for j in range(width):
                    total += coupling[j] * np.float32(values[row, start + j])
                weight += q * total
            if weight > np.float32(1e-30):
                better = as_float(to_half(scale + gain / weight))
                for i in range(width):
                    moved = (scale - better) * np.float32(values[row, start + i])
                    change[row, i] = moved
                    coupling = hessian[start + i, start : start + width]
                    for j in range(width):
                        g[j] += moved * coupling[j]
                scale = better
        if abs(scale) > np.float32(1e-30):
            for i in range(width):
                coupling = hessian[start + i, start : start + width]
                q = np.float32(values[row, start + i])
                best = min(max(np.rint(q + g[i] / (coupling[i] * scale)), low), highest)
                if best != q:
                    moved = (q - best) * scale
                    change[row, i] += moved
                    values[row, start + i] = np.int8(best)
                    for j in range(width):
                        g[j] += moved * coupling[j]
        scales[row, 0] = scale
        for i in range(width):
            errors[row, start + i] += change[row, i]
    return True


def round_with_feedback(
    weights: np.ndarray, curvature: Curvature, bits: int, group: int, sweeps: int = _SWEEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows so that their products with the calibration text's inputs stay what they were.

    weights: float32 [rows, columns], finite. Returns (values int8 [rows, columns], scales float16 [rows, groups], or
    float32 for one scale a row). The same on any number of threads; callers may run blocks of rows side by side.
    """
    weights = np.ascontiguousarray(weights) if curvature.shift is None else weights + weights @ curvature.shift
    rows, columns = weights.shape
    width, lowest = group or columns, -(1 << (bits - 1))
    importance = np.ascontiguousarray(np.diagonal(curvature.hessian))
    values, stored = search_scales(weights, bits, group, importance)
    scales = stored.astype(np.float32)
    errors = np.zeros_like(weights)
    blocks = [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]
    for start, stop in blocks:
        carried = errors[:, :start] @ curvature.feedback[:start, start:stop]
        _round_block(carried, weights, curvature.feedback, scales, start, width, lowest, values, errors)
    slope = errors @ curvature.hessian if sweeps else errors
    step = group or _BLOCK
    for _ in range(sweeps):
        for start in range(0, columns, step):
            change = np.empty((rows, min(step, columns - start)), np.float32)
            part = np.ascontiguousarray(scales[:, start // width, None])
            _improve_block(slope, curvature.hessian, start, lowest, bool(group), values, part, errors, change)
            scales[:, start // width] = part[:, 0]
            slope += change @ curvature.hessian[start : start + change.shape[1]]
    return values, scales.astype(stored.dtype)


def compile_kernels() -> None:
    """Before threads share them."""
    for kernel in (_round_block, _improve_block):
        if not kernel.overloads:
            kernel.compile(kernel.kernel_signature)
            kernel.disable_compile()
