"""Busy neighbours: processes that keep a core busy for a share of the time, as other programs on a board do.

    python benchmarks/busy.py --share 50

Owns: how long a neighbour works and sleeps, starting and ending neighbours. Does not know: what is measured beside
them. It imports nothing else, so that a neighbour is busy as soon as it starts.

A neighbour works for a fixed amount of processor time, then sleeps for what is left of 100 ms. If it takes longer than
that it goes on without a rest, but makes up for nothing. With a share of 100 it never sleeps.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD_S = 0.1


def work(share: int) -> None:
    """Be busy until the process that started this one is gone. share: percent of a core."""
    parent = os.getppid()
    wanted = PERIOD_S * share / 100
    while os.getppid() == parent:
        start, spent = time.perf_counter(), time.process_time()
        while time.process_time() - spent < wanted:
            pass
        if share < 100:
            time.sleep(max(0.0, start + PERIOD_S - time.perf_counter()))


class Neighbours:
    """Running neighbours."""

    def __init__(self, processes: list[subprocess.Popen]) -> None:
        self._processes = processes

    def seconds(self) -> float:
        """The processor time that they have had so far."""
        return sum(_seconds(process.pid) for process in self._processes)


@contextmanager
def neighbours(count: int, share: int) -> Iterator[Neighbours]:
    """Start so many neighbours, and end them. count: 0 or more. share: percent of a core that each wants, 1 to 100."""
    if not 1 <= share <= 100:
        raise ValueError(f"a neighbour's share is {share}, expected 1 to 100 percent of a core")
    command = [sys.executable, __file__, "--share", str(share)]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield Neighbours(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _seconds(process: int) -> float:
    """User and system time of a process, from /proc."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=50, help="percent of a core")
    work(parser.parse_args().share)


if __name__ == "__main__":
    main()
