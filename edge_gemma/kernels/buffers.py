"""Arrays of a prompt's run, used again as soon as nobody holds them.

A chunk of a prompt makes some 700 arrays of up to 3 MB. Given back to the system and taken anew each time, their pages
cost a fifth of prefill (docs/LOG.md). Owns: which memory is free. Does not know: what is in it.
"""

import contextlib
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

_SMALL = 1 << 16  # bytes; below it the system's allocator keeps its pages
_active = threading.local()


def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """np.empty, out of this thread's pool where `reuse` made one."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    blocks: list[np.ndarray] | None = getattr(_active, "blocks", None)
    if blocks is None or size < _SMALL:
        return np.empty(shape, dtype)
    at = min(
        (i for i in range(len(blocks)) if size <= blocks[i].nbytes <= 2 * size and _is_free(blocks, i)),
        key=lambda i: blocks[i].nbytes,
        default=None,
    )
    if at is None:
        at = len(blocks)
        blocks.append(np.empty(size, np.uint8))
    return blocks[at][:size].view(dtype).reshape(shape)


def _is_free(blocks: list[np.ndarray], i: int) -> bool:
    """Whether no array lives in a block: every view of it, and of its views, holds a reference to it."""
    return sys.getrefcount(blocks[i]) == 2  # the list's and the call's own


@contextlib.contextmanager
def reuse() -> Iterator[None]:
    """Let this thread's arrays share memory until the end; those that are still held then stay whole."""
    if hasattr(_active, "blocks"):
        yield
        return
    _active.blocks = []
    try:
        yield
    finally:
        del _active.blocks
