"""Matrices that are integers and scales in the source already. They are carried over, never rounded again.

Owns: `PackedMatrix`, the interface that readers give such a matrix; converting blocks of it to a folder's bytes and
back.
Does not know: containers, schemas, recipes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.export.source_file import StoredTensor
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import Tensor

Integers = NDArray[np.int8]
Scales = NDArray[np.float32]


Packed = tuple[NDArray[Any], ...]
"""Rows of a matrix: integers int8 [n, columns] and scales float32 [n, groups]; or, with a minimum, integers, pairs
[n, groups, 2] (uint8, or float32) and factors float32 [n, blocks, 2]. layouts.py says what they come to.
"""


@dataclass(frozen=True)
class PackedMatrix:
    """W [rows, columns] as integers with scales, in a format that model folders have (layouts.py)."""

    shape: tuple[int, int]
    bits: int  # 2, 4, 8
    group: int  # columns that share a scale; 0: one scale a row
    origin: str  # where the integers came from, in words for `edge-gemma info`
    read: Callable[[int, int], Packed]
    """Rows [start, stop). Raises CheckpointError."""
    # Static int8 activation scales the matrix was trained with (0: none), as folder.Tensor has them.
    input_scale: float = 0.0
    output_scale: float = 0.0
    cache_scale: float = 0.0
    minimum: int = 0  # bits of a group's minimum; 0: none
    stored: tuple[StoredTensor, ...] = ()  # where the values lie

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [n, columns]."""
        return self.dequantize(self.read(start, stop))

    def dequantize(self, packed: Packed) -> NDArray[np.float32]:
        """float32 [n, columns] of what `read` gave."""
        return layouts.dequantize_rounded(*packed, bits=self.bits, group=self.group)


def decode_packed(tensor: Tensor, parts: dict[str, np.ndarray], rows: int) -> Packed:
    """The inverse of encode_packed for a block of `rows` rows; parts as folder.Part.numpy_dtype has them."""
    if tensor.layout == "rows":
        return layouts.unpack_rows(parts["records"], tensor.shape[1], tensor.bits, tensor.group)
    values = layouts.unpack_panels(parts["packed"], tensor.bits, rows, tensor.shape[1])
    if not tensor.minimum:
        return values, layouts.unpack_scales(parts["scales"].view(layouts.scales_dtype(tensor.group)), rows)
    panels = len(parts["packed"])
    factors = parts["factors"].view(np.float16) if "factors" in parts else np.empty((panels, 0, 2, 8), np.float16)
    return values, *layouts.unpack_words(parts["scales"], factors, tensor.group, rows)


def encode_dense(tensor: Tensor, weights: NDArray[np.float32]) -> dict[str, np.ndarray]:
    """Values in the tensor's own type; exact in bfloat16, which only values that were it already are stored in."""
    if tensor.parts["values"].dtype == "F32":
        return {"values": weights}
    return {"values": (weights.view(np.uint32) >> 16).astype(np.uint16)}


def encode_packed(tensor: Tensor, values: np.ndarray, *scales: np.ndarray) -> dict[str, np.ndarray]:
    """A block of whole rows, integers and scales as `Packed` has them, as the bytes of each part."""
    if tensor.layout == "rows":
        (of_groups,) = scales
        return {"records": layouts.pack_rows(values, of_groups, tensor.bits, tensor.group)}
    packed = layouts.pack_panels(values, tensor.bits)
    if not tensor.minimum:
        (of_groups,) = scales
        return {"packed": packed, "scales": layouts.pack_scales(of_groups, tensor.group)}
    pairs, factors = scales
    parts = {
        "packed": packed,
        "scales": layouts.pack_words(pairs, tensor.group, tensor.minimum),
        "factors": layouts.pack_factors(factors),
    }
    return {key: parts[key] for key in tensor.parts}
