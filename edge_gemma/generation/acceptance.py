"""Which drafts a target takes: the rule under which drafting changes the time that a text takes and not the text.

A draft d was drawn from q, the target would draw from p. The draft is taken with probability min(1, p(d) / q(d)); else
the token comes from what p has more than q, (p - q)+ made to sum to one. Either way the token is drawn from p
(Leviathan et al. 2023, "Fast inference from transformers via speculative decoding"). When all drafts are taken, one
more token is drawn from the target's last distribution.

A draft that was not drawn but chosen (the likeliest one, one out of a prompt) has q(d) = 1: `sure`. For these alone a
simpler rule does the same: `matching`, which asks the target's own sampler for every token and stops at the first that
is not the draft. It draws as plain decoding draws, so that a seed gives the text that it gives without drafts.

Owns: this rule. Does not know: models, sessions, where drafts and distributions come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Distribution = tuple[np.ndarray, np.ndarray]
"""Ids that may be drawn, int64 [n], each once; and their probabilities, float64 [n], sum 1."""


@dataclass(frozen=True)
class Taken:
    """What came of some drafts: the first `accepted` of them were taken, then comes `token`."""

    accepted: int
    token: int


def sure(token: int) -> Distribution:
    """The distribution of a draft that was chosen, not drawn."""
    return np.array([token], np.int64), np.ones(1)


def matching(drafts: Sequence[int], sample: Callable[[int], int]) -> Taken:
    """Take drafts while they are what the target says itself: greedy decoding, or drafts that were chosen.

    sample: the target's token after so many of the drafts; called once for each, in order, up to the first that is
    another than its draft, or once more after the last.
    """
    for accepted, draft in enumerate(drafts):
        token = sample(accepted)
        if token != draft:
            return Taken(accepted, token)
    return Taken(len(drafts), sample(len(drafts)))


def accept(
    drafts: Sequence[int],
    drawn_from: Sequence[Distribution],
    target: Callable[[int], Distribution],
    uniform: Callable[[], float],
) -> Taken:
    """Take drafts so that every token is distributed as the target has it.

    drawn_from: of each draft, what it was drawn from, given those before it. target: the distribution after so many of
    the drafts; called as in `matching`. uniform: independent random numbers in [0, 1): one for each draft that is
    judged, and one for the token behind them.
    """
    for accepted, (draft, q) in enumerate(zip(drafts, drawn_from, strict=True)):
        p = target(accepted)
        if uniform() * _chance(q, draft) >= _chance(p, draft):
            return Taken(accepted, _drawn(_rest(p, q), uniform()))
    return Taken(len(drafts), _drawn(target(len(drafts)), uniform()))


def _chance(distribution: Distribution, token: int) -> float:
    ids, probabilities = distribution
    return float(probabilities[ids == token].sum())


def _rest(p: Distribution, q: Distribution) -> Distribution:
    """(p - q)+, which need not sum to one. p itself where rounding leaves nothing."""
    ids, probabilities = p
    left = probabilities.copy()
    order = np.argsort(ids)
    at = np.minimum(np.searchsorted(ids, q[0], sorter=order), len(ids) - 1)
    both = ids[order[at]] == q[0]
    left[order[at[both]]] -= q[1][both]
    left = np.maximum(left, 0)
    return (ids, left) if left.any() else p


def _drawn(distribution: Distribution, uniform: float) -> int:
    """Draw an id. The probabilities are made to sum to one; ids of none are never drawn."""
    ids, probabilities = distribution
    cumulative = np.cumsum(probabilities)
    last = int(np.flatnonzero(probabilities)[-1])
    return int(ids[min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), last)])
