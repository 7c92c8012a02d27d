"""Keys and values of the past: rings for sliding layers, growing caches for full ones, nothing for shared layers.

Owns: storage, which positions are still there, rewinding, snapshots. Does not know: how K and V are computed or used.

Position p lives in slot p % capacity of its layer. A ring holds `sliding_window + slack` positions, so that every row
of a chunk of up to `slack` tokens still finds the whole window before it, and the last `slack` tokens can be undone.
Rows are stored after k_norm and RoPE (K) and after v_norm (V), as float16 bits or float32.
"""

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_gemma import kernels
from edge_gemma.config import GemmaConfig, LayerSpec
from edge_gemma.model import ops
from edge_gemma.model.run_state import shaped

# Memory that a forked process does not share; elsewhere than on Unix there is no such choice, and no fork.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass(frozen=True)
class LayerCache:
    """One layer's rows. k, v: [capacity, num_key_value_heads, head_dim], float32 or uint16 (float16 bits)."""

    k: np.ndarray
    v: np.ndarray
    window: int | None

    @property
    def capacity(self) -> int:
        return len(self.k)

    def store(self, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Write rows k, v, float32 [n, num_key_value_heads, head_dim]. positions: int64 [n], ascending by one."""
        kernels.store_kv(k, v, self.k, self.v, positions[:1])

    def attend(
        self, q: np.ndarray, positions: np.ndarray, window: int | None, scale: float, memory: np.ndarray
    ) -> np.ndarray:
        """What queries [n, heads, head_dim] at such positions see, in `memory`: float32 [n, heads * head_dim]."""
        return ops.attention(q, self.k, self.v, positions[:1], window, scale, memory)

    def rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of rows first to last - 1, which must still be there: k and v as they are stored."""
        slots = np.arange(first, last) % self.capacity
        return self.k[slots], self.v[slots]

    def put(self, position: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write rows position, position + 1, ... that `rows` gave."""
        slots = np.arange(position, position + len(k)) % self.capacity
        self.k[slots], self.v[slots] = k, v


@dataclass(frozen=True)
class TokenLayers:
    """A layer's caches of tokens that need not follow each other: each token has one, and may share it."""

    caches: Sequence[LayerCache]

    def store(self, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Write a row of k, v into each token's cache. positions: int64 [tokens]; -1: there is no token."""
        for t, cache in enumerate(self.caches):
            cache.store(positions[t : t + 1], k[t : t + 1], v[t : t + 1])

    def attend(
        self, q: np.ndarray, positions: np.ndarray, window: int | None, scale: float, memory: np.ndarray
    ) -> np.ndarray:
        """As `LayerCache.attend`, each query over its token's cache."""
        out = shaped(memory, q.shape)
        for t, cache in enumerate(self.caches):
            ops.attention(
                q[t : t + 1], cache.k, cache.v, positions[t : t + 1], window, scale, out[t : t + 1].reshape(-1)
            )
        return out.reshape(len(q), -1)


class TokenCaches:
    """The caches of tokens that run together; `KVCache.layers`, as the forward pass uses it."""

    def __init__(self, caches: "Sequence[KVCache]") -> None:
        self._caches = caches
        self.layers = {i: TokenLayers([cache.layers[i] for cache in caches]) for i in caches[0].layers}

    def tail(self, n: int) -> "TokenCaches | KVCache":
        """Those of the last n tokens."""
        return TokenCaches(self._caches[-n:]) if n else self


@dataclass(frozen=True)
class Snapshot:
    """The rings as they were at `position`; the growing caches need none, their old rows are never overwritten."""

    position: int
    floor: int
    rings: dict[int, tuple[np.ndarray, np.ndarray]]


class KVCache:
    """All layers' caches of one session."""

    def __init__(self, config: GemmaConfig, context: int, slack: int, dtype: str) -> None:
        """context: most positions held; slack: longest chunk; dtype: "float16" or "float32"."""
        self.places, self.slack = context, min(slack, context)
        self.position = 0  # the next position to be written
        self.dtype = dtype
        self.floor = 0  # every ring holds all positions from here (or from 0) on
        self.layers: dict[int, LayerCache] = {
            layer.index: _allocate(layer, context, self.slack, dtype) for layer in config.layers if layer.owns_kv
        }
        self._rings = {i: layer for i, layer in self.layers.items() if layer.window and layer.capacity < context}
        self._window = max((ring.window or 0 for ring in self._rings.values()), default=0)

    def tail(self, n: int) -> "KVCache":
        """That of the last n tokens: of any."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers.values())

    def reserve(self, n: int) -> None:
        """n rows are about to be stored: what they overwrite counts as gone, even if the work is interrupted."""
        capacity = min((ring.capacity for ring in self._rings.values()), default=self.position + n)
        self.floor = max(self.floor, self.position + n - capacity)

    def advance(self, n: int) -> None:
        """n positions were stored in every layer."""
        self.position += n

    def holds(self, position: int) -> bool:
        """Whether a query at `position` would find every key of its window."""
        return position <= self.position and (self.floor == 0 or position - self._window + 1 >= self.floor)

    def has_all(self, first: int) -> bool:
        """Whether every ring still has all positions from `first` up to its own."""
        return self.floor <= first

    def truncate(self, position: int) -> None:
        """Go back to `position`, which `holds` must allow. Later rows are overwritten before they are seen."""
        self.position = position

    def snapshot(self) -> Snapshot:
        rings = {i: (ring.k.copy(), ring.v.copy()) for i, ring in self._rings.items()}
        return Snapshot(self.position, self.floor, rings)

    def restore(self, snapshot: Snapshot) -> None:
        self.floor = sys.maxsize  # until all of it is back, nothing is held
        for i, (k, v) in snapshot.rings.items():
            self.layers[i].k[...], self.layers[i].v[...] = k, v
        self.position, self.floor = snapshot.position, snapshot.floor

    def follow(self, other: "KVCache", shared: int) -> None:
        """Become a copy of another cache of this shape; positions before `shared` are the same in both already."""
        if not self.holds(shared):
            shared = 0
        floor = max(other.floor, self.floor if shared else 0)
        self.floor = sys.maxsize  # until all of it is there, nothing is held
        for i, layer in self.layers.items():
            first = max(shared, other.position - layer.capacity)
            layer.put(first, *other.layers[i].rows(first, other.position))
        self.position, self.floor = other.position, floor
        self.reserve(0)

    def resume(self, position: int, floor: int) -> None:
        """The rows were filled from elsewhere and hold everything from `floor` to `position`."""
        self.position, self.floor = position, floor


def _allocate(layer: LayerSpec, context: int, slack: int, dtype: str) -> LayerCache:
    capacity = min(context, layer.sliding_window + slack) if layer.sliding_window else context
    shape = (capacity, layer.num_key_value_heads, layer.head_dim)
    k, v = (_untouched(shape, np.dtype(np.uint16 if dtype == "float16" else np.float32)) for _ in range(2))
    return LayerCache(k, v, layer.sliding_window)


def _untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros, whose pages the system gives when they are first written. np.zeros may take memory that was in use, and
    clear it: 24 MB of a cache of E2B that is never written.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    memory = mmap.mmap(-1, size, **_PRIVATE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
