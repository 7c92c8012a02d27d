"""Many short recordings, made of the few recorded ones in tests/speech: other gains, silence before, two joined.

The same number makes the same clip, so what is made of them can be compared between runs and machines.
"""

import functools
import wave
from pathlib import Path

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile

SPEECH = Path(__file__).parent.parent / "speech"
LATE_S = 12.0  # silence before the speech of a marked clip; others are shorter


@functools.cache
def spoken() -> tuple[np.ndarray, ...]:
    """The recorded clips, float32 of 16 kHz."""
    sounds = []
    for path in sorted(SPEECH.glob("*.flac")):
        with AudioFile(path) as file:
            sounds.append(np.concatenate(list(file)))
    return tuple(sounds)


def clip(number: int, *, late: bool = False) -> np.ndarray:
    """A clip. late: its speech begins after LATE_S, by which tests recognise it."""
    draw, sounds = np.random.default_rng(number), spoken()
    parts = [_silence(LATE_S if late else draw.uniform(0, 0.6)), sounds[number % len(sounds)]]
    if number % 6 == 5:  # two joined, some of them with a pause that makes two segments
        parts += [_silence(draw.choice([0.2, 1.5])), sounds[draw.integers(len(sounds))]]
    parts.append(_silence(draw.uniform(0, 0.4)))
    return np.concatenate(parts) * np.float32(draw.uniform(0.3, 1.0))


def write(path: Path, samples: np.ndarray) -> Path:
    """Write a .wav."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def make(folder: Path, count: int, *, late: tuple[int, ...] = ()) -> Path:
    """A folder of `count` clips: 0000.wav and so on. late: the marked ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write(folder / f"{number:04}.wav", clip(number, late=number in late))
    return folder


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)
