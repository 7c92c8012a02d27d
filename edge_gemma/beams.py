"""Beam search: the likeliest reply, found with several hypotheses side by side on one timeline.

Owns: which hypotheses live on, from when on a token is certain. Does not know: text, prompts, messages.

Who takes the likeliest token each time cannot take one back that made all that follows unlikely; the likeliest of
several hypotheses can (Sutskever et al. 2014, section 3.2). One timeline serves all of them: it goes back to where a
hypothesis leaves the one before it, and the rest is run as a short prompt. Scores are not divided by length: how long
a text is, the sound says.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from edge_gemma.sampler import Sampler
from edge_gemma.timeline import Timeline, common_prefix

MARGIN = 3.0  # nats below the best at which a hypothesis is given up (docs/LOG.md)


class Hypothesis(NamedTuple):
    """The beginning of a reply, or all of it with its stop token. score: its log probability, in nats."""

    score: float
    tokens: tuple[int, ...]


def search(
    session: Timeline, logits: np.ndarray, *, sampler: Sampler, limit: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """A reply's tokens, each as soon as all hypotheses agree on it; the stop token comes last.

    session: at the prompt's end, left wherever the last hypothesis ended. logits: float32 [vocab_size], those after
    the prompt. sampler: says how many hypotheses there are. limit: most tokens, all but the last of which the session
    has to hold. Raises what the session and the sampler raise.
    """
    start, width = session.position, sampler.sampling.num_beams
    live, ended, told = [Hypothesis(0.0, ())], list[Hypothesis](), 0
    for _ in range(limit):
        grown = []
        for score, tokens in sorted(live, key=lambda hypothesis: hypothesis.tokens):  # neighbours share the most
            if tokens:
                logits = _run(session, start, tokens)
            likeliest = sampler.likeliest(logits, width + len(stop_ids), session.ids)
            grown += [Hypothesis(score + nats, (*tokens, token)) for token, nats in likeliest]
        best = sorted(grown, reverse=True)
        ended = sorted([*ended, *(h for h in best[:width] if h.tokens[-1] in stop_ids)])[-1:]
        least = max([best[0].score - MARGIN, *(h.score for h in ended)])
        live = [h for h in best if h.score > least and h.tokens[-1] not in stop_ids][:width]
        agreed = _agreed([h.tokens for h in (*live, *ended)])
        yield from agreed[told:]
        told = len(agreed)
        if not live:
            return
    yield from max([*live, *ended]).tokens[told:]


def _run(session: Timeline, start: int, tokens: tuple[int, ...]) -> np.ndarray:
    """Bring the timeline from the prompt's end at `start` to a hypothesis' end. Returns the logits there."""
    shared = min(common_prefix(session.ids[start:], tokens), len(tokens) - 1)
    session.rewind(start + shared)
    return session.prefill(list(tokens[shared:]))


def _agreed(hypotheses: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What all begin with: what the first and the last of them in order share."""
    first, last = min(hypotheses), max(hypotheses)
    return first[: common_prefix(first, last)]
