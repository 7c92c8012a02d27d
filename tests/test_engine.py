"""What engines share with each other and with the process around them: open files, threads, forks."""

import gc
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.kernels import workers
from edge_gemma.kernels.recording import program
from tests.open_files import open_below
from tests.tiny import write_checkpoint

several_cpus = pytest.mark.skipif(kernels.threads() < 2, reason="this machine has one CPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    return export_checkpoint(write_checkpoint(root / "source", "e2b"), root / "model", "q4")


# --- open files -------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_dropped_leaves_no_file_open(model: Path) -> None:
    session = Engine.load(model).session()
    session.prefill([2, 5])
    gc.collect()
    assert open_below(model), "the session still reads rows"
    session.prefill([7, 9])
    del session
    gc.collect()
    assert not open_below(model)


def test_a_closed_engine_says_so(model: Path) -> None:
    with Engine.load(model) as engine:
        session = engine.session()
        session.prefill([2])
    engine.close()  # twice is once
    assert not [file for file in open_below(model) if "per_layer" in file]
    for ids in ([5], [5, 6, 7]):
        with pytest.raises(UsageError, match="was closed: load it again"):
            session.prefill(ids)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs on this machine take no thread away (host/pace.py)."""
    monkeypatch.setattr("edge_gemma.host.pace._UNIT_S", math.inf)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of every kernel call."""
    found: list[int] = []
    threads = program.threads

    def note() -> int:  # a launch asks for its number
        found.append(threads())
        return found[-1]

    monkeypatch.setattr(program, "threads", note)
    return found


@several_cpus
def test_every_engine_has_its_own_threads(model: Path, launched: list[int]) -> None:
    engines = {n: Engine.load(model, threads=n) for n in (1, 2)}
    engines[None] = Engine.load(model)
    assert [engine.threads for engine in engines.values()] == [1, 2, kernels.threads()]
    sessions = {n: engine.session() for n, engine in engines.items()}

    def used(act) -> dict[int | None, set[int]]:
        found = {}
        for n, session in sessions.items():
            launched.clear()
            act(session)
            assert launched
            found[n] = set(launched)
        return found

    expected = {1: {1}, 2: {2}, None: {kernels.threads()}}
    assert used(lambda session: session.prefill([2, 5, 6])) == expected
    for _ in range(3):  # recorded, and run as recorded
        assert used(lambda session: session.step(7)) == expected
    assert used(lambda session: session.forward([1, 2])) == expected
    hidden = {session: session.hidden([3, 4]) for session in sessions.values()}
    assert used(lambda session: session.logits(hidden[session])) == expected
    kernels.set_threads(1)
    try:
        assert used(lambda session: session.prefill([2, 5, 6])) == expected | {None: {1}}
        assert [engine.threads for engine in engines.values()] == [1, 2, 1]
    finally:
        kernels.set_threads(None)


@several_cpus
def test_engines_of_two_threads_do_not_change_each_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, run, wanted = [], workers.run, threading.local()

    def check(operations, length, threads, keep) -> None:
        if threads not in (1, wanted.threads):  # 1: there is no second chunk
            wrong.append(threads)
        run(operations, length, threads, keep)

    monkeypatch.setattr(workers, "run", check)

    def work(n: int) -> None:
        wanted.threads = n
        session = Engine.load(model, threads=n).session()
        for _ in range(10):
            session.prefill([2, 5, 6])
            session.step(7)

    both = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for worker in both:
        worker.start()
    for worker in both:
        worker.join()
    assert not wrong


def test_use_threads_ends_with_its_block() -> None:
    outside = kernels.threads()
    with kernels.use_threads(1):
        assert kernels.threads() == 1
        with kernels.use_threads(None):
            assert kernels.threads() == 1
        with pytest.raises(UsageError), kernels.use_threads(outside):
            raise UsageError
        assert kernels.threads() == 1
    assert kernels.threads() == outside


def test_threads_that_the_machine_does_not_have_are_refused(model: Path) -> None:
    before = kernels.threads()
    with pytest.raises(UsageError, match="99999 threads, expected 1 to"):
        Engine.load(model, threads=99_999)
    assert kernels.threads() == before


@several_cpus
def test_a_session_that_ran_with_fewer_threads_tries_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single steps and in prompts: what is allowed is not what the run itself was limited to."""
    for ids in ([5], [5, 6, 7]):
        session = Engine.load(model).session()
        session.prefill([2, 5])
        with monkeypatch.context() as patch:
            patch.setattr("edge_gemma.host.pace._UNIT_S", 0)
            session._pace.limit, session._pace._next = 1, 0.0
            session.prefill(ids)
            assert session._pace.limit != 1


# --- forks ------------------------------------------------------------------------------------------------------------

FORK = """
import multiprocessing, os, sys
from edge_gemma import Engine
from edge_gemma.kernels import functions, workers
engine = Engine.load(sys.argv[1])
def work(i):
    return int(engine.session().prefill([2, 5, 6, 7] * 40).argmax())
before = sys.argv[2] == "before"
expected = None if before else work(0)
locks = [functions._loading] if before else [functions._loading, workers._workers._one_at_a_time]
[lock.acquire() for lock in locks]  # as if another thread were computing at the moment of the fork
pid = os.fork()
if pid == 0:
    print("child", work(1), flush=True)
    os._exit(0)
[lock.release() for lock in locks]
print("exit", os.waitpid(pid, 0)[1], flush=True)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print("pool", *set(pool.map_async(work, range(2)).get(timeout=60)), flush=True)
print("parent", work(0), expected, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_forked_child_works(model: Path, when: str) -> None:
    """Its parent's workers are not there; it has its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(model), when], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    child, status, pool, parent = done.stdout.splitlines()
    assert status == "exit 0"
    result, expected = parent.split()[1:]
    assert result.isdigit()
    assert expected in (result, "None")
    assert (child, pool) == (f"child {result}", f"pool {result}")


def _answer(model: str) -> int:
    return int(Engine.load(model).session().prefill([2, 5, 6, 7]).argmax())


def test_spawned_processes_work_beside_a_used_engine(model: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(_answer, [str(model)]), _answer(str(model)))
