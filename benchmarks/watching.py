"""A command that is watched: how long it takes, and the resident memory of it and its children meanwhile."""

import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Watched:
    """What a command took: seconds; resident memory in MB of it alone and with all its children, over its time."""

    seconds: float
    own: list[float]
    all: list[float]
    output: str

    def memory(self, share: float) -> tuple[int, int]:
        """MB (of the command, with its children) when this share of its time had passed."""
        to = max(1, round(share * len(self.all)))
        span = slice(max(0, to - max(1, len(self.all) // 20)), to)
        return round(statistics.median(self.own[span])), round(statistics.median(self.all[span]))


def watched(command: Sequence[str]) -> Watched:
    """Run a command; raises subprocess.CalledProcessError if it fails."""
    begin = time.perf_counter()
    own, everyone = list[float](), list[float]()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        pending = _LineReader(process)
        while process.poll() is None:
            tree = _memory(process.pid)
            if tree:
                own.append(tree[0])
                everyone.append(sum(tree))
            time.sleep(0.5 if time.perf_counter() - begin > 10 else 0.05)
        seconds = time.perf_counter() - begin
        output = pending.text()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), output)
    return Watched(seconds, own, everyone, output)


class _LineReader:
    """Reads what a process prints, so that it never waits."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        import threading

        self._parts: list[str] = []
        assert process.stdout is not None
        self._thread = threading.Thread(target=self._parts.extend, args=(process.stdout,), daemon=True)
        self._thread.start()

    def text(self) -> str:
        self._thread.join()
        return "".join(self._parts)


def _memory(pid: int) -> list[float]:
    """Resident MB of a process, then of its children and theirs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                children += (task / "children").read_text().split()
    except OSError:
        return []
    found = re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
    if found is None:
        return []
    return [int(found[1]) / 1024, *(value for child in children for value in _memory(int(child)))]
