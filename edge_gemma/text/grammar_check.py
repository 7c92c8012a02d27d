"""What a grammar may take, and whether llguidance can follow it.

Owns: the limits, the first step of a grammar, llguidance's errors in a line. Does not know: what a grammar is for.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

_LOOK_AHEAD = 200  # bytes that are certain at its beginning
_REASON = re.compile(r"error: (.+)")
_PLACE = re.compile(r"^at \d+\(\d+\): ")


def limits() -> "LLParserLimits":
    """What a grammar may take: 0.1 s of preparing, 50 ms and some 40 MB in a step."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=100_000, step_lexer_fuel=200_000, max_lexer_states=20_000, verbose_errors=False
    )


def reason_of(error: str) -> str:
    """llguidance's error, in a line."""
    found = _REASON.search(error)
    line = found[1] if found else _PLACE.sub("", error.strip()).split("\n")[0]
    return line.removesuffix("; no error message") or "it is not possible"


def problem_of(grammar: str) -> str | None:
    """Why the first step of a grammar cannot be made, in a line; None if it can."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    error = matcher.get_error()
    if not error and not matcher.is_accepting():
        try:
            matcher.compute_bitmask()
            matcher.consume_tokens(matcher.compute_ff_tokens()[:_LOOK_AHEAD])
        except ValueError as failure:
            error = str(failure)
        else:
            error = matcher.get_error() or (
                "nothing fits it" if matcher.is_stopped() and not matcher.is_accepting() else ""
            )
    if error.startswith("NoExtension"):
        error = "nothing fits it"
    return reason_of(error) if error else None
