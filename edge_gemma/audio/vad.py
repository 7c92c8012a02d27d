"""Is this speech? One probability for each 32 ms of sound, in order.

Owns: the detectors. Does not know: what is made of the probabilities (segments.py).

`SileroDetector` runs the Silero VAD network (github.com/snakers4/silero-vad, MIT), which is shipped in silero/ with its
licence. `LoudnessDetector` needs nothing and tells speech from noise only by being louder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.errors import ModelFolderError

WINDOW = 512  # samples that a probability is for: 32 ms
_CONTEXT = 64  # samples before the window that the network looks at
SILERO = Path(__file__).parent / "silero" / "silero_vad.onnx"


class Detector(Protocol):
    """A detector with memory: feed it consecutive windows."""

    def probability(self, window: np.ndarray) -> float:
        """window: float32 [WINDOW]. Returns the probability, 0 to 1, that it is speech."""
        ...


class SileroDetector:
    """Silero VAD, versions 5 and 6, at 16 kHz."""

    def __init__(self, model: Path = SILERO) -> None:
        """Raises ModelFolderError, one line, where onnxruntime cannot be loaded or does not take the network."""
        from edge_gemma.host.ort import open_graph

        self._network = open_graph(model, threads=1)  # 0.1 ms a window: threads only cost
        self._state = np.zeros((2, 1, 128), np.float32)
        self._rate = np.array(SAMPLE_RATE, np.int64)
        self._heard = np.zeros((1, _CONTEXT + WINDOW), np.float32)

    def probability(self, window: np.ndarray) -> float:
        self._heard[:, :_CONTEXT] = self._heard[:, WINDOW:]
        self._heard[:, _CONTEXT:] = window
        inputs = {"input": self._heard, "state": self._state, "sr": self._rate}
        output, self._state = self._network.run(None, inputs)
        return float(output[0, 0])


class LoudnessDetector:
    """Louder than the quietest of the last seconds: speech.

    The floor falls at once and rises slowly, so that it follows a room's noise and not a speaker.
    """

    margin_db = 10.0  # above the floor: probability 0.5
    rise_db = 1.0 * WINDOW / SAMPLE_RATE  # a window: 1 dB a second
    quietest_db = -65.0  # below full scale; nothing under it counts, nor does the floor fall further
    loudest_floor_db = -30.0

    def __init__(self) -> None:
        self._floor = -50.0

    def probability(self, window: np.ndarray) -> float:
        level = 10 * np.log10(float(np.mean(np.square(window, dtype=np.float64))) + 1e-12)
        floor = min(level, self._floor + self.rise_db)
        self._floor = min(max(floor, self.quietest_db), self.loudest_floor_db)
        return float(1 / (1 + np.exp(-(level - self._floor - self.margin_db) / 2)))


def open_detector(note: Callable[[str], None]) -> Detector:
    """Silero; loudness where it cannot be opened, which `note` is told."""
    try:
        return SileroDetector()
    except ModelFolderError as error:
        note(f"pauses are found by loudness alone: {error}")
        return LoudnessDetector()
