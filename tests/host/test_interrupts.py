"""Ctrl-C while kernels compile or load: never lost, and acted on at once afterwards."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from edge_gemma.host import interrupts
from tests import ROOT


def press() -> None:
    """Ctrl-C, handled before this returns."""
    signal.raise_signal(signal.SIGINT)


def test_it_arrives_at_the_end_of_the_block() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        press()
        press()
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_does_not_swallow_it() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held():  # noqa: PT012
        press()
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_a_handler_of_the_program_is_called_once_and_kept() -> None:
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts.held():
            press()
            assert not calls
        assert calls == [signal.SIGINT]
        with interrupts.held(), interrupts.held():
            press()
        assert calls == [signal.SIGINT] * 2
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.held():
            press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing_and_do_not_fail() -> None:
    seen: list[object] = []

    def work() -> None:
        with interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [signal.default_int_handler]


# LLVM calls back into Python when it loads what numba compiled: here the key is pressed in every such call, and where a
# process that can start no other compiles.
IN_A_CALLBACK = """
import os, signal, sys
from pathlib import Path
from numba.core.codegen import CPUCodeLibrary
signal.signal(signal.SIGINT, signal.default_int_handler)
pressed = []
def pressing(owner, name):
    call = getattr(owner, name)
    def wrapped(*arguments, **named):
        pressed.append(1)
        signal.raise_signal(signal.SIGINT)
        return call(*arguments, **named)
    setattr(owner, name, wrapped)
pressing(CPUCodeLibrary, "_object_compiled_hook")
pressing(CPUCodeLibrary, "_object_getbuffer_hook")
from edge_gemma import kernels
from edge_gemma.kernels import gates, kept
from edge_gemma.kernels.compiled import compiler
from edge_gemma.quant import feedback
pressing(compiler, "_emit")
sys.frozen = True
kernels.set_cache_root(Path(sys.argv[1]))
kept.SHIPPED = Path(sys.argv[1], "none")
for act in (lambda: gates._softcap_chunk.address, lambda: gates._scale_chunk.address, feedback.compile_kernels):
    pressed.clear()
    try:
        act()
        print("lost" if pressed else "not pressed", flush=True)
    except KeyboardInterrupt:
        print("arrived", flush=True)
"""


def test_none_is_lost_in_a_callback_of_llvm(tmp_path) -> None:
    """What is loaded from the cache is no business of LLVM's, but for the exporter's functions."""
    for expected in (["arrived"] * 3, ["not pressed", "not pressed", "arrived"]):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_CALLBACK, str(tmp_path)], capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.stdout.split("\n")[:3] == expected, (done.stdout, done.stderr)
        assert "ignored" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a process gets Ctrl-C with its whole console there")
@pytest.mark.parametrize("seconds", [0.8, 1.6, 2.4])
def test_a_command_that_compiles_ends_with_130(tmp_path, seconds: float) -> None:
    script = f"from pathlib import Path\nfrom edge_gemma.kernels import kept\nkept.SHIPPED = Path({str(tmp_path)!r})\n"
    script += "from edge_gemma.cli.main import main\nmain()"
    command = [sys.executable, "-c", script, "run", "--max-tokens", "400", "Hello"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        run.stderr.readline()  # "(compiling the kernels ...)"
        time.sleep(seconds)
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert "ignored" not in errors
    assert time.monotonic() - start < 60


def test_what_numba_compiles_is_compiled_in_two_places() -> None:
    """Which hold Ctrl-C meanwhile."""
    root, words = ROOT, r"\.kernel_signature|\bCFunc\b|numba\.(vectorize|cfunc)|compile_extra\(|create_mcjit_compiler"
    paths = [file for folder in ("edge_gemma", "export", "quant") for file in (root / folder).rglob("*.py")]
    found = {path.relative_to(root).as_posix() for path in paths if re.search(words, path.read_text())}
    loads = "edge_gemma/kernels/machine_code.py"  # on systems other than Linux
    assert found == {"edge_gemma/kernels/compiled/compiler.py", "quant/compiling.py", loads}
