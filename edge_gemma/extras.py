"""Packages that come with an extra: imported when they are first needed.

Owns: the one line about a package that is not installed, or that is and cannot be loaded. Does not know: what the
packages are for.
"""

import importlib
from typing import Any

from edge_gemma.errors import EdgeGemmaError


def imported(module: str, what: str, extra: str, error: type[EdgeGemmaError]) -> Any:
    """The package `module`. what: what needs it, the beginning of a sentence; extra: what brings it.

    Raises `error`, one line: the package is not installed, or why it cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name == module:
            raise error(f"{what} needs {module}: pip install 'edge-gemma[{extra}]'") from None
        raise error(_broken(module, what, missing)) from None
    except (ImportError, OSError, MemoryError) as reason:
        raise error(_broken(module, what, reason)) from None


def _broken(module: str, what: str, reason: BaseException) -> str:
    told = " ".join(str(reason).split())[:200] or "there is not enough memory"
    return f"{what} needs {module}, which is installed and cannot be loaded: {told}"
