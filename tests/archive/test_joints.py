"""Joints of long recordings: batch's are transcribe's, words at them are there once, the benchmark counts rightly."""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from benchmarks import joints, speech_clips
from benchmarks.joints import Joints, Place, Span, places
from benchmarks.speech_clips import Clip, Word
from benchmarks.watching import watched
from edge_gemma.audio.seams import glue, seam

SAID = "we went down to the river where all of the boats lay and then home"  # two words a second


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of tests/speech, half of it without pauses."""
    pytest.importorskip("av", reason="the audio extra is not installed")
    clips = [
        Clip(speech_clips.trimmed(samples), said := speech_clips.words(text), tuple((0.0, 0.1) for _ in said))
        for samples, text in speech_clips.clips(None)
    ]
    path = tmp_path_factory.mktemp("joints") / "recording.wav"
    speech_clips.write(path, clips, 120, breathless=0.5)
    return path


# --- batch and transcribe ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transcribed(recording: Path) -> list[dict]:
    from edge_gemma import Engine

    with Engine.load("demo") as engine:
        segments = engine.transcribe(recording).segments
    return [{"start": each.start, "end": each.end, "text": each.text} for each in segments]


@pytest.mark.parametrize(("workers", "sessions"), [(1, 1), (1, 4), (2, 2)])
def test_a_batch_has_the_segments_of_transcribe(
    recording: Path, transcribed: list[dict], tmp_path: Path, workers: int, sessions: int
) -> None:
    from edge_gemma.archive import job

    listed, output = tmp_path / "input.txt", tmp_path / "output.jsonl"
    listed.write_text(f"{recording}\n")
    asked = {"response_format": "verbose_json"}
    report = job.run(job.Job(str(listed), output, "demo", workers=workers, sessions=sessions, asked=asked))
    assert (report.done, report.failed) == (1, 0)
    (line,) = output.read_text().splitlines()
    body = json.loads(line)["response"]["body"]
    found = [{name: each[name] for name in ("start", "end", "text")} for each in body["segments"]]
    assert len(found) > 5
    assert found == transcribed


def test_how_a_recording_is_cut_can_be_told_from_its_segments(recording: Path, transcribed: list[dict]) -> None:
    found, known = joints.spans_of(transcribed), [span for span, _ in joints.cuts(recording)]
    assert {"cut", "pause"} <= {place.kind for place in places(known)}
    assert [span.joined for span in found] == [span.joined for span in known]
    for a, b in zip(found, known, strict=True):
        assert (a.start, a.end, a.heard_from, a.heard_to) == pytest.approx((b.start, b.end, b.heard_from, b.heard_to))


# --- seams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "joined"),
    [
        (
            "the person you are calling is not at their desk i will",
            "we is not a their desk i will try to locate them",
            "the person you are calling is not at their desk i will try to locate them",
        ),
        ("switch off all lights in the hall", "of all light in the hall now", "switch off all lights in the hall now"),
        ("a b c d e f", "c d x e f g", "a b c d x e f g"),
        ("a b c d x e f", "c d e f g", "a b c d x e f g"),
        ("a b c d", "e f g h", "a b c d e f g h"),
        ("press one to listen", "listen press two to record", "press one to listen press two to record"),
    ],
)
def test_a_misheard_word_does_not_double_the_others(before: str, after: str, joined: str) -> None:
    assert glue(*seam(before, after)) == joined


# --- the count --------------------------------------------------------------------------------------------------------


def said() -> list[Word]:
    return [Word(word, i / 2, i / 2 + 0.5) for i, word in enumerate(SAID.split())]


def errors(before: str, after: str, at: float = 4.0) -> list[tuple[str, str]]:
    segments = [{"start": 0.0, "end": at, "text": before}, {"start": at, "end": 7.5, "text": after}]
    found = Joints(said(), segments).errors(Place(at, "cut", 0))
    return [(error.kind, error.word) for error in found]


def test_nothing_is_found_where_nothing_is() -> None:
    assert errors("we went down to the river where all", "of the boats lay and then home") == []
    assert errors("We went down to the river, where all", "of the boats lay, and then home.") == []
    assert errors("we went down to the river where all of the", "boats lay and then home") == []


def test_a_lost_word_is_found() -> None:
    assert errors("we went down to the river where", "of the boats lay and then home") == [("lost", "all")]
    assert errors("we went down to the river where all", "the boats lay and then home") == [("lost", "of")]
    found = errors("we went down to the river", "boats lay and then home")
    assert found == [("lost", word) for word in ("where", "all", "of", "the")]


def test_a_doubled_word_is_found() -> None:
    assert errors("we went down to the river where all", "all of the boats lay and then home") == [("doubled", "all")]
    found = errors("we went down to the river where all of", "where all of the boats lay and then home")
    assert sorted(found) == [("doubled", word) for word in ("all", "of", "where")]


def test_a_changed_and_an_added_word_are_found() -> None:
    assert errors("we went down to the river where ale", "of the boats lay and then home") == [("changed", "all")]
    assert errors("we went down to the river where all", "um of the boats lay and then home") == [("added", "um")]


def test_what_is_wrong_far_from_a_joint_is_not_its_own() -> None:
    assert errors("went town to the river where all", "of the boats lay and then") == []


def test_what_the_model_gets_wrong_anyway_is_not_the_joints() -> None:
    texts = ("we went down to the river where", "of the boats lay then home")
    segments = [{"start": 0.0, "end": 4.0, "text": texts[0]}, {"start": 4.0, "end": 7.5, "text": texts[1]}]
    spans = [Span(0.0, 4.0, False, 0.0, 5.0), Span(4.0, 7.5, True, 3.0, 7.5)]
    pieces = []

    def write(asked):
        pieces.extend(asked)
        return [SAID for _ in asked]

    figures, lines = joints.counted(said(), spans, segments, write)
    assert pieces == [(0.0, 14.0)]
    assert figures["cut"] == {"places": 1, "words": 8, "lost": 1, "lost, its own": 1}
    assert len(lines) == 1
    figures, lines = joints.counted(said(), spans, segments, lambda asked: [" ".join(texts)] * len(asked))
    assert figures["cut"] == {"places": 1, "words": 8, "lost": 1}
    assert lines == []


def test_a_pause_is_longer_than_what_is_near() -> None:
    words = [Word("before", 1.0, 1.5), Word("after", 9.0, 9.5)]
    segments = [{"start": 0.8, "end": 1.7, "text": ""}, {"start": 8.8, "end": 9.7, "text": "after"}]
    assert [e.word for e in Joints(words, segments).errors(Place(5.25, "pause", 0))] == ["before"]


def test_sound_that_no_segment_has_is_found() -> None:
    words = [Word("a", 1.0, 2.0), Word("b", 2.0, 3.0), Word("c", 3.0, 4.0)]
    spans = [Span(0.5, 2.0, False, 0.5, 2.0), Span(2.0, 3.5, False, 2.0, 3.5)]
    assert [word.text for word in joints.unheard(words, spans)] == ["c"]
    assert joints.unheard(words[:2], spans) == []
    assert [word.text for word in joints.unheard(words[:2], spans[1:])] == ["a"]
    gap = [Span(0.5, 1.5, False, 0.5, 1.5), Span(1.7, 4.0, False, 1.7, 4.0)]
    assert [word.text for word in joints.unheard(words, gap)] == ["a"]


@pytest.mark.parametrize("how", joints.HALVES)
def test_who_hears_all_words_writes_each_once(how: str) -> None:
    words = [Word(f"word{i}", 0.4 * i, 0.4 * i + 0.4) for i in range(200)]
    spans = [Span(0.0, 28.9, False, 0.0, 29.93), Span(28.9, 56.8, True, 27.88, 57.83), Span(56.8, 80, True, 55.78, 80)]
    segments = joints.perfect(words, spans, how)
    assert " ".join(segment["text"] for segment in segments) == " ".join(word.text for word in words)


# --- the recording and the watch --------------------------------------------------------------------------------------


def test_a_recording_says_when_what_is_said(tmp_path: Path) -> None:
    samples = np.full(8000, 0.5, np.float32)
    samples[3000:5000] = 0
    told = ("one", "two")
    spans = speech_clips.word_spans(samples, told)
    assert np.allclose(spans, [(0.0, 0.1875), (0.3125, 0.5)], atol=0.011)
    path = tmp_path / "r.wav"
    heard = speech_clips.write(path, [Clip(samples, told, spans)], 60)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    assert 60 <= len(sound) / 16_000 < 65
    for word in heard:
        assert np.abs(sound[int(word.start * 16_000) + 300 : int(word.end * 16_000) - 300]).min() > 0.4
    assert len(heard) * 0.19 == pytest.approx((np.abs(sound) > 0.4).sum() / 16_000, rel=0.02)


def test_a_command_is_watched() -> None:
    done = watched([sys.executable, "-c", "import time; time.sleep(0.5); print('x' * 100000)"])
    assert done.output == "x" * 100_000 + "\n"
    own, everyone = done.memory(1.0)
    assert 3 < own <= everyone
    assert done.seconds > 0.5
