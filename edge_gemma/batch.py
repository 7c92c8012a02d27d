"""Sessions of one model that decode at the same time: a token of each goes through the model in one pass.

Decoding a token reads all weights, and so does decoding a token of each of sixteen sessions. Threads that ask for a
token while a pass runs wait for it, and theirs go together in the next: one of them runs it for all. Kernels of a
prompt run between two passes. What a session computes is the same to the last bit, whoever was in the pass.

Owns: who goes into which pass, and when. Does not know: what a pass does (model/recorded.py), how a token was chosen,
who may compute now (server/turns.py).
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edge_gemma import kernels
from edge_gemma.host import interrupts
from edge_gemma.host.pace import Pace
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.recorded import MOST, Passes

_PATIENCE = 0.25  # of a pass's duration: how long the next waits for threads that were in it
_MOST_PATIENCE = 0.1  # seconds
Meeting = Callable[[], AbstractContextManager[Hashable]]  # as Engine.meeting


class Member(Protocol):
    """The part of `edge_gemma.session.Session` that is used here."""

    def settled(self) -> KVCache:
        """Its cache, brought to where its ids end."""
        ...

    def run_alone(self, token: int) -> np.ndarray:
        """Run a token at its end, in a pass of its own. Returns the logits after it: float32 [vocab_size]."""
        ...

    def stepped(self, token: int, alone: bool) -> None:
        """A token that was run is now part of it. alone: in a pass of its own."""
        ...


Tokens = Sequence[tuple[Member, int]]


@dataclass(eq=False)
class _Asked:
    """Tokens of one thread that wait for a pass: MOST at most."""

    tokens: Tokens
    thread: int = field(default_factory=threading.get_ident)
    since: float = field(default_factory=time.perf_counter)
    logits: list[np.ndarray] | None = None


class _Company:
    """Threads whose tokens may share a pass. All of it is guarded by the batch's condition."""

    def __init__(self) -> None:
        self.asked: list[_Asked] = []  # the longest first
        self.leader: _Asked | None = None  # whose thread runs the next pass
        self.chosen: list[_Asked] = []  # what that pass runs, once it has begun
        self.before: set[int] = set()  # threads whose tokens were in the last pass
        self.took = self.ended = 0.0  # seconds of the last pass, and when it ended

    def left(self) -> float | None:
        """Seconds until a thread should lead the next pass: for so long it waits for those of the pass before.

        None: as long as the present leader takes.
        """
        if self.leader is not None:
            return None
        missing = self.before - {one.thread for one in self.asked}
        if not missing or sum(len(one.tokens) for one in self.asked) >= MOST:
            return 0
        patience = min(_PATIENCE * self.took, _MOST_PATIENCE)
        # Those who asked while it ran have waited, those who were in it could not come yet: else two groups would take
        # turns for ever, each in time for its own pass only.
        return max(0.0, max(self.asked[0].since, self.ended) + patience - time.perf_counter())

    def choose(self) -> list[_Asked]:
        """Whose tokens go into the pass that begins: the leader's, and those that fit beside them."""
        assert self.leader is not None
        self.chosen, rows = [self.leader], len(self.leader.tokens)
        for one in self.asked:
            if one is not self.leader and rows + len(one.tokens) <= MOST:
                self.chosen.append(one)
                rows += len(one.tokens)
        return self.chosen

    def leave(self, asked: _Asked) -> None:
        """A thread has what it asked for, or asks no more."""
        if asked in self.asked:
            self.asked.remove(asked)
        if self.leader is asked:
            self.leader, self.chosen = None, []


class Batch:
    """All sessions of a model. Any number of threads may use it, each with sessions of its own."""

    def __init__(
        self,
        decoder: Decoder,
        slack: int,
        kv_dtype: str,
        threads: int | None,
        between: Callable[[], None],
        meeting: Meeting,
    ) -> None:
        """slack, kv_dtype: of the sessions' caches. threads: as in `Pace`. between, meeting: as in Engine."""
        self._between, self._meeting = between, meeting
        self.passes = Passes(decoder, slack, kv_dtype)
        self._pace = Pace(threads, kernels.threads())
        self._changed = threading.Condition()
        self._companies: dict[Hashable, _Company] = {}
        self._running = threading.Lock()  # one pass at a time

    def step(self, member: Member, token: int) -> np.ndarray:
        """Append a token to a session, together with those of other threads. Returns its logits: float32 [vocab_size].

        Raises what `between` or the pass raises, if this thread ran it; the others' tokens then go into the next.
        """
        return self.steps([(member, token)])[0]

    def steps(self, tokens: Tokens) -> list[np.ndarray]:
        """Append a token to each of several sessions of this thread. Returns the logits: float32 [vocab_size] each.

        As `step`; more than MOST tokens take several passes.
        """
        for member, _ in tokens:
            member.settled()  # this may be a prompt's work, which belongs to this thread
        parts = [tokens[first : first + MOST] for first in range(0, len(tokens), MOST)]
        return [logits for part in parts for logits in self._together(_Asked(part))]

    def _together(self, asked: _Asked) -> list[np.ndarray]:
        with self._meeting() as who, self._taking_part(who, asked) as company:
            while asked.logits is None:
                if self._leads(company, asked):
                    self._between()  # others gather meanwhile
                    self._lead(company)
        return asked.logits

    @contextmanager
    def _taking_part(self, who: Hashable, asked: _Asked) -> Iterator[_Company]:
        """However this thread leaves, by Ctrl-C too, nobody waits for it, and no pass touches its sessions."""
        with self._changed:
            company = self._companies.setdefault(who, _Company())
            company.asked.append(asked)
            self._changed.notify_all()
        try:
            yield company
        finally:
            with self._changed:
                try:
                    while asked is not company.leader and asked in company.chosen:
                        self._changed.wait()
                finally:
                    company.leave(asked)
                    self._changed.notify_all()

    def _leads(self, company: _Company, asked: _Asked) -> bool:
        """Wait until the tokens were run, or until this thread is to lead a pass. Returns whether it is."""
        with self._changed:
            while asked.logits is None and (left := company.left()) != 0:
                self._changed.wait(left)
            if asked.logits is None:
                company.leader = asked
            return asked.logits is None

    def _lead(self, company: _Company) -> None:
        with self._running:
            with self._changed:
                chosen = company.choose()
            tokens = [token for one in chosen for token in one.tokens]
            begin = time.perf_counter()
            found = iter(self._run(tokens))
            with interrupts.held() if len(tokens) > 1 else nullcontext():  # all of them, or none
                for member, token in tokens:
                    member.stepped(token, alone=len(tokens) == 1)
                with self._changed:
                    for one in chosen:
                        one.logits = [next(found) for _ in one.tokens]
                        company.asked.remove(one)
                    company.ended = time.perf_counter()
                    company.took, company.before = company.ended - begin, {one.thread for one in chosen}

    def _run(self, tokens: Tokens) -> Sequence[np.ndarray]:
        """The logits after each token, which is not part of its timeline yet."""
        if len(tokens) == 1:
            return [tokens[0][0].run_alone(tokens[0][1])]
        caches = [member.settled() for member, _ in tokens]
        with kernels.use_threads(self._pace.limit), self._pace.of(1):
            for cache in caches:
                cache.reserve(1)
            positions = [cache.position for cache in caches]
            _, logits = self.passes.run(caches, [token for _, token in tokens], positions, len(caches), logits=True)
        for cache in caches:
            cache.advance(1)
        return list(logits)
