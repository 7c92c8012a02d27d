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

LOGITS = os.path.join(HERE, "logits.py")
# Recipe -> how far its logits may be, relative, from those of this machine: of our own decoder, and of ONNX graphs
RECIPES = {"float": 1e-5, "q4": 0.1}
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
        arguments = command(folder, BOARDS[name], os.path.join(HERE, "inside.py"), name)
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
def folders(tmp_path_factory):
    """Folder of a tiny E2B -> its logits on this machine: model folders, and ONNX folders of every recipe."""
    pytest.importorskip("onnx")
    from edge_gemma.export.convert import export_checkpoint
    from edge_gemma.export.onnx_folder import export_onnx
    from tests.tiny import write_checkpoint
    from tests.tiny_qat import write_qat_checkpoint

    at = tmp_path_factory.mktemp("logits")
    write_checkpoint(at / "source", "e2b")
    write_qat_checkpoint(at / "source-mobile")
    sources = {r: at / ("source-mobile" if r == "mobile" else "source") for r in ONNX_RECIPES}
    made = [export_onnx(source, at / f"onnx-{r}", r) for r, source in sources.items()]
    made += [export_checkpoint(sources[r], at / f"folder-{r}", r) for r in RECIPES]
    subprocess.run([sys.executable, LOGITS, str(at), *map(str, made)], check=True)
    return {path: np.load(f"{path}.npy") for path in made}


@pytest.fixture(scope="session")
def computed(folder, folders, tmp_path_factory):
    """computed(board) -> (where its logits are, a Pi 5's system calls); the boards run side by side."""
    started = {}
    for name, board in BOARDS.items():
        at = tmp_path_factory.mktemp(f"logits-{name}")
        trace = at / "calls" if name == "pi5" else None
        arguments = command(folder, board, LOGITS, at, *folders, trace=trace)
        with open(at / "output", "w") as output:
            started[name] = (
                at,
                subprocess.Popen(
                    arguments, env=environment(folder, board), stdin=subprocess.DEVNULL, stdout=output, stderr=output
                ),
            )

    def finished(name):
        at, process = started[name]
        end = ending(process.wait(timeout=LIMIT))
        assert end == "exit status 0", f"{name}: {end}; {(at / 'output').read_text(errors='replace')[-1000:]}"
        return at, at / "calls"

    yield finished
    for _, process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_gives_the_same_logits(folders, computed, board):
    """Every operator of every ONNX recipe has an implementation there. With int8 products two runs differ as
    everywhere."""
    at, _ = computed(board)
    for path, expected in folders.items():
        got = np.load(at / f"{path.name}.npy")
        backend, recipe = path.name.split("-")
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        print(f"{board} {path.name}: relative difference {error:.1e}")
        assert error < (ONNX_RECIPES if backend == "onnx" else RECIPES)[recipe]


# System calls whose first argument is an address the kernel wants on a page, and the one with an offset in a file.
ON_A_PAGE = re.compile(r" (?:mprotect|munmap|madvise|mremap|msync|mlock)\((0x[0-9a-f]+|\d+),")
MAPPED = re.compile(r" mmap\((\S+?),.*,(0x[0-9a-f]+|\d+)\) = ")


def off_the_page(calls, page_bytes):
    """Lines of system calls that name an address or an offset off a page: with such pages the kernel refuses them."""
    for line in calls:
        values = [m[1] for m in [ON_A_PAGE.search(line)] if m] or [m[2] for m in [MAPPED.search(line)] if m]
        if any(int(value, 0) % page_bytes for value in values):
            yield line.strip()


def test_pages_of_16_kb(folder, computed):
    """A Pi 5's kernel has them. The emulator tells programs their size, but does not refuse what they get wrong."""
    done = subprocess.run(
        command(folder, BOARDS["pi5"], "-c", "import mmap; print(mmap.PAGESIZE)"),
        env=environment(folder, BOARDS["pi5"]), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.stdout.strip() != str(BOARDS["pi5"].page_bytes):
        pytest.skip(f"this emulator has pages of {done.stdout.strip()} bytes only (QEMU 9 and later)")
    calls = computed("pi5")[1].read_text(errors="replace").splitlines()
    assert sum(" mmap(" in line for line in calls) > 100
    assert not list(off_the_page(calls, BOARDS["pi5"].page_bytes))
    mapped = "7 mmap(NULL,4096,PROT_READ,MAP_PRIVATE,3,0x1000) = 0x4000800000"
    unmapped = "7 munmap(0x0000004000801000,4096) = 0"
    assert list(off_the_page([mapped, unmapped], 16384)) == [mapped, unmapped]
