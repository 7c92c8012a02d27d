"""Recordings cut into parts that any worker can write down, by a process of their own.

Files are read where the command runs, so that workers need no files, and what they get is what `transcribe` hears.

Owns: the parts of a recording, and their names. Does not know: workers, the journal.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from edge_gemma.archive.child import Do, Emit
from edge_gemma.archive.inputs import opened_address
from edge_gemma.audio.cuts import Cutter


@dataclass(frozen=True)
class Part:
    """A segment of speech of a recording. key: its name, the same whenever the recording is read: a digest.

    start, end, joined, samples: as in `cuts.Cut`. share: of the recording that was read by then, None if not known.
    """

    key: str
    start: float
    end: float
    joined: bool
    samples: np.ndarray
    share: float | None


@dataclass(frozen=True)
class Whole:
    """What comes after the last part. notes: what the user should know about the recording."""

    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ReaderCharge:
    """A process that reads one recording at a time. A work is a file: a path, or an address that fsspec knows."""

    slots: int = 1

    def open(self) -> Do:
        """As Charge.open."""
        return read


def read(file: str, emit: Emit) -> None:
    """Emit the parts of a recording, and a Whole. Raises EdgeGemmaError for one that cannot be read."""
    notes: dict[str, None] = {}
    total: float | None = None

    def progress(done: float, duration_s: float | None) -> None:
        nonlocal total
        total = duration_s

    cutter = Cutter(note=lambda text: notes.setdefault(text))
    with opened_address(file) as source:
        for cut in cutter.file(source, progress=progress):
            digest = hashlib.blake2b(cut.samples.tobytes(), digest_size=16, salt=b"%.4f" % cut.start)
            share = min(1.0, cut.end / total) if total else None
            emit(Part(digest.hexdigest(), cut.start, cut.end, cut.joined, cut.samples, share))
    emit(Whole(cutter.seconds, tuple(notes)))
