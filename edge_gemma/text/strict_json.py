"""JSON of strangers: only what JSON is, and not too deep.

Owns: what is refused. Does not know: how large it may be, what it is for.
"""

import json
import math
from typing import Any

BYTES = 32 << 20  # of a request: minutes of sound in base64
DEPTH = 100  # objects and lists in one another


def parsed(text: str) -> Any:
    """A value. Raises ValueError for what is no JSON, NaN and Infinity, 1e999, and what is nested deeper than DEPTH;
    RecursionError for what is far deeper; UnicodeError for half of a character.
    """
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    _check_depth(value)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # half of a character
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number:.40} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        if not level:
            return
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} deep")
