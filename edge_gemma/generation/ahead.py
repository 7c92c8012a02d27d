"""Running ahead of a reply: a draft is run behind each token, and what was guessed right costs no pass of its own.

Owns: the order of passes and rewinds on a timeline, so that logits are those of one token after another. Does not
know: how a token is chosen, how drafts are found (lookup.py) and whether they pay (gain.py).

Whoever writes the reply chooses every token from the logits before it, as without drafts. A draft that goes on with the
chosen token gives the next logits at once; else its rest is forgotten. So drafts change no text, greedy or drawn: for a
draft that is certain this is the acceptance rule of speculative sampling (Leviathan et al. 2023, section 2.3), and the
random stream stays the same.
"""

import time
from collections.abc import Collection, Sequence

import numpy as np

from edge_gemma.generation.gain import LONGEST_DRAFT, Gain, padded
from edge_gemma.generation.lookup import Lookup
from edge_gemma.session import Timeline, common_prefix

_NOTHING = np.empty((0, 0), np.float32)


class Ahead:
    """A timeline at the end of a prompt. `run` the reply's tokens in order, then `close`."""

    def __init__(
        self,
        session: Timeline,
        gain: Gain | None = None,
        *,
        stop_ids: Collection[int] = (),
        expected: Sequence[int] = (),
    ) -> None:
        """gain: decides on drafts; None: there are none. stop_ids: nothing is drafted behind them. expected: what the
        reply probably is.
        """
        self._session, self._gain = session, gain
        self._stop_ids, self._expected = stop_ids, expected
        self._lookup: Lookup | None = None
        self._draft: list[int] = []  # tokens that the timeline holds and nobody has chosen yet
        self._rows = _NOTHING  # logits before the first of them, and after each
        self._seen: set[int] = set()  # rows of passes that were run here: the first of each takes longer
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
        if self._lookup is None:
            self._lookup = Lookup(self.ids, self._expected)
        for token in tokens:
            self._gain.came(token)
            self._lookup.push(token)
        right = common_prefix(self._draft, tokens)
        if right:
            self._gain.accepted(right)
            self.accepted += right
            self._draft, self._rows = self._draft[right:], self._rows[right:]
        if right == len(tokens):
            return self._rows[0]
        self.close()
        return self._pass(tokens[right:], most, self._gain, self._lookup)

    def close(self) -> None:
        """Forget the draft: the timeline holds only what was run."""
        self._rows = _NOTHING
        if self._draft:
            session, rest = self._session, len(self._draft)
            self._draft = []
            session.rewind(session.position - rest)

    def _plain(self, tokens: list[int]) -> np.ndarray:
        return self._session.step(tokens[0]) if len(tokens) == 1 else self._session.prefill(tokens)

    def _pass(self, tokens: list[int], most: int, gain: Gain, lookup: Lookup) -> np.ndarray:
        """Run tokens that no draft had, and a new draft behind them."""
        session, draft = self._session, list[int]()
        if match := lookup.find():
            guess = lookup.follow(match, LONGEST_DRAFT)
            gain.guess(match.length, guess)
            stop = next((i for i, token in enumerate(guess) if token in self._stop_ids), len(guess))
            draft = guess[: gain.draft(match.length, min(most, stop), len(tokens))]
        rows, before = padded(len(tokens) + len(draft)), time.perf_counter()
        logits = session.forward([*tokens, *draft]) if draft else self._plain(tokens)[None]
        seconds = time.perf_counter() - before
        gain.ran(len(tokens), len(draft), seconds, first=rows not in self._seen)
        self._seen.add(rows)
        self.drafted += len(draft)
        self._draft, self._rows = draft, logits[-1 - len(draft) :]
        return self._rows[0]
