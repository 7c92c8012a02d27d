"""The screen, and whole processes: signals, closed pipes, a person at a real terminal."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from edge_gemma.cli.screen import Screen
from edge_gemma.text.reply import Piece
from tests import ROOT

SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from tests.fakes import FakeEngine, FakeSession
from edge_gemma.cli import main, options
step = FakeSession.step
def slow(self, token):
    time.sleep(0.02)
    return step(self, token)
FakeSession.step = slow
engine = FakeEngine("y" * 3000, "done")
options.load_engine = lambda model, **given: engine
main.main()
"""


def start(*arguments, **options):
    code = [sys.executable, "-c", SLOW.format(root=str(ROOT)), *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(code, **pipes)


def test_sigint_stops_the_answer_and_the_chat_goes_on():
    with start("chat") as process:
        process.stdin.write(b"Tell me\n")
        process.stdin.flush()
        assert process.stdout.read(1) == b"y"
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"More\n")
        process.stdin.close()
        rest, told = process.stdout.read().decode(), process.stderr.read().decode()
        assert process.wait(60) == 0, told
    assert rest.lstrip("y") == "\ndone\n"
    assert "(stopped)" in told
    assert "Traceback" not in told


def test_sigint_ends_run_with_130():
    with start("run", "Tell me") as process:
        assert process.stdout.read(1) == b"y"
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode()
        assert process.stdout.read().strip(b"y") == b"\n"
        assert (process.wait(60), told) == (130, "interrupted\n")


def test_a_closed_pipe_is_no_traceback():
    with start("run", "Tell me") as process:
        assert process.stdout.read(1) == b"y"
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait(60) == 1
        assert told == ""


class Terminal:
    """A person at a terminal: reads the screen until it shows something, types."""

    def __init__(self, *arguments):
        self.screen = ""
        self.master, slave = pty.openpty()
        self.process = start(*arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)

    def until(self, text, seconds=60):
        deadline = time.monotonic() + seconds
        while text not in self.screen and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        assert text in self.screen, self.screen
        before, _, self.screen = self.screen.partition(text)
        return before

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt_until_it_leaves(self):
        """readline misses a signal that comes after its prompt was written and before it waits for a key."""
        while self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)

    def leave(self):
        code = self.process.wait(60)
        os.close(self.master)
        return code


@pytest.mark.parametrize("farewell", ["\x03", "\x04", "/quit\n"])
def test_at_a_terminal(farewell):
    terminal = Terminal("chat")
    terminal.until("> ")
    terminal.type("Tell me\n")
    terminal.until("yyy")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.type("More\n")
    terminal.until("done")
    terminal.until("> ")
    if farewell == "\x03":
        terminal.interrupt_until_it_leaves()
    else:
        terminal.type(farewell)
    assert terminal.leave() == 0


def test_a_model_cannot_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    screen = Screen()
    screen.show(Piece("answer", "a\x1b[2Jb\x07\x9bc\r\n\td"))
    assert capsys.readouterr().out == "a[2Jbc\n\td"


def test_status_lines_give_way(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen, clear = Screen(), "\r\x1b[K"
    screen.prefilled(0, 1200)
    screen.prefilled(512, 1200)
    screen.prefilled(1200, 1200)
    screen.show(Piece("reasoning", "a"))
    screen.show(Piece("reasoning", "b"))
    screen.show(Piece("answer", "c"))
    screen.end()
    out, err = capsys.readouterr()
    shown = [part.replace("\x1b[2m", "").replace("\x1b[0m", "") for part in err.split(clear)]
    assert shown == [
        "",
        "reading 0 of 1200 tokens",
        "reading 512 of 1200 tokens",
        "",
        "thinking (1)",
        "thinking (2)",
        "",
    ]
    assert out == "c\n"
