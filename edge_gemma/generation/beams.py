"""Beam search: the likeliest reply, found with several hypotheses side by side on one timeline.

Owns: which hypotheses are kept, and when a token is certain. Does not know: text, prompts, messages.

Greedy decoding cannot undo a token that makes everything after it unlikely. Keeping several hypotheses can (Sutskever
et al. 2014, section 3.2). One timeline serves all of them: it is rewound to where a hypothesis differs from the one
before it, and the rest is run as a prompt of at most LOOK_BACK tokens. Scores are not divided by length
(length_penalty 0 in transformers' words), because the sound decides how long its text is.
"""

import threading
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.sampler import Sampler
from edge_gemma.session import Timeline, common_prefix

MARGIN = 3.0  # nats: a hypothesis that is so far below the best is dropped (docs/LOG.md#beam-search)
LOOK_BACK = 32  # tokens: those of the best hypothesis before its last LOOK_BACK are certain


class Hypothesis(NamedTuple):
    """The beginning of a reply, or all of it with its stop token. score: its log probability, in nats."""

    score: float
    tokens: tuple[int, ...]


def search(
    session: Timeline,
    logits: np.ndarray,
    *,
    sampler: Sampler,
    limit: int,
    stop_ids: Collection[int],
    bounds: Bounds | None = None,
    stopping: threading.Event | None = None,
) -> Iterator[int]:
    """Yields a reply's tokens, each as soon as all hypotheses agree on it. The stop token comes last.

    session: at the prompt's end, left wherever the last hypothesis ended. logits: float32 [vocab_size], those after
    the prompt. sampler: says how many hypotheses there are. limit: most tokens, all but the last of which the session
    has to hold. bounds: those of a reply not begun, left as they are; None: anything. stopping: once it is set, the
    tokens end. Raises what the session, the sampler and the bounds raise.
    """
    start, width = session.position, sampler.sampling.num_beams
    live, ended, told = [Hypothesis(0.0, ())], list[Hypothesis](), 0
    bounds_of: dict[tuple[int, ...], Bounds] = {} if bounds is None else {(): bounds}
    for length in range(limit):
        if stopping is not None and stopping.is_set():
            return
        grown = []
        # Neighbours share the most; and the timeline stands where the last of the step before ended.
        for score, tokens in sorted(live, key=lambda h: h.tokens, reverse=length % 2 == 0):
            if tokens:
                logits = _run(session, start, tokens)
            allowed = bounds_of[tokens].allowed() if bounds_of else None
            likeliest = sampler.likeliest(logits, width + len(stop_ids), session.ids, allowed)
            grown += [Hypothesis(score + nats, (*tokens, token)) for token, nats in likeliest]
        best = sorted(grown, key=_rank)
        ended = sorted([*ended, *(h for h in best[:width] if h.tokens[-1] in stop_ids)], key=_rank)[:1]
        live = [h for h in best if h.tokens[-1] not in stop_ids][:width]
        if not live and not ended:
            return
        live, ended = _that_may_win(live, ended)
        bounds_of = {h.tokens: bounds_of[h.tokens[:-1]].after(h.tokens[-1]) for h in live if bounds_of}
        agreed = _agreed([h.tokens for h in (*live, *ended)])
        yield from agreed[told:]
        told = len(agreed)
        if not live:
            return
    yield from live[0].tokens[told:]


def _that_may_win(live: list[Hypothesis], ended: list[Hypothesis]) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The hypotheses within MARGIN of the best that share its certain tokens; live ones also beat the ended one."""
    best = min([*live, *ended], key=_rank)
    certain, least = best.tokens[:-LOOK_BACK], best.score - MARGIN
    live, ended = (
        [h for h in part if h.score > least and h.tokens[: len(certain)] == certain] for part in (live, ended)
    )
    return [h for h in live if not ended or h.score > ended[0].score], ended


def _rank(hypothesis: Hypothesis) -> tuple[float, tuple[int, ...]]:
    """A sort key: the likeliest first, ties by ids, as in the sampler."""
    return -hypothesis.score, hypothesis.tokens


def _run(session: Timeline, start: int, tokens: tuple[int, ...]) -> np.ndarray:
    """Bring the timeline from the prompt's end at `start` to a hypothesis' end. Returns the logits there."""
    shared = min(common_prefix(session.ids[start:], tokens), len(tokens) - 1)
    if start + shared < session.position:
        session.rewind(start + shared)
    return session.prefill(list(tokens[shared:]))


def _agreed(hypotheses: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all hypotheses begin with: those that the first and the last in order share."""
    first, last = min(hypotheses), max(hypotheses)
    return first[: common_prefix(first, last)]
