"""Numbers, durations and times of day as people write and say them.

Owns: English words for numbers up to 999, "an hour and a half", "10m", "1:30", "half past six", "6 pm". Does not know:
clocks, timers.
"""

import re
from fractions import Fraction

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * (n + 2) for n, word in enumerate(_TENS)}
_WORDS |= {"a": 1, "an": 1}
_PARTS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}
_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86_400),
}
_TOKEN = re.compile(r"\d+(?:[.,]\d+)?|[a-z]+|:")
_CLOCK = re.compile(r"(\d{1,2})(?:[:.h ]?(\d{2}))?\s*(?:o'?clock)?\s*(am|pm|a\.m\.|p\.m\.|a m|p m)?", re.IGNORECASE)
_PAST = re.compile(r"(.+?)(?:\s+minutes?)?\s+(past|after|to|before)\s+(.+)")
_MINUS = ("-", "−")
_MAX_SECONDS = 366 * 86_400


def duration(text: str) -> float | None:
    """The seconds of a duration: "10 minutes", "an hour and a half", "1h30", "2:30:00". None for what is none."""
    if text.strip().startswith(_MINUS):
        return None
    text = text.lower().replace("-", " ").strip()
    if found := re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d)", text):
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return _in_range(Fraction(3600 * hours + 60 * minutes + seconds))
    total, unit = Fraction(0), 0
    amount: Fraction | None = None
    for word in _TOKEN.findall(text):
        if word[0].isdigit():
            amount = (amount or Fraction(0)) + Fraction(word.replace(",", "."))
        elif word in _WORDS and not (word in ("a", "an") and amount is not None):
            amount = (amount or Fraction(0)) + _WORDS[word]
        elif word == "hundred":
            amount = (amount or Fraction(1)) * 100
        elif word in _PARTS:  # "half an hour", "a quarter of an hour", "an hour and a half"
            amount = _PARTS[word] if amount in (None, 1) else amount + _PARTS[word]
        elif word in _UNITS:
            unit = _UNITS[word]
            total, amount = total + (1 if amount is None else amount) * unit, None
        elif word not in ("and", "a", "an", "of", "in", "for"):
            return None
    if amount is not None:  # what is left has the next smaller unit, or is a part of the last one
        if not unit:
            return None
        total += amount * (unit if amount < 1 else Fraction(unit, 60 if unit < 86_400 else 24))
    return _in_range(total)


def _in_range(seconds: Fraction) -> float | None:
    return float(seconds) if 0 < seconds <= _MAX_SECONDS else None


def whole(text: str) -> int | None:
    """ "forty five" is 45, "7" is 7; None for what is no number."""
    total = None
    for word in text.lower().replace("-", " ").split():
        value = int(word) if word.isdecimal() else _WORDS.get(word)
        if value is None:
            return None
        total = value if total is None else total + value
    return total


def time_of_day(text: str) -> tuple[int, int, bool] | None:
    """Hour, minute, and whether morning or evening was said: "7:30", "half past 6", "6 pm". None for what is none."""
    text = " ".join(text.lower().strip().split())
    if text.startswith(_MINUS):
        return None
    named = {"noon": (12, 0, True), "midday": (12, 0, True), "midnight": (0, 0, True)}
    if text in named:
        return named[text]
    half_day = None
    for words, half in ((" in the morning", "am"), (" in the afternoon", "pm"), (" in the evening", "pm")):
        if text.endswith(words):
            text, half_day = text.removesuffix(words), half
    if found := _PAST.fullmatch(text):
        minutes = {"half": 30, "a quarter": 15, "quarter": 15}.get(found[1], whole(found[1]))
        base = time_of_day(found[3])
        if minutes is None or base is None or not 0 <= minutes < 60:
            return None
        at = 60 * base[0] + base[1] + (minutes if found[2] in ("past", "after") else -minutes)
        return _hour(at // 60 % 24, at % 60, half_day, base[2])
    digits = text if text[:1].isdigit() else _in_digits(text)
    if not (found := _CLOCK.fullmatch(digits)):
        return None
    half_day = (found[3] or half_day or "").replace(".", "").replace(" ", "") or None
    return _hour(int(found[1]), int(found[2] or 0), half_day, False)


def _in_digits(text: str) -> str:
    """ "seven thirty pm" is "7:30 pm"."""
    words = text.replace("-", " ").replace("oh ", "").replace("o'clock", "").split()
    half = words.pop() if words and words[-1] in ("am", "pm") else ""
    hour = whole(words[0]) if words else None
    minute = whole(" ".join(words[1:])) if words[1:] else 0
    return "" if hour is None or minute is None else f"{hour}:{minute:02} {half}".strip()


def _hour(hour: int, minute: int, half_day: str | None, known: bool) -> tuple[int, int, bool] | None:
    if half_day is not None and not 0 <= hour <= 12:
        half_day = None
    if half_day is not None:
        hour = hour % 12 + (12 if half_day == "pm" else 0)
    if not (0 <= hour < 24 and 0 <= minute < 60):
        return None
    return hour, minute, known or half_day is not None or hour > 12 or hour == 0
