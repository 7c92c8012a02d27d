"""Computes log-mel features of all clips, clean and augmented, for training to read.

    python -m training.features DATA --copies 3 [--processes 2]

For DATA/clips/<split>-<voice> writes DATA/features/<split>-<voice>-<copy>.f16, raw float16 [frames, 128] of
edge_gemma.audio.features.log_mel, clips one after the other, and .jsonl: the clip's line with "first_frame" and
"frames". Copy 0 is clean; the others are augmented, seeded by the file's name and the copy. Held-out splits have only
copy 0. Existing files are kept.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_gemma.audio.features import log_mel
from edge_gemma.folder.atomic import write_file
from training.augment import augment
from training.clips import TESTS, read_clips, seed

BABBLERS = 60  # clips of the same file from which babble is made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.features", description="Features of every file of clips.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--copies", type=int, default=2, help="1: only clean; 2: clean and one augmented; ...")
    parser.add_argument("--human-copies", type=int, default=0, help="copies of recorded speech, if more")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    indexes = sorted((options.data / "clips").glob("*.jsonl"))
    jobs = [
        (index, copy)
        for copy in range(max(options.copies, options.human_copies))
        for index in indexes
        if copy < _copies(index.name.split("-")[0], options.copies, options.human_copies)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start, frames = time.perf_counter(), 0
    with ProcessPoolExecutor(options.processes) as pool, Progress(*columns) as progress:
        bar = progress.add_task("features", total=len(jobs))
        running = {pool.submit(write_features, index, copy): index.stem for index, copy in jobs}
        for done in as_completed(running):
            frames += done.result()
            progress.update(bar, advance=1, description=running[done])
    seconds = time.perf_counter() - start
    print(
        f"{frames} frames in {seconds:.0f} s: {frames / seconds:.0f} frames/s, {frames / seconds / 100:.0f} x real time"
    )


def _copies(split: str, most: int, human: int) -> int:
    """The number of copies of a split: 1 if it is held out, `human` for recorded speech, of which there is little."""
    return 1 if split in TESTS else max(most, human) if split == "train_human" else most


def write_features(index: Path, copy: int) -> int:
    """One copy of one file of clips. Returns the frames computed: 0 if it was there."""
    target = index.parent.parent / "features" / f"{index.stem}-{copy}.f16"
    if target.with_suffix(".jsonl").exists():
        return 0
    target.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng([seed(index.stem), copy])
    clips = [(line, pcm.astype(np.float32) / 32768) for line, pcm in read_clips(index)]
    others = [samples for _, samples in clips[:: max(1, len(clips) // BABBLERS)]]
    rows, lines, first = [], [], 0
    for line, samples in clips:
        features = log_mel(augment(samples, rng, others) if copy else samples).astype(np.float16)
        lines.append(json.dumps({**line, "first_frame": first, "frames": len(features)}))
        rows.append(features.tobytes())
        first += len(features)
    write_file(target, b"".join(rows))
    write_file(target.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines).encode())
    return first


if __name__ == "__main__":
    main()
