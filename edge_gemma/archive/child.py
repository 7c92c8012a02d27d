"""A process that works: a request that ends it ends nothing else.

A `Child` is held by the command, or by a Dask worker. It starts its process when there is work, and a new one after the
process has ended. The process ends when its holder does, however that is.

Owns: starting the process, what goes through the pipe, telling which work ended a process. Does not know: what is
worked, who hands it out (crew.py, dask_crew.py), how often it is tried (run.py).

Work that is suspected to end processes is done alone: nothing else is then in the process that could have ended it.
"""

import itertools
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.host.pool import Pool

_STARTS = 3  # processes in a row that may end before they are ready
_LAST_LINE = 300  # characters of what a process wrote before it ended
AHEAD = 4  # values of a stream that wait for whoever reads it

Emit = Callable[[Any], None]
Do = Callable[[Any, Emit], Any]


class Charge(Protocol):
    """What a process is started for. It is pickled, and so are works and what becomes of them."""

    @property
    def slots(self) -> int:
        """How many works are done at a time."""
        ...

    def open(self) -> Do:
        """In the process: prepare, and return the function that does a work. Raises EdgeGemmaError.

        The function is called by any of `slots` threads, with a work and what it may emit values with.
        """
        ...


class CrashedError(EdgeGemmaError):
    """The process ended while it worked."""


class NotStartedError(EdgeGemmaError):
    """The process cannot be started: nothing can be done here."""


class FailedError(EdgeGemmaError):
    """The work cannot be done, wherever it is tried."""


class Child:
    """A process, started when it is needed. Any thread may call; `slots` of them work at a time."""

    def __init__(self, charge: Charge) -> None:
        self.charge = charge
        self.running = 0  # works in the process
        self._changed = threading.Condition()
        self._alone, self._suspects = False, 0  # a work is done alone; so many wait for that
        self._process: _Process | None = None
        self._starting = threading.Lock()
        self._closed = False

    def do(self, work: Any, *, alone: bool = False) -> Any:
        """Do a work. alone: nothing else is done in the process meanwhile.

        Raises FailedError, one line; CrashedError if the process ended meanwhile; NotStartedError if there is none.
        """
        with self._place(alone):
            return self._opened().answer(work)

    def start(self) -> None:
        """Start the process now. Raises NotStartedError, one line."""
        self._opened()

    def stream(self, work: Any) -> Generator[Any, None, None]:
        """Do a work, and yield the values that it emits. Raises as `do`. Not read to its end, the process is ended."""
        with self._place(alone=False):
            process = self._opened()
            over = False
            try:
                yield from process.values(work)
                over = True
            except EdgeGemmaError:
                over = True
                raise
            finally:
                if not over:
                    process.kill()

    def close(self) -> None:
        """End the process, whatever it does. Work that waits raises CrashedError."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """The process, None if there is none."""
        return None if self._process is None or self._process.ended else self._process.popen.pid

    @contextmanager
    def _place(self, alone: bool) -> Iterator[None]:
        with self._changed:
            most = 1 if alone else self.charge.slots
            self._suspects += alone
            while self._alone or self.running >= most or (self._suspects and not alone):
                self._changed.wait()  # others come after those that are done alone, which would wait for ever
            self._suspects -= alone
            self.running, self._alone = self.running + 1, alone
        try:
            yield
        finally:
            with self._changed:
                self.running -= 1
                self._alone = False
                self._changed.notify_all()

    def _opened(self) -> "_Process":
        with self._starting:
            for left in reversed(range(_STARTS)):
                if self._closed:
                    raise CrashedError("the work was ended")
                if self._process is not None and not self._process.ended and not self._process.killed:
                    return self._process
                try:
                    self._process = _Process(self.charge)
                except OSError as error:
                    raise NotStartedError(f"no process can be started: {reason(error)}") from None
                if self._closed:  # meanwhile
                    self._process.kill()
                try:
                    self._process.wait()
                    return self._process
                except CrashedError as error:
                    if not left and not self._closed:
                        raise NotStartedError(f"the process that works cannot be started: {error}") from None
            raise CrashedError("the work was ended")


class _Process:
    """One life of a child."""

    def __init__(self, charge: Charge) -> None:
        with ExitStack() as stack:
            self._log = stack.enter_context(_log())
            ours, theirs = Pipe()
            stack.callback(ours.close)
            with theirs:
                self.popen = subprocess.Popen(
                    # -P: nothing that lies in the working folder is taken for a module
                    [sys.executable, "-P", "-m", "edge_gemma.archive.child", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                    pass_fds=[theirs.fileno()], start_new_session=True,  # Ctrl-C is for the command
                )  # fmt: skip
            self._held = stack.pop_all()  # until the process ends
        self._connection = ours
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.Queue[tuple[str, Any]]] = {}
        self._guard = threading.Lock()  # of the waiting, and of `ended`
        self.ended = ""  # how, once it has
        self.killed = False
        self._ready = self._expect()[1]
        self._charge = charge
        threading.Thread(target=self._receive, daemon=True).start()

    def wait(self) -> None:
        """Until the process is ready. Raises NotStartedError, one line, or CrashedError."""
        self._send(self._charge)
        kind, value = self._ready.get()
        if kind != "ready":
            self.kill()
            raise (CrashedError if kind == "crashed" else NotStartedError)(value)

    def answer(self, work: Any) -> Any:
        """What becomes of a work that emits nothing. Raises as Child.do."""
        number, answers = self._expect()
        self._send((number, work))
        kind, value = answers.get()
        return _value(kind, value)

    def values(self, work: Any) -> Iterator[Any]:
        """What a work emits. Raises as Child.do."""
        number, answers = self._expect(AHEAD)
        self._send((number, work))
        while (answer := answers.get())[0] == "value":
            yield answer[1]
        _value(*answer)

    def kill(self) -> None:
        """End it now. It may take a moment until it has ended: it gets no more work."""
        self.killed = True
        with suppress(OSError):
            self.popen.kill()

    def _expect(self, ahead: int = 0) -> "tuple[int, queue.Queue[tuple[str, Any]]]":
        number, answers = next(self._numbers), queue.Queue[tuple[str, Any]](ahead)
        with self._guard:
            if self.ended:
                raise CrashedError(self.ended)
            self._waiting[number] = answers
        return number, answers

    def _send(self, message: Any) -> None:
        with self._sending, suppress(OSError):  # of a process that has ended, which `_receive` tells
            self._connection.send(message)

    def _receive(self) -> None:
        """In a thread of its own: hand on what the process says, until it ends."""
        with suppress(Exception):  # its end, or what cannot be read: then it is ended
            while True:
                number, kind, value = self._connection.recv()
                self._hand_on(number, kind, value)
        self.kill()
        self.popen.wait()
        with self._guard:
            self.ended = self._how()
            waiting, self._waiting = self._waiting, {}
        with self._sending:  # who sends a long message must not find it closed amid it
            self._held.close()
        for answers in waiting.values():
            _put(answers, ("crashed", self.ended))

    def _hand_on(self, number: int, kind: str, value: Any) -> None:
        with self._guard:
            answers = self._waiting[number] if kind == "value" else self._waiting.pop(number)
        while True:
            try:
                answers.put((kind, value), timeout=1)  # whoever reads is slow: so is the process
                return
            except queue.Full:
                if self.popen.poll() is not None:  # nobody reads any more
                    return

    def _how(self) -> str:
        """How the process ended, with the last line that it wrote."""
        code = self.popen.returncode
        told = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                told = signal.Signals(-code).name
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the process ended ({told})" + (f": {last:.{_LAST_LINE}}" if last else "")


def _log() -> IO[bytes]:
    """A file for what a process writes: in memory where there is that, as nothing belongs on the disk."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("edge-gemma"), "w+b")
    return tempfile.TemporaryFile()


def _put(answers: "queue.Queue[tuple[str, Any]]", answer: tuple[str, Any]) -> None:
    """Put what ends a stream, even where it is full: its last values are not needed."""
    while True:
        try:
            answers.put_nowait(answer)
            return
        except queue.Full:
            with suppress(queue.Empty):
                answers.get_nowait()


def _value(kind: str, value: Any) -> Any:
    if kind == "done":
        return value
    raise {"crashed": CrashedError, "failed": FailedError}.get(kind, NotStartedError)(value)


def reason(error: BaseException) -> str:
    """An error in one line. What is no error of ours is told with its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, EdgeGemmaError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text}"


def _work(descriptor: int) -> None:
    """The process: do what comes through the pipe until it is closed."""
    connection, sending = Connection(descriptor), threading.Lock()

    def send(number: int, kind: str, value: Any) -> None:
        with sending, suppress(OSError):
            connection.send((number, kind, value))

    try:
        charge = connection.recv()
        do = charge.open()
    except EOFError:
        return
    except Exception as error:
        send(0, "not started", reason(error))
        return
    send(0, "ready", None)

    def work(number: int, what: Any) -> None:
        try:
            send(number, "done", do(what, lambda value: send(number, "value", value)))
        except BaseException as error:  # SystemExit too, and a result that cannot be sent: whoever asked waits
            send(number, "failed", reason(error))

    pool = Pool(charge.slots)
    with suppress(EOFError, OSError):
        while True:
            pool.submit(work, *connection.recv())
    os._exit(0)  # whoever held it is gone: nothing of what is being done is needed


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work(int(sys.argv[1]))
