"""Guessing how a text goes on: the tokens that followed the same words before (prompt look-up decoding, Saxena 2023).

Owns: the index of what was written, finding the longest recent n-gram in it, resuming a text that is copied with
changes. Does not know: whether a guess is worth its price (gain.py), how it is checked (ahead.py).

The text is the prompt and the reply so far. Before them stands what the reply is expected to be, if anything is: the
text that was written of a shorter part of the same sound, for example.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LONGEST = 12  # tokens of an n-gram that are compared
MOST_PLACES = 32  # places looked at, the most recent ones
_START, _END = -2, -1  # stand before the index, and after the expected text; no token has these ids
_MOST_MISSES = 2  # tokens in a row that may differ until a copied text is given up


class Match(NamedTuple):
    """at: where in the index the next token stands. length: how many tokens before it are those written last, at most
    LONGEST. One that is resumed after a token that differed has a length of 0 or 1.
    """

    at: int
    length: int


class Lookup:
    """Grows with a text. `push` costs the same wherever the text is, `find` at most MOST_PLACES comparisons."""

    free = True  # `follow` costs next to nothing

    def __init__(self, ids: Iterable[int], expected: Sequence[int] = ()) -> None:
        """ids: the text so far. expected: how it probably goes on; it is looked up as well."""
        self._text: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # a pair of tokens -> the index after its last place
        self._before: list[int] = []  # for the pair that ends at an index, the index after its place before; 0: none
        if expected:
            self._extend([*expected, _END])
        self._extend(ids)
        # The place that is copied from. The expected text follows the prompt as if all before it had been the same.
        self._copied: int | None = 0 if expected else None
        self._same, self._misses = LONGEST, 0  # tokens that were the same since the last miss; misses in a row

    def push(self, token: int) -> None:
        """The text goes on by a token."""
        if self._copied is not None:
            same = self._text[self._copied] == token
            self._same = min(self._same + 1, LONGEST) if same else 0
            self._misses = 0 if same else self._misses + 1
            self._copied += 1
        self._extend((token,))
        if self._copied is not None and (self._misses > _MOST_MISSES or self._text[self._copied] == _END):
            self._copied = None

    def _extend(self, tokens: Iterable[int]) -> None:
        text, before, last = self._text, self._before, self._last
        previous = text[-1] if text else _START
        for token in tokens:
            pair = previous, token
            text.append(token)
            before.append(last.get(pair, 0))
            last[pair] = len(text)
            previous = token

    def find(self) -> Match | None:
        """Where the text may go on: after the longest n-gram of two tokens or more, the most recent of several.

        Only the latest MOST_PLACES places of the last two tokens count. Without one, or if it is shorter, the text that
        was copied from is resumed. Further tokens are compared with the place that is found.
        """
        best = self._n_gram()
        if self._copied is not None and (best is None or self._same > best.length):
            return Match(self._copied, self._same)
        if best is not None:
            self._copied, self._same, self._misses = best.at, best.length, 0
        return best

    def _n_gram(self) -> Match | None:
        text, before = self._text, self._before
        best = None
        at = before[-1] if before else 0
        for _ in range(MOST_PLACES):
            if not at:
                break
            length = 2
            while length < min(at, LONGEST) and text[at - 1 - length] == text[-1 - length]:
                length += 1
            if text[at] != _END and (best is None or length > best.length):
                best = Match(at, length)
                if length == LONGEST:
                    break
            at = before[at - 1]
        return best

    def follow(self, match: Match, most: int) -> list[int]:
        """The tokens that stand at a match, at most so many. At the end of the text they begin anew: it repeats."""
        text, at = self._text, match.at
        draft = text[at : at + most]
        if _END in draft:
            return draft[: draft.index(_END)]
        while draft and len(draft) < most:
            draft += draft[: most - len(draft)]
        return draft
