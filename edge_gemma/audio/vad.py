"""Voice activity detection: one probability of speech for each 32 ms of sound, in order.

Owns: the detectors. Does not know: how the probabilities are used (segments.py).

`SileroDetector` runs the Silero VAD network (github.com/snakers4/silero-vad, MIT), which is shipped in silero/ with its
licence. `LoudnessDetector` needs no network; it only tells loud from quiet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.errors import ModelFolderError

WINDOW = 512  # samples for each probability: 32 ms
_CONTEXT = 64  # samples before the window that the network also gets
SILERO = Path(__file__).parent / "silero" / "silero_vad.onnx"


class Detector(Protocol):
    """A detector with memory: it has to get consecutive windows."""

    def probability(self, window: np.ndarray) -> float:
        """window: float32 [WINDOW]. Returns the probability, 0 to 1, that it is speech."""
        ...


class SileroDetector:
    """Silero VAD, versions 5 and 6, at 16 kHz."""

    def __init__(self, model: Path = SILERO) -> None:
        """Raises ModelFolderError, one line, if onnxruntime cannot be loaded or refuses the network."""
        from edge_gemma.host.ort import open_graph

        self._network = open_graph(model, threads=1)  # a window takes 0.1 ms: more threads would make it slower
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
    """Takes sound for speech when it is louder than the noise floor, the quietest of the last seconds.

    The floor falls at once and rises slowly, so it follows a room's noise and not a speaker.
    """

    margin_db = 10.0  # dB above the floor at which the probability is 0.5
    rise_db = 1.0 * WINDOW / SAMPLE_RATE  # dB that the floor may rise in a window: 1 dB a second
    quietest_db = -65.0  # dB of full scale: the lowest floor
    loudest_floor_db = -30.0

    def __init__(self) -> None:
        self._floor = -50.0

    def probability(self, window: np.ndarray) -> float:
        level = 10 * np.log10(float(np.mean(np.square(window, dtype=np.float64))) + 1e-12)
        floor = min(level, self._floor + self.rise_db)
        self._floor = min(max(floor, self.quietest_db), self.loudest_floor_db)
        return float(1 / (1 + np.exp(-(level - self._floor - self.margin_db) / 2)))


def open_detector(note: Callable[[str], None]) -> Detector:
    """A new SileroDetector; a LoudnessDetector, and a call of `note`, if that cannot be opened."""
    try:
        return SileroDetector()
    except ModelFolderError as error:
        note(f"pauses are found by loudness alone: {error}")
        return LoudnessDetector()
