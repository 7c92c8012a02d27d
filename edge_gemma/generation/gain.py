"""Whether guessing ahead pays: accepted tokens against the measured price of extra rows, and of the guesses.

Owns: the estimates, whose guess is drafted, the length of the next draft, when nothing is drafted. Does not know:
models, what tokens mean, how guesses are made (lookup.py, mtp.py) and checked (ahead.py). Nothing here reads a clock.

A pass checks a draft of k tokens with k + 1 rows. Its price is in steps: 1 is the time of a pass of one row. A draft is
worth its price if the tokens that come of it take less than as many steps. What a look-up guesses is free. A drafter's
tokens cost some hundredths of a step each, and are known only if they are paid for. So it is asked for a token now and
then that is not run, to learn how often it is right.
"""

import bisect
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from edge_gemma.model import recorded

ROWS = (1, 2, 4, 8, 16)  # rows of a pass; another number costs as much as the next of these
LONGEST_DRAFT = ROWS[-1] - 1

DRAFTED = 100  # in place of the length of a match: the guess is a drafter's

_MEASURED = 9  # passes of which the median counts
_MORE = {2: 0.15, 4: 0.15, 8: 0.9, 16: 2.0}  # steps that more rows cost beyond the number before, until measured
_DRAFT = 0.05  # steps that a drafter's token costs, until measured (E2B: 0.02 to 0.04)
_FORGOTTEN, _LONGEST_FORGOTTEN = 128, 8192  # passes after which a price is measured again
_SAME = 0.9  # share of the price before that counts as the same
_STALE = 64  # passes without one of one row, after which its time is measured again


def padded(rows: int) -> int:
    """The rows that a pass of so many costs as much as; more than ROWS knows stay as they are."""
    return recorded.padded(rows) if rows <= ROWS[-1] else rows


class Prices:
    """What passes of some rows cost on this machine, in steps. One for a model: all conversations tell it their times.

    A price that is not used is forgotten after some time, and then measured again. Each time that it is the same, it is
    remembered twice as long.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {n: deque(maxlen=_MEASURED) for n in ROWS}
        self._steps: dict[int, float] = {}
        self._drafts: deque[float] = deque(maxlen=_MEASURED)  # seconds of a drafter's token
        self._passes = 0
        self._measured = dict.fromkeys(ROWS, 0)  # the pass of the latest measurement
        self._remembered = dict.fromkeys(ROWS, _FORGOTTEN)

    def add(self, rows: int, seconds: float, *, first: bool = False) -> None:
        """A pass of so many rows, one of ROWS, took so long. first: of its timeline, which takes longer than others.

        A first pass counts only where it was quicker than those before.
        """
        self._passes += 1
        times = self._seconds[rows]
        worse = not times or seconds >= _SAME * statistics.median(times)
        if first and worse and not times:
            return
        if rows > 1 and times and self._passes - self._measured[rows] >= self._remembered[rows]:
            self._remembered[rows] = min(2 * self._remembered[rows], _LONGEST_FORGOTTEN) if worse else _FORGOTTEN
            if not (first and worse):
                times.clear()
        if not (first and worse):
            times.append(seconds)
            self._steps.clear()
        self._measured[rows] = self._passes

    def add_drafts(self, drafts: int, seconds: float, *, first: bool = False) -> None:
        """A drafter took so long for so many tokens. first: as in `add`; such a time does not count."""
        if drafts and not first:
            self._drafts.append(seconds / drafts)

    def drafting(self, drafts: int) -> float:
        """What so many tokens of a drafter cost, in steps; a guess until it was measured."""
        return drafts * (self.in_steps(statistics.median(self._drafts)) if self._drafts else _DRAFT)

    @property
    def ready(self) -> bool:
        """Whether it is known lately enough what a step costs."""
        return bool(self._seconds[1]) and self._passes - self._measured[1] < _STALE

    def measured(self, rows: int) -> bool:
        """Whether a pass of so many rows, one of ROWS, was ever measured."""
        return bool(self._seconds[rows])

    def steps(self, rows: int) -> float:
        """What a pass of so many rows, one of ROWS, costs: 1 or more; a guess if it was not measured lately."""
        if rows > 1 and self._passes - self._measured[rows] >= self._remembered[rows]:
            return min(self._known(rows), self._guessed(rows))
        return self._known(rows)

    def in_steps(self, seconds: float) -> float:
        """How many passes of one row take so long; 1 until it is known."""
        step = statistics.median(self._seconds[1]) if self._seconds[1] else 0.0
        return seconds / step if step > 0 else 1.0

    def _known(self, rows: int) -> float:
        """The price by the latest measurements, however old they are."""
        one, times = self._seconds[1], self._seconds[rows]
        if rows == 1 or not one or not times:
            return self._guessed(rows)
        if rows not in self._steps:
            self._steps[rows] = max(1.0, self.in_steps(statistics.median(times)))
        return self._steps[rows]

    def _guessed(self, rows: int) -> float:
        return 1.0 if rows == 1 else self._known(ROWS[ROWS.index(rows) - 1]) + _MORE[rows]


_LENGTHS = (2, 3, 4, 6, 9, 12, DRAFTED)  # lengths of a match that are told apart; shorter ones are resumed texts
# The chance of a draft's first token after each, until there is experience. The Brown corpus has 0.04, 0.18, 0.31,
# 0.39, 0.52, 0.53, 0.64, copied texts have more.
_FIRST_CHANCE = (0.1, 0.2, 0.35, 0.45, 0.6, 0.75, 0.9, 0.2)
_PRIOR = 2.0  # guesses that such an assumption counts as
_FADING = 0.97  # weight of a guess beside the next one


class Acceptance:
    """How often guessed tokens come, by the length of the match; a drafter's by themselves.

    Guesses that were not checked by a pass teach it too. The chances of a draft's later tokens are those that its
    tokens before came.
    """

    def __init__(self) -> None:
        groups = range(len(_LENGTHS) + 1)
        self._tried = [[0.0] * LONGEST_DRAFT for _ in groups]
        self._came = [[0.0] * LONGEST_DRAFT for _ in groups]
        self._sums: list[list[float] | None] = [None for _ in groups]
        self._open: list[tuple[int, Sequence[int], int]] = []  # group, guess, how many of its tokens came

    def guess(self, length: int, tokens: Sequence[int]) -> None:
        """After a match of this length these tokens are expected next."""
        if tokens:
            self._open.append((_group(length), tokens, 0))

    def came(self, token: int) -> None:
        """The next token of the text."""
        if not self._open:
            return
        still = []
        for group, tokens, at in self._open:
            tried, came = self._tried[group], self._came[group]
            same = tokens[at] == token
            tried[at] = tried[at] * _FADING + 1
            came[at] = came[at] * _FADING + same
            self._sums[group] = None
            if same and at + 1 < len(tokens):
                still.append((group, tokens, at + 1))
        self._open = still

    def expected(self, length: int) -> list[float]:
        """How many tokens of a draft after such a match will come, by its length: of 0 first, of LONGEST_DRAFT last."""
        group = _group(length)
        sums = self._sums[group]
        if sums is None:
            sums, alive, chance = [0.0], 1.0, _FIRST_CHANCE[group]
            for tried, came in zip(self._tried[group], self._came[group], strict=True):
                chance = (came + _PRIOR * chance) / (tried + _PRIOR)  # what is not known yet is as it was before
                alive *= chance
                sums.append(sums[-1] + alive)
            self._sums[group] = sums
        return sums


def _group(length: int) -> int:
    return bisect.bisect_right(_LENGTHS, length)


_MARGIN = 1.06  # times more tokens in the same time that a draft has to promise
_MOST_STEPS = 2.0  # times its price that a pass counts at most: others may have kept the machine busy
_MOST_LOST = -4.0  # steps: a larger loss ends drafting for a while
_MOST_WON = 6.0  # steps: what was won long ago does not count
_REST, _LONGEST_REST = 128, 8192  # tokens without a draft; twice as many each time
_CURIOSITY = 0.005  # steps a token that asking a drafter may take, only to learn
_MOST_CURIOSITY = 0.25  # steps: so much at once, as at the beginning


class Gain:
    """Chooses drafts for one conversation, and keeps an account of what they cost and saved.

    For each pass: `choose` before it, `ran` after it. For each guess: `guess`. For each token of the text, in order:
    `came`.
    """

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._acceptance = Acceptance()
        self._account = 0.0  # steps that drafts have saved, less what they have cost
        self._resting, self._rest = 0, _REST
        self._made = 0.0  # steps that making the draft took
        self._curiosity = _MOST_CURIOSITY

    def guess(self, length: int, tokens: Sequence[int], seconds: float = 0.0, *, first: bool = False) -> None:
        """What a look-up expects after a match of this length, or what a drafter says (DRAFTED); drafted or not.

        seconds: that the drafter took. first: as in Prices.add.
        """
        self._acceptance.guess(length, tokens)
        if length == DRAFTED and tokens:
            self.prices.add_drafts(len(tokens), seconds, first=first)
            self._made = min(self.prices.in_steps(seconds), _MOST_STEPS * self.prices.drafting(len(tokens)))

    def asks(self) -> bool:
        """Whether a drafter should be asked for a token where none is drafted."""
        price = self.prices.drafting(1)
        if self._resting or not self.prices.ready or self._curiosity < price:
            return False
        self._curiosity -= price
        return True

    def came(self, token: int) -> None:
        """The next token of the text."""
        self._acceptance.came(token)
        self._resting = max(0, self._resting - 1)
        self._curiosity = min(self._curiosity + _CURIOSITY, _MOST_CURIOSITY)

    def choose(self, offers: Sequence[tuple[int, int]], tokens: int = 1) -> tuple[int, int]:
        """Which of some guesses to draft, and how many tokens of it; 0 tokens for none.

        offers: of each, the length of its match, or DRAFTED, and the tokens that it may have at most. tokens: those
        that have to be run anyway. The draft is the one that gives the most tokens in the time of the pass and of its
        own making.
        """
        best = 0, 0
        if self._resting or not self.prices.ready or tokens > LONGEST_DRAFT:
            return best
        speed = _MARGIN * tokens / self.prices.steps(padded(tokens))
        for at, (length, most) in enumerate(offers):
            own = self.prices.drafting(1) if length == DRAFTED else 0.0
            for drafted, promised in self._promises(length, most, tokens, own):
                if promised > speed:
                    best, speed = (at, drafted), promised
        return best

    def _promises(self, length: int, most: int, tokens: int, own: float) -> Iterator[tuple[int, float]]:
        """Lengths of a draft that may be best, and the tokens in the time of a step that each promises.

        own: steps that each of its tokens takes to make. Where that is nothing, a pass is filled.
        """
        coming, shorter = self._acceptance.expected(length), 0
        for rows in ROWS:
            if rows <= tokens or shorter == most:
                continue
            full, price = min(rows - tokens, most), self.prices.steps(rows)
            for drafted in range(shorter + 1 if own else full, full + 1):
                yield drafted, (tokens + coming[drafted]) / (price + own * drafted)
            if not self.prices.measured(rows):  # one unknown price at a time
                return
            shorter = full

    def ran(self, tokens: int, drafted: int, seconds: float, *, first: bool = False) -> None:
        """A pass has run `tokens` that were certain, and a draft. first: as in Prices.add."""
        rows = padded(tokens + drafted)
        if drafted or rows == 1:  # several tokens without a draft are run as a prompt, with one row of logits
            self.prices.add(rows, seconds, first=first)
        if drafted:
            price = self.prices.steps(rows)
            if not first:  # what it took, not what such passes take: a price that is too low by chance tempts to draft
                price = min(max(1.0, self.prices.in_steps(seconds)), _MOST_STEPS * price)
            self._account -= self._made + price - self.prices.steps(padded(tokens))
            if self._account < _MOST_LOST:
                self._account, self._resting = 0.0, self._rest
                self._rest = min(2 * self._rest, _LONGEST_REST)
        self._made = 0.0

    def accepted(self, drafted: int) -> None:
        """So many drafted tokens came, each a step saved."""
        self._account = min(self._account + drafted, _MOST_WON)
        if self._account == _MOST_WON:
            self._rest = _REST
