"""The workers: every chunk is done once and in its turn, whoever comes late, sleeps, or is kept from its core."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numba
import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.kernels import machine_code, workers
from edge_gemma.kernels.compiled import compiler
from edge_gemma.kernels.compiled import workers as claims
from edge_gemma.kernels.compiled.operands import operands, pointer
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import WORDS, Operation, address
from tests import ROOT

CROWD = """
import gc, sys, threading, time
import numpy as np
from edge_gemma import kernels
from edge_gemma.kernels import thread_count
from edge_gemma.kernels.recording import program

thread_count.MOST = 8

def recorded(rng):
    n = int(rng.integers(1, 5)) * 4096 + 5
    x, y, z = rng.standard_normal((3, 1, n)).astype(np.float32)
    with program.record() as recorder:
        for _ in range(int(rng.integers(1, 9))):
            kernels.add_scaled(x, y, 1.0, 0.5)
            kernels.scale(z, 0.75)
            kernels.gelu_tanh_mul(x, z, y)
    return recorder.program(), (x, y, z)

kernels.set_threads(1)
cases = []
for seed in range(12):
    made, arrays = recorded(np.random.default_rng(seed))
    begin = [a.copy() for a in arrays]
    made.run()
    cases.append((begin, [a.copy() for a in arrays]))
kernels.set_threads(None)
wrong, rounds, end = [], [0], time.monotonic() + float(sys.argv[1])

def work(seed):
    rng = np.random.default_rng([seed, 1])
    while time.monotonic() < end:
        case = int(rng.integers(len(cases)))
        with kernels.use_threads(int(rng.integers(1, 9))):
            made, arrays = recorded(np.random.default_rng(case))  # runs, too
            for _ in range(int(rng.integers(1, 4))):
                for array, begin in zip(arrays, cases[case][0]):
                    array[...] = begin
                made.run()
                if not all(np.array_equal(a, b) for a, b in zip(arrays, cases[case][1])):
                    wrong.append(case)
                rounds[0] += 1
        if rng.random() < 0.1:
            time.sleep(0.002)  # workers fall asleep

sys.setswitchinterval(1e-4)
crowd = [threading.Thread(target=work, args=(i,)) for i in range(3)]
[each.start() for each in crowd], [each.join() for each in crowd]
print(rounds[0], len(wrong))
"""


def test_more_workers_than_cpus_change_no_bit() -> None:
    """Eight threads on whatever this machine has: most are kept from a core at any time, and come late."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CROWD, "3"], capture_output=True, text=True, env=environment, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounds, wrong = map(int, done.stdout.split())
    assert rounds > 20
    assert wrong == 0


@pytest.fixture
def pool() -> workers.Workers:
    return workers.Workers(4)


def halves(x: np.ndarray, times: int) -> program.Program:
    with program.record() as recorder:
        for _ in range(times):
            kernels.scale(x, 0.5)
    return recorder.program()


def chunk_function(function: Callable[..., None]) -> ChunkFunction:
    """Decorator: a chunk function of these tests."""
    made = ChunkFunction(function.__module__, function.__name__, ())
    made.address = machine_code.load(compiler.object_file(function))
    return made


@chunk_function
def slow(row, chunk):
    """sums, n, turns: chunk i counts i * turns times."""
    w, _ = operands(row)
    sums, state = numba.carray(pointer(w[0]), w[1], np.uint64), np.uint64(1)
    for _ in range(chunk * w[2]):
        state = state * np.uint64(6364136223846793005) + np.uint64(chunk)
    sums[chunk] = state


def test_a_worker_sleeps_and_is_woken(pool: workers.Workers) -> None:
    x = np.ones((1, 40 * 4096), np.float32)
    made = halves(x, 1)
    for _ in range(3):
        x[...] = 8
        pool.run(made._list, 1, 3, made)
        assert (x == 4).all()
        end = time.monotonic() + 30
        while pool._asleep < 2:
            assert time.monotonic() < end
            time.sleep(0.001)
    assert len(pool._threads) == 2
    sums = np.zeros(6, np.uint64)
    made = program.Program([Operation(slow, (sums, len(sums), 1_000_000), (), (sums,), len(sums))])
    others = 0.0
    while others < 0.005:  # seconds that workers have computed
        cpu = time.thread_time(), time.process_time()
        pool.run(made._list, 1, 3, made)
        others = time.process_time() - cpu[1] - (time.thread_time() - cpu[0])
        assert time.monotonic() < end
    while pool._asleep < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    cpu = time.thread_time(), time.process_time()
    time.sleep(0.2)
    assert time.process_time() - cpu[1] < 0.1  # asleep, they take nothing


def test_a_late_worker_finds_nothing_and_what_it_looks_at_is_kept(pool: workers.Workers) -> None:
    """A slot that says a worker is inside: as if it had been stopped there."""
    x = np.ones((1, 40 * 4096), np.float32)
    first, second = halves(x, 2), halves(x, 1)
    inside = (workers.SLOTS + 2 * workers.LINE) // 8
    pool._state[inside] = 1
    pool.run(first._list, 2, 2, first)
    pool.run(second._list, 1, 2, second)
    assert pool._kept >= {first, second}
    pool._state[inside] = -1
    end = time.monotonic() + 30
    while pool._kept and time.monotonic() < end:
        pool.run(second._list, 1, 1, second)
    assert not pool._kept
    assert not np.any(x > 0.125)


@chunk_function
def late(request, _):
    """A worker that was stopped before it looked for chunks: of a run that is over."""
    claims._work_through(claims.read(request), claims.read(request + 8), claims.read(request + 16))


@pytest.mark.parametrize("length", [1, 3])
def test_a_late_worker_does_nothing(pool: workers.Workers, length: int) -> None:
    """The list is about to be done again, with other operations in it, when a worker of the last run comes."""
    x = np.ones((1, 40 * 4096), np.float32)
    made = halves(x, length)
    pool.run(made._list, length, 1, made)
    x[...] = 1
    run = int(pool._state[0]) >> 1
    lines, counts = made._list._lines, made._list._counts
    for now, count in [(run + 1, 40), (run + 1, 39), (run, 40)]:
        lines[:, 0], lines[:, 1], counts[:] = now << 32, 0, 40  # the next run has begun, or this one is to end
        lines[:, 0] += 40 - count
        pool._state[0] = 2 * now + 1
        request = np.array([pool._address, made._list.address, run], np.int64)
        workers._callable(late)(request.ctypes.data, 0)
        assert (x[0, : count * 4096] == 1).all() == (now != run)
        assert (lines[:, 1] == 0).all() == (now != run)


def test_a_run_ends_when_the_slowest_chunk_does() -> None:
    sums = np.zeros(6, np.uint64)
    for _ in range(12):
        sums[:] = 0
        program.call([Operation(slow, (sums, len(sums), 1_000_000), (), (sums,), len(sums))])
        assert sums.all()


def test_one_run_at_a_time(pool: workers.Workers) -> None:
    """A thread that asks for a run while another's is on waits for it."""
    x = np.ones((1, 4096), np.float32)
    made = halves(x, 1)
    x[...] = 1
    with pool._one_at_a_time:
        other = threading.Thread(target=pool.run, args=(made._list, 1, 2, made))
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert (x == 1).all()
    other.join(30)
    assert (x == 0.5).all()


@pytest.mark.parametrize("array", [
    np.zeros(3), np.zeros((4, 5), np.float32)[1:, :2], np.zeros(0), np.frombuffer(b"12345678"), np.zeros((1, 1), "i1"),
])  # fmt: skip
def test_the_address_is_what_numpy_says(array: np.ndarray) -> None:
    assert address(array) == array.ctypes.data


def test_the_address_of_a_mapped_file(tmp_path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    assert address(mapped) == mapped.ctypes.data
    assert address(mapped[7:]) == mapped.ctypes.data + 7


def test_closed_workers_leave_their_code_and_the_caller_works_on(pool: workers.Workers) -> None:
    x = np.ones((1, 40 * 4096), np.float32)
    made = halves(x, 1)
    for _ in range(3):
        pool.run(made._list, 1, 3, made)
        pool.close()
        assert not any(thread.is_alive() for thread in pool._threads)
    assert (x == 1 / 8).all()


def test_an_interpreter_that_ends_at_once_ends_well() -> None:
    """Workers still spin then: their code must not go before them."""
    script = "import numpy as np\nfrom edge_gemma import kernels\nx = np.ones((1, 1 << 20), np.float32)\n"
    script += "for _ in range(3): kernels.scale(x, 2.0)\n"
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0


def test_a_list_of_nothing_is_done_at_once(pool: workers.Workers) -> None:
    pool.run(workers.List(0), 0, 2, None)
    assert workers.List(3).rows.shape == (3, WORDS)
