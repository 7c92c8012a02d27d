"""The first start: several processes compile what a model needs; whatever happens to one, the model answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_gemma import Engine, kernels
from edge_gemma.errors import KernelError
from edge_gemma.kernels import functions, kept, machine_code, preparing
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import Operation
from tests import ROOT

# A process with an empty cache in which nothing comes with the package. It notes who compiles what.
START = """
import json, pathlib, sys, time
from edge_gemma import Engine, kernels
from edge_gemma.host import cpus
from edge_gemma.kernels import kept, preparing
from edge_gemma.kernels.compiled.service import Service
root, how = pathlib.Path(sys.argv[1]), sys.argv[2]
kernels.set_cache_root(root)
kept.SHIPPED = root / "none"
cpus.available = lambda: 3
processes, asked, here = [], [], []
start, compile, alone = Service.__init__, Service.compile, preparing._here
def started(service):
    start(service)
    processes.append(service._process.pid)
    print("started", service._process.pid, file=sys.stderr, flush=True)
def compiled(service, function):
    asked.append(function.name)
    if how == "all killed" or (how == "one killed" and len(asked) == 5):
        service._process.kill()
    return compile(service, function)
Service.__init__, Service.compile = started, compiled
preparing._here = lambda function: here.append(function.name) or alone(function)
if how == "frozen":
    sys.frozen = True
if how == "no executable":
    sys.executable = ""
"""
MODEL = """
logits = Engine.load(cache_size=0).session().prefill(list(range(20, 50)))
if how == "unwritable":
    Engine.load(cache_size=0).session().prefill([20, 21])
"""
KERNELS = """
x = np.full((1, 8), 3, np.float32)
for _ in range(2):
    kernels.scale(x, 2.0)
    kernels.rms_norm(x, None, 1e-6, x)
logits = x
"""
END = """
files = len(list(root.rglob("*.code"))) if root.is_dir() else 0
print(json.dumps([len(processes), asked, here, files, int(logits.argmax())]))
"""


def started(folder: Path, how: str, script: str = MODEL) -> tuple[int, list[str], list[str], int, int]:
    """Processes, the functions that they were asked for, those compiled by the first one itself, files, the answer."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import numpy as np\n{START}{script}{END}", folder, how],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.slow
def test_several_processes_compile_what_this_one_loads(tmp_path: Path) -> None:
    processes, asked, here, files, answer = started(tmp_path / "a", "")
    assert processes == 3
    assert here == []
    assert len(asked) == len(set(asked)) == files > 20
    assert started(tmp_path / "a", "") == (0, [], [], files, answer)  # all of it is there
    processes, asked, here, same_files, same = started(tmp_path / "b", "one killed")
    assert here == []
    assert len(asked) == files + 1  # what it was at
    assert len(set(asked)) == same_files == files
    assert same == answer


@pytest.mark.slow
def test_where_processes_are_killed_this_one_compiles(tmp_path: Path) -> None:
    processes, _, here, files, _ = started(tmp_path, "all killed")
    assert processes > 3
    assert len(here) == len(set(here)) == files > 10


@pytest.mark.parametrize("how", ["frozen", "no executable"])
def test_where_no_process_can_be_started_this_one_compiles(tmp_path: Path, how: str) -> None:
    processes, _, here, files, _ = started(tmp_path, how, KERNELS)
    assert processes == 0
    assert {"scale", "rms_norm"} <= set(here)
    assert len(here) == len(set(here)) == files
    assert started(tmp_path, how, KERNELS)[2] == []


@pytest.mark.slow
def test_without_a_cache_each_function_is_compiled_once(tmp_path: Path) -> None:
    """By whichever model needs it."""
    (tmp_path / "file").write_text("in the way")
    processes, asked, here, files, _ = started(tmp_path / "file", "unwritable")
    assert 3 <= processes <= 4  # one more for what nobody listed
    assert here == []
    assert files == 0
    assert len(asked) == len(set(asked)) > 20


def test_a_function_that_cannot_be_compiled_is_an_error_that_says_why() -> None:
    for module, why in (("kernels.compiled.gates", "has no attribute 'nothing'"), ("kernels.nothing", "No module")):
        with pytest.raises(KernelError, match=f"nothing.*{why}"):
            _ = ChunkFunction(module, "nothing", ()).address


EDITED = """
import pathlib
import edge_gemma
from edge_gemma import kernels
from edge_gemma.kernels import kept
assert pathlib.Path(kept.__file__).is_relative_to(sys.argv[1]), kept.__file__
kernels.set_cache_root(pathlib.Path(sys.argv[1], "cache"))
sys.frozen = sys.argv[2] == "frozen"
from edge_gemma.errors import KernelError
from edge_gemma.kernels.functions import chunk_function
function = chunk_function("kernels.compiled.gates", "scale")
print(function.kept)
with pathlib.Path(sys.argv[1], "edge_gemma", "kernels", "compiled", "gates.py").open("a") as file:
    file.write("# edited" + chr(10))
try:
    print(function.address > 0)
except KernelError as error:
    print(error)
print(*pathlib.Path(sys.argv[1]).rglob("scale-*"))
"""


@pytest.mark.parametrize("how", ["a process", "frozen"])
def test_sources_that_were_edited_while_the_program_ran_are_not_compiled(tmp_path: Path, how: str) -> None:
    """Their code would be kept under the name of what they were."""
    shutil.copytree(
        ROOT / "edge_gemma", tmp_path / "edge_gemma", ignore=shutil.ignore_patterns("demo", "shipped", "__pycache__")
    )
    script = f"import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}\n{EDITED}"
    command = [sys.executable, "-S", "-c", script, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kept, refused, files = done.stdout.split("\n")[:3]
    assert kept == "False"
    assert refused.endswith("this program was changed while it ran: start it again")
    assert files == ""


ANSWER = """
import subprocess, sys
from edge_gemma.cli.main import cli
from edge_gemma.kernels.compiled import service
if sys.argv[1] == "warm":
    service.subprocess = None  # no process can be started
cli(["run", "--max-tokens", "12", "Hello"], standalone_mode=False)
print(sorted({name.split(".")[0] for name in sys.modules} & {"numba", "llvmlite", "onnxruntime"}))
"""


def test_an_answer_needs_neither_numba_nor_llvm() -> None:
    """Where the code is on disk: from the first word to the last."""
    for start in ("as it is", "warm"):
        command, environment = [sys.executable, "-c", ANSWER, start], os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        *answer, loaded = done.stdout.splitlines()
        assert "".join(answer).strip()
        assert loaded == "[]"


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


@pytest.mark.skipif(os.name == "nt", reason="a process gets Ctrl-C with its whole console there")
def test_ctrl_c_ends_the_processes_and_the_command(tmp_path: Path) -> None:
    """It is pressed for all that runs in the terminal's foreground."""
    command = [sys.executable, "-c", f"import os; os.setpgid(0, 0)\n{START}{MODEL}", tmp_path, ""]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        while not list(tmp_path.rglob("*.code")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    *lines, last = errors.splitlines()
    assert last == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1, errors
    processes = [int(line.split()[1]) for line in lines if line.startswith("started ")]
    assert len(processes) == 3
    for number in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_a_model_that_is_closed_needs_nothing() -> None:
    engine = Engine.load(cache_size=0)
    assert engine._model in preparing.opened
    engine.close()
    assert engine._model not in preparing.opened


def test_a_model_that_is_gone_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def needed(self) -> set:
            raise AssertionError

    preparing.opened.add(Model())
    monkeypatch.setattr(preparing, "_alone", lambda function: b"code")
    assert functions.compile_with is preparing.compiled
    assert preparing.compiled(ChunkFunction("kernels.compiled.gates", "of nobody", ())) == b"code"


def test_what_a_model_needs_is_compiled_with_the_first_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, count: int) -> None:
            self.count = count

        def needed(self) -> set:
            return {ChunkFunction("kernels.compiled.gates", f"nobody's {i}", ()) for i in range(self.count)}

    compiled: list[int] = []
    monkeypatch.setattr(preparing, "_alone", lambda function: b"code")
    monkeypatch.setattr(preparing, "compile_all", lambda functions, processes: compiled.append(len(functions)))
    first = ChunkFunction("kernels.compiled.gates", "nobody's first", ())

    def use(model: Model) -> list[int]:
        """How many functions are compiled together when the first one is asked for, and asked for again."""
        compiled.clear()
        preparing.opened.add(model)
        preparing.compiled(first)
        preparing.compiled(first)
        return compiled

    assert use(Model(5)) == []  # not worth a process
    assert use(Model(6)) == [7]
    made = {function.file: b"code" for function in Model(2).needed()}  # which could not be kept
    monkeypatch.setattr(preparing, "_made", made)
    assert use(Model(7)) == []
    assert use(Model(8)) == [7]


def test_code_that_our_reader_does_not_know_is_loaded_by_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another LLVM may write it."""
    function = ChunkFunction("kernels.compiled.gates", "scale", ())
    code = kept.read(function.file) or preparing.compiled(function)

    def refused(_: bytes) -> int:
        raise machine_code.Unreadable("a relocation of kind 4711")

    monkeypatch.setattr(machine_code, "load", refused)
    x = np.ones((1, 8), np.float32)
    found = functions._in_memory(code)
    function.__dict__["address"] = found
    program.call([Operation(function, (x, x.size, 3.0), (x,), (x,))])
    assert (x == 3).all()
