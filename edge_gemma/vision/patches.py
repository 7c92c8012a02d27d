"""Cuts a picture into the patches that Gemma 4's encoder reads.

Owns: budgets of soft tokens, the size that a picture is resized to, the order of patches and of values in them. Does
not know: files, the encoder.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_gemma.errors import PictureError, UsageError
from edge_gemma.host.extras import imported

BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens, at most
DEFAULT_BUDGET = 280
PATCH = 16  # pixels
POOLED = 3  # patches a side that become one soft token
_CELL = PATCH * POOLED  # pixels a side of one soft token
# The words that OpenAI's protocol has for it. "auto" is `auto_budget`.
DETAIL: dict[str, int | Literal["auto"]] = {"low": 70, "auto": "auto", "high": 1120}


@dataclass(frozen=True, eq=False)
class Patches:
    """A picture in patches of 16x16 pixels, row by row.

    values: uint8 [n, 768], of each patch in the order (y, x, rgb). positions: int64 [n, 2], (x, y) in patches.
    """

    values: np.ndarray
    positions: np.ndarray

    @property
    def tokens(self) -> int:
        """The number of soft tokens that the encoder makes of them."""
        return len(self.values) // POOLED**2


def size_for(height: int, width: int, budget: int = DEFAULT_BUDGET) -> tuple[int, int]:
    """The size (height, width) that a picture is resized to: the largest of about its shape within the budget.

    Both sides are multiples of 48 pixels, and smaller pictures are enlarged. Raises PictureError for a picture without
    pixels, UsageError for a budget that is none.
    """
    _check_budget(budget)
    if height < 1 or width < 1:
        raise PictureError(f"the picture has {width}x{height} pixels, expected at least 1x1")
    factor = math.sqrt(budget * _CELL**2 / (height * width))
    rows, columns = math.floor(factor * height / _CELL), math.floor(factor * width / _CELL)
    if not rows and not columns:
        raise PictureError(f"the picture has {width}x{height} pixels: nothing is left of it at {budget} soft tokens")
    if not rows:  # flatter than one row of the budget's cells: the reference keeps to that row
        rows, columns = 1, budget
    elif not columns:
        rows, columns = budget, 1
    return rows * _CELL, columns * _CELL


def auto_budget(height: int, width: int, most: int = DEFAULT_BUDGET) -> int:
    """The smallest budget with at least as many pixels as the picture has; `most` if it has more.

    Raises UsageError if `most` is not a budget.
    """
    _check_budget(most)
    return next((budget for budget in BUDGETS if budget * _CELL**2 >= height * width and budget < most), most)


def cut(picture: np.ndarray, budget: int = DEFAULT_BUDGET) -> Patches:
    """Resize a picture, uint8 [h, w, 3], to the budget (`size_for`) and cut it into patches.

    Raises as `size_for`, and PictureError if Pillow is missing.
    """
    height, width = size_for(picture.shape[0], picture.shape[1], budget)
    if picture.shape[:2] != (height, width):
        pillow = imported("PIL.Image", "reading pictures", "vision", PictureError)
        resized = pillow.fromarray(picture).resize((width, height), pillow.Resampling.BICUBIC)
        picture = np.asarray(resized)
    rows, columns = height // PATCH, width // PATCH
    values = picture.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return Patches(values, np.stack([x, y], axis=1))


def _check_budget(budget: int) -> None:
    if budget not in BUDGETS:
        raise UsageError(f"{budget!r:.60} soft tokens for a picture, expected {', '.join(map(str, BUDGETS))}")
