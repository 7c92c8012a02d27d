"""The audio encoder: waveform in, soft tokens out, for a whole clip or for sound as it arrives.

Owns: the ONNX session, a stream's state and its steps. Does not know: where samples come from, what the decoder does
with soft tokens, how the graph computes (export/audio_graph.py).

One graph serves both. The encoder looks only three frames ahead, so a whole clip is a stream that is fed at once, in
long steps. Token t is final when 640 (t + 1) + 1 samples have arrived.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_gemma.audio.features import (
    FRAMES_PER_TOKEN,
    MAX_SAMPLES,
    MEL_BINS,
    SAMPLE_RATE,
    SAMPLES_PER_TOKEN,
    MelStream,
    checked,
)
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.folder.folder import AUDIO_STREAM, ModelFolder

TOKEN_MS = SAMPLES_PER_TOKEN * 1000 // SAMPLE_RATE  # 40
_LONG_STEP = 96  # tokens of a step when a whole clip is encoded
# Idle threads spin for 20 us and then sleep; none spins between steps, because the decoder needs the cores too. A step
# of 160 ms takes 21 ms this way, 26 without spinning, and 19 with onnxruntime's default, which is half as slow again on
# a busy machine.
_WAITING = {"session.intra_op.spin_duration_us": "20", "session.force_spinning_stop": "1"}
_STATE = ("mel", "conv", "kv", "glu")


def _settings() -> dict[str, str]:
    from edge_gemma import kernels

    if any("vnni" in name for name in kernels.available_variants()):
        return _WAITING
    # x86 without VNNI adds products of 8-bit integers in 16 bits, which can overflow: ask for the slower, exact way
    return _WAITING | {"session.x64quantprecision": "1"}


def _nothing() -> None:
    pass


class AudioEncoder:
    """A loaded encoder, shared by its streams. Any thread may use it; they encode a step at a time each."""

    def __init__(self, session: Any, hidden_size: int) -> None:
        self._session = session
        self._step = threading.Lock()  # one at a time: each uses every core
        self.hidden_size = hidden_size  # D: elements of a soft token
        self.between: Callable[[], None] = _nothing  # as Engine.between, called before each step
        shapes = {item.name: item.shape for item in session.get_inputs()}
        self._state_shapes = {name: tuple(shapes[f"past_{name}"]) for name in _STATE}
        self._names = [item.name for item in session.get_outputs()]

    @classmethod
    def load(cls, folder: ModelFolder, threads: int, graphs_in: str = "") -> "AudioEncoder":
        """Load the folder's encoder. graphs_in: the folder below it that holds the graphs.

        Raises UsageError if there is no encoder, ModelFolderError if it cannot be loaded.
        """
        if folder.audio is None:
            raise UsageError(f"{folder.path} has no audio tower: export a model that has, without --no-audio")
        from edge_gemma.host.ort import open_graph

        path = folder.path / graphs_in / AUDIO_STREAM
        try:
            return cls(open_graph(path, threads, _settings()), folder.config.hidden_size)
        except KeyError as missing:
            raise ModelFolderError(f"{path} lacks the input {missing}: export the model again") from None

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Encode a whole clip. Returns float32 [features.token_count(n), hidden_size]: no row below 161 samples.

        samples: float32 [n] at SAMPLE_RATE, n <= MAX_SAMPLES. Raises UsageError for anything else.
        """
        samples = checked(samples)
        if len(samples) > MAX_SAMPLES:
            raise UsageError(
                f"the clip has {len(samples) / SAMPLE_RATE:.1f} s, expected at most {MAX_SAMPLES // SAMPLE_RATE}: "
                "cut it into segments"
            )
        stream = AudioStream(self, _LONG_STEP)
        return np.concatenate([stream.feed(samples), stream.finish()])

    def stream(self, step_ms: int = 160) -> "AudioStream":
        """A new stream, encoded `step_ms` (a multiple of 40) at a time. Raises UsageError for another number.

        Every step reads all weights, however short it is, so steps of 320 ms cost half as much as steps of 160 ms. In
        either case at most one step is left to do when speech ends.
        """
        tokens, rest = divmod(step_ms, TOKEN_MS)
        if rest or tokens < 1:
            raise UsageError(f"a step of {step_ms} ms was asked for, expected a multiple of {TOKEN_MS}")
        return AudioStream(self, tokens)

    def initial_state(self) -> dict[str, np.ndarray]:
        """The state of a stream that has heard nothing: zeros, by the names of the graph's inputs."""
        state = {f"past_{name}": np.zeros(shape, np.float32) for name, shape in self._state_shapes.items()}
        return state | {"history": np.zeros(1, np.int64)}

    def step(self, mel: np.ndarray, valid: int, state: dict[str, np.ndarray]) -> np.ndarray:
        """Encode frames and update `state`. mel: float32 [4 n, MEL_BINS]; its first `valid` rows are frames.

        Returns float32 [n, hidden_size]. After a step with fewer valid frames than rows the stream cannot continue.
        Raises UsageError after `close`.
        """
        self.between()
        if self._session is None:
            raise UsageError("the audio encoder was released: take engine.audio again")
        mask = np.arange(len(mel))[None] < valid
        with self._step:
            outputs = self._session.run(None, {"input_features": mel[None], "input_features_mask": mask} | state)
        named = dict(zip(self._names, outputs, strict=True))
        state |= {f"past_{name}": named[f"present_{name}"] for name in _STATE}
        most = self._state_shapes["kv"][1]
        state["history"] = np.minimum(state["history"] + len(mel) // FRAMES_PER_TOKEN, most)
        return named["audio_features"][0]

    def close(self) -> None:
        """Free the encoder's memory."""
        self._session = None


class AudioStream:
    """One clip as it arrives. `feed` and `finish` return soft tokens that became final: float32 [t, hidden_size]."""

    def __init__(self, encoder: AudioEncoder, tokens_per_step: int) -> None:
        self._encoder = encoder
        self._step = tokens_per_step * FRAMES_PER_TOKEN  # frames
        self._features = MelStream()
        self._mel = np.zeros((0, MEL_BINS), np.float32)  # frames not yet encoded
        self._state = encoder.initial_state()
        self._finished = False

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Append samples: float32 [n] at SAMPLE_RATE, any n. Raises UsageError for other arrays, or after `finish`."""
        self._check_open()
        self._mel = np.concatenate([self._mel, self._features.feed(samples)])
        ready = len(self._mel) // self._step * self._step
        return self._encode(ready)

    def finish(self) -> np.ndarray:
        """End the clip. Returns the soft tokens of the rest of it. Raises UsageError when called twice."""
        self._check_open()
        self._finished = True
        return self._encode(len(self._mel))

    def _check_open(self) -> None:
        if self._finished:
            raise UsageError("the audio stream has ended: begin another")

    def _encode(self, frames: int) -> np.ndarray:
        """Encode that many frames, in long steps when many are waiting."""
        ready, self._mel = self._mel[:frames], self._mel[frames:]
        tokens = [np.zeros((0, self._encoder.hidden_size), np.float32)]
        longest = max(self._step, _LONG_STEP * FRAMES_PER_TOKEN)
        for start in range(0, frames, longest):
            mel = ready[start : start + longest]
            missing = -len(mel) % FRAMES_PER_TOKEN  # only at the clip's end
            tokens.append(self._encoder.step(np.pad(mel, ((0, missing), (0, 0))), len(mel), self._state))
        return np.concatenate(tokens)
