"""Matrices whose integers and scales a source has already: they are carried over, never rounded again.

Owns: `PackedMatrix`, what a reader offers of such a matrix. Does not know: containers, schemas, recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma import qformat

Integers = NDArray[np.int8]
Scales = NDArray[np.float32]


Packed = tuple[NDArray[Any], ...]
"""Rows of a matrix: integers int8 [n, columns] and scales float32 [n, groups]; or, with a minimum, integers, pairs
[n, groups, 2] (uint8, or float32) and factors float32 [n, blocks, 2]. qformat.py says what they come to.
"""


@dataclass(frozen=True)
class PackedMatrix:
    """W [rows, columns] as integers with scales, in a format that model folders have (qformat.py)."""

    shape: tuple[int, int]
    bits: int  # 2, 4, 8
    group: int  # columns that share a scale; 0: one scale a row
    origin: str  # where the integers came from, in words for `edge-gemma info`
    read: Callable[[int, int], Packed]
    """Rows [start, stop). Raises CheckpointError."""
    # Static int8 activation scales the matrix was trained with (0: none), as model_folder.Tensor has them.
    input_scale: float = 0.0
    output_scale: float = 0.0
    cache_scale: float = 0.0
    minimum: int = 0  # bits of a group's minimum; 0: none

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [n, columns]."""
        return self.dequantize(self.read(start, stop))

    def dequantize(self, packed: Packed) -> NDArray[np.float32]:
        """float32 [n, columns] of what `read` gave."""
        return qformat.dequantize_rounded(*packed, bits=self.bits, group=self.group)
