"""Where this user's files are kept: compiled kernels and converted models, pulled models.

Owns: the two folders. Does not know: what is put there.
"""

from collections.abc import Callable
from pathlib import Path

import platformdirs

CACHE_VARIABLE, DATA_VARIABLE = "XDG_CACHE_HOME", "XDG_DATA_HOME"


def cache() -> Path | None:
    """The folder for files that can be made again. None for a user without a home and without $XDG_CACHE_HOME."""
    return _folder(platformdirs.user_cache_dir)


def data() -> Path | None:
    """The folder for files that cannot. None for a user without a home and without $XDG_DATA_HOME."""
    return _folder(platformdirs.user_data_dir)


def _folder(find: Callable[..., str]) -> Path | None:
    try:
        path = Path(find("edge-gemma", appauthor=False))
    except RuntimeError:  # no HOME and an unknown user: what a container runs with any user id
        return None
    return None if path.parts[0].startswith("~") else path  # how older versions of platformdirs say so
