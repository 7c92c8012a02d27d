"""Joins the texts of neighbouring segments, and notices a model that repeats itself.

Owns: splitting texts into words and comparing these. Does not know: sound, models.
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
_HALF_HEARD = 2  # words at either edge of the overlap that may differ: the cut goes through them
_MISHEARD = 2  # words in a row within the overlap that may differ: each segment has heard them in another context

_LOOP_PERIODS = 40  # tokens: the longest phrase whose repetition is noticed
_LOOP_TOKENS, _LOOP_TIMES = 30, 5  # five repetitions of a phrase, thirty tokens or more in all, are a loop


@dataclass(frozen=True)
class _Word:
    key: str  # the word as it is compared: lower case, no punctuation
    start: int
    end: int


def _words(text: str) -> list[_Word]:
    found = [(re.sub(r"\W", "", match[0].casefold()), match.start(), match.end()) for match in _WORD.finditer(text)]
    return [_Word(*entry) for entry in found if entry[0]]


def seam(before: str, after: str) -> tuple[str, str]:
    """Remove from two texts the words they share: the end of `before` and the start of `after` are the same sound.

    Returns both texts, with each word in one of them. The shared words are the longest common run near both edges. Up
    to two words beyond it at either edge were cut in half and are left out. The last shared word is taken from `after`,
    which heard what follows. If there is no such run, words between the shared ones may differ. If nothing is shared,
    both stay whole: a word twice is better than a word lost.
    """
    if (match := _match(before, after)) is None:
        return before, after
    return before[: match[0].start].rstrip(), after[match[1].start :]


def hold_back(text: str) -> tuple[str, str]:
    """Split off the last word of a text that ends at a seam: it may be cut in half. Returns (all before it, it)."""
    if not (words := _words(text)):
        return "", text
    return text[: words[-1].start].rstrip(), text[words[-1].start :]


def go_on(told: str, held: str, after: str) -> str:
    """The text to show next: `hold_back` gave (told, held), and the next segment's text is `after`."""
    match = _match(told, after)
    return glue(held, after) if match is None else after[match[1].end :].lstrip()


class Telling:
    """Decides what to show of each segment as soon as it ends. Words at a seam are shown once."""

    def __init__(self) -> None:
        self._last = self._held = ""  # of a segment cut in speech: its text, and its last word, not shown yet

    def next(self, text: str, *, joined: bool, cut: bool) -> str:
        """The text to show of a segment.

        joined: the segment before ends with the same words. cut: the next one will begin with its last words.
        """
        if joined:
            text = go_on(self._last, self._held, text)
        if cut:
            text, self._held = hold_back(text)
            self._last = text
        return text


def _match(before: str, after: str) -> tuple[_Word, _Word] | None:
    """The last word of the shared run, in each of the texts; None if nothing is shared."""
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
    return best or _loose_match(a, b)


def _loose_match(a: Sequence[_Word], b: Sequence[_Word]) -> tuple[_Word, _Word] | None:
    """As `_match`, where the shared words are no run: one of the segments has misheard a word among them."""
    best, best_score = None, -1
    scores: dict[tuple[int, int], int] = {}  # of the best chain of shared words that ends with a[i] and b[j]
    steps = [(x, y) for x in range(_MISHEARD + 1) for y in range(_MISHEARD + 1)]  # words between two shared ones
    for i, j in ((i, j) for i in range(len(a)) for j in range(len(b)) if a[i].key == b[j].key):
        chains = [scores[i - 1 - x, j - 1 - y] - max(x, y) for x, y in steps if (i - 1 - x, j - 1 - y) in scores]
        if j <= _HALF_HEARD:
            chains.append(-j)
        if not chains:
            continue
        scores[i, j] = max(chains) + 2
        left = len(a) - 1 - i
        if left <= _HALF_HEARD and scores[i, j] - left > best_score:
            best, best_score = (a[i], b[j]), scores[i, j] - left
    return best


def glue(before: str, after: str) -> str:
    """Two texts joined by a space, or by nothing if their script has no spaces."""
    if not before or not after:
        return before or after
    spaced = not (_NO_SPACE.match(before[-1]) or _NO_SPACE.match(after[0]))
    return f"{before} {after}" if spaced else before + after


def glued(texts: Sequence[str]) -> str:
    """All texts joined by `glue`."""
    return reduce(glue, texts, "")


def loop(tokens: Sequence[int]) -> int:
    """The number of tokens at the end that only repeat those before them; 0 if there is no loop."""
    n = len(tokens)
    for period in range(1, min(_LOOP_PERIODS, n // _LOOP_TIMES) + 1):
        same = (tokens[i] == tokens[i - period] for i in range(n - 1, period - 1, -1))
        run = next((k for k, equal in enumerate(same) if not equal), n - period)
        if run // period + 1 >= _LOOP_TIMES and run + period >= _LOOP_TOKENS:
            return run // period * period
    return 0
