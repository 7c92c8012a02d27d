"""Where the segments of a recording meet: words that are lost or doubled there, and whose errors they are.

Owns: joints, errors near them (`errors`, `Joints`, `counted`), who else writes a recording down: one who hears every
word (`perfect`), Whisper, the model piece by piece. long_recording.py tells what counts as what. Does not know: how
recordings are cut, how their parts are joined.
"""

import bisect
import itertools
import json
import subprocess
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.speech_clips import RATE, Word, words

_NEAR_S = 2.0
_PIECE_S = 10.0  # on either side
_CUTS = 60
_LEAST_S = 6.0  # a segment whose middle is looked at
_KINDS = ("lost", "doubled", "changed", "added")
HALVES = ("left out", "in part", "whole", "mistaken")  # what may become of a word of which a part is heard


# --- what is written at joints ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """kind: one of _KINDS. word: said, or written though nobody said it. at: seconds, the place among what was said."""

    kind: str
    word: str
    at: float


def errors(said: Sequence[Word], written: Sequence[str]) -> list[Error]:
    """How what is written differs from what was said."""
    import jiwer

    if not said or not written:
        return [Error("lost", word.text, word.at) for word in said]
    found: list[Error] = []
    aligned = jiwer.process_words([" ".join(word.text for word in said)], [" ".join(written)]).alignments[0]
    for chunk in aligned:
        here = said[chunk.ref_start_idx : chunk.ref_end_idx]
        if chunk.type == "delete":
            found += [Error("lost", word.text, word.at) for word in here]
        elif chunk.type == "substitute":
            found += [Error("changed", word.text, word.at) for word in here]
        elif chunk.type == "insert":
            at = said[min(chunk.ref_start_idx, len(said) - 1)].at
            for index in range(chunk.hyp_start_idx, chunk.hyp_end_idx):
                length = chunk.hyp_end_idx - chunk.hyp_start_idx
                around = [*written[max(0, index - 2 * length) : index], *written[index + 1 : index + 1 + 2 * length]]
                found.append(Error("doubled" if written[index] in around else "added", written[index], at))
    return found


@dataclass(frozen=True)
class Place:
    """A joint, or the middle of a segment. kind: pause, cut, middle. index: of the segment before it, or of its own."""

    at: float
    kind: str
    index: int


Segments = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Span:
    """As `cuts.Cut`, without its samples: heard_from and heard_to are seconds, too."""

    start: float
    end: float
    joined: bool
    heard_from: float
    heard_to: float


def cuts(recording: Path, rules: Any = None) -> Iterator[tuple[Span, np.ndarray]]:
    """How the recording is cut, and what is heard. rules: None for those of recordings."""
    from edge_gemma.audio.cuts import Cutter
    from edge_gemma.audio.segments import FILE_RULES, OVERLAP

    for cut in Cutter(rules or FILE_RULES).file(recording):
        heard_from = cut.start - (OVERLAP / 2 / RATE if cut.joined else 0.0)
        span = Span(cut.start, cut.end, cut.joined, heard_from, heard_from + len(cut.samples) / RATE)
        yield span, cut.samples


def spans_of(segments: Segments) -> list[Span]:
    """How a recording was cut whose segments these are: one that ends where the next begins and is full ends at a cut.

    As `cuts`, but in no time.
    """
    from edge_gemma.audio.segments import FILE_RULES, OVERLAP
    from edge_gemma.audio.vad import WINDOW

    half, window = OVERLAP / 2 / RATE, WINDOW / RATE
    found, is_joined = list[Span](), False
    for segment, after in itertools.zip_longest(segments, segments[1:]):
        start, end = segment["start"], segment["end"]
        heard_from = start - half * is_joined
        full = -1.5 * window < end + half - heard_from - FILE_RULES.longest_s < 1e-3
        is_cut = full and after is not None and abs(after["start"] - end) < 1e-3
        found.append(Span(start, end, is_joined, heard_from, end + half * is_cut))
        is_joined = is_cut
    return found


def unheard(said: Sequence[Word], spans: Sequence[Span]) -> list[Word]:
    """Words of whose sound more than 2% are in no segment."""
    ends = [span.heard_to for span in spans]
    found = []
    for word in said:
        at = word.start
        for span in spans[bisect.bisect_left(ends, word.start) :]:
            if span.heard_from > max(at, word.start + 0.02 * (word.end - word.start)) or at >= word.end:
                break
            at = max(at, span.heard_to)
        if word.end - at > 0.02 * (word.end - word.start):
            found.append(word)
    return found


def places(spans: Sequence[Span]) -> list[Place]:
    """All joints, and middles of segments."""
    found = []
    for i, span in enumerate(spans):
        if span.end - span.start >= _LEAST_S:
            found.append(Place((span.start + span.end) / 2, "middle", i))
        if i + 1 < len(spans):
            after = spans[i + 1]
            found.append(Place((span.end + after.start) / 2, "cut" if after.joined else "pause", i))
    return found


class Joints:
    """What was said, and what was written of it."""

    def __init__(self, said: Sequence[Word], segments: Segments) -> None:
        self._said, self._segments = said, segments
        self._times = [word.at for word in said]
        self._written = [words(segment["text"]) for segment in segments]

    def between(self, start: float, end: float) -> Sequence[Word]:
        """What was said from start to end."""
        return self._said[bisect.bisect_left(self._times, start) : bisect.bisect_left(self._times, end)]

    def near(self, place: Place) -> tuple[float, float]:
        """From when to when words are near a place."""
        middle = bisect.bisect_left(self._times, place.at)
        before = self._times[max(0, middle - 1)]
        after = self._times[min(middle, len(self._times) - 1)]
        return min(before, place.at - _NEAR_S), max(after, place.at + _NEAR_S)

    def errors(self, place: Place) -> list[Error]:
        """Those near a place."""
        first = max(0, place.index - 1)
        chosen = self._segments[first : place.index + 3]
        start = chosen[0]["start"] if first else 0.0
        end = chosen[-1]["end"] if place.index + 3 < len(self._segments) else float("inf")
        written = [word for each in self._written[first : place.index + 3] for word in each]
        return self._within(place, errors(self.between(start, end), written))

    def errors_in_one_piece(self, place: Place, start: float, end: float, text: str) -> list[Error]:
        """Those near a place of what was written of start to end, as one piece."""
        return self._within(place, errors(self.between(start, end), words(text)))

    def _within(self, place: Place, found: Iterable[Error]) -> list[Error]:
        start, end = self.near(place)
        return [error for error in found if start <= error.at <= end]


def of_the_joint(found: Sequence[Error], in_one_piece: Sequence[Error]) -> list[Error]:
    """The errors that are not there in one piece: neither that word, nor, for added ones, any at that place."""
    there = {error.at for error in in_one_piece}
    return [error for error in found if error.at not in there]


Write = Callable[[Sequence[tuple[float, float]]], list[str]]  # what is heard from when to when, seconds, to texts


def counted(
    said: Sequence[Word],
    spans: Sequence[Span],
    segments: Segments,
    write: Write | None = None,
    *,
    piece_s: float = _PIECE_S,
    chosen: Set[int] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Figures by kind of place, and a line about each error that is a joint's. write: None: all errors are.

    chosen: only joints without a pause between these segments, and the middles of these.
    """
    joints = Joints(said, segments)
    figures = {kind: Counter[str]() for kind in ("pause", "cut", "middle")}
    found: list[tuple[Place, list[Error]]] = []
    for place in places(spans):
        beside = {place.index, place.index + (place.kind == "cut")}
        if chosen is not None and (place.kind == "pause" or not chosen >= beside):
            continue
        figures[place.kind]["places"] += 1
        figures[place.kind]["words"] += len(joints.between(*joints.near(place)))
        if errors := joints.errors(place):
            found.append((place, errors))
    pieces = [(max(0.0, place.at - piece_s), place.at + piece_s) for place, _ in found]
    texts = write(pieces) if write else [""] * len(found)
    lines = []
    for (place, errors), (start, end), text in zip(found, pieces, texts, strict=True):
        figure = figures[place.kind]
        for error in errors:
            figure[error.kind] += 1
        own = of_the_joint(errors, joints.errors_in_one_piece(place, start, end, text)) if write else errors
        for error in own:
            figure[f"{error.kind}, its own"] += 1
            around = " ".join(word.text for word in joints.between(place.at - 4, place.at + 4))
            after = segments[min(place.index + 1, len(segments) - 1)]["text"]
            lines.append(
                f"{place.kind} at {place.at:.2f}: {error.kind} {error.word!r} at {error.at:.2f}: "
                f"{segments[place.index]['text'][-60:]!r} | {after[:60]!r}; said {around!r}; in one piece {text!r}"
            )
    return {kind: dict(figure) for kind, figure in figures.items()}, lines


def told_figures(figures: dict[str, Any]) -> Iterator[str]:
    """A line for each kind of place."""
    for kind, figure in figures.items():
        told = ", ".join(
            f"{name} {figure.get(name, 0)} (its own {figure.get(f'{name}, its own', 0)})" for name in _KINDS
        )
        yield f"{kind}: {figure.get('places', 0):,} places, {figure.get('words', 0):,} words near; {told}"


def joined(spans: Sequence[Span], texts: Iterable[str]) -> Segments:
    """What was written of each span, with the words at joints in one of them."""
    from edge_gemma.audio.transcribe import Segment, finished

    written = ((Segment(span.start, span.end, text), span.joined) for span, text in zip(spans, texts, strict=True))
    return [{"start": each.start, "end": each.end, "text": each.text} for each in finished(written)]


# --- who else writes it down ------------------------------------------------------------------------------------------


def perfect(said: Sequence[Word], spans: Sequence[Span], how: str, seed: int = 1) -> Segments:
    """What is written by one who hears all words. how: what becomes of words that are cut in two, one of HALVES."""
    rng = np.random.default_rng(seed)
    starts, ends = [word.start for word in said], [word.end for word in said]
    texts = []
    for span in spans:
        heard = []
        for word in said[bisect.bisect_right(ends, span.heard_from) : bisect.bisect_left(starts, span.heard_to)]:
            before = max(0.0, span.heard_from - word.start) / (word.end - word.start)  # shares that are not heard
            after = max(0.0, word.end - span.heard_to) / (word.end - word.start)
            if not span.joined:  # nobody pauses within a word: the estimate is wrong, it is on one side of the pause
                before = float(before >= 0.5)
            if span.heard_to == span.end:
                after = float(after > 0.5)
            letters = word.text
            if before + after >= 1:
                letters = ""
            elif before + after > 0.02:
                if how == "in part":
                    letters = letters[round(before * len(letters)) : round((1 - after) * len(letters))]
                elif how == "left out" or before + after > 0.5:
                    letters = ""
                elif how == "mistaken":
                    letters = f"{letters[:1]}umble{int(rng.integers(100))}"
            heard.append(letters)
        texts.append(" ".join(word for word in heard if word))
    return joined(spans, texts)


class Whisper:
    """Whisper tiny.en in a process of another environment, as training/recognisers.py runs it."""

    def __init__(self, python: Path, recording: Path, threads: int = 2) -> None:
        self._command = [str(python), "-m", "training.recognisers", "whisper-tiny.en", "", str(threads)]
        self._recording = recording
        with recording.open("rb") as file:
            self._header = file.read(4096).index(b"data") + 8

    def write(self, pieces: Sequence[tuple[float, float]]) -> list[str]:
        """The text of each piece: from when to when, in seconds."""
        if not pieces:
            return []
        end = (self._recording.stat().st_size - self._header) // 2
        jobs = []
        for piece in pieces:
            start, stop = (min(end, round(at * RATE)) for at in piece)
            first = self._header // 2 + start
            jobs.append({"file": str(self._recording.resolve()), "first": first, "samples": stop - start})
        # That environment may not have what the process needs to tell its own memory, at its very end.
        run = subprocess.run(self._command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
        texts = [json.loads(line)["text"] for line in run.stdout.splitlines()[: len(jobs)]]
        if len(texts) < len(jobs):
            raise click.ClickException(f"whisper ended early: {run.stderr[-500:]}")
        return texts


def piece_writer(engine: Any, recording: Path) -> Write:
    """What the model writes of pieces."""
    from edge_gemma.audio.transcribe import Transcriber

    transcriber = Transcriber(engine)

    def text(start: float, end: float) -> str:
        written: str
        with wave.open(str(recording)) as file:
            file.setpos(int(start * RATE))
            sound = np.frombuffer(file.readframes(int((end - start) * RATE)), "<i2").astype(np.float32) / 32768
        written, *_ = transcriber.text(sound)
        return written

    return lambda pieces: [text(*piece) for piece in pieces]


def beside_cuts(said: Sequence[Word], spans: Sequence[Span], write: Write) -> tuple[dict[str, Any], list[str]]:
    """As `counted`, of the first _CUTS joints without a pause and the segments beside them: another recogniser is slow.

    What is far from these counts as written without an error.
    """
    after = [i for i, span in enumerate(spans) if span.joined][:_CUTS]
    chosen = {*after, *(i - 1 for i in after)}
    order = sorted(chosen)
    heard = write([(spans[i].heard_from, spans[i].heard_to) for i in order])
    texts = [str(segment["text"]) for segment in perfect(said, spans, "whole")]
    for i, text in zip(order, heard, strict=True):
        texts[i] = text
    written = joined(spans, texts)
    return counted(said, spans, written, write, chosen=chosen) if after else ({}, [])
