"""Matrices whose integers and scales a source has already: they are carried over, never rounded again.

Owns: `PackedMatrix`, what a reader offers of such a matrix. Does not know: containers, schemas, recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_gemma import qformat

Integers = NDArray[np.int8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class PackedMatrix:
    """W [rows, columns] = integers * scales, in a format that model folders have (qformat.py)."""

    shape: tuple[int, int]
    bits: int  # 2, 4, 8
    group: int  # columns that share a scale; 0: one scale a row
    origin: str  # where the integers came from, in words for `edge-gemma info`
    read: Callable[[int, int], tuple[Integers, Scales]]
    """Rows [start, stop): int8 [n, columns] and float32 [n, groups]. Raises CheckpointError."""
    # Static int8 activation scales the matrix was trained with (0: none), as model_folder.Tensor has them.
    input_scale: float = 0.0
    output_scale: float = 0.0
    cache_scale: float = 0.0

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [n, columns]."""
        return qformat.dequantize(*self.read(start, stop), self.group)
