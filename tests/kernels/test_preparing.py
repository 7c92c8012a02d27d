"""The first start: several processes compile what a model needs; whatever happens to one, the model answers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import Engine, kernels
from edge_gemma.kernels import preparing
from edge_gemma.kernels.recording import program
from tests import ROOT

START = """
import os, pathlib, sys, threading
from edge_gemma import Engine, kernels
from edge_gemma.kernels import compiler, preparing
from edge_gemma.host import cpus
kernels.set_cache_root(pathlib.Path(sys.argv[1]))
cpus.available = lambda: 3
forks, fork = [], os.fork
def counted():
    forks.append(fork())
    if forks[-1] == 0 and sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    return forks[-1]
os.fork = counted
mine, compile = [], compiler.CFunc.compile
def noted(function):
    if not function._cache.has(function._sig):
        mine.append(function.__name__)
    return compile(function)
compiler.CFunc.compile = noted
if sys.argv[2] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
if sys.argv[2] == "unwritable":
    compiler._unwritable = True
session = Engine.load(cache_size=0).session()
logits = session.prefill(list(range(20, 50)))
print(len(forks), len(mine), len(list(compiler.cache_directory().glob("*.bin"))), int(logits.argmax()), sep="\\n")
"""


def started(folder: Path, how: str) -> list[int]:
    """Forks, functions compiled by the process itself, files, the answer."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", START, folder, how], capture_output=True, text=True, env=environment,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_children_compile_what_this_process_then_loads(tmp_path: Path) -> None:
    forks, mine, files, answer = started(tmp_path / "a", "")
    assert forks == 2
    assert 0 < mine < files - 4
    assert started(tmp_path / "a", "") == [0, 0, files, answer]  # all of it is there
    forks, mine, alone, same = started(tmp_path / "b", "killed")  # they took something with them, or nothing
    assert forks == 2
    assert mine == alone <= files
    assert same == answer


@pytest.mark.slow
@pytest.mark.parametrize("how", ["threads", "unwritable"])
def test_where_a_child_would_be_of_no_use_there_is_none(tmp_path: Path, how: str) -> None:
    forks, mine, files, _ = started(tmp_path, how)
    assert forks == 0
    assert mine == files > 10


def test_what_is_collected_is_not_computed() -> None:
    x = np.ones((2, 8), np.float32)
    with program.collect() as functions:
        kernels.scale(x, 2.0)
        kernels.rms_norm(x, None, 1e-6, x)
        with pytest.raises(ValueError, match="do not fit"):
            kernels.rms_norm(x, None, 1e-6, x[:1])
    assert not x.any()
    assert {function.name for function in functions} == {"scale", "rms_norm"}
    x[...] = 1
    kernels.scale(x, 2.0)
    assert (x == 2).all()


def test_a_recording_does_not_notice_what_is_collected_meanwhile() -> None:
    """As when its first kernel is about to be compiled, and models list what they need."""
    cache, rows = np.zeros((2, 8, 1, 64), np.float32), np.ones((1, 1, 64), np.float32)
    out, position = np.empty_like(rows), np.zeros(1, np.int64)
    with program.record() as recorder:
        with program.collect() as functions:
            other = np.zeros((2, 8, 1, 64), np.float32)
            kernels.store_kv(rows, rows, *other, position)
            kernels.attention(rows, *other, position, 0, 1.0, out)
        assert not recorder.operations
        assert not recorder.rings
        assert not recorder._arrays
        kernels.store_kv(rows, rows, *cache, position)
    assert len(functions) == 3
    assert len(recorder.operations) == len(recorder.rings) == 1


def test_ctrl_c_ends_the_children_too(tmp_path: Path) -> None:
    script = "import os; os.setpgid(0, 0)\n" + START
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, ""], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        while not list(tmp_path.rglob("*.bin")):
            assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # ends when the last of them has closed it
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_model_that_is_closed_needs_nothing() -> None:
    engine = Engine.load(cache_size=0)
    assert engine._model in preparing.opened
    engine.close()
    assert engine._model not in preparing.opened


def test_a_model_that_is_gone_needs_nothing() -> None:
    class Model:
        def needed(self) -> set:
            raise AssertionError

    preparing.opened.add(Model())
    preparing.prepare()
