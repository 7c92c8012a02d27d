"""edge_gemma: Gemma 4 on a CPU as small as a Raspberry Pi's.

`Engine` is a loaded model, `Session` one mutable timeline over it. Nothing heavy is imported until one is asked for.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Engine", "Session", "__version__"]

if TYPE_CHECKING:
    from edge_gemma.engine import Engine
    from edge_gemma.session import Session


def __getattr__(name: str) -> object:
    if name == "Engine":
        from edge_gemma.engine import Engine

        return Engine
    if name == "Session":
        from edge_gemma.session import Session

        return Session
    raise AttributeError(f"module 'edge_gemma' has no attribute {name!r}")
