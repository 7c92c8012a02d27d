"""Beam search: the likeliest reply, found with several hypotheses side by side on one timeline.

Owns: which hypotheses are kept, and when a token is certain. Does not know: text, prompts, messages.

Greedy decoding cannot undo a token that makes everything after it unlikely. Keeping several hypotheses can (Sutskever
et al. 2014, section 3.2). Each has a timeline of its own, and one pass runs a token of each. Where that cannot be, one
timeline serves all of them: it is rewound to where a hypothesis differs from the one before it, and the rest is run as
a prompt of at most LOOK_BACK tokens. Scores are not divided by length (length_penalty 0 in transformers' words),
because the sound decides how long its text is.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edge_gemma.generation.bounds import Bounds
from edge_gemma.generation.sampler import Sampler
from edge_gemma.session import Session, Timeline, common_prefix

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
    width = sampler.sampling.num_beams
    lanes = _Abreast(session) if isinstance(session, Session) and session.batch else _InTurn(session)
    live, ended, told = [Hypothesis(0.0, ())], list[Hypothesis](), 0
    bounds_of: dict[tuple[int, ...], Bounds] = {} if bounds is None else {(): bounds}
    for length in range(limit):
        if stopping is not None and stopping.is_set():
            return
        grown = []
        # Neighbours share the most; and the timeline stands where the last of the step before ended.
        ordered = sorted(live, key=lambda h: h.tokens, reverse=length % 2 == 0)
        for (score, tokens), (ids, found) in zip(ordered, lanes.run([h.tokens for h in ordered]), strict=True):
            allowed = bounds_of[tokens].allowed() if bounds_of else None
            likeliest = sampler.likeliest(logits if found is None else found, width + len(stop_ids), ids, allowed)
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


class _InTurn:
    """All hypotheses on one timeline, one after another."""

    def __init__(self, session: Timeline) -> None:
        """session: at the prompt's end."""
        self._session, self._start = session, session.position

    def run(self, hypotheses: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], np.ndarray | None]]:
        """Yields each hypothesis' timeline and the logits at its end; None at the prompt's end."""
        for tokens in hypotheses:
            logits = self._logits(tokens) if tokens else None
            yield self._session.ids, logits

    def _logits(self, tokens: tuple[int, ...]) -> np.ndarray:
        session, start = self._session, self._start
        shared = min(common_prefix(session.ids[start:], tokens), len(tokens) - 1)
        if start + shared < session.position:
            session.rewind(start + shared)
        return session.prefill(list(tokens[shared:]))


class _Abreast:
    """A timeline for each hypothesis, and one pass for all of them."""

    def __init__(self, session: Session) -> None:
        """session: at the prompt's end; the first timeline. The others begin as copies of it."""
        assert session.batch is not None
        self._batch, self._lanes, self._start = session.batch, [session], session.position

    def run(self, hypotheses: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], np.ndarray | None]]:
        """As `_InTurn.run`. Each hypothesis is one of those of the call before, or the prompt, and a token."""
        if hypotheses == [()]:
            yield self._lanes[0].ids, None
            return
        parents = [self._lane_of(tokens[:-1]) for tokens in hypotheses]
        free = [lane for lane in self._lanes if lane not in parents]
        lanes: list[Session] = []
        for parent in parents:  # the first child takes the parent's timeline as it is
            lanes.append(parent if parent not in lanes else self._copy(parent, free))
        logits = self._batch.steps([(lane, tokens[-1]) for lane, tokens in zip(lanes, hypotheses, strict=True)])
        yield from zip([lane.ids for lane in lanes], logits, strict=True)

    def _copy(self, lane: Session, free: list[Session]) -> Session:
        if free:
            free[-1].follow(lane)
            return free.pop()
        self._lanes.append(lane.branch())
        return self._lanes[-1]

    def _lane_of(self, tokens: tuple[int, ...]) -> Session:
        return next(lane for lane in self._lanes if tuple(lane.ids[self._start :]) == tokens)


def _agreed(hypotheses: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all hypotheses begin with: those that the first and the last in order share."""
    first, last = min(hypotheses), max(hypotheses)
    return first[: common_prefix(first, last)]
