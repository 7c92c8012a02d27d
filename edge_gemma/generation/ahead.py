"""Running ahead of a reply: a draft is run behind each token, and what was guessed right costs no pass of its own.

Owns: the order of passes and rewinds on a timeline, so that logits are those of one token after another. Does not
know: how a token is chosen, how guesses are made (lookup.py, mtp.py), whose is drafted and whether it pays (gain.py).

Whoever writes the reply chooses every token from the logits before it, as without drafts. A draft that goes on with the
chosen token gives the next logits at once; else its rest is forgotten. So drafts change no text, greedy or drawn: for a
draft that is certain this is the acceptance rule of speculative sampling (Leviathan et al. 2023, section 2.3), and the
random stream stays the same.
"""

import time
from collections.abc import Collection, Sequence
from typing import Protocol, cast

import numpy as np

from edge_gemma.generation.gain import LONGEST_DRAFT, Gain, padded
from edge_gemma.generation.lookup import Lookup, Match
from edge_gemma.generation.mtp import DrafterGuesses
from edge_gemma.model.drafter import Drafter
from edge_gemma.session import Session, Timeline, common_prefix

_NOTHING = np.empty((0, 0), np.float32)


class Source(Protocol):
    """Where guesses come from: `Lookup`, or `DrafterGuesses`."""

    @property
    def free(self) -> bool:
        """Whether a guess costs nothing, so that it is made to learn from it, drafted or not."""
        ...

    def push(self, token: int) -> None:
        """The text goes on by a token."""
        ...

    def find(self) -> Match | None:
        """What a guess would begin with; None where there is none."""
        ...

    def follow(self, match: Match, most: int) -> list[int]:
        """The guess: at most so many tokens."""
        ...


class Ahead:
    """A timeline at the end of a prompt. `run` the reply's tokens in order, then `close`."""

    def __init__(
        self,
        session: Timeline,
        gain: Gain | None = None,
        *,
        drafter: Drafter | None = None,
        stop_ids: Collection[int] = (),
        expected: Sequence[int] = (),
    ) -> None:
        """gain: decides on drafts; None: there are none. drafter: of the session's model, which is then a `Session`;
        None: only what a look-up finds is drafted. stop_ids: nothing is drafted behind them. expected: what the reply
        probably is.
        """
        self._session, self._gain = session, gain
        self._stop_ids, self._expected = stop_ids, expected
        self._sources: list[Source] = []
        self._drafter = None if drafter is None else DrafterGuesses(drafter, cast(Session, session))
        self._draft: list[int] = []  # tokens that the timeline holds and nobody has chosen yet
        self._rows = _NOTHING  # logits before the first of them, and after each
        self._hidden = _NOTHING  # what these were computed from, for the drafter; none where it is not known
        self._seen: set[int] = set()  # rows of passes that were run here: the first of each takes longer
        self._asked = False  # the drafter, here
        self.drafted = self.accepted = 0  # tokens

    @property
    def ids(self) -> list[int]:
        """The timeline without the draft."""
        ids = self._session.ids
        return ids[: len(ids) - len(self._draft)] if self._draft else ids

    def run(self, tokens: list[int], most: int = 0) -> np.ndarray:
        """Append tokens. Returns the logits after the last: float32 [vocab_size].

        most: tokens that may be drafted behind them. Raises what the session raises.
        """
        if self._gain is None:
            return self._plain(tokens)
        if not self._sources:
            self._sources = [Lookup(self.ids, self._expected), *([self._drafter] if self._drafter else [])]
            self._hidden = self._row()
        for token in tokens:
            self._gain.came(token)
            for source in self._sources:
                source.push(token)
        right = common_prefix(self._draft, tokens)
        if right:
            self._gain.accepted(right)
            self.accepted += right
            self._draft, self._rows, self._hidden = self._draft[right:], self._rows[right:], self._hidden[right:]
        if right == len(tokens):
            return self._rows[0]
        self.close()
        return self._pass(tokens[right:], most, self._gain)

    @property
    def _accompanied(self) -> bool:
        return getattr(self._session, "accompanied", False)  # other timelines know no company

    def close(self) -> None:
        """Forget the draft: the timeline holds only what was run."""
        self._rows = _NOTHING
        if self._draft:
            session, rest = self._session, len(self._draft)
            self._draft = []
            session.rewind(session.position - rest)

    def _pass(self, tokens: list[int], most: int, gain: Gain) -> np.ndarray:
        """Run tokens that no draft had, and a new draft behind them.

        Not where other sessions' tokens share the passes: a draft would part from them, and the time of such a pass
        says nothing of what its rows cost.
        """
        draft = [] if self._accompanied else self._guess(tokens, most, gain)
        rows, before = padded(len(tokens) + len(draft)), time.perf_counter()
        logits = self._checked(tokens, draft) if draft else self._plain(tokens)[None]
        seconds = time.perf_counter() - before
        if not self._accompanied:
            gain.ran(len(tokens), len(draft), seconds, first=rows not in self._seen)
        self._seen.add(rows)
        self.drafted += len(draft)
        self._draft, self._rows = draft, logits[-1 - len(draft) :]
        return self._rows[0]

    def _guess(self, tokens: list[int], most: int, gain: Gain) -> list[int]:
        """The draft behind some tokens; none where that does not pay."""
        found: list[tuple[Source, Match]] = []
        offers: list[tuple[int, int]] = []
        if self._drafter is not None:
            self._drafter.begin(self._hidden[0] if len(self._hidden) else None, tokens)
        for source in self._sources:
            if (match := source.find()) is None:
                continue
            limit = most
            if source.free:  # what is not drafted teaches too
                guess = source.follow(match, LONGEST_DRAFT)
                gain.guess(match.length, guess)
                limit = min(most, self._end(guess))
            found.append((source, match))
            offers.append((match.length, limit))
        at, drafted = gain.choose(offers, len(tokens))
        if drafted:
            guess = self._made(*found[at], drafted, gain)
            return guess[: self._end(guess)]
        if found and not found[-1][0].free and gain.asks():
            self._made(*found[-1], 1, gain)
        return []

    def _made(self, source: Source, match: Match, most: int, gain: Gain) -> list[int]:
        """A guess of at most so many tokens. The gain knows those of free sources already."""
        before = time.perf_counter()
        guess = source.follow(match, most)
        if not source.free:
            gain.guess(match.length, guess, time.perf_counter() - before, first=not self._asked)
            self._asked = True
        return guess

    def _end(self, guess: Sequence[int]) -> int:
        """How many tokens of a guess come before one that ends the reply."""
        return next((i for i, token in enumerate(guess) if token in self._stop_ids), len(guess))

    def _plain(self, tokens: list[int]) -> np.ndarray:
        logits = self._session.step(tokens[0]) if len(tokens) == 1 else self._session.prefill(tokens)
        self._hidden = self._row()
        return logits

    def _checked(self, tokens: list[int], draft: list[int]) -> np.ndarray:
        """Run tokens and a draft behind them. Returns the logits after each: float32 [n, vocab_size]."""
        if self._drafter is None:
            return self._session.forward([*tokens, *draft])
        session = cast(Session, self._session)
        self._hidden = _NOTHING  # what an interruption leaves
        hidden = session.hidden([*tokens, *draft])
        self._hidden = hidden[-1 - len(draft) :]
        return session.logits(hidden)

    def _row(self) -> np.ndarray:
        """What the logits of the latest pass were computed from, for the drafter: float32 [1, hidden_size], or none."""
        row = cast(Session, self._session).row if self._drafter is not None else None
        return _NOTHING if row is None else row[None]
