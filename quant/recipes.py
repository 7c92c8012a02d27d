"""Recipes: which tensor gets how many bits. A recipe is data; the first pattern that matches a tensor's name decides.

Norms, scalars and other one-dimensional tensors are always dense float32: they are too small to save on.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from edge_gemma.errors import UsageError


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. bits 0: dense, in the source's own float type. group 0: one scale a row."""

    bits: int
    group: int = 0


DENSE = Format(0)

RECIPES: dict[str, tuple[tuple[str, Format], ...]] = {
    "float": (("*", DENSE),),
    "q8": (("*", Format(8, 32)),),
    "q4": (
        # 13.8 M weights that every layer's per-layer input comes from: 7 MB more than at 4 bits.
        ("per_layer_model_projection.weight", Format(8, 32)),
        ("*", Format(4, 32)),
    ),
}


def tensor_format(recipe: str, name: str, shape: tuple[int, ...]) -> Format:
    """The format a recipe gives a tensor. Raises UsageError for an unknown recipe."""
    if recipe not in RECIPES:
        raise UsageError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if len(shape) < 2:
        return DENSE
    return next(fmt for pattern, fmt in RECIPES[recipe] if fnmatchcase(name, pattern))
