"""Threads under load, on a machine that is simulated: equal parts, and a CPU that another program shares."""

from dataclasses import dataclass

import pytest

from edge_gemma.host.pace import Pace


@dataclass
class Machine:
    """Runs a token of `work` CPU seconds on n threads, each with an equal part; `busy` of its CPUs are shared."""

    cpus: int
    busy: int = 0
    work: float = 0.001
    clock: float = 100.0
    cpu: float = 7.0

    def run(self, pace: Pace, tokens: int) -> int:
        threads = pace.limit or self.cpus
        with pace.of(tokens):
            slow = threads > self.cpus - self.busy  # the system gives free CPUs first
            self.clock += tokens * self.work / threads * (2 if slow else 1)
            self.cpu += tokens * self.work
        return threads

    def pace(self, threads: int | None = None) -> Pace:
        return Pace(threads, self.cpus, clock=lambda: self.clock, cpu=lambda: self.cpu)

    def share_at(self, pace: Pace, wanted: int, seconds: float, tokens: int) -> float:
        """The share of the time that ran with `wanted` threads."""
        start, right = self.clock, 0.0
        while self.clock < start + seconds:
            before = self.clock
            if self.run(pace, tokens) == wanted:
                right += self.clock - before
        return right / (self.clock - start)


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
def test_an_idle_machine_uses_all(cpus: int, tokens: int) -> None:
    machine = Machine(cpus)
    assert machine.share_at(machine.pace(), cpus, 20, tokens) == 1


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize(("cpus", "busy"), [(2, 1), (4, 1), (8, 1)])
def test_a_busy_neighbour_costs_a_thread(cpus: int, busy: int, tokens: int) -> None:
    machine = Machine(cpus, busy)
    pace = machine.pace()
    machine.share_at(pace, cpus - busy, 5, tokens)
    assert machine.share_at(pace, cpus - busy, 60, tokens) > 0.85


@pytest.mark.parametrize("tokens", [1, 128])
def test_when_the_neighbour_has_gone_all_are_used_again(tokens: int) -> None:
    machine = Machine(4, 1)
    pace = machine.pace()
    machine.share_at(pace, 3, 30, tokens)
    machine.busy = 0
    machine.share_at(pace, 4, 10, tokens)
    assert machine.share_at(pace, 4, 60, tokens) > 0.99


def test_what_was_asked_for_is_kept() -> None:
    machine = Machine(4, 2)
    pace = machine.pace(4)
    assert machine.share_at(pace, 4, 10, 1) == 1
    assert pace.limit == 4


def test_waiting_for_the_disk_is_tried_and_given_up() -> None:
    """Little CPU time, and fewer threads are slower: seldom tried."""
    machine = Machine(4)
    pace = machine.pace()
    right, start = 0.0, machine.clock
    while machine.clock < start + 60:
        before = machine.clock
        threads = machine.run(pace, 1)
        machine.clock += 0.01 / threads  # pages that each thread fetches for itself
        pace._seconds += 0.01 / threads
        right += machine.clock - before if threads == 4 else 0
    assert right / (machine.clock - start) > 0.95


def test_an_error_in_a_run_is_passed_on() -> None:
    machine = Machine(2)
    with pytest.raises(KeyError), machine.pace().of(1):
        raise KeyError
