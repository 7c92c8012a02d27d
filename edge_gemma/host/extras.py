"""Imports packages when they are first needed; most come with an extra.

Owns: the one-line error for a package that is not installed or cannot be loaded. Does not know: what the packages are
for.
"""

import importlib
from typing import Any

from edge_gemma.errors import EdgeGemmaError


def imported(module: str, what: str, extra: str, error: type[EdgeGemmaError], remedy: str = "") -> Any:
    """Import and return a package or a module of one.

    what: what needs it, the beginning of a sentence. extra: the extra that it comes with, "" for none. remedy: what
    helps if it is installed and cannot be loaded. Raises `error`, one line, if it is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        package = module.split(".")[0]
        if missing.name == package:
            remedy = f"'edge-gemma[{extra}]'" if extra else package
            raise error(f"{what} needs {package}: pip install {remedy}") from None
        raise error(_broken(module, what, missing, remedy)) from None
    except (ImportError, OSError, MemoryError) as reason:
        raise error(_broken(module, what, reason, remedy)) from None


def _broken(module: str, what: str, reason: BaseException, remedy: str) -> str:
    told = " ".join(str(reason).split())[:200] or "there is not enough memory"
    return f"{what} needs {module}, which is installed and cannot be loaded: {told}{remedy and '; '}{remedy}"
