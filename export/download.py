"""The download of a checkpoint while it is converted: every tensor's bytes, in the order of the files.

Owns: the order of bytes and tensors, how much may wait on the disk, digests of files that are read whole. Does not
know: HTTP (hub.py), where bytes are kept (spool.py), what becomes of them.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_gemma.export.hub import HubFile
from edge_gemma.export.source_file import StoredTensor
from edge_gemma.export.spool import Range, Spool, SpooledFile

_WINDOW = 32 << 20  # bytes that may wait beyond what must, so that the link never does
_SKIP = 1 << 18  # bytes nobody needs are skipped by another request from so many on

Fetch = Callable[[HubFile, int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Unit:
    """What is converted at once: a tensor of the decoder, or the towers. stored: where its values lie."""

    name: str
    stored: tuple[StoredTensor, ...]


def _place(tensor: StoredTensor, files: Mapping[Any, int]) -> tuple[int, int]:
    return files[tensor.file], tensor.offset


def in_order(units: Iterable[Unit], files: Sequence[SpooledFile]) -> list[Unit]:
    """Units in the order in which the last of their bytes arrives."""
    number = {file: i for i, file in enumerate(files)}
    return sorted(units, key=lambda unit: max(_place(tensor, number) for tensor in unit.stored))


def room_needed(units: Sequence[Unit], files: Sequence[SpooledFile]) -> int:
    """The most bytes that lie on the disk at once: the largest tensors, and what has to wait for its other half."""
    number = {file: i for i, file in enumerate(files)}
    arriving = sorted((_place(t, number), t.nbytes, unit.name) for unit in units for t in unit.stored)
    last = {name: place for place, _, name in arriving}
    held, most = 0, 0
    waiting: dict[str, int] = {}
    for place, nbytes, name in arriving:
        held += nbytes
        waiting[name] = waiting.get(name, 0) + nbytes
        most = max(most, held)
        if last[name] == place:
            held -= waiting.pop(name)
    return most + _WINDOW


class Download(threading.Thread):
    """Fetches what `units` need into the spool. As a context manager it stops at the exit and ends its thread."""

    def __init__(
        self,
        fetch: Fetch,
        spool: Spool,
        files: Sequence[tuple[SpooledFile, HubFile]],
        units: Sequence[Unit],
        *,
        whole: bool,
        report: Callable[[int, str], None],
        stop: Callable[[], None],
    ) -> None:
        """whole: read the files from their first byte to their last, and take their digests.

        report is told (bytes that arrived, of which file); stop wakes a `fetch` that pauses.
        """
        super().__init__(name="download", daemon=True)
        self._fetch, self._spool, self._files, self._whole, self._report = fetch, spool, files, whole, report
        self._room = room_needed(units, [file for file, _ in files])
        self._stop, self._stopped = stop, False
        self.digests: dict[str, str] = {}  # file -> sha256
        self._wanted: dict[SpooledFile, list[Range]] = {file: [] for file, _ in files}
        for tensor in sorted((t for unit in units for t in unit.stored), key=lambda t: t.offset):
            file = tensor.file
            assert isinstance(file, SpooledFile)
            self._wanted[file].append(file.order(tensor.offset, tensor.offset + tensor.nbytes))

    def missing(self) -> int:
        """Bytes still to be fetched."""
        if self._whole:
            return sum(file.size for _, file in self._files)
        return sum(r.stop - r.start - r.have for ranges in self._wanted.values() for r in ranges)

    def __enter__(self) -> "Download":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._spool.lock:
            self._stopped = True
        self._stop()
        self._spool.fail(_StoppedError("the download was stopped"))
        self.join(timeout=5)
        self._spool.flusher.shutdown(cancel_futures=True)

    def run(self) -> None:
        try:
            for spooled, file in self._files:
                self._run_file(spooled, file)
        except BaseException as error:
            self._spool.fail(error)

    def _run_file(self, spooled: SpooledFile, file: HubFile) -> None:
        digest = hashlib.sha256() if self._whole else None
        for start, stop, ranges in self._requests(spooled, file):
            at = start
            for chunk in self._fetch(file, start, stop):
                if digest:
                    digest.update(chunk)
                self._keep(spooled, ranges, at, chunk)
                at += len(chunk)
                self._report(len(chunk), file.name)
        if digest:
            self.digests[file.name] = digest.hexdigest()

    def _requests(self, spooled: SpooledFile, file: HubFile) -> list[tuple[int, int, list[Range]]]:
        """(start, stop, the ranges filled) of each request."""
        wanted = [r for r in self._wanted[spooled] if r.start + r.have < r.stop]
        if self._whole:
            return [(0, file.size, wanted)]
        requests: list[tuple[int, int, list[Range]]] = []
        for r in wanted:
            begin = r.start + r.have
            if requests and begin - requests[-1][1] < _SKIP:
                start, _, ranges = requests.pop()
                requests.append((start, r.stop, [*ranges, r]))
            else:
                requests.append((begin, r.stop, [r]))
        return requests

    def _keep(self, spooled: SpooledFile, ranges: list[Range], at: int, chunk: bytes) -> None:
        """Store the bytes that came at `at` where they belong; nobody needs the rest."""
        end = at + len(chunk)
        while ranges and ranges[0].start < end:
            r = ranges[0]
            first, last = max(r.start + r.have, at), min(r.stop, end)
            if last > first:
                self._wait_for_room(last - first)
                spooled.add(r, chunk[first - at : last - at])
            if r.start + r.have < r.stop:
                return
            ranges.pop(0)

    def _wait_for_room(self, nbytes: int) -> None:
        with self._spool.lock:
            # A reader that waits for bytes that come later frees no room: then there is none to wait for.
            while not self._stopped and not self._spool.starved() and self._spool.held + nbytes > self._room:
                self._spool.changed.wait()
            if self._stopped:
                raise _StoppedError("the download was stopped")


class _StoppedError(Exception):
    """The conversion ended first."""
