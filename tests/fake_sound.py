"""A sound system in the place of sounddevice: a microphone and a loudspeaker that run in time, in threads.

Owns: `FakeSound`, which is installed by monkeypatch. What the microphone hears is said by the test; with `echo` it also
hears the loudspeaker.
"""

import threading
import time
import types

import numpy as np

from edge_gemma.audio import mic
from edge_gemma.voice import loudspeaker


class FakeSound:
    """rate: of both devices when nothing else is asked for. speed: how much faster than a clock time passes."""

    class PortAudioError(Exception):
        pass

    default = types.SimpleNamespace(device=(0, 1))

    def __init__(self, monkeypatch, *, refused=(), echo=False, speed=1.0):
        self.refused, self.echo, self.speed = set(refused), echo, speed
        self.played: list[tuple[float, np.ndarray, int]] = []  # when, int16 [n], rate
        self.streams: list[_Stream] = []
        self._said = np.zeros(0, np.int16)
        self._lock = threading.Lock()
        for module in (mic, loudspeaker):
            monkeypatch.setattr(module, "portaudio", lambda: self)

    def query_devices(self, device=None, kind=None):
        both = [
            {"name": "Ear", "max_input_channels": 1, "max_output_channels": 0, "default_samplerate": 16_000.0},
            {"name": "Mouth", "max_input_channels": 0, "max_output_channels": 2, "default_samplerate": 48_000.0},
        ]
        if kind is None:
            return both
        at = 0 if kind == "input" else 1
        if device not in (None, at, both[at]["name"]):
            raise ValueError(f"No {kind} device matching {device!r}")
        return both[at] | {"index": at}

    def say(self, samples):
        """samples: float32 [n] of 16 kHz, which the microphone hears from now on, after what it was told before."""
        with self._lock:
            self._said = np.concatenate([self._said, (samples * 32767).astype(np.int16)])

    @property
    def silent(self):
        """Whether the microphone has heard all that was said."""
        return not len(self._said)

    def heard(self):
        """What the loudspeaker has played, without the silence around it: int16 [n], and its rate."""
        sound = np.concatenate([block for _, block, _ in self.played])
        loud = np.flatnonzero(sound)
        rate = self.played[-1][2]
        return (sound[max(0, loud[0] - rate // 2) : loud[-1] + rate // 2], rate) if len(loud) else (sound[:0], rate)

    def RawInputStream(self, **options):
        return self._stream(self._captured, **options)

    def RawOutputStream(self, **options):
        return self._stream(self._play, **options)

    def _stream(self, block, **options):
        if self.refused & {options["samplerate"], (options["samplerate"], options["channels"])}:
            raise self.PortAudioError("Invalid sample rate", -9997)
        self.streams.append(_Stream(self, block, **options))
        return self.streams[-1]

    def _captured(self, stream):
        with self._lock:
            now, self._said = np.split(self._said, [stream.frames])
        now = np.pad(now, (0, stream.frames - len(now)))
        if self.echo and self.played and np.any(self.played[-1][1]):
            now = now + np.resize(self.played[-1][1], len(now)) // 2
        stream.callback(memoryview(now.tobytes()), stream.frames, None, types.SimpleNamespace(input_overflow=False))

    def _play(self, stream):
        out = bytearray(2 * stream.frames * stream.channels)
        stream.callback(memoryview(out), stream.frames, None, None)
        channels = np.frombuffer(bytes(out), np.int16).reshape(-1, stream.channels)
        assert (channels == channels[:, :1]).all()
        self.played.append((time.monotonic(), channels[:, 0], stream.rate))


class _Stream:
    latency = 0.02

    def __init__(self, sound, block, *, samplerate, blocksize, channels, callback, finished_callback=lambda: None, **_):
        self.rate, self.frames, self.channels, self.callback = samplerate, blocksize, channels, callback
        self._sound, self._block, self._finished = sound, block, finished_callback
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def _run(self):
        due = time.monotonic()
        while not self._over.is_set():
            self._block(self)
            due += self.frames / self.rate / self._sound.speed
            self._over.wait(max(0.0, due - time.monotonic()))
        self._finished()

    def close(self):
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
