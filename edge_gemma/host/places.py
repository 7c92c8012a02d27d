"""The folders for this user's files: a cache (compiled kernels, converted models) and data (pulled models).

Owns: the two paths. Does not know: what is stored there.
"""

from collections.abc import Callable
from pathlib import Path

import platformdirs

CACHE_VARIABLE, DATA_VARIABLE = "XDG_CACHE_HOME", "XDG_DATA_HOME"


def cache() -> Path | None:
    """The folder for files that can be made again. None for a user with neither a home nor $XDG_CACHE_HOME."""
    return _folder(platformdirs.user_cache_dir)


def data() -> Path | None:
    """The folder for files that cannot be made again. None for a user with neither a home nor $XDG_DATA_HOME."""
    return _folder(platformdirs.user_data_dir)


def _folder(find: Callable[..., str]) -> Path | None:
    try:
        path = Path(find("edge-gemma", appauthor=False))
    except RuntimeError:  # no HOME and an unknown user, as in a container with any user id
        return None
    return None if path.parts[0].startswith("~") else path  # older versions of platformdirs return "~"
