"""Memory that was freed, given back to the system.

Owns: the C library's call. Does not know: who freed it.
"""

import contextlib
import ctypes


def trim() -> None:
    """Give freed memory back, where the C library is one that keeps it and can (glibc). Elsewhere nothing.

    glibc keeps up to 64 MB for later, twice the largest array that was ever freed (mallopt(3), M_TRIM_THRESHOLD).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library by that name, or no such call
        ctypes.CDLL(None).malloc_trim(0)
