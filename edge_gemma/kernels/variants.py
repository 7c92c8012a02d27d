"""Which instruction set the kernels use on this machine, and how to choose another.

Owns: the choice. Does not know: what the sets are (isa.py).
"""

import functools

from edge_gemma.kernels import isa, targets

__all__ = ["available_variants", "processor", "set_variant", "variant"]


@functools.cache
def available_variants() -> tuple[str, ...]:
    """Instruction sets this CPU can run the matrix kernels with, best first (isa.py)."""
    return isa.available(targets.host().needs)


_chosen: str | None = None


def variant() -> str:
    """The instruction set in use, as `edge-gemma info` shows it."""
    return _chosen or available_variants()[0]


def processor() -> str:
    """What kind of processor machine code is made for here (targets.py)."""
    return targets.host().name


def set_variant(name: str | None) -> None:
    """Use another of `available_variants` (None: the best one). For tests and measurements."""
    global _chosen
    if name not in (None, *available_variants()):
        raise ValueError(f"kernel variant {name!r}, expected one of {', '.join(available_variants())}")
    _chosen = name
