"""The element types of GGUF, and how their blocks become float32 or are carried over as integers.

Owns: the byte layout of every GGUF block type we read, and a NumPy dequantiser for each, vectorised over blocks. Does
not know: files, tensor names, models.

Nibbles and bit fields are listed low bits first. The arithmetic is float32 in the order of the reference, so that
results are equal to its to the last bit.

Source of the layouts: ggml-quants.c / ggml-common.h, cross-checked with the PyPI package `gguf` (gguf/quants.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.export.element_types import BF16, F16, F32, Bytes, ElementType, Floats


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(q: Bytes, out: NDArray[Any]) -> None:
    """Low nibbles of the 16 bytes to values 0..15, high nibbles to values 16..31."""
    out[:, :16] = q & 15
    out[:, 16:] = q >> 4


def _add_fifth_bits(packed: Bytes, out: NDArray[Any]) -> None:
    """Adds 16 to value i where bit i of the block's little-endian 32-bit word `packed` [n, 4] is set."""
    out += np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """34 bytes, 32 values: f16 d | int8 q[32].  w = q * d"""
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """18 bytes, 32 values: f16 d | 16 bytes of nibbles (value i low in byte i, value i + 16 high).  w = d * (q - 8)"""
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """20 bytes, 32 values: f16 d | f16 m | 16 bytes of nibbles as in Q4_0.  w = d * q + m"""
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    """22 bytes, 32 values: f16 d | u32 fifth bits (bit i of value i) | 16 bytes of nibbles.  w = d * (q - 16)"""
    _nibbles(blocks[:, 6:], out)
    _add_fifth_bits(blocks[:, 2:6], out)
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    """24 bytes, 32 values: f16 d | f16 m | u32 fifth bits | 16 bytes of nibbles.  w = d * q + m"""
    _nibbles(blocks[:, 8:], out)
    _add_fifth_bits(blocks[:, 4:8], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _crumbs(q: Bytes, out: NDArray[Any]) -> None:
    """64 bytes of 2-bit fields: byte b of half h holds value b of its four runs of 32 (bits 0-1 the first run)."""
    halves, runs = q.reshape(-1, 2, 32), out.reshape(-1, 2, 4, 32)
    for run in range(4):
        runs[:, :, run] = (halves >> (2 * run)) & 3


def _q2_k(blocks: Bytes, out: Floats) -> None:
    """84 bytes, 256 values in 16 sub-blocks of 16: u8 scales[16] (scale low nibble, minimum high) | 64 bytes of 2-bit
    fields | f16 d | f16 dmin.  w = (d * scale) * q - dmin * minimum
    """
    scales = blocks[:, :16]
    _crumbs(blocks[:, 16:80], out)
    sub = out.reshape(-1, 16, 16)
    sub *= (_half(blocks, 80) * (scales & 15))[:, :, None]
    sub -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k_fields(blocks: Bytes, out: NDArray[Any]) -> None:
    """The two lower bits and the third: 0 to 7."""
    _crumbs(blocks[:, 32:96], out)
    runs = out.reshape(-1, 8, 32)
    for run in range(8):
        runs[:, run] += (blocks[:, :32] >> run & 1) << 2


def _q3_k_scales(blocks: Bytes) -> NDArray[np.int8]:
    """-32 to 31 [n, 16]."""
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return (low | high << 4).view(np.int8) - np.int8(32)


def _q3_k(blocks: Bytes, out: Floats) -> None:
    """110 bytes, 256 values in 16 sub-blocks of 16: third bits[32] (bit r of byte b: value b of run r of 32) | 64 bytes
    of 2-bit fields | 12 bytes of 6-bit scales | f16 d.  w = (d * (scale - 32)) * q, q two bits less 4 if the third is 0

    Scales: sub-block i < 8 has its low 4 bits in the low nibble of byte i, i >= 8 in the high nibble of byte i - 8; its
    upper 2 bits are bits 2 * (i // 4) of byte 8 + i % 4.
    """
    _q3_k_fields(blocks, out)
    out -= 4
    sub = out.reshape(-1, 16, 16)
    sub *= (_half(blocks, 108) * _q3_k_scales(blocks))[:, :, None]


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes -> 6-bit scales [n, 8] and minima [n, 8] of Q4_K and Q5_K.

    Bytes 0-3: scales 0-3 (6 bits) and the upper two bits of scales 4-7; bytes 4-7: the same for minima;
    bytes 8-11: low nibble the lower four bits of scales 4-7, high nibble those of minima 4-7.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2 & 48)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 2 & 48)], axis=1)
    return scales, minima


def _scale_k(blocks: Bytes, out: Floats) -> None:
    """w = (d * scale) * q - dmin * minimum over the 8 sub-blocks of 32 of Q4_K and Q5_K (d, dmin, scales lead both)."""
    scales, minima = _k_scales(blocks[:, 4:16])
    sub = out.reshape(-1, 8, 32)
    sub *= (_half(blocks, 0) * scales)[:, :, None]
    sub -= (_half(blocks, 2) * minima)[:, :, None]


def _nibble_runs(q: Bytes, out: NDArray[Any]) -> None:
    """128 bytes: four groups of 32 bytes, each its low nibbles (a run of 32 values), then its high nibbles."""
    groups, runs = q.reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32)
    runs[:, :, 0] = groups & 15
    runs[:, :, 1] = groups >> 4


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """144 bytes, 256 values in 8 sub-blocks of 32: f16 d | f16 dmin | 12 bytes of 6-bit scales and minima | 128 bytes
    of nibbles.  w = (d * scale) * q - dmin * minimum
    """
    _nibble_runs(blocks[:, 16:], out)
    _scale_k(blocks, out)


def _q5_k_fields(blocks: Bytes, out: NDArray[Any]) -> None:
    _nibble_runs(blocks[:, 48:], out)
    runs = out.reshape(-1, 8, 32)
    for run in range(8):
        runs[:, run] += (blocks[:, 16:48] >> run & 1) << 4


def _q5_k(blocks: Bytes, out: Floats) -> None:
    """176 bytes, 256 values in 8 sub-blocks of 32: f16 d | f16 dmin | 12 bytes of scales and minima | fifth bits[32]
    (bit r of byte b: value b of sub-block r) | 128 bytes of nibbles.  w = (d * scale) * q - dmin * minimum
    """
    _q5_k_fields(blocks, out)
    _scale_k(blocks, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """210 bytes, 256 values in 16 sub-blocks of 16: 128 bytes of low nibbles | 64 bytes of upper 2-bit fields | int8
    scales[16] | f16 d.  w = (d * scale) * (q - 32)

    Each half of 128 values owns 64 nibble bytes: runs 0 and 1 of 32 are the low nibbles, runs 2 and 3 the high ones.
    """
    _crumbs(blocks[:, 128:192], out)
    out *= 16
    low = blocks[:, :128].reshape(-1, 2, 64)
    halves = out.reshape(-1, 2, 2, 64)
    halves[:, :, 0] += low & 15
    halves[:, :, 1] += low >> 4
    out -= 32
    sub = out.reshape(-1, 16, 16)
    sub *= (_half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8))[:, :, None]


Packed = tuple[NDArray[Any], ...]  # n blocks as export/packed.py has rows, each a row of its own


def _fields(blocks: Bytes, count: int, read: Callable[[Bytes, NDArray[Any]], None]) -> Bytes:
    """Unsigned fields uint8 [n, count] by one of the readers above."""
    out = np.empty((len(blocks), count), np.uint8)
    read(blocks, out)
    return out


def _less(fields: Bytes, zero: int) -> NDArray[np.int8]:
    return fields.view(np.int8) - np.int8(zero)


def _q8_0_packed(blocks: Bytes) -> Packed:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0)


def _q4_0_packed(blocks: Bytes) -> Packed:
    return _less(_fields(blocks[:, 2:], 32, _nibbles), 8), _half(blocks, 0)


def _q5_0_packed(blocks: Bytes) -> Packed:
    """In bytes."""
    fields = _fields(blocks[:, 6:], 32, _nibbles)
    _add_fifth_bits(blocks[:, 2:6], fields)
    return _less(fields, 16), _half(blocks, 0)


def _q4_1_packed(blocks: Bytes) -> Packed:
    """Scale d, minimum -m."""
    pairs = np.stack([_half(blocks, 0), -_half(blocks, 2)], axis=-1)
    return _less(_fields(blocks[:, 4:], 32, _nibbles), 8), pairs, np.empty((len(blocks), 0, 2), np.float32)


def _factors(blocks: Bytes, d: int, dmin: int) -> Floats:
    """float32 [n, 1, 2] of the float16 at these bytes."""
    return np.stack([_half(blocks, d), _half(blocks, dmin)], axis=-1)


def _q2_k_packed(blocks: Bytes) -> Packed:
    pairs = np.stack([blocks[:, :16] & 15, blocks[:, :16] >> 4], axis=-1)
    return _less(_fields(blocks[:, 16:80], 256, _crumbs), 2), pairs, _factors(blocks, 80, 82)


def _q4_k_packed(blocks: Bytes) -> Packed:
    pairs = np.stack(_k_scales(blocks[:, 4:16]), axis=-1)
    return _less(_fields(blocks[:, 16:], 256, _nibble_runs), 8), pairs, _factors(blocks, 0, 2)


def _q5_k_packed(blocks: Bytes) -> Packed:
    """In bytes, 0 to 31."""
    pairs = np.stack(_k_scales(blocks[:, 4:16]), axis=-1)
    return _less(_fields(blocks, 256, _q5_k_fields), 0), pairs, _factors(blocks, 0, 2)


def _q3_k_packed(blocks: Bytes) -> Packed:
    """In 4 bits, 0 to 8: w = (d * scale) * (q - 4) has the minimum 4 d * scale. A negative scale changes its sign, and
    that of its integers: q becomes 8 - q.
    """
    fields, scales, d = _fields(blocks, 256, _q3_k_fields), _q3_k_scales(blocks), _half(blocks, 108)
    sub = fields.reshape(-1, 16, 16)
    sub[...] = np.where(scales[:, :, None] < 0, 8 - sub, sub)
    sizes = np.abs(scales).view(np.uint8)
    return _less(fields, 8), np.stack([sizes, sizes], axis=-1), np.stack([d, 4 * d], axis=-1)


@dataclass(frozen=True)
class PackedType:
    """A type whose integers and scales model folders can hold as they are (layouts.py)."""

    bits: int
    group: int
    minimum: int
    read: Callable[[Bytes], Packed]


# Not Q5_1 and Q6_K: as bytes with minima they would take 9 and 9.1 bits a weight, and rounding them to 8.5 costs
# nothing that could be measured (docs/LOG.md#words-for-minima).
PACKED_TYPES: dict[str, PackedType] = {
    "Q4_0": PackedType(4, 32, 0, _q4_0_packed),
    "Q5_0": PackedType(8, 32, 0, _q5_0_packed),
    "Q8_0": PackedType(8, 32, 0, _q8_0_packed),
    "Q4_1": PackedType(4, 32, 16, _q4_1_packed),
    "Q2_K": PackedType(2, 16, 4, _q2_k_packed),
    "Q3_K": PackedType(4, 16, 8, _q3_k_packed),
    "Q4_K": PackedType(4, 32, 8, _q4_k_packed),
    "Q5_K": PackedType(8, 32, 8, _q5_k_packed),
}

# GGUF type id -> type.
GGUF_TYPES: dict[int, ElementType] = {
    0: F32,
    1: F16,
    2: ElementType("Q4_0", 32, 18, _q4_0),
    3: ElementType("Q4_1", 32, 20, _q4_1),
    6: ElementType("Q5_0", 32, 22, _q5_0),
    7: ElementType("Q5_1", 32, 24, _q5_1),
    8: ElementType("Q8_0", 32, 34, _q8_0),
    10: ElementType("Q2_K", 256, 84, _q2_k),
    11: ElementType("Q3_K", 256, 110, _q3_k),
    12: ElementType("Q4_K", 256, 144, _q4_k),
    13: ElementType("Q5_K", 256, 176, _q5_k),
    14: ElementType("Q6_K", 256, 210, _q6_k),
    30: BF16,
}

BY_NAME: dict[str, ElementType] = {kind.name: kind for kind in GGUF_TYPES.values()}

# Types a GGUF may hold that we do not read, for an error that names them.
UNREAD_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
