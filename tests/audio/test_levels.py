"""Very quiet recordings are made louder and that is told; all others pass bit by bit."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.levels import QUIET_DB, levelled, loudest_db
from edge_gemma.audio.transcribe import Transcriber
from tests.fake_speech import SpeechEngine, say


def tone_at(db, seconds=1.0):
    """A sine whose power is `db` of full scale."""
    n = round(seconds * SAMPLE_RATE)
    return (10 ** (db / 20) * np.sqrt(2) * np.sin(2 * np.pi * 400 * np.arange(n) / SAMPLE_RATE)).astype(np.float32)


def run(sound, size=8000):
    notes, blocks = [], [sound[at : at + size] for at in range(0, len(sound), size)]
    return np.concatenate([*levelled(blocks, notes.append), np.zeros(0, np.float32)]), notes


def test_levels():
    for db in (-80, -40, -10):
        assert loudest_db(tone_at(db)) == pytest.approx(db, abs=0.1)
    assert loudest_db(np.zeros(0, np.float32)) == loudest_db(np.zeros(9, np.float32)) == -120
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[5000:5016] = 0.5
    assert loudest_db(click) < -25, "a click of 1 ms counts little"


@pytest.mark.parametrize("db", [-75, -60, -45])
def test_what_is_very_quiet_is_made_louder(db):
    sound, notes = run(np.concatenate([tone_at(-85, 2), tone_at(db, 2)]))
    assert loudest_db(sound) == pytest.approx(-20, abs=0.1)
    assert loudest_db(sound[:SAMPLE_RATE]) == pytest.approx(-20 - 85 - db, abs=0.1)
    assert notes == [f"the recording is very quiet, {db} dB of full scale at its loudest: it was made louder"]


def test_by_no_more_than_there_is_room_for():
    sound, notes = run(tone_at(-89))
    assert loudest_db(sound) == pytest.approx(-34, abs=0.2)
    assert len(notes) == 1
    for nothing in (np.zeros(SAMPLE_RATE, np.float32), np.zeros(0, np.float32)):
        sound, notes = run(nothing)
        assert not sound.any()
        assert len(sound) == len(nothing)
        assert notes == []


def test_the_gain_falls_before_speech_at_full_level():
    """A minute of a quiet room, then someone speaks."""
    sound, notes = run(np.concatenate([tone_at(-70, 60), tone_at(-15, 2), tone_at(-70, 2)]))
    assert loudest_db(sound[60 * SAMPLE_RATE : 62 * SAMPLE_RATE]) == pytest.approx(-15, abs=0.1)
    assert loudest_db(sound[62 * SAMPLE_RATE :]) == pytest.approx(-70, abs=0.1), "and stays there"
    assert notes == []


@pytest.mark.parametrize("size", [1, 7, 1999, 2001])
def test_blocks_shorter_than_a_moment_are_judged_together(size):
    for db, told in ((-15, 0), (-43, 0), (-47, 1)):
        sound, notes = run(tone_at(db), size)
        assert np.array_equal(sound, tone_at(db)) is not bool(told)
        assert len(notes) == told


@settings(deadline=None, max_examples=40)
@example([(-15.0, 1.0)], 1)
@given(st.lists(st.tuples(st.floats(-100, 0), st.floats(0.01, 3)), max_size=8), st.integers(1, 20_000))
def test_no_sample_is_lost_and_normal_sound_is_untouched(parts, size):
    sound = np.concatenate([np.zeros(0, np.float32), *(tone_at(db, s) for db, s in parts)])
    got, notes = run(np.clip(sound, -1, 1), size)
    assert len(got) == len(sound)
    assert np.abs(got).max(initial=0) <= 1
    if loudest_db(sound) > QUIET_DB + 15:  # pieces of blocks may be shorter than a moment
        assert np.array_equal(got, np.clip(sound, -1, 1))
        assert notes == []


def test_a_recording_of_minus_60_db_is_written_down():
    notes, engine = [], SpeechEngine(lambda levels: "heard" if levels.max(initial=0) > 0.05 else "")
    detector = type("", (), {"probability": lambda self, window: float(np.abs(window).max() > 0.05)})
    quiet = (say(-10, 1, 2, 3, -10) / 1000).astype(np.float32)
    assert Transcriber(engine, detector=detector, note=notes.append).transcribe(quiet).text == "heard"
    assert len(notes) == 1


def test_speech_without_a_text_is_told():
    notes, engine = [], SpeechEngine(lambda levels: "")
    detector = type("", (), {"probability": lambda self, window: float(np.abs(window).max() > 0.05)})
    result = Transcriber(engine, detector=detector, note=notes.append).transcribe(say(-10, 1, 2, 3, -10))
    assert (result.text, result.segments[0].note) == ("", "empty")
    assert notes == ["what was heard from 0.7 to 1.9 s gave no text"]
