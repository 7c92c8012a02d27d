"""Pictures to soft tokens, each encoded once.

Owns: what was encoded lately, how many soft tokens a picture gets. Does not know: files (picture.py), arithmetic
(encoder.py).
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from edge_gemma.arguments import is_integer, is_one_of, require
from edge_gemma.vision.encoder import VisionEncoder
from edge_gemma.vision.graph import GraphEncoder
from edge_gemma.vision.patches import BUDGETS, DETAIL, Patches, auto_budget, cut
from edge_gemma.vision.picture import read_picture

Budget = int | Literal["auto", "low", "high"]  # soft tokens at most (patches.DETAIL)
KEPT_BYTES = 64 << 20  # of soft tokens: some forty pictures of 280


class Eyes:
    """What a model has seen. The same picture is encoded once, as long as it is kept. Any thread may ask."""

    def __init__(self, encoder: Callable[[], VisionEncoder | GraphEncoder]) -> None:
        """encoder: called when a picture has to be encoded."""
        self._encoder = encoder
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()  # by digest, the oldest first
        self._lock = threading.Lock()
        self.encoded = 0  # pictures, ever

    def see(self, source: Any, budget: Budget = "auto", note: Callable[[str], None] = lambda text: None) -> np.ndarray:
        """The soft tokens of a picture, read-only: float32 [n, hidden_size].

        The same array again for the same picture. source, note: as in read_picture. Raises PictureError for what
        cannot be read, UsageError for another budget, or a model that does not see.
        """
        budget = checked_budget(budget)
        picture = read_picture(source, note)
        size = auto_budget(*picture.shape[:2]) if budget == "auto" else budget
        return self.encode(cut(picture, size))

    def encode(self, patches: Patches) -> np.ndarray:
        """As `see`, for a picture that is cut already."""
        width = int(patches.positions[:, 0].max()) + 1
        digest = hashlib.sha256(width.to_bytes(8, "little") + patches.values.tobytes()).digest()
        with self._lock:  # not held while encoding: whoever computes may let another thread go first meanwhile
            if (known := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                return known
        rows = self._encoder().encode(patches)
        rows.flags.writeable = False
        with self._lock:
            self.encoded += 1
            self._kept[digest] = rows
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return rows


def checked_budget(budget: Any) -> int | Literal["auto"]:
    """A budget as a number, or "auto": as many as a picture has pixels for, 280 at most. Raises UsageError."""
    good = is_one_of(budget, DETAIL) or (is_integer(budget) and budget in BUDGETS)
    require("the soft tokens of a picture", budget, good, f"{', '.join(DETAIL)}, {', '.join(map(str, BUDGETS))}")
    return DETAIL[budget] if isinstance(budget, str) else int(budget)
