"""Whether what a caller gave is of the kind it has to be.

Owns: the one line that says what was got and what was expected. Does not know: what a value is for.
"""

import operator
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from edge_gemma.errors import UsageError

_LONGEST_PATH = 4096  # bytes, Linux's PATH_MAX


def require(name: str, value: object, good: bool, expected: str) -> None:
    """Raises UsageError unless `good`."""
    if not good:
        raise UsageError(f"{name} is {shown(value)}, expected {expected}")


def shown(value: object) -> str:
    """A value in a line, whatever it is: a number of 5,000 digits has no repr."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_integer(value: object) -> TypeGuard[int]:
    """NumPy's integers too; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_one_of(value: object, words: Iterable[str]) -> bool:
    return isinstance(value, str) and value in words  # an array's == is no bool


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises UsageError if it is none or below `least`."""
    require(name, value, is_integer(value) and value >= least, f"an integer of {least} or more")
    return int(value)


def texts(name: str, values: Any) -> tuple[str, ...]:
    """Raises UsageError unless `values` are several texts; a text alone would be taken for its letters."""
    good = isinstance(values, Iterable) and not isinstance(values, str | bytes)
    found = tuple(values) if good else ()
    require(name, values, good and all(isinstance(value, str) for value in found), "a list of texts")
    return found


def token_ids(values: Any) -> list[int]:
    """Raises UsageError unless `values` are integers: a list, or an array [n]."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise UsageError(f"token ids are {shown(values)}, expected a list of integers") from None


def file_path(name: str, value: Any) -> Path:
    """Raises UsageError for what cannot be a path."""
    good = isinstance(value, str | os.PathLike)
    try:
        good = good and b"\0" not in os.fsencode(value) and len(os.fsencode(value)) < _LONGEST_PATH
    except (TypeError, UnicodeEncodeError):
        good = False
    require(name, value, good, "a path")
    return Path(value)
