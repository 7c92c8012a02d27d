"""Requests and commands for tests of what `batch` must stand, and a crew that does nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edge_gemma.archive.crew import Outcome
from edge_gemma.archive.working import Hear
from edge_gemma.cli.main import cli

HELLO = [{"role": "user", "content": "Hello"}]


def requests(path: Path, bodies: dict[str, tuple[str, dict[str, Any]]]) -> Path:
    """A .jsonl of requests."""
    lines = [{"custom_id": name, "url": url, "body": body} for name, (url, body) in bodies.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(*arguments: object) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli, ["batch", *map(str, arguments), "-m", "demo"])


def results(path: Path) -> dict[str, Any]:
    """The lines of an OUTPUT, by custom_id."""
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().rstrip("\n").split("\n"))}


class Nobody:
    """A crew that has done everything at once."""

    slots = 2

    def __init__(self, told: Callable[[int, Outcome], None]) -> None:
        self.told = told

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """As Crew.submit."""
        entry = {"start": work.start, "end": work.end} if isinstance(work, Hear) else {}
        self.told(number, Outcome("done", {"text": "one two"} | entry))

    def tend(self) -> None:
        """As Crew.tend."""

    def close(self) -> None:
        """As Crew.close."""
