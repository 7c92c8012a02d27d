"""A part of the tests as AArch64 code, emulated: as on a Raspberry Pi 5 (Cortex-A76) and on a Pi 4 (Cortex-A72).

What is run, how, and what it cannot show: docs/ARM.md. Both boards run side by side, in the background of this file's
tests.
"""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.aarch64.prepare import BOARDS, Unavailable, command, default_folder, environment, prepare

HERE = os.path.dirname(__file__)
TAIL, WIDTH = 60, 200  # lines of output in a failure, and characters of a line
LIMIT = 3600  # seconds, of a run that hangs; how long one takes: docs/ARM.md

# ONNX recipe -> how far its logits may be, relative, from those of this machine
ONNX_RECIPES = {"float": 1e-5, "float16": 1e-5, "q8": 0.1, "q4": 0.1, "q2mix": 0.2, "mobile": 0.1}

pytestmark = [pytest.mark.aarch64, pytest.mark.timeout(LIMIT + 900)]

# mmap a page, write `sdot v0.4s, v1.16b, v2.16b; ret` into it and call it.
SDOT = """
import ctypes, mmap
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("2094824e c0035fd6"))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@pytest.fixture(scope="session")
def folder():
    try:
        return prepare(default_folder())
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def runs(request, folder, tmp_path_factory):
    """Board name -> (process of tests/aarch64/inside.py, path of its output), for the boards of this session."""
    started = {}
    wanted = {item.callspec.params["board"] for item in request.session.items if "runs" in item.fixturenames}
    for name in sorted(wanted, reverse=True):
        output = tmp_path_factory.mktemp(name) / "output"
        arguments = command(folder, BOARDS[name], os.path.join(HERE, "aarch64", "inside.py"), name)
        with open(output, "w") as file:
            process = subprocess.Popen(
                arguments, env=environment(folder, BOARDS[name]), cwd=output.parent, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        started[name] = process, output
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def ending(returncode: int) -> str:
    return f"exit status {returncode}" if returncode >= 0 else signal.Signals(-returncode).name


@pytest.mark.parametrize("board", BOARDS)
def test_the_emulated_processor_has_sdot_or_traps(folder, board):
    """Otherwise a Pi 4's kernels could hold instructions that a Pi 4 has not, and pass."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))" + SDOT
    done = subprocess.run(
        command(folder, BOARDS[board], "-c", code), env=environment(folder, BOARDS[board]), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert ending(done.returncode) == {"pi5": "exit status 0", "pi4": "SIGILL"}[board], done.stderr


@pytest.mark.parametrize("board", BOARDS)
def test_the_chosen_tests_pass_on_a_board(runs, board):
    process, output = runs[board]
    try:
        end = ending(process.wait(timeout=LIMIT))
    except subprocess.TimeoutExpired:
        end = f"no end within {LIMIT} s"
    lines = output.read_text(errors="replace").splitlines()
    tail = "\n".join(line[:WIDTH] for line in lines[-TAIL:])
    assert end == "exit status 0", f"{board}: {end}; the last lines of its output:\n{tail}"
    assert re.search(r"\d+ passed", lines[-1]), tail
    assert "skipped" not in lines[-1], tail


@pytest.fixture(scope="session")
def onnx_folders(tmp_path_factory):
    """Recipe -> an ONNX folder of a tiny E2B, and its logits on this machine beside it."""
    pytest.importorskip("onnx")
    from edge_gemma.export.onnx_folder import export_onnx
    from tests.tiny import write_checkpoint
    from tests.tiny_qat import write_qat_checkpoint

    at = tmp_path_factory.mktemp("onnx")
    write_checkpoint(at / "source", "e2b")
    write_qat_checkpoint(at / "source-mobile")
    made = {r: export_onnx(at / ("source-mobile" if r == "mobile" else "source"), at / r, r) for r in ONNX_RECIPES}
    subprocess.run(
        [sys.executable, os.path.join(HERE, "aarch64", "onnx_logits.py"), *map(str, made.values())], check=True
    )
    return {recipe: (path, np.load(f"{path}.npy")) for recipe, path in made.items()}


@pytest.mark.parametrize("board", BOARDS)
def test_onnx_graphs_give_the_same_logits_on_a_board(folder, onnx_folders, board):
    """Every operator of every recipe has an implementation there. With int8 products two runs differ as everywhere."""
    script = os.path.join(HERE, "aarch64", "onnx_logits.py")
    done = subprocess.run(
        command(folder, BOARDS[board], script, *(path for path, _ in onnx_folders.values())),
        env=environment(folder, BOARDS[board]), capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    for recipe, (path, expected) in onnx_folders.items():
        got = np.load(f"{path}.npy")
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        print(f"{board} {recipe}: relative difference {error:.1e}")
        assert error < ONNX_RECIPES[recipe]
