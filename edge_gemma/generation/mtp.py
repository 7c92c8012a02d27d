"""Drafts from a drafter, for a loop that has its target verify them.

    source = DrafterDrafts(engine.drafter, sampling, seed)
    drafts = source.draft(session, hidden, token, 4)      # `token` follows the session and is not in it yet
    rows = session.hidden([token, *drafts.tokens])        # the target's own opinion, after each of them
    ...                                                   # acceptance.py says how many are taken
    session.rewind(...)                                   # behind the last one that was

`hidden` is the row of the session's last token: the last of `session.hidden(prompt, last=1)` at first, then, after a
verification, row `accepted` of its rows.

Owns: drawing drafts, and what they were drawn from; a drafter as a source of guesses for ahead.py. Does not know: how
many drafts pay, which are taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_gemma.generation.acceptance import Distribution, sure
from edge_gemma.generation.gain import DRAFTED
from edge_gemma.generation.lookup import Match
from edge_gemma.generation.sampler import Sampling, candidates
from edge_gemma.model.drafter import Drafter
from edge_gemma.session import Session


@dataclass(frozen=True)
class Drafts:
    """Guessed tokens, and of each the distribution that it was drawn from, given those before it."""

    tokens: list[int]
    drawn_from: list[Distribution]


class DrafterDrafts:
    """A source of drafts. It has a random stream of its own; not thread-safe."""

    def __init__(self, drafter: Drafter, sampling: Sampling | None = None, seed: int | None = None) -> None:
        """sampling: how drafts are drawn, best as the target's tokens are; None or a temperature of 0: the likeliest is
        taken. seed: of the random stream.
        """
        self._drafter = drafter
        self._sampling = sampling
        self._random = np.random.default_rng(seed)

    def draft(self, session: Session, hidden: np.ndarray, token: int, most: int) -> Drafts:
        """Guess `most` tokens after `token`, which follows the session. hidden: as in `Session.draft`.

        The session stays as it is. There are no drafts where the session is empty or was just rewound far.
        """
        drawn_from: list[Distribution] = []

        def choose(ids: np.ndarray, logits: np.ndarray) -> int:
            chosen, distribution = self._choose(ids, logits)
            drawn_from.append(distribution)
            return chosen

        return Drafts(session.draft(self._drafter, hidden, token, most, choose), drawn_from)

    def _choose(self, ids: np.ndarray, logits: np.ndarray) -> tuple[int, Distribution]:
        sampling = self._sampling
        if sampling is None or sampling.temperature == 0 or sampling.top_k == 1:
            best = int(ids[np.argmax(logits)])
            return best, sure(best)
        at, probabilities = candidates(logits, sampling)
        some = ids[at]
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(some[min(int(drawn), len(some) - 1)]), (some, probabilities)


class DrafterGuesses:
    """A drafter on one timeline, beside `Lookup` as a source of guesses: its likeliest tokens.

    Before each guess it is told where the timeline is: `begin`.
    """

    free = False  # `follow` takes time

    def __init__(self, drafter: Drafter, session: Session) -> None:
        self._session, self._drafts = session, DrafterDrafts(drafter)
        self._row: np.ndarray | None = None
        self._next: Sequence[int] = ()

    def begin(self, row: np.ndarray | None, tokens: Sequence[int]) -> None:
        """row: float32 [hidden_size], the timeline's last token's, as of `Session.hidden`; None: it is not known.

        tokens: those that follow the timeline.
        """
        self._row, self._next = row, tokens

    def push(self, token: int) -> None:
        """The text goes on by a token: nothing to do, it is in the timeline."""

    def find(self) -> Match | None:
        """Whether there are guesses: behind a single token, whose row before is known."""
        return Match(self._session.position, DRAFTED) if self._row is not None and len(self._next) == 1 else None

    def follow(self, match: Match, most: int) -> list[int]:
        """So many guesses; none where the session was just rewound far."""
        assert self._row is not None
        return self._drafts.draft(self._session, self._row, self._next[0], most).tokens
