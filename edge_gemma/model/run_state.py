"""The activations of a forward pass, in memory that every layer and every chunk of a prompt uses again.

Owns: which memory an array of `Decoder.layer` lies in. Does not know: what is computed (decoder.py).

A chunk of a prompt makes some 700 arrays of up to 6 MB. Given back to the system and taken anew each time, their pages
cost a fifth of prefill (docs/LOG.md#prefill-tiles).
"""

import copy
import math
from collections.abc import Callable

import numpy as np

from edge_gemma.config import GemmaConfig

Int8 = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rounded activations: q int8 [n, k padded], scale float32 [n, groups or 1], sums int32 [n, groups]."""


class RunState:
    """Memory for the activations of at most `rows` tokens; each field is flat, float32.

    x          the normalised input of a block          [rows, D]
    q, rotated queries before and after RoPE            [rows, H * hd]
    k, keys    keys before and after RoPE               [rows, KV * hd]
    v, values  values before and after v_norm           [rows, KV * hd]
    attention  what attention returns                   [rows, H * hd]
    gate, up   the two halves of a gated block          [rows, F or P]
    y          the output of a block                    [rows, D]

    Pages are taken from the system when they are first written, so that a short prompt takes few.
    """

    def __init__(self, config: GemmaConfig, rows: int, between: Callable[[], None] = lambda: None) -> None:
        """between: called between two layers; what it raises ends the pass."""
        layers = config.layers
        heads = max(layer.num_attention_heads * layer.head_dim for layer in layers)
        kv_heads = max(layer.num_key_value_heads * layer.head_dim for layer in layers)
        gated = max(config.hidden_size_per_layer_input, *(layer.intermediate_size for layer in layers))

        def memory(width: int) -> np.ndarray:
            return np.empty(rows * (width + -width % 8), np.float32)  # packed matrices have rows in eights

        self.rows, self.between = rows, between
        self.x, self.y = memory(config.hidden_size), memory(config.hidden_size)
        self.q, self.rotated, self.attention = memory(heads), memory(heads), memory(heads)
        self.k, self.keys, self.v, self.values = (memory(kv_heads) for _ in range(4))
        self.gate, self.up = memory(gated), memory(gated)
        self._int8: list[Int8] = []  # flat

    def shared(self, between: Callable[[], None]) -> "RunState":
        """The same memory, for a pass that calls something else between two layers."""
        other = copy.copy(self)
        other.between = between
        return other

    def int8(self, number: int, n: int, k: int, groups: int) -> Int8:
        """Memory for rounded activations; `number` tells apart those that live at the same time."""
        if number == len(self._int8):
            self._int8.append((np.empty(0, np.int8), np.empty(0, np.float32), np.empty(0, np.int32)))
        if any(len(old) < n * width for old, width in zip(self._int8[number], (k, groups, groups), strict=True)):
            q, scale, sums = new_int8(self.rows, k, groups)
            self._int8[number] = q.reshape(-1), scale.reshape(-1), sums.reshape(-1)
        q, scale, sums = self._int8[number]
        shape = n, groups
        return q[: n * k].reshape(n, k), scale[: n * groups].reshape(shape), sums[: n * groups].reshape(shape)


def new_int8(n: int, k: int, groups: int) -> Int8:
    """New memory for rounded activations."""
    return np.empty((n, k), np.int8), np.empty((n, groups), np.float32), np.empty((n, groups), np.int32)


def shaped(memory: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of a shape, in the beginning of a field of RunState; a new array without one."""
    if memory is None:
        return np.empty(shape, np.float32)
    return memory[: math.prod(shape)].reshape(shape)
