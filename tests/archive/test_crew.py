"""Processes that work on this machine: what ends one ends nothing else, whatever else is being done."""

import os
import queue
import signal
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from edge_gemma.archive.child import AHEAD, Child, CrashedError, FailedError, NotStartedError
from edge_gemma.archive.crew import LocalCrew, Outcome
from tests.archive.poison import Plain, told
from tests.waiting import until

LONG_S = 300


@pytest.fixture
def child(request):
    """A child that does as it is told."""
    with closing(Child(Plain(**getattr(request, "param", {})))) as found:
        yield found


def gone(pid):
    """Whether a process has ended, or is about to."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def in_thread(call):
    """Start a call. Returns a queue that gets what it returns or raises."""
    found = queue.Queue()

    def run():
        try:
            found.put(call())
        except Exception as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def test_a_child_works_and_says_what_cannot_be_done(child):
    assert child.pid is None  # until there is work
    assert child.do(("echo", {"a": 1})) == {"a": 1}
    pid = child.pid
    with pytest.raises(FailedError, match="ValueError: it is no good"):
        child.do(("fail", "it is\n no good"))
    assert child.do(("echo", 2)) == 2
    assert child.pid == pid
    assert child.running == 0


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSEGV])
def test_work_that_ends_the_process_is_told_and_the_next_has_a_new_one(child, ending):
    child.do(("echo", 1))
    pid = child.pid
    with pytest.raises(CrashedError, match=rf"^the process ended \({ending.name}\): it ends with 1 works$"):
        child.do(("end", ending))
    assert gone(pid)
    assert child.do(("echo", 3)) == 3
    assert child.pid != pid


@pytest.mark.parametrize("child", [{"slots": 3}], indirect=True)
def test_several_are_done_at_a_time_and_end_together(child, tmp_path):
    child.charge = Plain(3, log=str(tmp_path / "log"))
    waiting = [in_thread(lambda: child.do(("sleep", 600))) for _ in range(2)]
    until(lambda: len(told(tmp_path / "log")) == 2, LONG_S)
    assert child.do(("echo", 1)) == 1  # beside them
    os.kill(child.pid, signal.SIGKILL)
    for answer in waiting:
        assert isinstance(answer.get(timeout=LONG_S), CrashedError)
    assert child.do(("echo", 2)) == 2


@pytest.mark.parametrize("child", [{"slots": 3}], indirect=True)
def test_what_is_done_alone_has_no_company_and_waits_for_none_that_came_later(child):
    over = threading.Event()

    def others():
        while not over.is_set():
            child.do(("sleep", 0.02))

    flow = [in_thread(others) for _ in range(6)]
    until(lambda: child.running == 3, LONG_S)
    alone = [in_thread(lambda: child.do(("busy", 0.1), alone=True)) for _ in range(3)]
    assert [answer.get(timeout=LONG_S) for answer in alone] == [1, 1, 1]
    over.set()
    assert [answer.get(timeout=LONG_S) for answer in flow] == [None] * 6
    assert child.running == 0


def test_a_process_that_cannot_be_prepared_is_told(tmp_path):
    with closing(Child(Plain(opens="fail"))) as child, pytest.raises(NotStartedError, match="this cannot be opened"):
        child.do(("echo", 1))
    log = tmp_path / "log"
    with closing(Child(Plain(opens="end", log=str(log)))) as child:
        told_us = r"^the process that works cannot be started: the process ended \(SIGABRT\): a last word$"
        with pytest.raises(NotStartedError, match=told_us):
            child.do(("echo", 1))
    assert told(log) == ["opened"] * 3
    with closing(Child(Plain(opens=str(tmp_path / "once")))) as child:
        assert child.do(("echo", 1)) == 1  # the second time


def test_work_that_cannot_be_sent_is_told(child):
    child.do(("echo", 1))
    pid = child.pid
    with pytest.raises((AttributeError, TypeError)):
        child.do(("echo", threading.Lock()))
    assert child.running == 0
    assert child.do(("echo", 2)) == 2
    assert child.pid == pid


def test_a_process_that_ends_while_it_is_sent_much(child):
    for _ in range(5):
        child.do(("echo", 1))
        os.kill(child.pid, signal.SIGSTOP)
        answer = in_thread(lambda: child.do(("echo", bytes(10_000_000))))
        until(lambda: child._process._sending.locked(), LONG_S)
        time.sleep(0.05)  # the pipe is full by now
        os.kill(child.pid, signal.SIGKILL)
        found = answer.get(timeout=LONG_S)
        assert isinstance(found, CrashedError), found


def test_closed_while_it_works(child, tmp_path):
    child.charge = Plain(log=str(tmp_path / "log"))
    answer = in_thread(lambda: child.do(("sleep", 600)))
    next_one = in_thread(lambda: child.do(("echo", 1)))  # waits for its place
    until(lambda: told(tmp_path / "log"), LONG_S)
    pid = child.pid
    child.close()
    assert isinstance(answer.get(timeout=LONG_S), CrashedError)
    assert isinstance(next_one.get(timeout=LONG_S), CrashedError)
    until(lambda: gone(pid), LONG_S)
    with pytest.raises(CrashedError):
        child.do(("echo", 1))
    assert child.pid is None


def test_closed_while_it_starts():
    child = Child(Plain())
    answer = in_thread(lambda: child.do(("echo", 1)))
    until(lambda: child.running, LONG_S)
    child.close()
    found = answer.get(timeout=LONG_S)
    assert isinstance(found, CrashedError), found  # or it was quicker:
    until(lambda: child.pid is None, LONG_S)


# Streams


def test_a_stream_waits_for_its_reader(child, tmp_path):
    child.charge = Plain(log=str(tmp_path / "log"))
    big = 200_000  # values: far more than a pipe holds
    values = child.stream(("emit", big))
    assert next(values) == 0
    seen = -1

    def still():
        nonlocal seen
        before, seen = seen, len(told(tmp_path / "log"))
        time.sleep(0.5)
        return before == seen

    until(still, LONG_S)
    assert AHEAD < seen < big
    values.close()


def test_a_stream_comes_whole_and_in_order(child):
    assert list(child.stream(("emit", 1000))) == list(range(1000))
    assert list(child.stream(("emit", 0))) == []
    with pytest.raises(FailedError, match="nothing"):
        list(child.stream(("fail", "nothing")))
    assert child.running == 0


def test_a_stream_that_is_abandoned_ends_the_process(child):
    values = child.stream(("emit", 100_000))
    assert next(values) == 0
    pid = child.pid
    values.close()
    until(lambda: gone(pid), LONG_S)
    assert child.do(("echo", 1)) == 1
    assert child.running == 0


def test_a_stream_whose_process_ends(child):
    values = child.stream(("emit", 100_000))
    assert next(values) == 0
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(CrashedError, match="SIGKILL"):
        list(values)
    assert child.do(("echo", 1)) == 1


# Crews


@pytest.fixture
def crew(request):
    """A crew, and what it tells."""
    outcomes = queue.Queue()
    made = LocalCrew(Plain(slots=2), 2, lambda number, outcome: outcomes.put((number, outcome)))
    with closing(made):
        yield made, outcomes


def all_of(outcomes, count):
    """So many outcomes."""
    return dict(outcomes.get(timeout=LONG_S) for _ in range(count))


def test_a_crew_tells_what_became_of_each(crew):
    crew, outcomes = crew
    assert crew.slots == 4
    for number in range(20):
        crew.submit(number, ("fail", "no") if number % 5 == 4 else ("echo", number), alone=number % 3 == 0)
    found = all_of(outcomes, 20)
    assert found == {number: Outcome("failed", "ValueError: no") if number % 5 == 4 else Outcome("done", number)
                     for number in range(20)}  # fmt: skip
    assert all(child.pid is not None for child in crew.children)  # both have worked


def test_a_crew_goes_on_after_works_that_end_processes(crew):
    crew, outcomes = crew
    for number in range(8):
        crew.submit(number, ("end", signal.SIGKILL) if number in (1, 6) else ("echo", number), alone=True)
    found = all_of(outcomes, 8)
    assert [number for number, each in sorted(found.items()) if each.kind == "crashed"] == [1, 6]
    assert all(found[number] == Outcome("done", number) for number in (0, 2, 3, 4, 5, 7))


def test_a_crew_that_cannot_start_tells_that_nothing_can_be_done():
    outcomes = queue.Queue()
    with closing(LocalCrew(Plain(opens="fail"), 1, lambda number, outcome: outcomes.put((number, outcome)))) as crew:
        crew.submit(7, ("echo", 1), alone=False)
        assert outcomes.get(timeout=LONG_S) == (7, Outcome("lost", "ValueError: this cannot be opened"))


def test_a_crew_that_is_closed_ends_its_processes(crew):
    crew, outcomes = crew
    for number in range(10):
        crew.submit(number, ("sleep", 600), alone=False)
    until(lambda: all(child.running == 2 and child.pid for child in crew.children), LONG_S)
    pids = [child.pid for child in crew.children]
    crew.close()
    until(lambda: all(map(gone, pids)), LONG_S)
    with suppress(queue.Empty):
        while True:
            assert outcomes.get(timeout=1)[1].kind == "crashed"
