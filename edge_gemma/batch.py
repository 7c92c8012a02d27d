"""Sessions of one model that decode at the same time: a token of each goes through the model in one pass.

Decoding a token reads all weights, and so does decoding a token of each of sixteen sessions. Threads that ask for a
token while a pass runs wait for it, and theirs go together in the next. Kernels of a prompt run between two passes.
What a session computes is the same to the last bit, whoever was in the pass.

Owns: who goes into which pass, and when. Does not know: what a pass does (model/recorded.py), how a token was chosen.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edge_gemma import kernels
from edge_gemma.host import interrupts
from edge_gemma.host.pace import Pace
from edge_gemma.model.decoder import Decoder
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.recorded import MOST, NOBODY, PAD, Pass, padded

_PATIENCE = 0.25  # of a pass's duration: how long the next waits for threads that were in it
_MOST_PATIENCE = 0.1  # seconds


class Member(Protocol):
    """The part of `edge_gemma.session.Session` that is used here."""

    def settled(self) -> KVCache:
        """Its cache, brought to where its ids end."""
        ...

    def step_alone(self, token: int) -> np.ndarray:
        """Append a token in a pass of its own. Returns the logits after it: float32 [vocab_size]."""
        ...

    def stepped(self, token: int) -> None:
        """A token was appended to its cache."""
        ...


@dataclass(eq=False)
class _Asked:
    """A token that waits for a pass."""

    member: Member
    token: int
    thread: int = field(default_factory=threading.get_ident)
    since: float = field(default_factory=time.perf_counter)
    logits: np.ndarray | None = None


class Batch:
    """All sessions of a model. Any number of threads may use it, each with sessions of its own."""

    def __init__(
        self, decoder: Decoder, slack: int, kv_dtype: str, threads: int | None, between: Callable[[], None]
    ) -> None:
        """slack, kv_dtype: of the sessions' caches. threads: as in `Pace`. between: Engine.between."""
        self._between = between
        self._decoder, self._slack, self._kv_dtype = decoder, slack, kv_dtype
        self._pace = Pace(threads, kernels.threads())
        self._passes: dict[int, Pass] = {}
        self._places = 0  # of the caches that the passes were made for
        self._changed = threading.Condition()
        self._leader: object = None  # who runs a pass
        self._asked: list[_Asked] = []
        self._before: set[int] = set()  # threads whose tokens were in the last pass
        self._took = 0.0  # seconds of the last pass

    def step(self, member: Member, token: int) -> np.ndarray:
        """Append a token to a session, together with those of other threads. Returns its logits: float32 [vocab_size].

        Raises what the pass raises, if this thread ran it; the others' tokens then go into the next.
        """
        asked = _Asked(member, token)
        with self._left_whole(asked):
            while asked.logits is None:
                if others := self._wait(asked):
                    self._lead(others)
        return asked.logits

    def steps(self, tokens: Sequence[tuple[Member, int]]) -> list[np.ndarray]:
        """Append a token to each of several sessions of this thread. Returns the logits: float32 [vocab_size] each.

        Raises what `between` or a pass raises.
        """
        self._between()
        me = object()
        with self._left_whole(me):
            with self._changed:
                while self._leader is not None:
                    self._changed.wait()
                self._leader = me
            parts = [tokens[first : first + MOST] for first in range(0, len(tokens), MOST)]
            return [logits for part in parts for logits in self._run(part)]

    @contextmanager
    def _left_whole(self, me: object) -> Iterator[None]:
        """However this thread leaves, by Ctrl-C too, nobody waits for it."""
        try:
            yield
        finally:
            with self._changed:
                if me in self._asked:
                    self._asked.remove(me)
                if self._leader is me:
                    self._leader = None
                self._changed.notify_all()

    def _wait(self, asked: _Asked) -> list[_Asked]:
        """Wait until the token was run: no tokens. Or until this thread is to run a pass: the tokens of that pass."""
        with self._changed:
            if asked not in self._asked:
                self._asked.append(asked)
                self._changed.notify_all()
            while asked.logits is None and (left := self._left()) != 0:
                self._changed.wait(left)
            if asked.logits is not None:
                return []
            self._leader = asked
            self._asked.remove(asked)
            others = self._asked[: MOST - 1]
            del self._asked[: MOST - 1]
            return [asked, *others]

    def _left(self) -> float | None:
        """Seconds until the next pass should begin: for so long it waits for threads that were in the one before.

        None: as long as the present pass takes.
        """
        if self._leader is not None:
            return None
        missing = self._before - {asked.thread for asked in self._asked}
        if not missing or len(self._asked) >= MOST:
            return 0
        patience = min(_PATIENCE * self._took, _MOST_PATIENCE)
        return max(0.0, self._asked[0].since + patience - time.perf_counter())

    def _lead(self, asked: list[_Asked]) -> None:
        begin = time.perf_counter()
        try:
            found = self._run([(one.member, one.token) for one in asked])
        except BaseException:
            with self._changed:
                self._asked[:0] = asked[1:]
            raise
        with self._changed:
            for one, logits in zip(asked, found, strict=True):
                one.logits = logits
            self._leader = None
            self._took = time.perf_counter() - begin
            self._before = {one.thread for one in asked}
            self._changed.notify_all()

    def _run(self, tokens: Sequence[tuple[Member, int]]) -> Sequence[np.ndarray]:
        if len(tokens) == 1:
            return [tokens[0][0].step_alone(tokens[0][1])]
        caches = [member.settled() for member, _ in tokens]
        rows = padded(len(tokens))
        empty = rows - len(tokens)
        ids = np.array([token for _, token in tokens] + [PAD] * empty, np.int64)
        positions = np.array([cache.position for cache in caches] + [NOBODY] * empty, np.int64)
        with kernels.use_threads(self._pace.limit), self._pace.of(1):
            run = self._pass(rows, max(cache.places for cache in caches))
            run.move([*caches, *caches[:1] * empty])
            for cache in caches:
                cache.reserve(1)
            logits = self._decoder.logits(run(ids, positions)[: len(tokens)])
        with interrupts.held():  # all of them, or none
            for (member, token), cache in zip(tokens, caches, strict=True):
                cache.advance(1)
                member.stepped(token)
        return list(logits)

    def _pass(self, rows: int, places: int) -> Pass:
        """A pass of so many rows. It is recorded on a cache of nobody, whose pages are never written."""
        if places > self._places:
            self._passes, self._places = {}, places
        if rows not in self._passes:
            nobody = KVCache(self._decoder.config, self._places, self._slack, self._kv_dtype)
            self._passes[rows] = Pass(self._decoder, [nobody] * rows)
            self._passes[rows](np.full(rows, PAD), np.full(rows, NOBODY))
        return self._passes[rows]
