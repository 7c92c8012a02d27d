"""What was computed of earlier prompts: keys and values of runs of tokens, shared by all sessions of a model.

Owns: finding the longest known beginning of a timeline, putting its rows into a session's cache, forgetting what was
not used for longest. Does not know: text, chats, how K and V are computed, the form of the files (prefix_files.py).

Rows of a position depend only on the tokens up to it, and not on how a prompt was cut into chunks, so a run of tokens
that was computed once after some beginning is right wherever that beginning stands: after an edit, in another
conversation, in the next process. Runs form a tree. A run is known by the digest of all tokens before it and by its own
tokens, and may be used in part; a timeline that leaves a run in its middle goes on with runs that begin there. Rings
(sliding layers) hold only the last positions of a session, the tree has all rows, so any position can be gone back to.

A token is its id. A soft token is a number made from its values, below 0, which no id is.
"""

import hashlib
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edge_gemma.folder.prefix_files import LostFileError, PrefixFile, PrefixFiles
from edge_gemma.host.pool import Pool
from edge_gemma.model.kv_cache import KVCache, LayerCache

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Run:
    """Consecutive tokens and their rows, in memory or in a file."""

    prefix: bytes  # digest of all tokens before
    tokens: np.ndarray  # int64 [n]
    rows: dict[str, np.ndarray] | None  # "layer.k", "layer.v": [n, KV, hd] as the cache stores them; None: in `file`
    file: PrefixFile | None = None
    used: int = 0  # when, in calls

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(rows.nbytes for rows in self.rows.values()) if self.rows else 0

    def read(self, names: list[str]) -> Mapping[str, np.ndarray]:
        """Rows of all its tokens, by name. Raises LostFileError."""
        if self.rows is not None:
            return self.rows
        assert self.file is not None
        return self.file.rows(names)


Step = tuple[Run, int, int]  # a run, the position of its first token, the position after the last one that is used


def soft_key(embedding: np.ndarray) -> int:
    """The token that a soft token is: a number below 0 made from its values, float32 [hidden_size]."""
    digest = hashlib.blake2b(embedding.tobytes(), digest_size=8).digest()
    return -1 - (int.from_bytes(digest, "little") >> 1)


class PrefixCache:
    """A tree of runs. Any number of threads may use it."""

    def __init__(self, most_bytes: int, files: PrefixFiles | None = None) -> None:
        """most_bytes: of rows in memory. files: where `keep` writes to, None for nowhere."""
        self._most, self._files = most_bytes, files
        self._lock = threading.RLock()
        self._runs: dict[bytes, list[Run]] = {}  # by prefix
        self._clock = itertools.count(1)
        self._bytes = 0
        self._writer: Pool | None = None
        self._written: set[tuple[bytes, int]] = set()
        self._read_files = files is None
        self._told = False  # that something was not written

    def restore(self, cache: KVCache, tokens: np.ndarray) -> int:
        """Fill a cache, which holds the beginning of `tokens`, with what is known of the rest.

        tokens: int64, the whole timeline. Returns how many positions were filled; the cache has moved on by as many.
        """
        first = cache.position
        with self._lock:
            path = [step for step in self._path(tokens) if step[2] > first]
            if not path:
                return 0
            last = path[-1][2]
            found: list[Rows] = []
            for step in path:
                try:
                    found += _rows(step, cache, first, last)
                except LostFileError as lost:
                    log.info("a prefix is computed again: %s", lost)
                    self._forget_lost(step[0])
                    return self.restore(cache, tokens)  # what comes before it
            self._use(path)
        cache.reserve(last - first)
        for layer, at, k, v in found:
            layer.put(at, k, v)
        cache.advance(last - first)
        return last - first

    def store(self, cache: KVCache, tokens: np.ndarray, first: int) -> int:
        """Take the rows of `tokens` that are not known yet, if the cache still holds them: those from `first` on.

        tokens: int64, the whole timeline. Returns how many of them are known afterwards, without a gap.
        """
        last = len(tokens)
        with self._lock:
            path = self._path(tokens)
            known = path[-1][2] if path else 0
            self._use(path)
            if known == last or known < first or not self._most:
                return known
            rows = {
                f"{index}.{kind}": part
                for index, layer in cache.layers.items()
                for kind, part in zip("kv", layer.rows(known, last), strict=True)
            }
            run = Run(_digest(tokens[:known]), tokens[known:last].copy(), rows, used=next(self._clock))
            if run.nbytes > self._most:
                return known
            self._runs.setdefault(run.prefix, []).append(run)
            self._bytes += run.nbytes
            self._use(path)  # what comes before is used later, so that the end of a path goes first
            self._make_room()
            return last

    def keep(self, tokens: np.ndarray) -> None:
        """Write what is known of `tokens` to disk, in a thread of its own, for the processes that come later."""
        if self._files is None:
            return
        with self._lock:
            self._writer = self._writer or Pool(1, "edge-gemma-prefix")
            for run, begin, end in self._path(tokens):
                if run.file is None and (run.prefix, end - begin) not in self._written:
                    self._written.add((run.prefix, end - begin))
                    self._writer.submit(self._write, run, end - begin)

    def close(self) -> None:
        """Wait until everything is written. Runs in memory are forgotten."""
        if self._writer is not None:
            self._writer.shutdown()
        with self._lock:
            self._writer, self._bytes, self._read_files = None, 0, self._files is None
            self._runs.clear()

    def _write(self, run: Run, n: int) -> None:
        """The first n tokens of a run: the rest is not for the disk."""
        assert self._files is not None
        with self._lock:
            rows = run.rows
        if rows is None:
            return
        try:
            file = self._files.write(run.prefix, run.tokens[:n], {name: part[:n] for name, part in rows.items()})
        except OSError as error:
            log.log(
                logging.DEBUG if self._told else logging.WARNING, "a prefix is not kept for the next start: %s", error
            )
            self._told = True
            return
        with self._lock:
            if n == len(run.tokens) and run in self._runs.get(run.prefix, ()):  # not forgotten meanwhile
                self._bytes -= run.nbytes
                run.rows, run.file = None, file

    def _path(self, tokens: np.ndarray) -> list[Step]:
        """The longest known beginning of `tokens`, in runs."""
        if not self._read_files:
            self._read_files = True
            for file in self._files.found() if self._files else ():
                self._runs.setdefault(file.prefix, []).append(Run(file.prefix, file.tokens, None, file))
        path: list[Step] = []
        digest, position = hashlib.blake2b(digest_size=16), 0
        while position < len(tokens):
            here = tokens[position:]
            lengths = [(_shared(run.tokens, here), run) for run in self._runs.get(digest.digest(), ())]
            length, run = max(lengths, key=lambda found: found[0], default=(0, None))
            if run is None or not length:
                break
            path.append((run, position, position + length))
            digest.update(here[:length].tobytes())
            position += length
        return path

    def _use(self, path: list[Step]) -> None:
        for run, _, _ in reversed(path):
            run.used = next(self._clock)
            if run.file is not None and self._files is not None:
                self._files.touch(run.file)

    def _make_room(self) -> None:
        held = (run for runs in self._runs.values() for run in runs if run.rows is not None)
        for run in sorted(held, key=lambda run: run.used):
            if self._bytes <= self._most:
                return
            self._bytes -= run.nbytes
            self._forget(run)

    def _forget(self, run: Run) -> None:
        runs = self._runs[run.prefix]
        runs.remove(run)
        if not runs:
            del self._runs[run.prefix]

    def _forget_lost(self, run: Run) -> None:
        if run.file is not None and self._files is not None:
            self._files.remove(run.file)
        self._written.discard((run.prefix, len(run.tokens)))
        self._forget(run)


Rows = tuple[LayerCache, int, np.ndarray, np.ndarray]  # a layer, a position, and k and v from there on


def _rows(step: Step, cache: KVCache, first: int, last: int) -> Iterator[Rows]:
    """What a step has of positions first to last - 1, as far as a layer can hold them. Raises LostFileError."""
    run, begin, end = step
    starts = {index: max(begin, first, last - layer.capacity) for index, layer in cache.layers.items()}
    wanted = {index: at for index, at in starts.items() if at < end}
    rows = run.read([f"{index}.{kind}" for index in wanted for kind in "kv"])
    for index, at in wanted.items():
        layer = cache.layers[index]
        k, v = (rows[f"{index}.{kind}"][at - begin : end - begin] for kind in "kv")
        if any(part.shape[1:] != layer.k.shape[1:] or part.dtype != layer.k.dtype for part in (k, v)):
            raise LostFileError(f"layer {index} has other rows")
        yield layer, at, k, v


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two runs share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
