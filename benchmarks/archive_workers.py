"""What handing out costs `edge-gemma batch`, with many workers: `python -m benchmarks.archive_workers`.

    python -m benchmarks.archive_workers --workers 200 --requests 100000 --sleep 2.0 --csv workers.csv
    python -m benchmarks.archive_workers --no-dask --requests 100000

A worker sleeps in place of a model, for as long as an answer would take, and answers with a chat completion of some 300
characters. All else is the command's own: INPUT is a .jsonl of chats that goes into a journal on disk, `Batch` hands
out, `DaskCrew` speaks to a scheduler (`dask scheduler`, a process of its own), OUTPUT is written. With --no-dask the
answers are there at once: what a request costs the command itself.

200 processes of workers would need more memory than a small machine has. So a process holds up to 25 workers of
distributed in one event loop. Each has its own connections, and a thread of its own that sleeps, which keeps nobody
from work. What a worker otherwise measures of its own process many times a second is off: 200 of them would keep a core
busy with it. All processes share the cores of this machine, so what workers and the scheduler compute counts as
overhead, too; in a real cluster they have cores of their own. So does what else runs on the machine: the share of the
time in which something waited for a core is told (busy_percent, from /proc/pressure).

Figures. ideal_s: requests * sleep / workers. wall_s: from the first request that is handed out to the last result that
is written down. overhead_percent: what wall_s is above ideal_s. take_s, write_s: reading INPUT, writing OUTPUT.
command_cpu_s, scheduler_cpu_s, workers_cpu_s: while the batch runs. rss_*_mb: of the command, when so many percent of
the requests are over; rss_peak_mb: the largest that was seen, twice a second.
"""

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from benchmarks.server_process import TICK_S
from edge_gemma.archive import output
from edge_gemma.archive.crew import Crew, Outcome, Told
from edge_gemma.archive.dask_crew import DaskCrew
from edge_gemma.archive.inputs import CHAT, open_input
from edge_gemma.archive.journal import DONE, Journal
from edge_gemma.archive.run import Batch, Progress

ROOT = Path(__file__).resolve().parent.parent
_TOGETHER = 25  # workers of a process
_QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.tick.cycle": "60s",
    "distributed.admin.system-monitor.interval": "10s",
}
_START_S = 120.0
_LOOK_S = 0.5  # between two looks at the memory
_MARKS = (0.1, 0.5, 1.0)  # shares of the requests at which the memory is noted
_QUESTION = (
    "Summarise in three sentences what was said about the bridge, and who was to pay for it, in minute {number}."
)
_ANSWER = (
    "The council spoke about bridge {number}, which had been closed since the flood. It was agreed that the district "
    "pays two thirds and the railway the rest, once both have seen the drawings. A new date was set for the spring, "
    "and the engineer was asked to bring the figures for a span of steel and for one of stone."
)


@dataclass(frozen=True)
class Sleeping:
    """The charge: a worker that sleeps."""

    seconds: float
    slots: int = 1

    def check(self) -> None:
        """As ModelCharge.check: everybody can sleep."""


@dataclass
class Figures:
    """A line of the CSV. What they mean is in the module's description."""

    workers: int
    requests: int
    sleep_s: float
    ideal_s: float = 0.0
    wall_s: float = 0.0
    overhead_percent: float = 0.0
    requests_per_s: float = 0.0
    take_s: float = 0.0
    write_s: float = 0.0
    command_cpu_s: float = 0.0
    scheduler_cpu_s: float = 0.0
    workers_cpu_s: float = 0.0
    busy_percent: float = 0.0
    rss_10_mb: float = 0.0
    rss_50_mb: float = 0.0
    rss_100_mb: float = 0.0
    rss_peak_mb: float = 0.0
    rss_growth_mb: float = 0.0


def sleep(charge: Sleeping, work: Any, alone: bool) -> Outcome:
    """In a worker: what a model would do."""
    time.sleep(charge.seconds)
    return Outcome("done", answer(work.custom_id, work.created))


def answer(custom_id: str, created: int) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": _ANSWER.format(number=custom_id)}
    return {
        "id": f"chatcmpl-{custom_id}", "object": "chat.completion", "created": created, "model": "sleeping",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 70, "total_tokens": 110},
    }  # fmt: skip


def write_requests(path: Path, n: int) -> None:
    """A .jsonl of chats."""
    with path.open("w") as file:
        for number in range(n):
            body = {"messages": [{"role": "user", "content": _QUESTION.format(number=number)}], "max_tokens": 100}
            file.write(json.dumps({"custom_id": f"chat-{number}", "method": "POST", "url": CHAT, "body": body}) + "\n")


class AtOnce:
    """A crew whose works are done when they are handed out."""

    def __init__(self, workers: int, told: Told) -> None:
        self.slots, self._told = workers, told

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """As Crew.submit."""
        self._told(number, Outcome("done", answer(work.custom_id, work.created)))

    def tend(self) -> None:
        """As Crew.tend."""

    def close(self) -> None:
        """As Crew.close."""


# The scheduler, and processes of workers.


@contextmanager
def process(*command: str) -> Iterator[int]:
    """Another process of this benchmark. Yields its id."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL,
        start_new_session=True,  # Linux shares cores out among sessions, and each would have a machine of its own
    ) as running:  # fmt: skip
        try:
            yield running.pid
        finally:
            running.send_signal(signal.SIGKILL)  # nothing of theirs is needed


def hold(address: str, n: int, folder: str) -> None:
    """The process of n workers, until it is ended."""
    import dask
    import distributed

    async def run() -> None:
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(
                    distributed.Worker(address, nthreads=1, dashboard=False, memory_limit=0, local_directory=folder)
                )
                for _ in range(n)
            ]
            await asyncio.gather(*(worker.finished() for worker in workers))  # they end with their scheduler

    with dask.config.set(_QUIET):
        asyncio.run(run())


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[tuple[str, int, list[int]]]:
    """A scheduler with so many workers. Yields its address, its process, and those of workers."""
    import distributed

    found = folder / "scheduler.json"
    with ExitStack() as stack:
        scheduler = stack.enter_context(
            process("-m", "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard",
                    "--scheduler-file", str(found))
        )  # fmt: skip
        address = json.loads(_waited(lambda: found.exists() and found.read_text()))["address"]
        holders = [
            stack.enter_context(
                process("-c", f"from benchmarks.archive_workers import hold; hold({address!r}, {n}, {str(folder)!r})")
            )
            for n in [min(_TOGETHER, workers - first) for first in range(0, workers, _TOGETHER)]
        ]
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=_START_S)
        yield address, scheduler, holders


def _waited(found: Callable[[], Any]) -> Any:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.05)
    raise TimeoutError("the scheduler does not start")


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def pressed_s() -> float:
    """Seconds since the machine was started in which something waited for a core; 0 if Linux does not tell."""
    pressure = Path("/proc/pressure/cpu")
    return int(pressure.read_text().split("total=")[1].split()[0]) / 1e6 if pressure.exists() else 0.0


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# The command.


@dataclass
class Watched:
    """A crew, and when it was first given a work. Also what is seen of the command while it works."""

    crew: Crew | None = None
    first: float = 0.0
    last: float = 0.0
    looked: float = 0.0
    marks: dict[float, float] = field(default_factory=dict)
    peak: float = 0.0

    def around(self, crew: Crew) -> "Watched":
        """This, as that crew."""
        self.crew = crew
        return self

    @property
    def slots(self) -> int:
        """As Crew.slots."""
        assert self.crew is not None
        return self.crew.slots

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """As Crew.submit."""
        assert self.crew is not None
        self.first = self.first or time.perf_counter()
        self.crew.submit(number, work, alone=alone)

    def tend(self) -> None:
        """As Crew.tend."""
        assert self.crew is not None
        self.crew.tend()

    def close(self) -> None:
        """As Crew.close."""
        assert self.crew is not None
        self.crew.close()

    def progress(self, progress: Progress) -> None:
        """Called after each result."""
        self.last = time.perf_counter()
        due = [mark for mark in _MARKS if mark not in self.marks and progress.done >= mark * progress.requests]
        if due or self.last - self.looked > _LOOK_S:
            self.looked, now = self.last, resident_mb()
            self.peak = max(self.peak, now)
            for mark in due:
                self.marks[mark] = now
                share = f"{progress.done:,} of {progress.requests:,} after {self.last - self.first:.1f} s"
                click.echo(f"{share}: {now:.1f} MB", err=True)


def measured(workers: int, requests: int, seconds: float, *, dask: bool, folder: Path) -> Figures:
    """A batch of so many requests. folder: for all files."""
    figures = Figures(workers, requests, seconds if dask else 0.0)
    write_requests(folder / "requests.jsonl", requests)
    watched = Watched()
    with ExitStack() as stack:
        address, scheduler, holders = stack.enter_context(cluster(workers, folder)) if dask else ("", 0, [])
        journal = stack.enter_context(Journal(folder / "answers.archive"))
        began = time.perf_counter()
        journal.take(open_input(str(folder / "requests.jsonl"), {}).items())
        figures.take_s = time.perf_counter() - began

        def start(told: Told) -> Crew:
            tell = lambda text: click.echo(f"({text})", err=True)  # noqa: E731
            crew = DaskCrew(address, Sleeping(seconds), told, tell, do=sleep) if dask else AtOnce(workers, told)
            return watched.around(crew)

        batch = Batch(journal, start, created=0, beside=folder / "answers", progress=watched.progress)
        processes = [os.getpid(), scheduler or os.getpid(), *holders]
        before, pressed = [cpu_s(pid) for pid in processes], pressed_s()
        batch.run()
        figures.busy_percent = 100 * (pressed_s() - pressed) / (watched.last - watched.first)
        used = [cpu_s(pid) - at for pid, at in zip(processes, before, strict=True)]
        began = time.perf_counter()
        output.write(folder / "answers.jsonl", journal.rows())
        figures.write_s = time.perf_counter() - began
        if journal.counts()[DONE] != requests:
            raise click.ClickException(f"only {journal.counts()[DONE]:,} of {requests:,} requests are done")
    _fill(figures, watched, used if dask else [used[0], 0.0])
    return figures


def _fill(figures: Figures, watched: Watched, cpu: list[float]) -> None:
    figures.ideal_s = figures.requests * figures.sleep_s / figures.workers
    figures.wall_s = watched.last - watched.first
    if figures.ideal_s:
        figures.overhead_percent = 100 * (figures.wall_s / figures.ideal_s - 1)
    figures.requests_per_s = figures.requests / figures.wall_s
    figures.command_cpu_s, figures.scheduler_cpu_s, figures.workers_cpu_s = cpu[0], cpu[1], sum(cpu[2:])
    figures.rss_10_mb, figures.rss_50_mb, figures.rss_100_mb = (watched.marks[mark] for mark in _MARKS)
    figures.rss_peak_mb, figures.rss_growth_mb = watched.peak, figures.rss_100_mb - figures.rss_10_mb


def lines(figures: Figures) -> Iterator[str]:
    """Yields the figures as text."""
    f = figures
    yield f"{f.requests:,} requests, {f.workers} workers" + (f", {f.sleep_s} s each" if f.sleep_s else ", done at once")
    if f.ideal_s:
        yield f"ideal {f.ideal_s:.1f} s, wall {f.wall_s:.1f} s, overhead {f.overhead_percent:.2f} %"
    else:
        yield f"wall {f.wall_s:.2f} s, {f.wall_s / f.requests * 1e6:.0f} us a request"
    yield f"{f.requests_per_s:.1f} requests/s; INPUT was taken in {f.take_s:.2f} s, OUTPUT written in {f.write_s:.2f} s"
    yield (
        f"CPU: command {f.command_cpu_s:.1f} s ({f.command_cpu_s / f.requests * 1e3:.2f} ms a request), "
        f"scheduler {f.scheduler_cpu_s:.1f} s ({f.scheduler_cpu_s / f.requests * 1e3:.2f} ms a request), "
        f"workers {f.workers_cpu_s:.1f} s; something waited for a core {f.busy_percent:.0f} % of the time"
    )
    yield (
        f"memory of the command: {f.rss_10_mb:.1f} MB at 10 %, {f.rss_50_mb:.1f} at 50 %, {f.rss_100_mb:.1f} at 100 %, "
        f"peak {f.rss_peak_mb:.1f}, growth from 10 % {f.rss_growth_mb:+.1f}"
    )


@click.command()
@click.option("--workers", default=200, show_default=True)
@click.option("--requests", default=100_000, show_default=True)
@click.option("--sleep", "seconds", default=2.0, show_default=True, help="Seconds of an answer.")
@click.option("--no-dask", is_flag=True, help="Answers are there at once.")
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path), help="CSV file.")
def main(workers: int, requests: int, seconds: float, no_dask: bool, out: Path | None) -> None:
    """What handing out costs the command for many requests."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(workers, requests, seconds, dask=not no_dask, folder=Path(folder))
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(Figures)], lineterminator="\n")
            writer.writeheader()
            writer.writerow({name: round(value, 3) for name, value in asdict(figures).items()})
    for line in lines(figures):
        click.echo(line)


if __name__ == "__main__":
    from benchmarks import archive_workers  # workers find its functions by this name

    archive_workers.main()
