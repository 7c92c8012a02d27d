"""Makes very quiet sound louder before it is analysed.

Owns: the level of a sound, the level that is too quiet, the gain. Does not know: files, speech.

Measured with the demonstration model: words are right while the loudest moment is above -46 dB of full scale; at -50 dB
9 in 10 are wrong. With the gain, recordings at -75 dB are transcribed as well as at full level. Noise that is made
louder is not taken for speech.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.samples import Note

QUIET_DB = -44.0  # of full scale: sound whose loudest moment is below gets a gain
_TARGET_DB = -20.0  # that brings it up to this level,
_MOST_DB = 55.0  # but is never more than this
_SILENT_DB = -90.0  # the last bit of 16-bit samples
_MOMENT = SAMPLE_RATE // 8  # samples whose mean power counts: longer than a click
_AHEAD = 30 * SAMPLE_RATE  # samples that are read before the first are handed on


def loudest_db(samples: np.ndarray) -> float:
    """The power of the loudest moment of float32 [n], in dB of full scale; -120 for silence."""
    if not len(samples):
        return -120.0
    sums = np.add.reduceat(np.square(samples, dtype=np.float64), np.arange(0, len(samples), _MOMENT))
    return float(10 * np.log10(sums.max() / _MOMENT + 1e-12))


def quietest_moment(samples: np.ndarray, first: int, last: int, moment: int) -> int:
    """The index of the middle of the quietest `moment` samples in samples[first:last], in steps of `moment`.

    samples: float32 [n].
    """
    windows = samples[first : last - (last - first) % moment].reshape(-1, moment)
    return first + int(np.square(windows).sum(axis=1).argmin()) * moment + moment // 2


def louder(samples: np.ndarray, loudest: float) -> np.ndarray:
    """Amplify float32 [n] so that its loudest moment, now at `loudest` dB, reaches _TARGET_DB. Never attenuates."""
    gain = min(max(_TARGET_DB - loudest, 0.0), _MOST_DB)
    return np.clip(samples * np.float32(10 ** (gain / 20)), -1, 1) if gain else samples


def _moments(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Joins blocks until each but the last has at least a moment: the power of less says nothing."""
    short: list[np.ndarray] = []
    for block in blocks:
        short.append(block)
        if sum(map(len, short)) >= _MOMENT:
            yield np.concatenate(short) if len(short) > 1 else block
            short = []
    if short:
        yield np.concatenate(short)


def levelled(blocks: Iterable[np.ndarray], note: Note) -> Iterator[np.ndarray]:
    """Yields the blocks of a recording, float32 [n] of 16 kHz mono: unchanged, or louder if it is very quiet.

    A recording is very quiet if nothing in its first 30 s is above QUIET_DB, and for as long as nothing is. The gain
    never rises. At the end note is called if there was a gain.
    """
    held, samples, loudest = list[np.ndarray](), 0, -120.0
    stream = _moments(blocks)
    for block in stream:
        held.append(block)
        samples, loudest = samples + len(block), max(loudest, loudest_db(block))
        if loudest >= QUIET_DB or samples >= _AHEAD:
            break
    quiet = loudest < QUIET_DB
    while held:
        yield louder(held[0], loudest) if quiet else held[0]
        del held[0]
    for block in stream:
        loudest = max(loudest, loudest_db(block)) if quiet else loudest
        yield louder(block, loudest) if quiet else block
    if _SILENT_DB < loudest < QUIET_DB:
        note(f"the recording is very quiet, {loudest:.0f} dB of full scale at its loudest: it was made louder")
