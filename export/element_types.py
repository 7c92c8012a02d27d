"""How the values of a tensor are stored, and the floats that every container has.

Owns: `ElementType`, F32, F16 and BF16, and turning bytes into float32. Does not know: files, tensor names, the block
types of GGUF (gguf_types.py).

A block is the smallest unit a type can be read in: `block_elements` consecutive values of one row in `block_bytes`
bytes. Everything is little endian.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ElementType:
    """One storage type. `dequantize(blocks, out)`: contiguous uint8 [n, block_bytes] -> float32 [n, block_elements]."""

    name: str
    block_elements: int
    block_bytes: int
    dequantize: Callable[[Bytes, Floats], None]

    def nbytes(self, elements: int) -> int:
        """Bytes of `elements` values, which must be whole blocks."""
        return elements // self.block_elements * self.block_bytes


def _f32(blocks: Bytes, out: Floats) -> None:
    """4 bytes: one IEEE float32."""
    out[...] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    """2 bytes: one IEEE float16."""
    out[...] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    """2 bytes: the upper half of an IEEE float32."""
    words = out.view("<u4")
    words[...] = blocks.view("<u2")
    words <<= 16


F32, F16, BF16 = ElementType("F32", 1, 4, _f32), ElementType("F16", 1, 2, _f16), ElementType("BF16", 1, 2, _bf16)
FLOATS = {kind.name: kind for kind in (F32, F16, BF16)}


def dequantize(kind: ElementType, blocks: Bytes) -> Floats:
    """Blocks uint8 [n, block_bytes] (C-contiguous) -> float32 [n, block_elements].

    Random or damaged scales may be infinite or NaN; they pass through as in the reference, without a warning.
    """
    out = np.empty((len(blocks), kind.block_elements), np.float32)
    dequantize_into(kind, blocks, out)
    return out


def dequantize_into(kind: ElementType, blocks: Bytes, out: Floats) -> None:
    """`dequantize` into an existing C-contiguous float32 [n, block_elements]."""
    with np.errstate(all="ignore"):
        kind.dequantize(blocks, out)
