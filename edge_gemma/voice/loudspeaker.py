"""A loudspeaker that falls silent at once.

Owns: the playback device (PortAudio through sounddevice), the samples that wait for it, how much of them was played.
Does not know: what is said.

PortAudio's callback takes what it plays from a queue. To be silent means to empty the queue: what the device holds then
is its latency, which is asked to be short.
"""

import threading
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
        self._changed = threading.Condition()
        self._waiting: list[np.ndarray] = []  # int16 [n]
        self._taken = 0  # samples of the first one that were played
        self._stream: Any = None
        self._given_rate = self._rate = self._epoch = 0
        self._resampler: Any = None
        self.played = 0.0  # seconds of sound that the device has taken since the last `stop`

    def play(self, samples: np.ndarray, rate: int) -> float:
        """Append samples, int16 [n] of one channel, `rate` a second. Waits while too much waits already.

        Returns the seconds that were appended, 0 if `stop` came meanwhile. Raises AudioError where the device cannot
        play them.
        """
        epoch = self._epoch
        self._open(rate)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        with self._changed:
            while self._left() > _AHEAD_S and epoch == self._epoch:
                if not self._changed.wait(_STALLED_S):
                    raise AudioError(f"the loudspeaker {self.name!r} plays nothing: was it unplugged?")
            if epoch != self._epoch:
                return 0.0
            if len(samples):
                self._waiting.append(samples)
            return len(samples) / self._rate

    def stop(self) -> None:
        """Be silent now, and forget what waits."""
        with self._changed:
            self._epoch += 1
            self._waiting, self._taken, self.played = [], 0, 0.0
            self._changed.notify_all()

    @property
    def left(self) -> float:
        """Seconds of sound that the device has still to take."""
        with self._changed:
            return self._left()

    @property
    def latency(self) -> float:
        """Seconds from when the device takes sound to when it is heard."""
        return float(self._stream.latency) if self._stream is not None else 0.0

    def _left(self) -> float:
        return (sum(map(len, self._waiting)) - self._taken) / self._rate if self._waiting else 0.0

    def _open(self, rate: int) -> None:
        """A stream for sound of this rate: at the rate itself if the device can, else at its own."""
        if rate == self._given_rate:
            return
        if self._stream is not None:
            with self._changed:
                silent = self._changed.wait_for(lambda: not self._waiting, _AHEAD_S + _STALLED_S)
            if not silent:
                raise AudioError(f"the loudspeaker {self.name!r} plays nothing: was it unplugged?")
            self._stream.close()
        own, told = int(self._info["default_samplerate"]), ""
        for self._rate in (rate, own):
            try:
                self._stream = self._sounddevice.RawOutputStream(
                    samplerate=self._rate,
                    blocksize=int(self._rate * BLOCK_S),
                    device=self._info["index"],
                    channels=1,
                    dtype="int16",
                    latency=_LATENCY_S,
                    callback=self._wanted,
                )
                self._stream.start()
                break
            except self._sounddevice.PortAudioError as error:
                told, self._stream = reason_of(error), None
        if self._stream is None:
            raise AudioError(f"the loudspeaker {self.name!r} cannot be opened: {told}")
        self._given_rate, self._resampler = rate, None
        if self._rate != rate:
            soxr = imported("soxr", f"sound of {rate} samples a second", "audio", AudioError)
            self._resampler = soxr.ResampleStream(rate, self._rate, 1, dtype="int16")

    def _wanted(self, out: Any, frames: int, clock: Any, status: Any) -> None:
        """PortAudio's callback."""
        with self._changed:
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
        out[:] = b"".join([*parts, bytes(2 * missing)])

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
