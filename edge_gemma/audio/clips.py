"""Turns a sound into the soft tokens of a message, in clips of at most 30 s.

Owns: where a longer sound is cut. Does not know: conversations, segments of speech.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE, SAMPLES_PER_TOKEN
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.levels import levelled, quietest_moment
from edge_gemma.audio.samples import SAMPLE_TYPES, Note, Samples, array_blocks, silent
from edge_gemma.errors import ContextFullError, UsageError
from edge_gemma.host.sources import Source

_SEARCHED = 5 * SAMPLE_RATE  # samples at a clip's end: the cut is at the quietest moment in them
_MOMENT = SAMPLE_RATE // 50  # samples: 20 ms


class ClipEncoder(Protocol):
    """The part of `edge_gemma.audio.encoder.AudioEncoder` that is used here."""

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """samples: float32 [n]. Returns the soft tokens: float32 [t, hidden_size]."""
        ...


def soft_clips(
    encoder: ClipEncoder, source: Source | Samples, *, most: int, rate: int | None = None, note: Note = silent
) -> tuple[np.ndarray, ...]:
    """Encode a sound. Returns the soft tokens of each clip: float32 [t, hidden_size].

    source, rate: as in `Engine.transcribe`. most: the soft tokens that the context has room for. note is called with
    what the user should know about the sound. Raises ContextFullError for a longer sound, AudioError for one that
    cannot be read, UsageError for what is no sound or is shorter than 40 ms.
    """
    if isinstance(source, SAMPLE_TYPES):
        samples = _whole(array_blocks(source, SAMPLE_RATE if rate is None else rate, note), most, note)
    elif rate is not None:
        raise UsageError("rate means nothing beside a file, which has its own: leave it out")
    else:
        with AudioFile(source, note) as file:
            samples = _whole(file, most, note)
    clips = [tokens for clip in cut(samples) if len(tokens := encoder.encode(clip))]
    if not clips:
        raise UsageError("the sound is shorter than 40 ms, expected something to hear")
    return tuple(clips)


def _whole(blocks: Iterable[np.ndarray], most: int, note: Note) -> np.ndarray:
    found, samples = [np.zeros(0, np.float32)], 0
    for block in levelled(blocks, note):
        found.append(block)
        samples += len(block)
        if samples > most * SAMPLES_PER_TOKEN:
            seconds = most * SAMPLES_PER_TOKEN // SAMPLE_RATE
            raise ContextFullError(f"the sound is longer than {seconds} s, for which the context has room: shorten it")
    return np.concatenate(found)


def cut(samples: np.ndarray) -> list[np.ndarray]:
    """Cut float32 [n] into clips of at most 30 s, each at the quietest moment of its last 5 s."""
    clips = []
    while len(samples) > MAX_SAMPLES:
        end = quietest_moment(samples, MAX_SAMPLES - _SEARCHED, MAX_SAMPLES, _MOMENT)
        clips.append(samples[:end])
        samples = samples[end:]
    return [*clips, samples]
