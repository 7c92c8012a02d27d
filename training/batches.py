"""Batches: clips of log-mel features, concatenated on a tape of fixed length.

Owns: reading the folder that `training.features` writes, drawing batches, simulating other speakers by warping, masking
times and frequencies (SpecAugment, Park et al. 2019). Does not know: models, losses. The features, a few GB, are read
into memory: random reads of a mapped file kept missing the page cache.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_gemma.audio.features import MEL_BINS, mel_edges, to_mel
from training.fast_audio import FRAMES_A_BLOCK, span


@dataclass(frozen=True)
class Clip:
    """One clip: its features, float16 [frames, 128], a view of its file's, and its text."""

    features: np.ndarray
    text: str
    voice: str
    split: str


@dataclass(frozen=True)
class Batch:
    features: Tensor  # float32 [frames, 128]: the clips one after the other, each in its `span`
    lengths: list[int]  # frames of each clip
    texts: list[str]


def read_clips(folder: Path, splits: Iterable[str], copies: Iterable[int] = range(100)) -> list[Clip]:
    """The clips of `folder/features/<split>-<voice>-<copy>.{f16,jsonl}`; files still being written are ignored."""
    wanted, numbers, clips = set(splits), {str(n) for n in copies}, []
    for listing in sorted((folder / "features").glob("*.jsonl")):
        if listing.stem.split("-")[0] not in wanted or listing.stem.rsplit("-", 1)[1] not in numbers:
            continue
        frames = np.fromfile(listing.with_suffix(".f16"), np.float16).reshape(-1, MEL_BINS)
        for line in listing.read_text().splitlines():
            entry = json.loads(line)
            first = entry["first_frame"]
            part = frames[first : first + entry["frames"]]
            clips.append(Clip(part, entry["text"], entry["voice"], entry["split"]))
    return clips


def batches(
    clips: list[Clip], frames: int, *, seed: int, skip: int = 0, weights: np.ndarray | None = None
) -> Iterator[Batch]:
    """Endless batches, each of as many clips as fit into `frames`, drawn by `weights`.

    skip: batches to skip at the start, so that a resumed run sees the same batches as an uninterrupted one.
    """
    shares = np.cumsum(np.ones(len(clips)) if weights is None else weights)
    for number in itertools.count(skip):
        rng = np.random.default_rng([seed, number])
        drawn = np.searchsorted(shares, rng.random(frames // FRAMES_A_BLOCK) * shares[-1], side="right")
        yield make_batch(list(_that_fit((_changed(clips[i], rng) for i in drawn), frames)), frames)


def _that_fit(clips: Iterable[Clip], frames: int) -> Iterator[Clip]:
    for clip in clips:
        frames -= span(len(clip.features))
        if frames < 0:
            return
        yield clip


def make_batch(clips: list[Clip], frames: int | None = None) -> Batch:
    """Concatenate clips. frames: the tape's length, if longer than needed."""
    starts = np.cumsum([0, *(span(len(c.features)) for c in clips)])
    tape = np.zeros((frames or starts[-1], MEL_BINS), np.float32)
    for start, clip in zip(starts, clips, strict=False):
        tape[start : start + len(clip.features)] = clip.features
    return Batch(torch.from_numpy(tape), [len(c.features) for c in clips], [c.text for c in clips])


def _changed(clip: Clip, rng: np.random.Generator) -> Clip:
    """Warp three quarters of the clips to another speaker, and mask three quarters."""
    features = clip.features.astype(np.float32)
    if rng.random() < 0.75:
        features = warped(features, rng.uniform(0.9, 1.15), rng.uniform(0.86, 1.16))
    if rng.random() < 0.75:
        _mask_bands(features, rng)
    return replace(clip, features=features)


def warped(features: np.ndarray, tempo: float, pitch: float) -> np.ndarray:
    """The clip `tempo` times as long, its frequencies times `pitch` (vocal tract length perturbation, Jaitly and Hinton
    2013): float32 [frames, 128] -> [round(frames * tempo), 128], by straight lines between what is there."""
    times = np.linspace(0, len(features) - 1, round(len(features) * tempo))
    edges = mel_edges()
    bins = to_mel(edges[1:-1] / pitch) / to_mel(edges[-1]) * (MEL_BINS + 1) - 1
    return _between(_between(features, times).T, bins.clip(0, MEL_BINS - 1)).T


def _between(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """rows [n, k] at places between 0 and n - 1."""
    low = np.minimum(at.astype(int), max(len(rows) - 2, 0))
    share = (at - low).astype(np.float32)[:, None]
    return rows[low] * (1 - share) + rows[np.minimum(low + 1, len(rows) - 1)] * share


def _mask_bands(features: np.ndarray, rng: np.random.Generator) -> None:
    """Two bands of up to 20 mel bins, and of times up to 16 frames (one for each 2 s), take the clip's own mean: a fill
    of zeros would be all a frame holds, and the norms without bias have no gradient there."""
    fill = features.mean()
    for _ in range(2):
        width = rng.integers(0, 21)
        at = rng.integers(0, MEL_BINS - width)
        features[:, at : at + width] = fill
    for _ in range(1 + len(features) // 200):
        width = rng.integers(0, min(16, max(1, len(features) // 6)) + 1)
        at = rng.integers(0, len(features) - width)
        features[at : at + width] = fill
