"""A conversation as a JSON file: what `chat --session` keeps and `/save` writes.

Owns: the file's form, reading it strictly, writing it whole or not at all. Does not know: models, screens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.atomic import write_file
from edge_gemma.chat import Message
from edge_gemma.errors import UsageError

FORMAT, VERSION = "edge_gemma conversation", 1
_SIZE_LIMIT = 64 << 20  # bytes


@dataclass(frozen=True)
class Transcript:
    """model: its name, for the reader only."""

    messages: tuple[Message, ...]
    system: str | None = None
    model: str | None = None

    def save(self, path: Path) -> None:
        """Replace `path`. Raises OSError; the old file is then as it was."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "system": self.system,
            "messages": [message.as_dict() for message in self.messages],
        }
        write_file(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: Path) -> "Transcript":
        """Raises UsageError, one line, if the file is not a conversation of this version; OSError if unreadable."""
        with path.open("rb") as file:
            data = file.read(_SIZE_LIMIT + 1)
        if len(data) > _SIZE_LIMIT:
            raise UsageError(f"{path} has more than {_SIZE_LIMIT >> 20} MB, which no conversation has")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is not JSON, expected a conversation: choose another --session file") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path} is not a conversation: choose another --session file")
        if content.get("version") != VERSION:
            raise UsageError(f"{path} has version {content.get('version')!r:.20}, this edge_gemma reads {VERSION}")
        messages, system, model = content.get("messages"), content.get("system"), content.get("model")
        if not isinstance(messages, list) or not isinstance(system, str | None) or not isinstance(model, str | None):
            raise UsageError(f"{path}: expected a list of messages, a system text and a model name")
        try:
            return cls(tuple(Message.from_dict(entry) for entry in messages), system, model)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
