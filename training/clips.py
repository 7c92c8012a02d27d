"""Files of clips: DATA/clips/<split>-<voice>.i16 and .jsonl, written whole or not at all.

Owns: the format, trimming and levelling of a clip, what each voice says in each split. Does not know: engines
(synthesise.py), features, how sources are fetched.

The .i16 file holds the clips one after the other, mono int16 at 16 kHz. The .jsonl file has a line for each clip: its
text (spoken form), kind (corpus.kind), voice, engine, split, first sample and number of samples.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from edge_gemma.folder.atomic import write_file
from training import recordings
from training.corpus import Corpus, distinct
from training.splits import held_out
from training.synthesise import RATE, engine
from training.texts import LONGEST as LONGEST_TEXT
from training.voices import FIRST, VOICES, Voice, seen

SHORTEST, LONGEST = 0.4, 10.0  # seconds of a clip
LEVEL = 0.07  # root mean square of a clip's speech, full scale 1
JOINED_MINUTES = 30  # of recordings joined in new orders
TESTS = {"dev", "test_seen", "test_unseen", "test_human"}
HUMAN = "human"  # the engine of recorded prompts


def seed(*names: str) -> int:
    return zlib.crc32("/".join(names).encode())


def finished(samples: np.ndarray, rng: np.random.Generator, varied: bool = False) -> np.ndarray | None:
    """Trim and level a clip: speech at LEVEL between 100 to 200 ms (varied: to 800) of near silence. Returns int16.

    Returns None if it is too short, too long or silent.
    """
    hop = RATE // 100
    count = len(samples) // hop
    if count < 10:
        return None
    energy = np.sqrt((samples[: count * hop].reshape(count, hop) ** 2).mean(axis=1))
    loud = np.flatnonzero(energy > max(0.01 * energy.max(), 1e-4))
    if energy.max() < 1e-3 or not len(loud):
        return None
    speech = samples[loud[0] * hop : (loud[-1] + 1) * hop]
    speech = speech * min(LEVEL / np.sqrt((speech**2).mean()), 0.97 / np.abs(speech).max())
    seconds = 0.1 + 0.7 * rng.random(2) ** 3 if varied else rng.uniform(0.1, 0.2, 2)
    ends = [np.zeros(int(end * RATE), np.float32) for end in seconds]
    clip = np.concatenate([ends[0], speech, ends[1]])
    if not SHORTEST <= len(clip) / RATE <= LONGEST:
        return None
    clip += rng.normal(0, 3e-5, len(clip)).astype(np.float32)  # a noise floor of -90 dB: silence is never exactly 0
    return np.rint(clip.clip(-1, 1) * 32767).astype("<i2")


def write_clips(
    folder: Path,
    split: str,
    voice: str,
    engine: str,
    clips: Iterable[tuple[str, np.ndarray]],
    kind: Callable[[str], str],
) -> float:
    """Write (text, int16 samples) pairs as one file of clips. kind: of a text. Returns its seconds."""
    sound, lines, first = [], [], 0
    for text, samples in clips:
        line = {"text": text, "kind": kind(text), "voice": voice, "engine": engine, "split": split}
        lines.append(json.dumps({**line, "first": first, "samples": len(samples)}))
        sound.append(samples.tobytes())
        first += len(samples)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{split}-{voice}.i16", b"".join(sound))
    write_file(folder / f"{split}-{voice}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return first / RATE


def read_clips(index: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """The lines of a .jsonl with their clips, int16, mapped from the .i16 beside it."""
    sound = np.memmap(index.with_suffix(".i16"), "<i2", "r") if index.with_suffix(".i16").stat().st_size else None
    for line in index.read_text().splitlines():
        clip = json.loads(line)
        assert sound is not None
        yield clip, sound[clip["first"] : clip["first"] + clip["samples"]]


def jobs() -> list[tuple[str, str]]:
    """All (split, voice) in the order of work: the recordings, then each voice, its held-out clips first."""
    human = [("train_human", recordings.VOICE), ("test_human", recordings.VOICE), ("train_human", recordings.JOINED)]
    return human + [(split, voice.name) for voice in VOICES for split in _splits(voice)]


def _splits(voice: Voice) -> list[str]:
    """The splits in which a voice speaks."""
    if not seen(voice):
        return ["test_unseen"]
    return [split for split, wanted in (("test_seen", voice.tests), ("dev", voice.devs), ("train", 1)) if wanted]


def make(data: Path, split: str, name: str, corpus: Corpus) -> float:
    """Make the clips of one voice in one split, unless they exist. Returns their seconds."""
    folder = data / "clips"
    index = folder / f"{split}-{name}.jsonl"
    if index.exists():
        return index.with_suffix(".i16").stat().st_size / 2 / RATE
    if name == recordings.JOINED:
        make(data, split, recordings.VOICE, corpus)
        return write_clips(folder, split, name, HUMAN, _joined(folder), corpus.kind)
    if name == recordings.VOICE:
        return write_clips(folder, split, name, HUMAN, _recorded(split, corpus), corpus.kind)
    voice = next(voice for voice in VOICES if voice.name == name)
    return write_clips(folder, split, name, voice.engine, _synthetic(split, voice, data, corpus), corpus.kind)


def _recorded(split: str, corpus: Corpus) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed(split, recordings.VOICE))
    for _, text, path in recordings.prompts(corpus.root):
        if held_out(text) == (split in TESTS):
            clip = finished(recordings.decode(path), rng)
            if clip is not None:
                yield text, clip


def _joined(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Recordings of the training split joined in new orders, JOINED_MINUTES of them; none has a held-out text."""
    rng = np.random.default_rng(seed(recordings.JOINED))
    index = folder / f"train_human-{recordings.VOICE}.jsonl"
    pieces = [(line["text"], _bare(pcm.astype(np.float32) / 32768)) for line, pcm in read_clips(index)]
    samples = 0
    while samples < JOINED_MINUTES * 60 * RATE:
        text, sound = recordings.joined(pieces, rng)
        clip = finished(sound, rng)
        if clip is not None and len(text) <= LONGEST_TEXT and not held_out(text):
            yield text, clip
            samples += len(clip)


def _bare(samples: np.ndarray) -> np.ndarray:
    """A finished clip without its near silence at both ends."""
    loud = np.flatnonzero(np.abs(samples) > 0.003)
    return samples[loud[0] : loud[-1] + 1]


def _synthetic(split: str, voice: Voice, data: Path, corpus: Corpus) -> Iterator[tuple[str, np.ndarray]]:
    """Distinct texts until the voice has its minutes (train) or its number of clips."""
    speak = engine(voice, data / "sources")
    chance = seed(split, voice.name)
    rng = np.random.default_rng(chance)
    most = {"dev": voice.devs}.get(split, voice.tests) if split in TESTS else 10**9
    limit = 10**9 if split in TESTS else voice.minutes * 60 * RATE
    samples = count = 0
    for text in distinct(corpus.stream(chance, held=split in TESTS, mixture=voice.mixture)):
        if samples >= limit or count >= most:
            return
        clip = finished(speak(text, rng), rng, varied=voice.mixture != FIRST)
        if clip is not None:
            yield text, clip
            samples, count = samples + len(clip), count + 1
