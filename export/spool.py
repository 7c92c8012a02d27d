"""What has arrived of a file that lies elsewhere: ranges of it, kept in a folder until they have been used.

Owns: the ranges on disk, reads that wait for bytes on their way, fetching a small range that nobody ordered. Does not
know: where bytes come from (hub.py), in what order they are ordered (download.py), what they mean.

A range is a file named by where it begins. What an interrupted run has left is taken over: after a kill as far as the
files reach; after the machine itself went down only as far as was flushed to the disk by then.
"""

import bisect
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.errors import CheckpointError, EdgeGemmaError
from edge_gemma.export.source_file import SourceFile, show
from edge_gemma.host import system
from edge_gemma.host.pool import Pool

_SYNC_BYTES = 16 << 20  # a range is flushed to the disk each time so much of it has come
_NEAR = 1 << 16  # small reads no farther apart are fetched in one
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Range:
    """Bytes [start, stop) of the file, of which the first `have` are here.

    coming: the others are on their way. They are not in a range that an earlier run left, until it is ordered again.
    """

    start: int
    stop: int
    path: Path
    have: int = 0
    synced: int = 0
    flushing: bool = False
    ordered: bool = False  # a tensor's: it goes when it has been used
    used: bool = False
    coming: bool = True

    @property
    def readable_to(self) -> int:
        """Where the bytes end that are here or on their way."""
        return self.stop if self.coming else self.start + self.have


class Spool:
    """The ranges of all files of a checkpoint below one folder, shared by the reader and the download.

    `held` counts the bytes of ordered ranges. One `lock` for all: `changed` is told of every byte that comes or goes,
    and of every reader that waits.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.held = folder, 0
        self._awaited: list[tuple[Range, int]] = []  # by readers: a range, and up to which byte of the file
        self.lock = threading.RLock()  # host/pool.py says why it is entered itself
        self.changed = threading.Condition(self.lock)
        self.flusher = Pool(1, "flush")  # a card takes a second for what a link brings in half of one
        self.failure: BaseException | None = None
        self._trust_what_was_flushed()

    def _trust_what_was_flushed(self) -> None:
        """What was written since this machine started counts as it lies; of the rest only what had been flushed.

        All ranges are cut before the new start is noted: a run that ends in between leaves nothing else to trust.
        """
        boot = _BOOT.read_bytes() if _BOOT.exists() else b""
        marker = self.folder / "boot_id"
        if boot and marker.exists() and marker.read_bytes() == boot:
            return
        for path in self.folder.glob("*-[st]"):
            with path.open("r+b") as file:
                file.truncate(min(_flushed(path), path.stat().st_size))
                system.flush(file.fileno())
        marker.write_bytes(boot)

    def check(self) -> None:
        """Raises what `fail` was told, in one line."""
        if isinstance(self.failure, EdgeGemmaError):
            raise self.failure
        if isinstance(self.failure, OSError):
            reason = f"{self.folder.parent}: {self.failure.strerror or self.failure}"
            raise CheckpointError(f"{reason}; the same command goes on from here") from self.failure
        if self.failure:
            raise CheckpointError("the download ended early: the same command goes on from here") from self.failure

    def starved(self) -> bool:
        """Whether a reader waits for bytes that have not come. One that has not woken up yet waits for none."""
        return any(here.start + here.have < until for here, until in self._awaited)

    @contextlib.contextmanager
    def awaiting(self, here: Range, until: int) -> Iterator[None]:
        """A reader waits for a range up to a byte of the file; `lock` is held."""
        wanted = (here, until)
        self._awaited.append(wanted)
        self.changed.notify_all()
        try:
            yield
        finally:
            self._awaited.remove(wanted)

    def fail(self, error: BaseException) -> None:
        """No more bytes will come: who waits for some raises this."""
        with self.lock:
            self.failure = self.failure or error
            self.changed.notify_all()


class SpooledFile(SourceFile):
    """A file elsewhere as a `SourceFile`: reads are served from the spool, or fetched."""

    elsewhere = True

    def __init__(
        self, spool: Spool, number: int, name: str, size: int, fetch: Callable[[int, int], Iterator[bytes]]
    ) -> None:
        """number: the file's among those of the checkpoint; fetch: gives the bytes [start, stop)."""
        self.path, self.name, self.size = Path(name), show(name, 200), size
        self._spool, self._number, self._fetch = spool, number, fetch
        self._ranges: list[Range] = []  # by where they begin
        self._closed = False
        for path in spool.folder.glob(f"{number}-*[st]"):
            self._take_over(path)

    def _take_over(self, path: Path) -> None:
        _, start, stop, ordered = path.name.split("-")
        kept = Range(int(start), int(stop), path, ordered=ordered == "t", coming=False)
        kept.have = min(path.stat().st_size, kept.stop - kept.start)
        kept.synced = min(kept.have, _flushed(path))
        if not kept.ordered and kept.have < kept.stop - kept.start:
            path.unlink()
            return
        os.truncate(path, kept.have)
        self._insert(kept)
        self._spool.held += kept.have if kept.ordered else 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`: waits for what is on its way, fetches what nobody has ordered."""
        self._check(offset, len(buffer))
        at, stop = offset, offset + len(buffer)
        while at < stop:
            here = self._arrived(at, stop)
            until = min(here.readable_to, stop)
            with here.path.open("rb", buffering=0) as file:
                file.seek(at - here.start)
                got = file.readinto(buffer[at - offset : until - offset])
            if got != until - at:
                raise CheckpointError(f"{here.path} became shorter while it was read: pull again")
            at = until

    def _arrived(self, at: int, stop: int) -> Range:
        """The range that `at` lies in, once it has come as far as it is needed up to `stop`."""
        with self._spool.lock:
            here = self._covering(at)
            if mine := here is None:
                here = self._new(at, min(stop, self._next_start(at)), ordered=False)
        if mine:
            self._fetch_small(here)
        with self._spool.lock:
            until = min(here.readable_to, stop)
            with self._spool.awaiting(here, until):
                while here.start + here.have < until:
                    self._spool.check()
                    self._spool.changed.wait()
        return here

    def prefetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Small ranges (offset, length): those near each other are fetched in one."""
        merged: list[list[int]] = []
        for start, length in sorted(spans):
            if self._covering(start):
                continue
            if merged and start - merged[-1][1] <= _NEAR:
                merged[-1][1] = max(merged[-1][1], start + length)
            else:
                merged.append([start, start + length])
        for start, stop in merged:
            with self._spool.lock:
                kept = self._new(start, stop, ordered=False)
            self._fetch_small(kept)

    def _fetch_small(self, kept: Range) -> None:
        try:
            for chunk in self._fetch(kept.start, kept.stop):
                self.add(kept, chunk)
        except BaseException as error:
            self._spool.fail(error)
            raise

    def order(self, start: int, stop: int) -> Range:
        """A tensor's range [start, stop), about to be added to; as it is where an earlier run began it."""
        with self._spool.lock:
            for kept in self._ranges:
                if kept.ordered and (kept.start, kept.stop) == (start, stop):
                    kept.coming = True
                    return kept
            return self._new(start, stop, ordered=True)

    def _new(self, start: int, stop: int, *, ordered: bool) -> Range:
        name = f"{self._number}-{start}-{stop}-{'t' if ordered else 's'}"
        kept = Range(start, stop, self._spool.folder / name, ordered=ordered)
        self._insert(kept)
        return kept

    def _insert(self, kept: Range) -> None:
        """Sorted by where they begin, a tensor's after a small one that begins there too."""
        bisect.insort(self._ranges, kept, key=lambda r: (r.start, r.ordered))

    def add(self, kept: Range, data: bytes) -> None:
        """The next bytes of a range.

        A reader may be done with a range before its last bytes come, when small ranges had them. A file that has gone
        by then is not begun anew: a later run would take these bytes for the first.
        """
        try:
            with kept.path.open("r+b" if kept.have else "wb") as file:  # buffered: a full disk may take a part of an
                file.seek(kept.have)  # unbuffered write in silence
                file.write(data)
        except FileNotFoundError:
            if not kept.used:
                raise
        with self._spool.lock:
            kept.have += len(data)
            if kept.used:
                return
            self._spool.held += len(data) if kept.ordered else 0
            self._spool.changed.notify_all()
            if kept.ordered and not kept.flushing and kept.have - kept.synced >= _SYNC_BYTES:
                kept.flushing = True
                self._spool.flusher.submit(self._flush, kept, kept.have)

    def _flush(self, kept: Range, have: int) -> None:
        """Bring a range to the disk, as far as it has come; meanwhile more of it comes."""
        try:
            with kept.path.open("rb") as file:
                system.flush(file.fileno())
            with self._spool.lock:
                kept.synced, kept.flushing = have, False
                if kept in self._ranges:
                    kept.path.with_suffix(".flushed").write_text(str(have))
        except FileNotFoundError:  # it has been used meanwhile
            pass
        except BaseException as error:
            self._spool.fail(error)

    def drop(self, start: int) -> None:
        """A tensor's range has been used."""
        with self._spool.lock:
            kept = next((r for r in self._ranges if r.ordered and r.start == start), None)
            if kept is None:
                return
            self._ranges.remove(kept)
            kept.used = True
            self._spool.held -= kept.have
            self._spool.changed.notify_all()
        for path in (kept.path, kept.path.with_suffix(".flushed")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _covering(self, offset: int) -> Range | None:
        """The range that has the byte at offset, or will have: a tensor's before a small one's."""
        for i in range(bisect.bisect_right(self._ranges, offset, key=lambda r: r.start) - 1, -1, -1):
            if offset < self._ranges[i].readable_to:
                return self._ranges[i]
        return None

    def _next_start(self, offset: int) -> int:
        at = bisect.bisect_right(self._ranges, offset, key=lambda r: r.start)
        return self._ranges[at].start if at < len(self._ranges) else self.size

    def _check(self, offset: int, length: int) -> None:
        if self._closed:
            raise CheckpointError(f"{self.name} was closed before it was read")
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError(
                f"{self.name} is truncated: {length} bytes at {offset} are needed, the file has {self.size}"
            )

    def close(self) -> None:
        """Idempotent."""
        self._closed = True


def _flushed(path: Path) -> int:
    """How many bytes of a range are noted as flushed to the disk."""
    try:
        return int(path.with_suffix(".flushed").read_text())
    except (OSError, ValueError):  # none, or a note that was lost itself
        return 0
