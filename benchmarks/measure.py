"""Measurements as rows of a CSV: the command, the machine, the result.

Owns: the row, the machine's facts, running a command in a process of its own. Does not know: engines, tables, models.
"""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class RunFailedError(Exception):
    """A measured command ended with an error."""


@dataclass(frozen=True)
class Row:
    """One measured number. engine: edge_gemma, llama.cpp, LiteRT-LM or onnxruntime. round: rows of the same round ran
    next to each other, so ratios between them are meaningful; those of round 0 did not.
    """

    round: int
    model: str  # "e2b-q4", "gemma3-270m", or "matmul 4096x1536"
    engine: str
    form: str  # how the weights are stored: "q4", "Q4_0", "4 bits, groups of 32"
    test: str  # "prefill 512", "decode 128 at 0", "peak RSS", ...
    value: float
    unit: str
    others: float  # cores that other processes kept busy meanwhile, including a virtual machine's stolen time
    command: str


@dataclass(frozen=True)
class Machine:
    """The machine and the versions that the numbers depend on."""

    date: str
    cpu: str
    cores: int
    threads: int
    memory_gb: float
    kernels: str
    versions: str


def cpu_name(cpuinfo: str) -> str:
    """The CPU's name from the text of /proc/cpuinfo; on ARM boards, which have none there, the part number."""
    found = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    part = found.get("CPU part")
    return found.get("model name") or (f"ARM part {part}" if part else platform.machine())


def slug(name: str) -> str:
    """A file name made of a CPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(threads: int, versions: dict[str, str]) -> Machine:
    from edge_gemma import kernels

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        date=datetime.date.today().isoformat(),
        cpu=cpu_name(Path("/proc/cpuinfo").read_text(errors="replace")),
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        memory_gb=round(memory / 1e9, 1),
        kernels=kernels.variant(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Finished:
    """A command that ended without an error."""

    answer: dict[str, Any]  # the last line of its standard output, a JSON object; empty when it printed none
    seconds: float  # from its start to its end
    others: float  # as in Row
    peak_rss_mb: float = 0.0  # the most memory that its process had


def busy_seconds(stat: str) -> float:
    """Seconds of all cores that were not idle, from the text of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def busy_now() -> float:
    return busy_seconds(Path("/proc/stat").read_text())


def run(command: Sequence[str], apart: Callable[[], float] = lambda: 0.0) -> Finished:
    """Run a command without showing its messages. Raises RunFailedError with the end of them.

    apart: processor seconds, so far, of processes that belong to the measurement and do not count as others.
    """
    busy, start = busy_now() - apart(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        others = max(0.0, busy_now() - apart() - busy - usage.ru_utime - usage.ru_stime) / seconds
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RunFailedError(f"{' '.join(command)}: exit code {process.returncode}: {err.read()[-2000:].strip()}")
        lines = out.read().strip().splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Finished(answer, seconds, others, usage.ru_maxrss * 1024 / 1e6)


def words(**options: Iterable[int]) -> list[str]:
    """no_warm_up=[], prompts=[20, 64] -> --no-warm-up --prompts 20 64"""
    return [w for name, of in options.items() for w in (f"--{name.replace('_', '-')}", *map(str, of))]


def write_csv(path: Path, about: Machine, rows: Iterable[Row]) -> None:
    """Write one line for each row. Each repeats the machine, so files of several machines can be joined."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in (*fields(Machine), *fields(Row))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            value = asdict(row) | {"value": f"{row.value:.5g}", "others": f"{row.others:.2f}"}
            writer.writerow(asdict(about) | value)


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Rows of both. A new row replaces the old one of the same round, engine and test."""
    rows = {(r.round, r.model, r.engine, r.form, r.test): r for r in (*old, *new)}
    return sorted(rows.values(), key=lambda r: r.model.startswith("matmul"))


def read_csv(path: Path) -> tuple[Machine, list[Row]]:
    """The inverse of write_csv. Raises ValueError for a file without rows or of several machines."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    kinds = {f.name: f.type for f in (*fields(Machine), *fields(Row))}

    def typed(line: dict[str, str], of: type) -> Any:
        return of(**{f.name: kinds[f.name](line[f.name]) for f in fields(of)})  # type: ignore[operator]

    machines = {typed(line, Machine) for line in lines}
    if len(machines) != 1:
        raise ValueError(f"{path.name} has rows of {len(machines)} machines, expected one")
    return machines.pop(), [typed(line, Row) for line in lines]
