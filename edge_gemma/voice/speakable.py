"""A text as a voice can read it: without markdown, pictures and addresses.

Owns: `speakable`, numbers as words. Does not know: where a clause ends, what of an answer is code.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.host.extras import imported

_LONGEST = 15  # digits of a number that is said as one; of a longer one the digits are said
_LINE = (
    (re.compile(r"^\s*(?:[-*_]\s*){3,}$"), ""),  # a rule
    (re.compile(r"^\s*\|?(?:\s*:?-+:?\s*\|)+\s*:?-*:?\s*$"), ""),  # under a table's head
    (re.compile(r"^\s*(?:>\s*)+"), ""),
    (re.compile(r"^\s*#{1,6}\s+"), ""),
    (re.compile(r"^\s*[-*+•]\s+(?:\[[ xX]\]\s+)?"), ""),
    (re.compile(r"^\s*(\d{1,3})[.)]\s+"), r"\1, "),
)
_ANYWHERE = (
    (re.compile(r"!?\[([^\]\[]*)\]\([^()\s]*(?:\s+\"[^\"]*\")?\)"), r"\1"),  # links, pictures
    (re.compile(r"https?://(?:www\.)?([^\s/?#)>\]]+)[^\s)>\]]*"), r"\1"),
    (re.compile(r"`+"), ""),
    (re.compile(r"(?<![\d*])(?<!\d )\*++|\*++(?! ?\d)|~~+"), ""),
    (re.compile(r"(?<![^\W_])_+|_+(?![^\W_])"), ""),
    (re.compile(r"\s*\|\s*"), ", "),
)
_NUMBER = re.compile(r"(?<![\w.,:])[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:st|nd|rd|th)?(?!\w|[.,:]\d)")
_CLOCK = re.compile(r"(?<![\w:])(\d{1,2}):(\d{2})(?![\w:])")
_ENGLISH = (
    (re.compile(r"(?<=\d)\s*%"), " percent"),
    (re.compile(r"(?<=\d)\s*°\s*C\b"), " degrees Celsius"),
    (re.compile(r"(?<=\d)\s*°\s*F\b"), " degrees Fahrenheit"),
    (re.compile(r"(?<=\d)\s*°"), " degrees"),
    (re.compile(r"(?<=\d)\s*[–-]\s*(?=\d)"), " to "),
    (re.compile(r"(?<=\d)\s*[×*]\s*(?=\d)"), " times "),
    (re.compile(r"(?<=\d)\s+\+\s+(?=\d)"), " plus "),
    (re.compile(r"(?<=\S)\s+=\s+(?=\S)"), " equals "),
)


def speakable(text: str, language: str | None = None, *, line_begins: bool = True) -> str:
    """What a voice reads of a clause: one line, "" if nothing of it can be said.

    language: a code of num2words ("en", "de"); numbers become its words. None leaves them as digits, which voices read
    in their own language. line_begins: whether the text begins a line, where markdown has its marks.
    Raises UsageError where num2words is missing or has no such language.
    """
    lines = text.split("\n")
    said = [_line(line, marks=line_begins or i > 0) for i, line in enumerate(lines)]
    joined = " ".join(line for line in said if line)
    if language:
        joined = _with_words(joined, language)
    return joined if any(map(str.isalnum, joined)) else ""


def check_language(language: str) -> None:
    """Raises UsageError as `speakable` does."""
    _words(language)(1)


def _line(line: str, *, marks: bool) -> str:
    line = "".join(c for c in line if not _is_picture(c))
    for pattern, to in (*(_LINE if marks else ()), *_ANYWHERE):
        line = pattern.sub(to, line)
    line = " ".join(line.split())
    return line.strip(", ") if line.startswith(",") else line


def _is_picture(c: str) -> bool:
    if "\U0001f3fb" <= c <= "\U0001f3ff":  # a colour of skin
        return True
    return (unicodedata.category(c) in ("So", "Cs", "Co", "Cn") and c not in "°©®™") or c in "\ufe0f\u200d\u20e3"


def _with_words(text: str, language: str) -> str:
    words = _words(language)
    if language.split("_")[0].split("-")[0] == "en":
        for pattern, to in _ENGLISH:
            text = pattern.sub(to, text)
    text = _CLOCK.sub(lambda at: _clock(at, words), text)
    return _NUMBER.sub(lambda number: _number(number[0], words), text)


def _clock(at: re.Match[str], words: Callable[..., str]) -> str:
    hour, minute = int(at[1]), int(at[2])
    if hour > 24 or minute > 59:
        return at[0]
    return f"{words(hour)} {words(minute)}" if minute else f"{words(hour)}"


def _number(text: str, words: Callable[..., str]) -> str:
    ordinal = text[-2:] in ("st", "nd", "rd", "th")
    digits = text.removesuffix(text[-2:] if ordinal else "").replace(",", "").replace("−", "-")
    if sum(map(str.isdigit, digits)) > _LONGEST:
        return " ".join(words(int(digit)) if digit.isdigit() else digit for digit in digits)
    try:
        return words(float(digits) if "." in digits else int(digits), ordinal=ordinal)
    except (NotImplementedError, TypeError, ValueError, OverflowError):  # a language without ordinals, or such numbers
        return text


def _words(language: str) -> Callable[..., str]:
    num2words: Any = imported("num2words", "spelling numbers out", "voice", UsageError).num2words

    def words(number: float, ordinal: bool = False) -> str:
        return str(num2words(number, lang=language, ordinal=ordinal)).replace("-", " ")

    try:
        words(1)
    except NotImplementedError:
        expected = "expected a code such as en, de or pt_BR"
        raise UsageError(f"numbers cannot be spelled out in {language!r}, {expected}") from None
    return words
