"""Finds float weights that are integers times a scale, and takes them apart without loss.

Weights trained for few bits are often published as floats again, each rounded to its float type: w = round(scale * q).
The grid is found where integers and a scale exist that give every weight back to the last bit.
"""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

_SPACING = {"F32": 1, "F16": 1 << 13, "BF16": 1 << 16}  # of a float type, in float32's own spacings
_FIRST = 2  # rows looked at first
_PART_WEIGHTS = 1 << 16  # looked at together: they stay in the cache
_COMMON = 8  # it is hardly ever larger than this
_PLACES = (0.5, 0.0, 1.0)  # tried in this order
_SMALLEST = 32  # largest integer that the smallest weight of a block is taken for: of 32, in 8 bits, at times above 8


@dataclass(frozen=True)
class Grid:
    """weights = integers * scales, rounded to the weights' float type."""

    bits: int  # 2, 4 or 8
    integers: np.ndarray  # int8 [rows, columns]
    scales: np.ndarray  # [rows, groups], float32; values of float16 in groups of 16 and 32


def find_grid(weights: np.ndarray, dtype: str = "BF16", group: int = 0) -> Grid | None:
    """The grid of least bits that all of a matrix lies on, with one scale a row or a group; None where there is none.

    weights: float32 [rows, columns], finite, exact values of the float type `dtype` ("BF16", "F16", "F32"). group: 0 or
    a divisor of columns. A block of zeros has the scale 0.
    """
    for bits in (2, 4, 8):
        if (found := on_grid(weights, bits, dtype, group)) is not None:
            return Grid(bits, *found)
    return None


def on_grid(
    weights: np.ndarray, bits: int, dtype: str = "BF16", group: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """(integers, scales) as in Grid, for this many bits; None where a block has none. Arguments as for find_grid."""
    rows, columns = weights.shape
    if group and columns % group:
        return None
    step = max(1, _PART_WEIGHTS // columns)
    parts = []
    for start, stop in pairwise([0, *range(min(_FIRST, rows), rows, step), rows]):
        part = _rows_on_grid(weights[start:stop], bits, dtype, group)
        if part is None:  # of random weights, the first rows say so
            return None
        parts.append(part)
    integers, scales = zip(*parts, strict=True)
    return np.concatenate(integers), np.concatenate(scales)


def _rows_on_grid(weights: np.ndarray, bits: int, dtype: str, group: int) -> tuple[np.ndarray, np.ndarray] | None:
    rows, columns = weights.shape
    blocks = weights.reshape(-1, group or columns)
    integers, scales = np.zeros(blocks.shape, np.int8), np.zeros(len(blocks), np.float32)
    smallest = np.where(blocks == 0, np.float32(np.inf), np.abs(blocks)).min(axis=1)
    left = np.flatnonzero(smallest < np.inf)
    scale_type = np.float16 if group in (16, 32) else np.float32
    for place, count in product(_PLACES if bits == 8 else _PLACES[:1], range(1, min(_SMALLEST, 1 << (bits - 1)) + 1)):
        if not len(left):
            break
        if (place, count) == (_PLACES[0], _COMMON + 1) and len(left) > max(1, len(blocks) // 8):
            return None  # of a grid hardly any are left: weights that lie on none are not searched on
        guess = (smallest[left] / np.float32(count))[:, None]
        q, s, fits = _fit(blocks[left], guess, bits, dtype, scale_type, place)
        integers[left[fits]], scales[left[fits]] = q[fits], s[fits]
        left = left[~fits]
    if len(left):
        return None
    return integers.reshape(rows, columns), scales.reshape(rows, -1)


def _fit(
    blocks: np.ndarray, guess: np.ndarray, bits: int, dtype: str, scale_type: type, place: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers and scale of each block near a guessed scale [n, 1], and whether they restore the block: q, s, bool [n].

    A weight w of q steps says that the scale lies within half a spacing of w, divided by q. The guess counts small
    integers right; what these say of the scale counts larger ones right. Above 64 steps half a spacing of bfloat16 can
    be half a step: then the count hangs on the `place` between least and most allowed that is taken for the scale.
    """
    half = 1 << (bits - 1)
    magnitude = np.abs(blocks).astype(np.float64)
    spread = np.spacing(np.abs(blocks)).astype(np.float64) * (_SPACING[dtype] / 2)
    low = magnitude - np.where(np.frexp(magnitude)[0] == 0.5, spread / 2, spread)  # below a power of 2 it is narrower
    high = magnitude + spread
    s = guess
    for most in (_SMALLEST, 64, half) if bits == 8 else (half,):
        q = np.rint(magnitude / s)
        s = _scale(low, high, np.where(q <= most, q, 0), place if most == 64 else 0.5)
    q *= np.sign(blocks)
    turned = (q.max(axis=1) == half) & (q.min(axis=1) > -half)
    q[turned], s[turned] = -q[turned], -s[turned]
    fits = (q.min(axis=1) >= -half) & (q.max(axis=1) < half)
    q = np.where(fits[:, None], q, 0).astype(np.int8)
    with np.errstate(over="ignore"):
        scales = s[:, 0].astype(scale_type).astype(np.float32)
    return q, scales, fits & np.isfinite(scales) & (_rounded(q * scales[:, None], dtype) == blocks).all(axis=1)


def _scale(low: np.ndarray, high: np.ndarray, q: np.ndarray, place: float) -> np.ndarray:
    """One of the scales [n, 1] that all weights of q > 0 steps, each between low and high, allow: 0 least, 1 most."""
    steps = np.maximum(q, 1)
    least = np.where(q > 0, low / steps, 0).max(axis=1, keepdims=True)
    most = np.where(q > 0, high / steps, np.inf).min(axis=1, keepdims=True)
    return least + place * (most - least)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to a float type, half to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
