"""Clips of log-mel features in batches of about equal length.

Owns: reading the folder that `training.features` writes (into memory, a few GB at most: pages of a mapped file that are
read at random were gone from the cache when wanted again), drawing batches whose clips differ little in length,
masking of times and frequencies (SpecAugment, Park et al. 2019). Does not know: models, losses.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MELS = 128
_STEP = 48  # frames: batches are padded to whole blocks of the encoder's attention (12 tokens of 4 frames)


@dataclass(frozen=True)
class Clip:
    """One clip's features, float16 [frames, 128], a view of its file's, and what is said in it."""

    features: np.ndarray
    text: str
    voice: str
    split: str


@dataclass(frozen=True)
class Batch:
    features: Tensor  # float32 [clips, frames, 128]
    mask: Tensor  # bool [clips, frames]
    texts: list[str]


def read_clips(folder: Path, splits: Iterable[str], copies: Iterable[int] = range(100)) -> list[Clip]:
    """Clips of `folder/features/<split>-<voice>-<copy>.{f16,jsonl}`; those still being written are not seen."""
    wanted, numbers, clips = set(splits), {str(n) for n in copies}, []
    for listing in sorted((folder / "features").glob("*.jsonl")):
        if listing.stem.split("-")[0] not in wanted or listing.stem.rsplit("-", 1)[1] not in numbers:
            continue
        frames = np.fromfile(listing.with_suffix(".f16"), np.float16).reshape(-1, MELS)
        for line in listing.read_text().splitlines():
            entry = json.loads(line)
            first = entry["first_frame"]
            part = frames[first : first + entry["frames"]]
            clips.append(Clip(part, entry["text"], entry["voice"], entry["split"]))
    return clips


def batches(
    clips: list[Clip], frames: int, *, seed: int, skip: int = 0, weights: np.ndarray | None = None
) -> Iterator[Batch]:
    """Endless batches of about `frames` frames in all, drawn by `weights`; clips of a batch are of like length.

    A draw takes 50 batches' worth of clips, sorts them by length and cuts them: random enough, little padding.
    skip: batches to leave out at the start, so that a run that goes on sees what it would have seen.
    """
    chances = None if weights is None else weights / weights.sum()
    mean = np.mean([len(c.features) for c in clips])
    for draw in itertools.count():
        rng = np.random.default_rng([seed, draw])
        drawn = rng.choice(len(clips), int(50 * frames / mean) + 1, p=chances)
        drawn = sorted(drawn, key=lambda i: len(clips[i].features))
        groups: list[list[int]] = [[]]
        for i in drawn:
            if (len(groups[-1]) + 1) * len(clips[i].features) > frames and groups[-1]:
                groups.append([])
            groups[-1].append(i)
        order = rng.permutation(len(groups))
        for g in order[skip:]:
            yield make_batch([clips[i] for i in groups[g]], np.random.default_rng([seed, draw, g]))
        skip = max(0, skip - len(order))


def make_batch(clips: list[Clip], rng: np.random.Generator | None = None) -> Batch:
    """rng: masks times and frequencies; None leaves the features as they are."""
    longest = -(-max(len(c.features) for c in clips) // _STEP) * _STEP
    features = np.zeros((len(clips), longest, MELS), np.float32)
    mask = np.zeros((len(clips), longest), bool)
    for row, valid, clip in zip(features, mask, clips, strict=True):
        count = len(clip.features)
        row[:count] = clip.features
        valid[:count] = True
        if rng is not None:
            _mask_bands(row[:count], rng)
    return Batch(torch.from_numpy(features), torch.from_numpy(mask), [c.text for c in clips])


def _mask_bands(features: np.ndarray, rng: np.random.Generator) -> None:
    """In half of the clips two bands of up to 16 mel bins, and of times up to 16 frames (one for each 2 s), take the
    clip's own mean: a fill of zeros would be all a frame holds, and the norms without bias have no gradient there."""
    if rng.random() < 0.5:
        return
    fill = features.mean()
    for _ in range(2):
        width = rng.integers(0, 17)
        at = rng.integers(0, MELS - width)
        features[:, at : at + width] = fill
    for _ in range(1 + len(features) // 200):
        width = rng.integers(0, min(16, max(1, len(features) // 6)) + 1)
        at = rng.integers(0, len(features) - width)
        features[at : at + width] = fill
