"""A conversation as a JSON file: what `chat --session` keeps and `/save` writes.

Owns: the file's form, reading it strictly, writing it whole or not at all, never replacing what another program has
written. Does not know: models, screens.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edge_gemma.arguments import file_path, is_one_of, require, shown
from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import write_file
from edge_gemma.host.system import lock_folder
from edge_gemma.text.message import Message, check_messages

FORMAT, VERSION = "edge_gemma conversation", 1
_SIZE_LIMIT = 64 << 20  # bytes
_PATIENCE_S = 5.0  # seconds to wait for another chat that saves into the same folder

Kind = Literal["chat", "continuation"]  # turns of a chat template, or a text that a base model continues


@dataclass(frozen=True)
class Transcript:
    """A saved conversation. model: its name, for readers only. kind: "chat" if the file has none; None if nothing was
    said.
    """

    messages: tuple[Message, ...] = ()
    system: str | None = None
    model: str | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a field of another type than declared."""
        check_messages(self.messages)
        for name in ("system", "model"):
            require(f"a transcript's {name}", value := getattr(self, name), isinstance(value, str | None), "a text")
        if self.kind is None and (self.messages or self.system):
            object.__setattr__(self, "kind", "chat")
        kinds = get_args(Kind)
        require(
            "a transcript's kind",
            self.kind,
            self.kind is None or is_one_of(self.kind, kinds),
            f"one of {', '.join(kinds)}",
        )

    def as_bytes(self) -> bytes:
        """The contents of the file. Raises UsageError for tool-call arguments that JSON cannot hold."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "model": self.model,
            "system": self.system,
            "messages": [message.as_dict() for message in self.messages],
        }
        try:
            text = json.dumps(content, ensure_ascii=False, indent=1)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the conversation cannot be saved, expected JSON values in it: {error}") from None
        return f"{text}\n".encode("utf-8", "replace")

    def save(self, path: Path | str) -> None:
        """Replace `path`. Raises OSError; the old file is then unchanged."""
        write_file(file_path("the conversation's file", path), self.as_bytes())

    @classmethod
    def load(cls, path: Path | str) -> "Transcript":
        """Read a file. Raises UsageError if it is no conversation of this version, OSError if it cannot be read."""
        with file_path("the conversation's file", path).open("rb") as file:
            return cls.from_bytes(file.read(_SIZE_LIMIT + 1), path)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path | str) -> "Transcript":
        """As `load`, from the bytes of a file called `path`."""
        if len(data) > _SIZE_LIMIT:
            raise UsageError(f"{path} has more than {_SIZE_LIMIT >> 20} MB, which no conversation has")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is not JSON, expected a conversation: choose another file") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path} is not a conversation: choose another file")
        if content.get("version") != VERSION:
            raise UsageError(f"{path} has version {shown(content.get('version'))}, this edge_gemma reads {VERSION}")
        messages, system, model = content.get("messages"), content.get("system"), content.get("model")
        kind = content.get("kind")  # which files had not before
        try:
            if not isinstance(messages, list):
                raise UsageError(f"messages is {shown(messages)}, expected a list")
            return cls(tuple(Message.from_dict(entry) for entry in messages), system, model, kind)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


class SessionFile:
    """The file in which a running chat is kept. It never replaces what another program has written there meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: str | None = None  # digest of what it held when this chat last read or wrote it

    def load(self) -> Transcript:
        """The contents of the file; an empty transcript if there is none. Raises as `Transcript.load`."""
        if not self.path.exists():
            return Transcript()
        with self.path.open("rb") as file:
            data = file.read(_SIZE_LIMIT + 1)
        self._seen = _digest(data)
        return Transcript.from_bytes(data, self.path)

    def save(self, transcript: Transcript) -> None:
        """Replace the file. Raises OSError, and UsageError if another program has written it since."""
        data = transcript.as_bytes()
        with _alone_in(self.path.resolve().parent):
            if self.path.exists() and _digest(self.path.read_bytes()) != self._seen:
                raise UsageError(f"{self.path} was written by another program meanwhile: choose another name")
            write_file(self.path, data)
        self._seen = _digest(data)

    def beside(self) -> "SessionFile":
        """A file with an unused name: monday-2.json beside monday.json."""
        names = (self.path.with_stem(f"{self.path.stem}-{i}") for i in itertools.count(2))
        return SessionFile(next(path for path in names if not path.exists()))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock `folder`, where the file system has locks, so that no other chat checks a file there and replaces it
    meanwhile.
    """
    lock, deadline = None, time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            lock = lock_folder(folder)
            break
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a folder that may be written but not read
            break
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
