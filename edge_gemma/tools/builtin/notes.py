"""Notes in a file of text: one a line, with the day it was written.

Owns: the file's form. A line that is no note (somebody edits the file) is a note too. Does not know: where the file is.
"""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import write_file
from edge_gemma.host import system
from edge_gemma.tools.function import RunnableTool, tool

_LONGEST = 2000  # characters of a note
_LARGEST = 1_000_000  # bytes of the file
_WAIT_S = 5.0  # for another program that writes them


class Notes:
    """The notes in one file, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # two calls of one reply

    @property
    def tools(self) -> list[RunnableTool]:
        methods: list[Any] = [self.add_note, self.list_notes, self.search_notes, self.delete_note]
        return [tool(method) for method in methods]

    def add_note(self, text: str) -> str:
        """Write a note down"""
        note = " ".join(text.split())
        if not 0 < len(note) <= _LONGEST:
            raise UsageError(f"the note has {len(note)} characters, expected 1 to {_LONGEST}")
        with self._alone():
            notes = self._read()
            self._write([*notes, f"{datetime.date.today()} {note}"])
            return f"note {len(notes) + 1} is written"

    def list_notes(self) -> list[str]:
        """List all notes, each with its number"""
        with self._lock:
            return [f"{n}: {note}" for n, note in enumerate(self._read(), 1)]

    def search_notes(self, text: str) -> list[str]:
        """Find the notes that have all these words"""
        words = text.lower().split()
        return [note for note in self.list_notes() if all(word in note.lower() for word in words)]

    def delete_note(self, number: int) -> str:
        """Delete a note by its number"""
        with self._alone():
            notes = self._read()
            if not 1 <= number <= len(notes):
                raise UsageError(f"there is no note {number}: there are {len(notes)}")
            gone = notes.pop(int(number) - 1)
            self._write(notes)
        return f"deleted: {gone}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the notes meanwhile, no other chat either. Raises UsageError if that takes too long."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            lock = _locked(self.path.parent)
            try:
                yield
            finally:
                if lock is not None:
                    os.close(lock)

    def _read(self) -> list[str]:
        if self.path.exists() and not self.path.is_file():
            raise UsageError(f"{self.path} is no file, expected one of notes")
        try:
            if self.path.stat().st_size > _LARGEST:
                raise UsageError(f"{self.path} is larger than {_LARGEST} bytes: it is no file of notes")
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _write(self, notes: list[str]) -> None:
        data = "".join(f"{note}\n" for note in notes).encode("utf-8", "replace")
        if len(data) > _LARGEST:
            raise UsageError(f"the notes have more than {_LARGEST} bytes: delete some")
        write_file(self.path, data)


def _locked(folder: Path) -> int | None:
    """The descriptor that holds the folder's lock; None where there are no locks."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            return system.lock_folder(folder)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UsageError("another program is writing notes: try again") from None
            time.sleep(0.01)
