"""Drafts for tests: a timeline whose tokens follow from those before, and a gain that drafts whatever it is told.

Owns: `Rule`, a timeline without a model; `Told`. Does not know: what is compared.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.generation.gain import Gain, Prices
from tests.fakes import VOCAB


class Rule:
    """A timeline whose logits follow from the last ids and the seed: texts that come round again, as they do in life.

    passes: how many tokens were run in each. fail_at: the pass that raises KeyboardInterrupt before anything is run.
    """

    def __init__(self, seed: int, ids: Iterable[int], context: int = 4096, reach: int = 2) -> None:
        """ids: those that are likely. reach: how many ids before a token decide on it."""
        self.context, self.ids = context, []
        self.passes: list[int] = []
        self.fail_at: int | None = None
        self._seed, self._likely, self._reach = seed, list(ids), reach
        self.nbytes = 0

    @property
    def position(self) -> int:
        return len(self.ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([self._seed, *ids[-self._reach :]])
        logits = rng.normal(0, 0.1, VOCAB).astype(np.float32)
        logits[rng.choice(self._likely, 3)] += (8, 6, 5)
        return logits

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        if len(self.passes) == self.fail_at:
            self.passes.append(0)
            raise KeyboardInterrupt
        if not ids or self.position + len(ids) > self.context:
            raise ContextFullError(f"{len(ids)} tokens do not fit")
        self.passes.append(len(ids))
        self.ids = [*self.ids, *ids]
        first = self.position - len(ids) + 1
        return np.stack([self.logits(self.ids[: first + i]) for i in range(len(ids))])

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        return self.forward(ids)[-1]

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def rewind(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}")
        self.ids = self.ids[:position]

    def recall(self, ids: Sequence[int], encoded: object = ()) -> int:
        return 0

    def mark(self) -> None: ...

    def keep_on_disk(self, position: int) -> None: ...

    def share(self) -> None: ...


class Told(Gain):
    """Drafts of these lengths, in turn, wherever there is a guess: of each source in turn, where there are two."""

    def __init__(self, lengths: Sequence[int] = (15, 3, 0, 7, 1)) -> None:
        super().__init__(Prices())
        self._lengths, self._sources = itertools.cycle(lengths), itertools.cycle((0, 1, 1))
        self.told: list[int] = []  # the lengths of the matches that were drafted

    def choose(self, offers: Sequence[tuple[int, int]], tokens: int = 1) -> tuple[int, int]:
        if not offers:
            return 0, 0
        at = next(self._sources) % len(offers)
        self.told.append(offers[at][0])
        return at, max(0, min(next(self._lengths), offers[at][1], 16 - tokens))
