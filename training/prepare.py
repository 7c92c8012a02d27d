"""Makes all speech data with one command: fetches the sources, then speaks every text with every voice.

    python -m training.prepare DATA [--engines human,espeak,flite] [--processes 2]
    python -m training.prepare DATA --table

Owns: the order of work, the manifest, the table of the data. A second run keeps what exists and does the rest.
"""

import argparse
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import write_file
from training import clips, recordings, sources
from training.corpus import Corpus
from training.splits import PARTS
from training.voices import VOICES

_corpus: dict[Path, Corpus] = {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder for sources and clips, a few GB")
    engines = {voice.name: voice.engine for voice in VOICES}
    engines |= dict.fromkeys((recordings.VOICE, recordings.JOINED), clips.HUMAN)
    parser.add_argument("--engines", default=",".join(sorted({*engines.values()})), help="only these [%(default)s]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print what is there, and renew the manifest")
    options = parser.parse_args()
    if options.table:
        write_manifest(options.data)
        print(table(options.data))
        return
    try:
        sources.fetch(options.data)
    except UsageError as error:
        sys.exit(f"error: {error}")
    wanted = set(options.engines.split(","))
    jobs = [job for job in clips.jobs() if engines[job[1]] in wanted]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProcessPoolExecutor(options.processes) as pool, Progress(*columns) as progress:
        bar = progress.add_task("clips", total=len(jobs))
        running = {pool.submit(_make, options.data, split, name): (split, name) for split, name in jobs}
        for done in as_completed(running):
            split, name = running[done]
            progress.update(bar, advance=1, description=f"{split}-{name}: {done.result() / 60:.1f} min")
    write_manifest(options.data)


def _make(data: Path, split: str, name: str) -> float:
    corpus = _corpus.setdefault(data, Corpus.load(data))
    return clips.make(data, split, name, corpus)


def write_manifest(data: Path) -> None:
    """DATA/manifest.json: digest, clips and seconds of every file of clips, and the versions of the sources."""
    files = {}
    for sound in sorted((data / "clips").glob("*.i16")):
        index = sound.with_suffix(".jsonl")
        if index.exists():
            files[sound.name] = {
                "sha256": hashlib.sha256(sound.read_bytes()).hexdigest(),
                "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
                "clips": index.read_text().count("\n"),
                "seconds": round(sound.stat().st_size / 2 / clips.RATE, 3),
            }
    packages = {
        package.name: {"version": package.version, "sha256": package.sha256, "licence": package.licence}
        for package in sources.PACKAGES
    }
    write_file(data / "manifest.json", json.dumps({"sources": packages, "files": files}, indent=1).encode())


def table(data: Path) -> str:
    """Voices, minutes and clips of each engine and split there, as Markdown."""
    rows: dict[tuple[str, str], list[float]] = {}
    for index in sorted((data / "clips").glob("*.jsonl")):
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        if lines:
            row = rows.setdefault((lines[0]["split"], lines[0]["engine"]), [0, 0, 0])
            row[0] += 1
            row[1] += len(lines)
            row[2] += sum(line["samples"] for line in lines) / clips.RATE / 60
    texts = ["| split | engine | files | clips | minutes |", "|---|---|---|---|---|"]
    ordered = sorted(rows.items(), key=lambda item: (PARTS.index(item[0][0]), item[0][1]))
    for (split, engine), (files, count, minutes) in ordered:
        texts.append(f"| {split} | {engine} | {files:.0f} | {count:.0f} | {minutes:.1f} |")
    return "\n".join(texts)


if __name__ == "__main__":
    main()
