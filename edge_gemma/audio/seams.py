"""Texts of neighbouring segments: joining them, and noticing a model that repeats itself.

Owns: words and their comparison. Does not know: sound, models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

# Scripts written without spaces: kana, Han, Thai, Lao, Khmer, Burmese. Each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_NO_SPACE = re.compile(rf"[{_UNSPACED}\u3000-\u303f\uff00-\uffef]")
_LOOKED_AT = 40  # words on each side of a seam: more than anyone says in two seconds
_HALF_HEARD = 2  # words at the very edges of the overlap that may differ

_LOOP_PERIODS = 40  # tokens of the longest phrase looked for
_LOOP_TOKENS, _LOOP_TIMES = 30, 5  # a phrase that is said five times, in thirty tokens or more, is a loop


@dataclass(frozen=True)
class _Word:
    key: str  # what is compared: no case, no punctuation
    start: int
    end: int


def _words(text: str) -> list[_Word]:
    found = [(re.sub(r"\W", "", match[0].casefold()), match.start(), match.end()) for match in _WORD.finditer(text)]
    return [_Word(*entry) for entry in found if entry[0]]


def seam(before: str, after: str) -> tuple[str, str]:
    """Two texts, the end of one and the start of the other being the same sound, with each word in one of them.

    The words heard twice are the longest run found near both edges; up to two words beyond it at either edge were cut
    in half and are left out. The last of them is taken from `after`, which heard what follows. Nothing in common: both
    stay whole, for a word twice is better than a word lost.
    """
    if (match := _match(before, after)) is None:
        return before, after
    return before[: match[0].start].rstrip(), after[match[1].start :]


def hold_back(text: str) -> tuple[str, str]:
    """A text that ends at a seam but has to be told now: all but its last word, which may be cut in half, and that."""
    if not (words := _words(text)):
        return "", text
    return text[: words[-1].start].rstrip(), text[words[-1].start :]


def go_on(told: str, held: str, after: str) -> str:
    """What is to be told next, after `hold_back` gave (told, held) and the next segment `after`."""
    match = _match(told, after)
    return glue(held, after) if match is None else after[match[1].end :].lstrip()


class Telling:
    """Texts of segments, each told as soon as it ends: words at a seam once, in the one text or the other."""

    def __init__(self) -> None:
        self._last = self._held = ""  # of a segment cut in speech: its text, and the last word, not told yet

    def next(self, text: str, *, joined: bool, cut: bool) -> str:
        """What to tell of a segment. joined: its first words end the segment before; cut: its last begin the next."""
        if joined:
            text = go_on(self._last, self._held, text)
        if cut:
            text, self._held = hold_back(text)
            self._last = text
        return text


def _match(before: str, after: str) -> tuple[_Word, _Word] | None:
    """The last of the words heard twice, in each of the texts."""
    a, b = _words(before)[-_LOOKED_AT:], _words(after)[:_LOOKED_AT]
    best, best_score = None, -1
    for i in range(len(a)):
        for j in range(min(len(b), _HALF_HEARD + 1)):
            run = next((n for n, (x, y) in enumerate(zip(a[i:], b[j:], strict=False)) if x.key != y.key), None)
            run = min(len(a) - i, len(b) - j) if run is None else run
            left = len(a) - i - run
            score = 2 * run - left - j
            if run and left <= _HALF_HEARD and score > best_score:
                best, best_score = (a[i + run - 1], b[j + run - 1]), score
    return best


def glue(before: str, after: str) -> str:
    """Two texts with a space between them, where their script has spaces."""
    if not before or not after:
        return before or after
    spaced = not (_NO_SPACE.match(before[-1]) or _NO_SPACE.match(after[0]))
    return f"{before} {after}" if spaced else before + after


def glued(texts: Sequence[str]) -> str:
    return reduce(glue, texts, "")


def loop(tokens: Sequence[int]) -> int:
    """How many tokens at the end are needless repetitions of those before them; 0: no loop."""
    n = len(tokens)
    for period in range(1, min(_LOOP_PERIODS, n // _LOOP_TIMES) + 1):
        same = (tokens[i] == tokens[i - period] for i in range(n - 1, period - 1, -1))
        run = next((k for k, equal in enumerate(same) if not equal), n - period)
        if run // period + 1 >= _LOOP_TIMES and run + period >= _LOOP_TOKENS:
            return run // period * period
    return 0
