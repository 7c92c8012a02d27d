"""The process that compiles: reads names of chunk functions, writes their object files.

Owns: the protocol, both ends. Does not know: numba (compiler.py), which functions are needed (kernels/preparing.py).

A request is a line of JSON, [module, digest of its sources, name, choices]. An answer is ANSWER, whether it went well,
the number of bytes in 8 (little-endian), and these: an object file, or a line that says what was wrong. The process
ends when nobody can ask any more.
"""

import contextlib
import json
import os
import subprocess
import sys
from typing import BinaryIO

from edge_gemma.errors import KernelError
from edge_gemma.kernels import kept, targets
from edge_gemma.kernels.functions import ChunkFunction

ANSWER = b"edge"
CHANGED = "this program was changed while it ran: start it again"


class NoService(Exception):
    """There is no process to compile in."""


class Service:
    """A process that compiles. Raises NoService where it cannot be started, or does not answer any more."""

    def __init__(self) -> None:
        if getattr(sys, "frozen", False) or not sys.executable:
            raise NoService
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            # A group of its own: Ctrl-C is for the process that asked, which then ends this one.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import main; main({targets.host().name!r})"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0,
            )  # fmt: skip
        except OSError as error:
            raise NoService from error

    def compile(self, function: ChunkFunction) -> bytes:
        """The object file. Raises KernelError for a function that cannot be compiled."""
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None
        assert answer is not None
        request = [function.module, kept.sources_of(function.module), function.function, function.choices]
        try:
            ask.write(json.dumps(request).encode() + b"\n")
            ask.flush()
        except OSError as error:
            raise NoService from error
        head = answer.read(len(ANSWER) + 9)
        if len(head) < len(ANSWER) + 9 or not head.startswith(ANSWER):
            raise NoService
        size = int.from_bytes(head[-8:], "little")
        data = answer.read(size)
        if len(data) < size:
            raise NoService
        if not head[len(ANSWER)]:
            text = data.decode(errors="replace")
            error = KernelError(text.partition("\n")[0])
            error.add_note(text)  # all of it, for who develops kernels
            raise error
        return data

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        self._process.wait()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more requests."""
    from edge_gemma.kernels.compiled import compiler

    for line in requests:
        module, digest, name, choices = json.loads(line)
        try:
            if kept.sources_of(module) != digest:
                raise KernelError(CHANGED)
            good, data = True, compiler.machine_code(module, name, choices)
        except Exception as error:
            good, data = False, f"{name} {choices}: {type(error).__name__}: {error}".encode()
        answers.write(ANSWER + bytes([good]) + len(data).to_bytes(8, "little") + data)
        answers.flush()


def main(processor: str) -> None:
    """Compile for a processor (targets.py). Standard output is for answers: what else is printed goes to the other."""
    targets.use(processor)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve(sys.stdin.buffer, answers)
