"""Voices: programs that read a text aloud, run as commands or reached as Wyoming servers.

Owns: how they are started, asked and stopped, errors of both. Does not know: clauses, loudspeakers.

None of them is imported: a command is another program with its own licence, a server speaks the Wyoming protocol
(github.com/OHF-Voice/wyoming; text-to-speech: `synthesize` is answered by `audio-start`, `audio-chunk`s, `audio-stop`).
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import wave
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from edge_gemma.errors import AudioError, UsageError
from edge_gemma.host.extras import imported

_OWN = {"espeak-ng": ["--stdin", "--stdout"], "espeak": ["--stdin", "--stdout"]}  # options, for a bare name
_FRAMES = 2048  # of a block
_SILENT_S = 30.0  # a voice that has sent nothing for so long is given up
_CONNECT_S = 5.0
_PORT = 10200
_LARGEST = 1 << 24  # bytes of one message of a server
_RATES = (1000, 192_000)  # Hz
_RATES_TOLD = f"{_RATES[0]} to {_RATES[1]}"


class Voice(Protocol):
    """Reads texts aloud, one at a time."""

    def speak(self, text: str) -> Iterator[tuple[np.ndarray, int]]:
        """Yields blocks of samples, int16 [n] of one channel, and their rate, Hz. Raises AudioError."""
        ...

    def stop(self) -> None:
        """End what is being spoken, from any thread: `speak` yields nothing more."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def named(name: str) -> Voice:
    """The voice of that name: `tcp://HOST[:PORT]` is a Wyoming server, "" what is installed, anything else a command.

    A command reads a text on its standard input and writes a WAV file to its standard output. Raises UsageError for a
    command that is not there, AudioError for a server that does not answer.
    """
    if "://" in name:
        return WyomingVoice(name)
    if name:
        return CommandVoice(name)
    if installed := next(filter(shutil.which, _OWN), None):
        return CommandVoice(installed)
    raise UsageError(
        'no voice was named and espeak-ng is not installed: apt install espeak-ng, or name one: "piper -m VOICE.onnx '
        '--output-file -", tcp://localhost:10200'
    )


class CommandVoice:
    """A command that is run for each text. The next one is started early: it loads its voice while nothing is said."""

    def __init__(self, command: str) -> None:
        """command: as in a shell, without its operators."""
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"the voice {command!r} cannot be read as a command: {error}") from None
        if not self._argv or shutil.which(self._argv[0]) is None:
            raise UsageError(f"the voice {command!r} is no command that is installed, nor tcp://HOST:PORT")
        self._name = self._argv[0]
        self._argv += _OWN.get(self._argv[0], []) if len(self._argv) == 1 else []
        self._lock = threading.Lock()
        self._next: _Run | None = self._start()
        self._now: _Run | None = None

    def _start(self) -> "_Run":
        try:
            return _Run(self._argv)
        except OSError as error:
            raise AudioError(f"the voice {self._name} cannot be run: {error.strerror or error}") from None

    def speak(self, text: str) -> Iterator[tuple[np.ndarray, int]]:
        """As `Voice.speak`."""
        with self._lock:
            run, self._next = self._next, None
            if run is not None and run.over:  # it did not wait for so long
                run.end()
                run = None
            self._now = run = run or self._start()
        try:
            run.write(text)
            with self._lock:
                if not run.ended:
                    self._next = self._start()
            yield from run.sound(self._name)
        finally:
            with self._lock:
                self._now = None
            run.end()

    def stop(self) -> None:
        """As `Voice.stop`."""
        with self._lock:
            if self._now is not None:
                self._now.kill()

    def close(self) -> None:
        """As `Voice.close`."""
        self.stop()
        with self._lock:
            if self._next is not None:
                self._next.end()
            self._next = None


class _Run:
    """One run of a command."""

    def __init__(self, argv: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads could hold it up
        self.ended = False
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for this program, which ends it
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def over(self) -> bool:
        """Whether the command has ended by itself."""
        return self._process.poll() is not None

    def write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what went wrong is told by `sound`
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.close()

    def sound(self, name: str) -> Iterator[tuple[np.ndarray, int]]:
        assert self._process.stdout is not None
        samples = 0
        try:
            with self._watched():
                opened = wave.open(self._process.stdout)  # noqa: SIM115
            with opened as file:
                channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
                if width != 2:
                    raise AudioError(f"the voice {name} writes samples of {8 * width} bits, expected 16")
                if not _RATES[0] <= rate <= _RATES[1]:
                    raise AudioError(f"the voice {name} writes {rate} samples a second, expected {_RATES_TOLD}")
                while data := self._read(file):
                    block = _one_channel(data, channels)
                    samples += len(block)
                    yield block, rate
        except (wave.Error, EOFError, OSError, ValueError) as error:
            if not self.ended:
                raise AudioError(f"the voice {name} has written no WAV file: {self._reason(error)}") from None
        if not samples and not self.ended:
            raise AudioError(f"the voice {name} has written no sound: {self._reason()}")

    def _read(self, file: wave.Wave_read) -> bytes:
        with self._watched():
            return file.readframes(_FRAMES)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Kills a command that sends nothing."""
        timer = threading.Timer(_SILENT_S, self._kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _reason(self, error: Exception | None = None) -> str:
        """What the command says is wrong."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._errors.seek(max(0, self._errors.seek(0, 2) - 1000))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        told = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return told[:200] or f"{error or ''} exit code {self._process.poll()}".strip()

    def kill(self) -> None:
        """End it, from any thread."""
        self.ended = True
        self._kill()

    def _kill(self) -> None:
        if hasattr(os, "killpg") and self._process.returncode is None:  # a shell's children hold its output open
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def end(self) -> None:
        """Kill it and free what it holds. For the thread that reads its sound."""
        self.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError, ValueError):
                file.close()  # type: ignore[union-attr]


class WyomingVoice:
    """A Wyoming server that speaks: wyoming-piper, Home Assistant's voices. One connection for each text."""

    def __init__(self, address: str) -> None:
        """address: `tcp://HOST[:PORT]`, port 10200 by default. Raises UsageError for another form, AudioError where no
        server answers, or one that has no voice.
        """
        try:
            parts = urlsplit(address)
            self._host, port = parts.hostname, parts.port
        except ValueError:
            self._host = port = None
        if "://" not in address or parts.scheme != "tcp" or not self._host or parts.path not in ("", "/"):
            raise UsageError(f"the voice is {address!r}, expected tcp://HOST:PORT or a command")
        self._port, self._name = port or _PORT, f"{self._host}:{port or _PORT}"
        self._events: Any = imported("wyoming.event", "a voice at an address", "voice", UsageError)
        self._connection: socket.socket | None = None
        self._stopped = False
        self._check()

    def _check(self) -> None:
        with self._connected(_CONNECT_S) as stream:
            self._events.write_event(self._events.Event("describe"), stream)
            while (event := self._next(stream)) is not None:
                if event.type == "info":
                    if not event.data.get("tts"):
                        raise AudioError(f"the server at {self._name} has no voice: it is another kind of server")
                    return
        raise AudioError(f"no Wyoming server answers at {self._name}")

    @contextlib.contextmanager
    def _connected(self, silent_s: float) -> Iterator[Any]:
        """silent_s: seconds without an answer after which the server is given up."""
        try:
            with socket.create_connection((str(self._host), self._port), _CONNECT_S) as connection:
                connection.settimeout(silent_s)
                self._connection = connection
                with connection.makefile("rwb") as stream:
                    yield _Bounded(stream)
        except OSError as error:
            if not self._stopped:
                reason = error.strerror or str(error) or type(error).__name__
                raise AudioError(f"the voice at {self._name} cannot be reached: {reason}") from None
        finally:
            self._connection = None

    def speak(self, text: str) -> Iterator[tuple[np.ndarray, int]]:
        """As `Voice.speak`."""
        self._stopped, samples = False, 0
        with self._connected(_SILENT_S) as stream:
            self._events.write_event(self._events.Event("synthesize", {"text": text}), stream)
            while (event := self._next(stream)) is not None and event.type != "audio-stop":
                if event.type == "error":
                    raise AudioError(f"the voice at {self._name}: {str(event.data.get('text'))[:200]}")
                if event.type == "audio-chunk":
                    block = self._block(event)
                    samples += len(block[0])
                    yield block
        if not samples and not self._stopped:
            raise AudioError(f"the voice at {self._name} has sent no sound")

    def _next(self, stream: Any) -> Any:
        """The next event, None at the end. Raises AudioError for what is none."""
        try:
            return self._events.read_event(stream)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise AudioError(f"the voice at {self._name} sends what is no Wyoming event: {error!r}") from None

    def _block(self, event: Any) -> tuple[np.ndarray, int]:
        rate, width, channels = (event.data.get(name) for name in ("rate", "width", "channels"))
        good = isinstance(rate, int) and _RATES[0] <= rate <= _RATES[1] and width == 2 and channels in (1, 2)
        if not good or not isinstance(event.payload or b"", bytes):
            sent = f"{width} bytes a sample, {channels} channels, {rate} Hz"
            raise AudioError(f"the voice at {self._name} sends sound of {sent}, expected 2 bytes and 1 or 2 channels")
        return _one_channel(event.payload or b"", channels), rate

    def stop(self) -> None:
        """As `Voice.stop`."""
        self._stopped = True
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As `Voice.close`."""
        self.stop()


class _Bounded:
    """A stream whose messages have a largest size."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.write, self.writelines, self.flush = stream.write, stream.writelines, stream.flush

    def readline(self) -> bytes:
        return bytes(self._stream.readline(_LARGEST))

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST:
            raise OSError(f"a message of {size} bytes")
        return bytes(self._stream.read(size))


def _one_channel(data: bytes, channels: int) -> np.ndarray:
    """Whole frames of 16-bit samples as one channel, the mean of theirs: int16 [n]."""
    whole = len(data) // (2 * channels) * 2 * channels
    return np.frombuffer(data[:whole], "<i2").reshape(-1, channels).mean(1).astype(np.int16)
