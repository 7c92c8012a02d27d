"""Drafts from a drafter, for a loop that has its target verify them.

    source = DrafterDrafts(engine.drafter, sampling, seed)
    drafts = source.draft(session, hidden, token, 4)      # `token` follows the session and is not in it yet
    rows = session.hidden([token, *drafts.tokens])        # the target's own opinion, after each of them
    ...                                                   # acceptance.py says how many are taken
    session.rewind(...)                                   # behind the last one that was

`hidden` is the row of the session's last token: the last of `session.hidden(prompt, last=1)` at first, then, after a
verification, row `accepted` of its rows.

Owns: drawing drafts, and what they were drawn from. Does not know: how many drafts pay, which are taken.
"""

from dataclasses import dataclass

import numpy as np

from edge_gemma.generation.acceptance import Distribution, sure
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
