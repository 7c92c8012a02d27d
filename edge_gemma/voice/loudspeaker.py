"""A loudspeaker that falls silent at once.

Owns: the playback device (PortAudio through sounddevice), the samples that wait for it, how much of them was played.
Does not know: what is said.

PortAudio's callback takes what it plays from a queue. To be silent means to empty the queue: what the device holds then
is its latency, which is asked to be short.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_gemma.audio.mic import portaudio, reason_of
from edge_gemma.errors import AudioError
from edge_gemma.host.extras import imported

BLOCK_S = 0.02  # of sound in one callback
_LATENCY_S = 0.06  # that the device is asked for
_AHEAD_S = 10.0  # of sound that waits at most: whoever has more waits
_STALLED_S = 5.0  # without a callback after which the device counts as gone


class Loudspeaker:
    """An open loudspeaker. One thread plays; the others may stop it, and ask what is left."""

    def __init__(self, device: int | str | None = None) -> None:
        """device: an index, a part of a name, None for the system's default. Raises AudioError if there is none."""
        self._sounddevice = portaudio()
        try:
            info = self._sounddevice.query_devices(device, "output")
        except (ValueError, self._sounddevice.PortAudioError) as error:
            wanted = "the default loudspeaker" if device is None else f"the loudspeaker {device!r}"
            raise AudioError(f"{wanted} cannot be used: {reason_of(error)}; edge-gemma listen --list-devices") from None
        self.name, self._info = str(info["name"]), info
        self._lock = threading.RLock()  # host/pool.py says why it is entered itself
        self._changed = threading.Condition(self._lock)
        self._waiting: list[np.ndarray] = []  # int16 [n]
        self._taken = 0  # samples of the first one that were played
        self._stream: Any = None
        self._given_rate = self._rate = self._epoch = 0
        self._channels = 1
        self._resampler: Any = None
        self._asked_at = 0.0  # when the device last asked for sound, by time.monotonic
        self.played = 0.0  # seconds of sound that the device has taken since the last `stop`

    def play(self, samples: np.ndarray, rate: int) -> float:
        """Append samples, int16 [n] of one channel, `rate` a second. Waits while too much waits already.

        Returns the seconds that were appended, 0 if `stop` came meanwhile. Raises AudioError where the device cannot
        play them, or has gone; what waited is lost then, and the next call opens it again.
        """
        epoch = self._epoch
        self._open(rate)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        with self._lock:
            self._wait_for(lambda: self._left() <= _AHEAD_S or epoch != self._epoch)
            if epoch != self._epoch:
                return 0.0
            if len(samples):
                self._waiting.append(samples)
            return len(samples) / self._rate

    def stop(self) -> None:
        """Be silent now, and forget what waits."""
        with self._lock:
            self._epoch += 1
            self._waiting, self._taken, self.played = [], 0, 0.0
            self._changed.notify_all()

    @property
    def left(self) -> float:
        """Seconds of sound that the device has still to take."""
        with self._lock:
            return self._left()

    @property
    def latency(self) -> float:
        """Seconds from when the device takes sound to when it is heard."""
        return float(self._stream.latency) if self._stream is not None else 0.0

    def _left(self) -> float:
        if not self._waiting or self._gone:
            return 0.0
        return (sum(map(len, self._waiting)) - self._taken) / self._rate

    @property
    def _gone(self) -> bool:
        return time.monotonic() - self._asked_at > _STALLED_S

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        """Raises AudioError if the device goes away meanwhile."""
        while not (ready() or self._gone):
            self._changed.wait(_STALLED_S)
        if self._gone:
            self._given_rate, self._waiting, self._taken = 0, [], 0
            raise AudioError(f"the loudspeaker {self.name!r} plays nothing: was it unplugged?")

    def _open(self, rate: int) -> None:
        """A stream for sound of this rate: at the rate itself and of one channel if the device can, else as it can."""
        if rate == self._given_rate:
            return
        self._close_stream()
        own, told = int(self._info["default_samplerate"]), ""
        for self._rate, self._channels in ((rate, 1), (own, 1), (rate, 2), (own, 2)):
            resampler = self._resampler_of(rate)
            try:
                stream = self._sounddevice.RawOutputStream(
                    samplerate=self._rate,
                    blocksize=int(self._rate * BLOCK_S),
                    device=self._info["index"],
                    channels=self._channels,
                    dtype="int16",
                    latency=_LATENCY_S,
                    callback=self._wanted,
                )
                self._asked_at = time.monotonic()
                stream.start()
            except self._sounddevice.PortAudioError as error:
                told = reason_of(error)
            else:
                self._stream, self._resampler, self._given_rate = stream, resampler, rate
                return
        raise AudioError(f"the loudspeaker {self.name!r} cannot be opened: {told}")

    def _resampler_of(self, rate: int) -> Any:
        if self._rate == rate:
            return None
        soxr = imported("soxr", f"sound of {rate} samples a second", "mic", AudioError)
        return soxr.ResampleStream(rate, self._rate, 1, dtype="int16")

    def _close_stream(self) -> None:
        """Close the stream when what waits is played."""
        stream, was_open = self._stream, self._given_rate
        if stream is None:
            return
        try:
            with self._lock:
                if was_open:
                    self._wait_for(lambda: not self._waiting)
        finally:
            self._stream, self._given_rate = None, 0
            stream.close()

    def _wanted(self, out: Any, frames: int, clock: Any, status: Any) -> None:
        """PortAudio's callback."""
        with self._lock:
            self._asked_at = time.monotonic()
            parts, missing = [], frames
            while self._waiting and missing:
                first = self._waiting[0][self._taken : self._taken + missing]
                parts.append(first.tobytes())
                missing -= len(first)
                self._taken += len(first)
                if self._taken == len(self._waiting[0]):
                    del self._waiting[0]
                    self._taken = 0
            self.played += (frames - missing) / self._rate
            self._changed.notify_all()
        samples = np.frombuffer(b"".join([*parts, bytes(2 * missing)]), np.int16)
        out[:] = samples.repeat(self._channels).tobytes()

    def close(self) -> None:
        """Stop, and free the device."""
        self.stop()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._given_rate = 0

    def __enter__(self) -> "Loudspeaker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
