"""A session as those see it who write on it: tokens go in at the end, logits come out, the end can be moved back.

`edge_gemma.session.Session` is one, and so is the ONNX backend's.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Timeline(Protocol):
    """What of a session generating needs."""

    ids: list[int]
    context: int

    @property
    def position(self) -> int: ...
    def prefill(self, ids: list[int]) -> np.ndarray: ...
    def step(self, token: int) -> np.ndarray: ...
    def rewind(self, position: int) -> None: ...
    def mark(self) -> None: ...


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two timelines share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
