"""Measures word error rates on the held-out clips, of this project's model and of two known recognisers.

    python -m training.evaluate MODEL DATA --out benchmarks/results/speech/2026-11-21.csv
    python -m training.evaluate --table benchmarks/results/speech/2026-11-21.csv --into docs/MODEL_CARD.md

Owns: which clips are used, the rows, the tables. Does not know: how a recogniser works (recognisers.py), how words are
counted (edge_gemma.measure.wer).

DATA holds clips/SPLIT-VOICE.i16, raw little-endian int16 of 16 kHz mono, and clips/SPLIT-VOICE.jsonl, a line for each
clip: {"text", "kind", "voice", "engine", "split", "first", "samples"}. The choice of clips is fixed: those of each file
whose text and voice have the smallest SHA-256. The recognisers run one after another, each in a process of its own, on
the same samples. Texts are compared in the same spelling. A real-time factor is the median over the clips of seconds
(of the clock, or of processor time) for a second of sound. A MODEL of "" is the embedded one.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge_gemma.folder.atomic import write_file
from edge_gemma.measure.wer import WordErrors
from training.recognisers import RATE, SYSTEMS

SPLITS = ("test_seen", "test_unseen", "test_human")
LIMIT = 120  # clips of each file
THREADS = 2
_TITLES = {
    "test_seen": "held-out sentences, voices of the training set",
    "test_unseen": "held-out sentences, voices never trained on",
    "test_human": "held-out recordings of a person",
    "dev": "development set",
}
_OURS = "edge_gemma"


@dataclass(frozen=True)
class Clip:
    file: str
    first: int  # sample of `file`
    samples: int
    text: str  # lower case, numbers in words
    kind: str  # where the text comes from (corpus.kind)
    voice: str
    engine: str  # what made the speech; "recording" or the like for a person
    split: str


@dataclass(frozen=True)
class Row:
    """One recogniser on one source. voice "all": all voices of the split, with texts of one kind or of all ("")."""

    system: str
    model: str  # folder name and recipe of ours
    split: str
    voice: str
    engine: str
    kind: str
    clips: int
    words: int
    wer: float  # 0.05: 5%
    substitutions: int
    deletions: int
    insertions: int
    duration_s: float
    rtf: float  # median, by the clock: only a quiet machine gives a meaningful one
    cpu_rtf: float  # median, by the processor time of all threads
    peak_mb: float  # of the process, over all sources
    threads: int
    cpu: str


def read_clips(data: Path, splits: Sequence[str], limit: int) -> list[Clip]:
    """The clips that are measured. Raises SystemExit if there are none."""
    found: list[Clip] = []
    for listing in sorted((data / "clips").glob("*.jsonl")):
        entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        clips = [
            Clip(str(listing.with_suffix(".i16")), **{name: entry[name] for name in _FROM_LISTING}) for entry in entries
        ]
        chosen = sorted((clip for clip in clips if clip.split in splits), key=_order)[:limit]
        found += sorted(chosen, key=lambda clip: clip.first)
    if not found:
        raise SystemExit(f"{data / 'clips'} holds no clips of {', '.join(splits)}: run training's preparation first")
    return found


_FROM_LISTING = [field.name for field in fields(Clip) if field.name != "file"]


def _order(clip: Clip) -> str:
    return hashlib.sha256(f"{clip.text}\0{clip.voice}".encode()).hexdigest()


def run(system: str, model: str, clips: Sequence[Clip], threads: int) -> tuple[list[dict[str, Any]], float]:
    """Texts and seconds, clip by clip, and the peak of the process's memory in MB."""
    command = [sys.executable, "-m", "training.recognisers", system, model, str(threads)]
    jobs = json.dumps([{"file": clip.file, "first": clip.first, "samples": clip.samples} for clip in clips])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, input=jobs, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    if done.returncode:
        raise SystemExit(f"{system} ended with exit code {done.returncode}: what it said stands above")
    *answers, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return answers, last["peak_mb"]


def rows(
    system: str, model: str, clips: Sequence[Clip], answers: Sequence[dict[str, Any]], peak_mb: float, threads: int
) -> list[Row]:
    """A row for each source, each kind of text and each split."""
    results = list(zip(clips, answers, strict=True))
    groups: dict[tuple[str, str, str, str], list[tuple[Clip, dict[str, Any]]]] = {}
    for clip, answer in results:
        for source in ((clip.voice, clip.engine, ""), ("all", "", clip.kind), ("all", "", "")):
            groups.setdefault((clip.split, *source), []).append((clip, answer))
    found = []
    for (split, voice, engine, kind), members in sorted(groups.items()):
        score = WordErrors.of([(clip.text, answer["text"]) for clip, answer in members])
        seconds = [clip.samples / RATE for clip, _ in members]
        work, busy = (
            [a[name] / s for (_, a), s in zip(members, seconds, strict=True)] for name in ("seconds", "cpu_s")
        )
        found.append(
            Row(
                system=system,
                model=model,
                split=split,
                voice=voice,
                engine=engine,
                kind=kind,
                clips=len(members),
                words=score.words,
                wer=round(score.wer or 0.0, 4),
                substitutions=score.substitutions,
                deletions=score.deletions,
                insertions=score.insertions,
                duration_s=round(sum(seconds), 1),
                rtf=round(statistics.median(work), 4),
                cpu_rtf=round(statistics.median(busy), 4),
                peak_mb=round(peak_mb),
                threads=threads,
                cpu=cpu(),
            )
        )
    return found


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{f.name: f.type(entry[f.name]) for f in fields(Row)}) for entry in csv.DictReader(file)]


def write_csv(path: Path, table: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.getvalue().encode())


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of both; a new row replaces old ones of the same system, model and split."""
    replaced = {(row.system, row.model, row.split) for row in new}
    return [row for row in old if (row.system, row.model, row.split) not in replaced] + list(new)


def tables(table: Sequence[Row]) -> str:
    """Markdown: a line for each recogniser and a column for each split, then a line for each kind of text and voice."""
    by_system: dict[str, list[Row]] = {}
    for row in table:
        by_system.setdefault(f"{row.system} {row.model}".strip(), []).append(row)
    splits = [split for split in _TITLES if any(row.split == split for row in table)]
    lines = [["", *(_TITLES[split] for split in splits), "real-time factor", "of processor time", "peak memory"]]
    for name, rows_of in by_system.items():
        wholes = {row.split: row for row in rows_of if (row.voice, row.kind) == ("all", "")}
        rates = [f"{wholes[split].wer:.1%}" if split in wholes else "-" for split in splits]
        work, busy = (statistics.median(getattr(row, f) for row in wholes.values()) for f in ("rtf", "cpu_rtf"))
        peak = max(row.peak_mb for row in rows_of)
        lines.append([name, *rates, f"{work:.3f}", f"{busy:.3f}", f"{peak:.0f} MB"])
    sources = {(row.split, row.kind, row.voice): row for row in table if (row.voice, row.kind) != ("all", "")}
    by_source = [["texts or voice", "clips", "words", *by_system]]
    for key, source in sorted(sources.items()):
        found = [[r.wer for r in rows_of if (r.split, r.kind, r.voice) == key] for rows_of in by_system.values()]
        rates = [f"{wer[0]:.1%}" if wer else "-" for wer in found]
        name = f"texts: {source.kind}" if source.kind else f"{source.voice} ({source.engine})"
        by_source.append([f"{source.split}, {name}", str(source.clips), str(source.words), *rates])
    return _markdown(lines) + "\n" + _markdown(by_source)


def with_tables(document: str, found: str) -> str:
    """The document with `found` between its two marks, lines that begin with `<!-- tables` and `<!-- end of tables`."""
    match = re.search(r"(?s)(^<!-- tables[^\n]*\n).*?(^<!-- end of tables)", document, re.MULTILINE)
    if match is None:
        raise SystemExit("the document has no line <!-- tables ... --> with a line <!-- end of tables --> after it")
    return document[: match.end(1)] + "\n" + found + "\n" + document[match.start(2) :]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |\n" for cells in lines]
    return head + "|" + "---|" * len(lines[0]) + "\n" + "".join(rest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="", help='a model folder or name; "" is the embedded model')
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, help="the CSV; rows of other systems, models and splits in it are kept")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--splits", nargs="+", default=list(SPLITS))
    parser.add_argument("--limit", type=int, default=LIMIT, help="clips of each source [%(default)s]")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--texts", type=Path, help="also write what was said and what was written, a line a clip")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the tables of a CSV and end")
    parser.add_argument("--into", type=Path, metavar="FILE", help="... or write them between the marks of a document")
    options = parser.parse_args(arguments)
    if options.table:
        found = tables(read_csv(options.table))
        if options.into:
            write_file(options.into, with_tables(options.into.read_text(encoding="utf-8"), found).encode())
        else:
            print(found, end="")
        return
    if options.data is None:
        parser.error("DATA is missing")
    measure(options)


def measure(options: argparse.Namespace) -> None:
    clips = read_clips(options.data, options.splits, options.limit)
    texts: dict[str, list[str]] = {}
    for system in options.systems:
        print(f"{system}: {len(clips)} clips", file=sys.stderr)
        name = model_name(options.model) if system.startswith(_OURS) else ""
        answers, peak_mb = run(system, options.model, clips, options.threads)
        texts[system] = [answer["text"] for answer in answers]
        new = rows(system, name, clips, answers, peak_mb, options.threads)
        if options.out:
            write_csv(options.out, merged(read_csv(options.out), new))
        print(tables(new), end="")
    if options.texts:
        found = [
            asdict(clip) | {system: written[i] for system, written in texts.items()} for i, clip in enumerate(clips)
        ]
        write_file(options.texts, "".join(json.dumps(entry) + "\n" for entry in found).encode())
    if _OURS in texts and f"{_OURS}-listen" in texts:
        differ = sum(a != b for a, b in zip(texts[_OURS], texts[f"{_OURS}-listen"], strict=True))
        print(f"live and file transcripts differ in {differ} of {len(clips)} clips")


def model_name(model: str) -> str:
    from edge_gemma.folder import find
    from edge_gemma.folder.folder import ModelFolder

    folder = ModelFolder.open(find.resolve(model or None))
    return f"{folder.path.name} {folder.manifest.get('recipe')}"


if __name__ == "__main__":
    main()
