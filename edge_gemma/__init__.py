"""edge_gemma: Gemma 4 on a CPU as small as a Raspberry Pi's.

`Engine` is a loaded model, `Session` one mutable timeline over it. Nothing heavy is imported until one is asked for.
"""

import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.2.0"
__all__ = ["Engine", "Session", "__version__"]

if TYPE_CHECKING:
    from edge_gemma.engine import Engine
    from edge_gemma.session import Session

# Nothing leaves the machine (docs/PRIVACY.md). Dependencies that report to their makers read these, at their import.
_REPORTING = "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
if _REPORTING:
    import logging

    logging.getLogger(__name__).warning(
        "onnxruntime was imported before edge_gemma and reports this program to its maker: import edge_gemma first, or "
        "set ORT_DISABLE_TELEMETRY=1"
    )


def __getattr__(name: str) -> object:
    if name == "Engine":
        from edge_gemma.engine import Engine

        return Engine
    if name == "Session":
        from edge_gemma.session import Session

        return Session
    raise AttributeError(f"module 'edge_gemma' has no attribute {name!r}")
