"""Time stamps and tracks of films: sound lies where the file says it does, and no stamp can make hours of silence."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.audio import files
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.transcribe import Transcriber
from edge_gemma.errors import UsageError
from tests.audio.test_files import read
from tests.fake_speech import LevelDetector, SpeechEngine

av = pytest.importorskip("av", reason="the audio extra is not installed")

RATE, FRAME = 48_000, 960


def film(path, *tracks, codec="aac", picture=0.0, default=None):
    """Tracks are lists of (second, samples at RATE): each is stamped with the second at which it begins."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p") if picture else None
        streams = [container.add_stream(codec, rate=RATE, layout="mono") for _ in tracks]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        if video:
            for i in range(round(picture * 10)):
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        for stream, pieces in zip(streams, tracks, strict=True):
            size = stream.codec_context.frame_size or FRAME
            for second, samples in pieces:
                for at in range(0, len(samples), size):
                    part = np.pad(samples[at : at + size], (0, max(0, size - len(samples) + at))).astype(np.float32)
                    kind = stream.codec_context.format.name
                    if "s16" in kind:
                        part = (part * 32767).astype(np.int16)
                    frame = av.AudioFrame.from_ndarray(part[None], kind, "mono")
                    frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
                    frame.pts = round(second * RATE) + at
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def buzz(seconds, level=0.5):
    return level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)


def loud_spans(samples):
    """Where the sound is, in seconds."""
    windows = np.abs(samples[: len(samples) // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.1
    edges = np.flatnonzero(np.diff(windows.astype(int), prepend=0, append=0)) / 100
    spans = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if spans and start - spans[-1][1] < 0.05:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    return spans


FILMS = [("x.mkv", "aac"), ("x.mp4", "aac"), ("x.ts", "aac"), ("x.webm", "libopus"), ("x.mkv", "pcm_s16le")]


@pytest.mark.parametrize(("name", "codec"), FILMS)
def test_a_hole_in_the_stamps_is_silence(tmp_path, name, codec):
    notes = []
    path = film(tmp_path / name, [(0, buzz(1)), (3.5, buzz(1))], codec=codec)
    (a, b), (c, d) = loud_spans(read(path, notes))
    assert (a, b, c, d) == pytest.approx((0, 1, 3.5, 4.5), abs=0.06)
    assert notes == []


@pytest.mark.parametrize(("name", "codec"), [("x.mkv", "aac"), ("x.mp4", "aac"), ("x.ts", "aac")])
def test_sound_that_begins_after_the_picture(tmp_path, name, codec):
    ((start, end),) = loud_spans(read(film(tmp_path / name, [(2, buzz(1))], codec=codec, picture=5)))
    assert (start, end) == pytest.approx((2, 3), abs=0.15)


def test_zero_is_where_the_first_stream_begins(tmp_path):
    """A recording of a broadcast begins anywhere."""
    ((start, _),) = loud_spans(read(film(tmp_path / "x.mkv", [(5000, buzz(1))])))
    assert start == pytest.approx(0, abs=0.05)


def test_cues_follow_the_stamps(tmp_path):
    notes = []
    path = film(tmp_path / "x.mkv", [(1.5, np.full(RATE, 0.2)), (9, np.full(RATE, 0.2))], codec="pcm_s16le", picture=10)
    result = Transcriber(SpeechEngine(lambda levels: "hm"), detector=LevelDetector, note=notes.append).transcribe(path)
    first, second = result.segments
    assert first.start < 1.5 < 2.2 < first.end < 3
    assert 8.5 < second.start < 9 < 9.9 < second.end < 10.1
    assert result.duration_s == pytest.approx(10, abs=0.1)
    assert notes == []


def test_a_sound_track_shorter_than_the_picture_is_whole(tmp_path):
    for name in ("x.mp4", "x.mkv"):
        for start in (0, 2):
            notes = []
            read(film(tmp_path / name, [(start, buzz(1.7))], picture=9), notes)
            assert notes == []


def test_stamps_that_lie_do_not_fill_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SILENCE_S", 5.0)
    notes = []
    got = read(film(tmp_path / "x.mkv", [(0, buzz(1)), (3, buzz(1)), (9000, buzz(1)), (9003, buzz(1))]), notes)
    spans = loud_spans(got)
    assert [start for start, _ in spans] == pytest.approx([0, 3, 7], abs=0.06), "the second hole does not count"
    assert notes == [
        f"{tmp_path}/x.mkv has time stamps with holes of 8996 s, more than 5 s in all: times after them are too early"
    ]


stamps = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10_000))


@given(st.one_of(st.none(), st.floats(-10, 10)), st.lists(st.tuples(stamps, st.floats(0, 2)), max_size=40))
def test_a_clock_never_goes_back_nor_beyond_its_room(origin, frames):
    clock, silence, sound = files._Clock(origin), 0.0, 0.0
    for time, length in frames:
        gap = clock.missing(time)
        assert gap >= 0
        silence, sound = silence + gap, sound + length
        clock.passed(gap, length)
        assert clock.at == pytest.approx(silence + sound)
        assert silence <= files._SILENCE_S * 1.001


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.5, 3)), min_size=1, max_size=20), st.floats(-0.05, 0.05))
def test_a_clock_follows_honest_stamps(pieces, jitter):
    clock, time = files._Clock(0.0), 0.0
    for i, (pause, length) in enumerate(pieces):
        time += pause
        gap = clock.missing(time + (jitter if i % 2 else 0))
        clock.passed(gap, length)
        time += length
        # A gap is measured by a stamp that is off by up to `jitter`, and left as it is up to _JITTER_S.
        assert abs(clock.at - time) <= files._JITTER_S + abs(jitter) + 1e-6


def test_stamps_that_begin_again_go_on(tmp_path):
    """Two broadcasts in one file."""
    clock = files._Clock(0.0)
    times = [*np.arange(0, 5, 0.02), *np.arange(0, 5, 0.02), *np.arange(7, 9, 0.02)]
    starts = []
    for time in times:
        gap = clock.missing(time)
        starts.append(clock.at + gap)
        clock.passed(gap, 0.02)
    assert starts[250] == pytest.approx(5)
    assert starts[500] == pytest.approx(12), "a hole of two seconds"
    assert all(0 < b - a < 2.1 for a, b in pairwise(starts))


# --- several sound tracks ---------------------------------------------------------------------------------------------


def two_tracks(path, first, second, default=None):
    return film(path, [(0, np.full(RATE, first))], [(0, np.full(RATE, second))], codec="pcm_s16le", default=default)


def transcribed(path, notes, **options):
    engine = SpeechEngine(lambda levels: f"{levels.max(initial=0):.1f}")
    return Transcriber(engine, detector=LevelDetector, note=notes.append).transcribe(path, **options).text


def test_the_default_track_is_read_else_the_first(tmp_path):
    for default, text, number in ((None, "0.2", 1), (0, "0.2", 1), (1, "0.4", 2)):
        notes, path = [], two_tracks(tmp_path / "x.mkv", 0.2, 0.4, default)
        assert transcribed(path, notes) == text
        assert notes == [f"{path} has 2 sound tracks: track {number} is read"]


def test_the_next_track_is_tried_where_nothing_is_said(tmp_path):
    for levels, text, tried in (((0, 0.4), "0.4", 2), ((0.2, 0), "0.2", 0), ((0, 0), "", 2)):
        notes, path = [], two_tracks(tmp_path / "x.mkv", *levels)
        assert transcribed(path, notes) == text
        assert any(f"no speech was found in track 1: track {tried} is tried" in note for note in notes) == bool(tried)
        assert ("no speech was found" in notes) == (levels == (0, 0))


def test_a_track_that_was_asked_for(tmp_path):
    notes, path = [], two_tracks(tmp_path / "x.mkv", 0.2, 0)
    assert transcribed(path, notes, track=2) == "", "no other one then"
    assert notes == [f"{path} has 2 sound tracks: track 2 is read", "no speech was found"]
    for track in (0, 3, -1):
        with pytest.raises(UsageError, match=f"track {track} was asked for"):
            AudioFile(path, track=track)
    with pytest.raises(UsageError, match="track means nothing beside samples"):
        transcribed(np.zeros(SAMPLE_RATE), [], track=1)
    with pytest.raises(UsageError, match="rate means nothing beside a file"):
        transcribed(path, [], rate=SAMPLE_RATE)
