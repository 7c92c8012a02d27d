"""A microphone as a stream of 16 kHz mono blocks.

Owns: the capture device (PortAudio through sounddevice), the queue between its callback and the reader, errors of both.
Does not know: what is done with the sound.

The callback runs in PortAudio's own thread and only enqueues: nothing that could make it late happens there. The queue
holds two minutes. A reader that falls further behind loses the newest sound, and `note` says so.
"""

import queue
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.samples import Converter, Note, silent
from edge_gemma.errors import AudioError
from edge_gemma.host.extras import imported

PIECE_MS = 32  # milliseconds of sound in one callback
_QUEUE_S = 120
_STALLED_S = 5.0  # seconds without any sound after which the device counts as gone
_BLOCK = SAMPLE_RATE // 2  # the most samples in a block, when sound has piled up


@dataclass(frozen=True)
class Device:
    """A microphone or a loudspeaker of this machine. rate: its own sample rate, Hz."""

    index: int
    name: str
    channels: int
    rate: int
    default: bool


def portaudio() -> Any:
    """The sounddevice package. Raises AudioError if it or PortAudio cannot be loaded."""
    remedy = "the PortAudio library is missing where nothing else is said: apt install libportaudio2, or its like"
    return imported("sounddevice", "a microphone", "mic", AudioError, remedy)


def devices(output: bool = False) -> list[Device]:
    """All microphones, or all loudspeakers. Raises AudioError if sounddevice or PortAudio cannot be loaded."""
    sounddevice = portaudio()
    try:
        default = sounddevice.default.device[output]
        channels = "max_output_channels" if output else "max_input_channels"
        return [
            Device(i, d["name"], d[channels], int(d["default_samplerate"]), i == default)
            for i, d in enumerate(sounddevice.query_devices())
            if d[channels] > 0
        ]
    except sounddevice.PortAudioError as error:
        raise AudioError(f"the system's sound devices cannot be listed: {reason_of(error)}") from None


class Microphone:
    """An open microphone. Iterating yields float32 [n] blocks of 16 kHz mono until `close` is called, by any thread.

    Iterating raises AudioError when the device goes away, after yielding what was captured before.
    """

    def __init__(self, device: int | str | None = None, note: Note = silent) -> None:
        """device: an index, a part of a name, None for the system's default. note is called when sound was lost.

        Raises AudioError if there is no such device or it cannot be opened.
        """
        self._sounddevice = portaudio()
        self._note = note
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0  # frames the queue had no room for
        self._overflows = 0  # times the system lost sound before the callback
        self._closed = False
        info = self._info(device)
        self.name = str(info["name"])
        self._stream = self._open(info)
        self._converter = Converter(self.rate)

    def _info(self, device: int | str | None) -> dict[str, Any]:
        try:
            return self._sounddevice.query_devices(device, "input")
        except (ValueError, self._sounddevice.PortAudioError) as error:
            wanted = "the default microphone" if device is None else f"the microphone {device!r}"
            raise AudioError(f"{wanted} cannot be used: {reason_of(error)}; edge-gemma listen --list-devices") from None

    def _open(self, info: dict[str, Any]) -> Any:
        """Start capturing: 16 kHz mono if the device can, else its own rate and channels."""
        own, most = int(info["default_samplerate"]), int(info["max_input_channels"])
        reason = ""
        for rate, channels in ((SAMPLE_RATE, 1), (own, 1), (own, min(2, most)), (own, most)):
            self.rate, self.channels = rate, channels
            self._limit = _QUEUE_S * 1000 // PIECE_MS
            try:
                stream = self._sounddevice.RawInputStream(
                    samplerate=rate,
                    blocksize=rate * PIECE_MS // 1000,
                    device=info["index"],
                    channels=channels,
                    dtype="int16",
                    latency="high",  # PortAudio's own buffer, not a delay of ours: room for a busy machine
                    callback=self._captured,
                    finished_callback=self._finished,
                )
                stream.start()
                return stream
            except self._sounddevice.PortAudioError as error:
                reason = reason_of(error)
        raise AudioError(f"the microphone {self.name!r} cannot be opened: {reason}")

    def _captured(self, data: Any, frames: int, clock: Any, status: Any) -> None:
        """PortAudio's callback."""
        if status.input_overflow:
            self._overflows += 1
        if self._pieces.qsize() < self._limit:
            self._pieces.put(bytes(data))
        else:
            self._dropped += frames

    def _finished(self) -> None:
        """PortAudio's callback when the stream ends, by `close` or by itself."""
        self._pieces.put(None)

    def __iter__(self) -> Iterator[np.ndarray]:
        pieces: list[bytes] | None = []
        while pieces is not None:
            pieces = self._next_pieces()
            if pieces:
                frames = np.frombuffer(b"".join(pieces), np.int16).reshape(-1, self.channels)
                yield self._converter.feed(frames)
            self._tell_losses()
        yield self._converter.finish()
        if not self._closed:
            raise AudioError(f"the microphone {self.name!r} has ended: was it unplugged?")

    def _next_pieces(self) -> list[bytes] | None:
        """Captured pieces, up to a block; waits for the first. None at the end."""
        pieces: list[bytes] = []
        try:
            while len(pieces) * PIECE_MS < _BLOCK * 1000 // SAMPLE_RATE:
                piece = self._pieces.get(timeout=_STALLED_S) if not pieces else self._pieces.get_nowait()
                if piece is None:
                    if not pieces:
                        return None
                    self._pieces.put(None)  # for the next call
                    break
                pieces.append(piece)
        except queue.Empty:
            if not pieces and self._closed:
                return None
            if not pieces:
                raise AudioError(
                    f"the microphone {self.name!r} has sent nothing for {_STALLED_S:g} s: was it unplugged?"
                ) from None
        return pieces

    def _tell_losses(self) -> None:
        if self._overflows:
            self._note("the system lost some sound: the machine is too busy")
            self._overflows = 0
        if self._dropped:
            lost, self._dropped = self._dropped / self.rate, 0
            self._note(f"{lost:.1f} s of sound were lost: this machine is too slow to follow")

    def close(self) -> None:
        """Stop capturing. Iterating still yields what was captured before."""
        if not self._closed:
            self._closed = True
            self._stream.close()
            self._pieces.put(None)

    def __enter__(self) -> "Microphone":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def reason_of(error: BaseException) -> str:
    """What PortAudio says of an error, in one line."""
    return " ".join(str(error.args[0] if error.args else error).split())
