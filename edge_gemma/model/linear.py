"""Matrices as the decoder uses them: y = W x, and single rows of W for token embeddings.

Owns: one class for each layout of a matrix and the quantisation of activations they share. Does not know: which layer
a matrix belongs to, or how the bytes came to be.
"""

import functools

import numpy as np

from edge_gemma import kernels
from edge_gemma.folder import layouts
from edge_gemma.model.run_state import Int8, RunState, new_int8, shaped

_BLAS_FROM = 24  # rows from which NumPy's product is the faster one


class Activations:
    """The input of one or several matrices: float32 [n, k], and its int8 form made once for all that need it.

    state: where the int8 form lies; the next Activations with this state use the same memory.
    """

    def __init__(self, values: np.ndarray, state: RunState | None = None) -> None:
        self.values = values
        self._state = state
        self._int8: dict[tuple[int, float], Int8] = {}

    def tail(self, n: int) -> "Activations":
        """The last n rows."""
        return self if n == len(self.values) else Activations(self.values[-n:], self._state)

    @functools.cached_property
    def _ends(self) -> tuple[float, float]:
        """The least and the largest value."""
        return self.values.min(), self.values.max()

    def clamped(self, low: float, high: float) -> "Activations":
        """Values from low to high: these Activations if all are."""
        least, largest = self._ends
        return self if low <= least and largest <= high else Activations(np.clip(self.values, low, high))

    def int8(self, group: int, static: float = 0.0) -> Int8:
        """(q int8 [n, k padded], scale float32 [n, groups], sums int32 [n, groups]) for weights in groups of `group`.

        Activations take a scale for each group of the weights they meet (one a token where rows have one scale): one
        scale a token costs 3.2% of perplexity on Gemma 3 270M, because a few channels are large
        (docs/LOG.md#activation-scales).
        Weights trained with one fixed scale for all tokens, `static`, get that one.
        """
        if (group, static) not in self._int8:
            n, k = self.values.shape
            shape = n, layouts.padded_k(k), layouts.group_count(k, group)
            q, scale, sums = self._state.int8(len(self._int8), *shape) if self._state else new_int8(*shape)
            if static:
                kernels.quantize_static(self.values, static, q, scale, sums)
            else:
                kernels.quantize_activations(self.values, group, q, scale, sums)
            self._int8[group, static] = q, scale, sums
        return self._int8[group, static]


class DenseMatrix:
    """W [rows, k], float32 or bfloat16 (as uint16 bits), row-major. The exact recipe, not the fast one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.rows = len(values)

    def in_kernels(self, rows: int) -> bool:
        """Whether a product of so many rows happens in kernels altogether, so that it can be recorded."""
        return self.values.dtype != np.float32 or rows < _BLAS_FROM

    def __call__(
        self, x: Activations, memory: np.ndarray | None = None, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """x W[start:stop]^T: float32 [n, stop - start], in `memory` (a field of RunState) if it is given."""
        w = self.values[start:stop]
        out = shaped(memory, (len(x.values), len(w)))
        if not self.in_kernels(len(x.values)):
            return np.matmul(x.values, w.T, out=out)
        (kernels.matmul_float if w.dtype == np.float32 else kernels.matmul_bfloat16)(x.values, w, out)
        return out

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Rows ids [n]: float32 [n, k]."""
        return widen(self.values[ids])


class PanelMatrix:
    """W [rows, k] in 2, 4 or 8 bits, packed in panels of 8 rows (layouts.py).

    Weights trained with static activation scales have them here: x and y are then rounded to these steps, -128 to 127
    of them (0: x to int8 as it comes, y not at all).
    """

    def __init__(
        self,
        packed: np.ndarray,
        scales: np.ndarray,
        shape: tuple[int, ...],
        bits: int,
        group: int,
        input_scale: float = 0.0,
        output_scale: float = 0.0,
        factors: np.ndarray | None = None,
    ) -> None:
        self.packed = packed
        self.scales = scales  # uint16 (float16 bits) [panels, groups, 8], or float32 [panels, 1, 8], or words
        self.factors = factors  # of words: uint16 (float16 bits) [panels, blocks, 2, 8]; None: no minimum
        self.rows, self.columns = shape
        self.bits, self.group = bits, group
        self.input_scale, self.output_scale = input_scale, output_scale

    def in_kernels(self, rows: int) -> bool:
        """As in DenseMatrix."""
        return self.rows % 8 == 0

    def __call__(
        self, x: Activations, memory: np.ndarray | None = None, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """x W[start:stop]^T: float32 [n, stop - start], in `memory` if it is given; `start` is a multiple of 8."""
        stop = self.rows if stop is None else stop
        first, last = start // 8, -(-stop // 8)
        q, scale, sums = x.int8(self.group, self.input_scale)
        out = shaped(memory, (len(q), 8 * (last - first)))
        factors = None if self.factors is None else self.factors[first:last]
        weights = self.packed[first:last], self.scales[first:last], self.bits, self.group
        kernels.matmul(q, scale, sums, *weights, out, factors, self.output_scale)
        return out if out.shape[1] == stop - start else np.ascontiguousarray(out[:, : stop - start])

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Rows ids [n]: float32 [n, k]. Each comes out of one panel, a contiguous few kB."""
        if self.factors is not None:
            halves = self.factors.view(np.float16)
            return layouts.dequantize_panels(self.packed, self.scales, self.bits, self.group, ids, self.columns, halves)
        rows = np.empty((len(ids), self.columns), np.float32)
        kernels.gather_panels(self.packed, self.scales, np.asarray(ids, np.int64), self.bits, self.group, rows)
        return rows


Matrix = DenseMatrix | PanelMatrix


def widen(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32; float32 as it is."""
    return values if values.dtype == np.float32 else (values.astype(np.uint32) << 16).view(np.float32)
