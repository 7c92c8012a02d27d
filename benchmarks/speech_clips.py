"""Clips of speech with known texts, one after another in a recording: what is said when.

Owns: which clips, the times of their words, the recording (`write`). long_recording.py tells how it is made. Does not
know: how recordings are cut.
"""

import itertools
import re
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPEECH = Path(__file__).resolve().parent.parent / "tests" / "speech"
RATE = 16_000
_BLOCK = 10 * RATE  # samples that are written at a time
_FRAME = 160  # samples: silence at the edges of a clip is cut off in these
_PAUSE_FRAMES = 12
_NOISE = 2e-4  # of full scale
_PAUSES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.7, 1.8, 2.0, 2.0, 2.5, 3.0, 3.0)  # seconds
_BREATHLESS = 0.08
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Clip:
    """samples: float32 of 16 kHz, without silence at its edges. spans: of each word, seconds (start, end)."""

    samples: np.ndarray
    words: tuple[str, ...]
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Word:
    """A word that was said, from start to end, in seconds: estimated within its clip."""

    text: str
    start: float
    end: float

    @property
    def at(self) -> float:
        """Its middle."""
        return (self.start + self.end) / 2


def words(text: str) -> tuple[str, ...]:
    """The words of a text: lower case, no punctuation, a digit as its name."""
    found = (re.sub(r"[^\w']", "", part.casefold()) for part in re.split(r"[\s-]+", text))
    return tuple(_NAMES[int(word)] if re.fullmatch("[0-9]", word) else word for word in found if word)


def clips(sounds: Path | None) -> Iterator[tuple[np.ndarray, str]]:
    """Samples and texts. sounds: where the Debian packages are unpacked."""
    from edge_gemma.audio.files import AudioFile

    for line in (SPEECH / "transcripts.tsv").read_text().splitlines():
        name, said = line.split("\t")
        with AudioFile(SPEECH / name) as file:
            yield np.concatenate(list(file)), said
    if sounds is not None:
        from training import recordings

        for _, said, path in recordings.prompts(sounds):
            if len(words(said)) > 2:
                yield recordings.decode(path), said


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Without the silence at both ends: frames whose peak is below 2% of the clip's."""
    peaks = _peaks(samples)
    loud = np.flatnonzero(peaks > 0.02 * peaks.max())
    return samples[loud[0] * _FRAME : (loud[-1] + 1) * _FRAME]


def _peaks(samples: np.ndarray) -> np.ndarray:
    return np.abs(samples[: len(samples) // _FRAME * _FRAME]).reshape(-1, _FRAME).max(axis=1)


def word_spans(samples: np.ndarray, words: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """When each word is said, about: by its letters, pauses left out. No word is said across a pause of 0.12 s."""
    peaks = _peaks(samples)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], peaks < 0.04 * peaks.max(), [0]])))
    pauses = [(a, b) for a, b in edges.reshape(-1, 2) if b - a >= _PAUSE_FRAMES and a > 0 and b < len(peaks)]
    voiced = np.ones(len(peaks), bool)
    for a, b in pauses:
        voiced[a:b] = False
    frames = np.flatnonzero(voiced)  # of the sound without its pauses
    letters = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    at = [len(frames) * share / letters[-1] for share in letters]  # boundaries of words, in such frames
    for place in (float(np.searchsorted(frames, a)) for a, _ in pauses):
        away = [abs(boundary - place) for boundary in at]
        if 0 < (nearest := away.index(min(away))) < len(words):
            at[nearest] = place
    at = sorted(at)

    def seconds(frame: float) -> float:
        whole = min(int(frame), len(frames) - 1)
        return float(frames[whole] + frame - whole) * _FRAME / RATE

    # A word that begins where a pause was begins after it, one that ends there ends before it.
    return tuple((seconds(a), max(seconds(a), seconds(b - 1e-6))) for a, b in itertools.pairwise(at))


def known(engine: Any, found: Iterable[tuple[np.ndarray, str]]) -> list[Clip]:
    """The clips that the model writes without an error if it hears them alone."""
    from edge_gemma.audio.transcribe import Transcriber

    transcriber, kept = Transcriber(engine), []
    for samples, said in found:
        sound, told = trimmed(samples), words(said)
        if len(samples) <= 20 * RATE and words(transcriber.text(sound)[0]) == told:
            kept.append(Clip(sound, told, word_spans(sound, told)))
    return kept


def write(
    path: Path, known: Sequence[Clip], seconds: float, seed: int = 1, breathless: float = _BREATHLESS
) -> list[Word]:
    """Write a recording as WAV, block by block. Returns what is said when.

    breathless: how often a pause is followed by speech without pauses.
    """
    rng = np.random.default_rng(seed)
    at, said, pending = 0, list[Word](), list[np.ndarray]()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)

        def add(samples: np.ndarray, least: int) -> None:
            nonlocal at
            pending.append(samples)
            at += len(samples)
            if sum(map(len, pending)) >= least:
                block = np.concatenate(pending)
                block = block + rng.normal(0, _NOISE, len(block))
                file.writeframes((np.clip(block, -1, 1) * 32767).astype("<i2").tobytes())
                pending.clear()

        breathless_until = 0.0
        for number in _shuffled(len(known), rng):
            if at >= seconds * RATE:
                break
            clip = known[number]
            said += timed(clip, at / RATE)
            add(clip.samples, _BLOCK)
            now = at / RATE
            if now >= breathless_until:
                if rng.random() < breathless:
                    breathless_until = now + float(rng.uniform(30, 120))
                pause = float(rng.choice(_PAUSES)) * float(rng.uniform(0.9, 1.0))
                add(np.zeros(int(pause * RATE)), _BLOCK)
        add(np.zeros(RATE), 0)
    return said


def _shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    """Each once, in an order of its own, again and again."""
    while True:
        yield from rng.permutation(n)


def timed(clip: Clip, start: float) -> list[Word]:
    """The words of a clip that begins at start."""
    return [Word(word, start + a, start + b) for word, (a, b) in zip(clip.words, clip.spans, strict=True)]
