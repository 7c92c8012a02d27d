"""Resumes an interrupted export: what it has rounded is read back from its own containers.

Owns: the journal, a line for each matrix that was written to its end. Does not know: how matrices are rounded, where
the folder stays in between (edge_gemma.folder.atomic).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_gemma import __version__
from edge_gemma.errors import CheckpointError
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.packed import Packed, decode_packed
from edge_gemma.folder.folder import Tensor

JOURNAL = "unfinished.jsonl"


def export_key(source: str, recipe: str, calibration: str, audio: bool, vision: bool) -> str:
    """Names the unfinished folder: 16 hexadecimal digits. source: the checkpoint's digest."""
    return hashlib.sha256(json.dumps([__version__, source, recipe, calibration, audio, vision]).encode()).hexdigest()[
        :16
    ]


@dataclass(frozen=True)
class Finished:
    """A matrix that an earlier run has written."""

    content: str  # sha256 of the values it was made from
    digests: dict[str, str]  # sha256 of its parts
    read: Callable[[int, int], Packed]  # rows from a multiple of 8 on

    def round(self, weights: np.ndarray, first: int) -> Packed:
        """Rows of `weights` from row `first` on, as they were rounded before: a quant.calibrate.Rounder."""
        return self.read(first, first + len(weights))


class Journal:
    """The lines {"name", "content", "parts"} of `writer.folder`, parts as digests by key."""

    def __init__(self, writer: FolderWriter, plan: dict[str, Tensor], *, floats: bool = False) -> None:
        """What the containers hold as the journal says is `finished`; a line that was cut off or lies is left out.

        floats: note tensors that are not rounded too, whose values need not be read again.
        """
        self._floats = floats
        self._writer, self._plan, self._path = writer, plan, writer.folder / JOURNAL
        self.finished: dict[str, Finished] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            name = entry["name"]
            if name in plan and writer.stored_digests(name) == entry["parts"]:
                self.finished[name] = self._finished(name, entry["content"], entry["parts"])

    def _finished(self, name: str, content: str, digests: dict[str, str]) -> Finished:
        tensor = self._plan[name]

        def read(start: int, stop: int) -> Packed:
            span = (start, stop) if tensor.layout == "rows" else (start // 8, -(-stop // 8))
            parts = {key: self._writer.read(name, key, *span) for key in tensor.parts}
            return decode_packed(tensor, parts, stop - start)

        return Finished(content, digests, read)

    def note(self, name: str, content: str) -> None:
        """A tensor is written to its end. Raises CheckpointError where an earlier run has read other values."""
        earlier = self.finished.get(name)
        if earlier and earlier.content != content:
            raise CheckpointError(f"{name} has changed since the interrupted export read it: export again")
        if earlier or not (self._plan[name].bits or self._floats):
            return
        entry = {"name": name, "content": content, "parts": self._writer.digests(name)}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def end(self) -> None:
        self._path.unlink(missing_ok=True)
