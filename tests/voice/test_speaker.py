"""Answers aloud: in order, clause by clause; silent at once; what was heard of them."""

import threading
import time

import numpy as np
import pytest

from edge_gemma.errors import AudioError
from edge_gemma.voice import loudspeaker as module
from edge_gemma.voice import speaker as speaker_module
from edge_gemma.voice.loudspeaker import Loudspeaker
from edge_gemma.voice.speaker import Speaker
from tests.fake_sound import FakeSound
from tests.waiting import until

RATE = 8000
LETTER_S = 0.01  # of sound for each letter


class Voice:
    """A voice whose samples are the letters, each for 10 ms. It waits where it is told to."""

    def __init__(self):
        self.texts, self.stopped = [], 0
        self.free = threading.Event()
        self.free.set()

    def speak(self, text):
        self.texts.append(text)
        if "fail" in text:
            raise AudioError("the voice is hoarse")
        for letter in text:
            assert self.free.wait(20)
            yield np.full(int(RATE * LETTER_S), ord(letter), np.int16), RATE

    def stop(self):
        self.stopped += 1

    def close(self):
        self.texts.append(None)


class Player:
    """A loudspeaker whose time passes when the test says so."""

    latency = 0.0

    def __init__(self):
        self.waiting, self.played, self.sound, self.closed = 0.0, 0.0, [], False

    @property
    def left(self):
        return self.waiting

    def play(self, samples, rate):
        self.sound.append(samples)
        self.waiting += len(samples) / rate
        return len(samples) / rate

    def passes(self, seconds):
        seconds = min(seconds, self.waiting)
        self.waiting -= seconds
        self.played += seconds

    def stop(self):
        self.waiting = self.played = 0.0

    def close(self):
        self.closed = True

    def text(self):
        return "".join(chr(block[0]) for block in self.sound)


@pytest.fixture
def made():
    voice, player, notes = Voice(), Player(), []
    with Speaker(voice, player, note=notes.append) as speaker:
        yield speaker, voice, player, notes
    assert player.closed
    assert voice.texts[-1] is None


def say(speaker, text):
    speaker.begin()
    for piece in text:
        speaker.say(piece)
    speaker.finish()


ANSWER = "Hello there. This is quite a long answer. And it ends here."


def test_an_answer_is_said_clause_by_clause_in_order(made):
    speaker, voice, player, _ = made
    say(speaker, ANSWER)
    until(lambda: player.text() == ANSWER.replace(". ", "."))
    assert voice.texts == ["Hello there.", "This is quite a long answer.", "And it ends here."]
    assert speaker.sounding
    player.passes(99)
    assert speaker.wait(5)
    assert speaker.heard == ANSWER
    until(lambda: not speaker.sounding)


def test_the_first_clause_is_said_while_the_rest_is_written(made):
    speaker, _, player, _ = made
    speaker.begin()
    speaker.say("Hello there. This is")
    until(lambda: player.text() == "Hello there.")
    assert speaker.first_sound_at is not None


@pytest.mark.parametrize("heard", [0, 5, 12, 13, 20, 30, 58])
def test_what_was_heard_ends_with_a_whole_word(made, heard):
    speaker, _, player, _ = made
    say(speaker, ANSWER)
    until(lambda: len(player.text()) == len(ANSWER) - 2)
    player.passes(heard * LETTER_S + 0.001)
    speaker.stop()
    assert player.left == 0
    assert ANSWER.startswith(speaker.heard)
    assert speaker.heard == "" or ANSWER[len(speaker.heard.rstrip()) :][:1] in ("", " ")
    assert abs(len(speaker.heard) - heard) <= 8
    player.passes(9)
    assert speaker.heard == speaker.heard, "it does not change any more"


def test_after_a_stop_nothing_of_the_answer_is_said(made):
    speaker, voice, player, _ = made
    voice.free.clear()
    say(speaker, ANSWER)
    until(lambda: voice.texts)
    speaker.stop()
    speaker.say(" More. And more. ")
    speaker.finish()
    voice.free.set()
    assert speaker.wait(5)
    assert player.waiting == 0
    assert voice.stopped
    assert voice.texts == ["Hello there."]
    say(speaker, "Yes? What.")
    until(lambda: player.text().endswith("Yes?What."))


def test_a_voice_that_fails_is_told_once_and_the_rest_is_said(made):
    speaker, _, player, notes = made
    say(speaker, "I fail. I fail again. But I go on.")
    until(lambda: player.text().endswith("But I go on."))
    assert notes == ["not said aloud: the voice is hoarse"]


def test_what_rings_is_said_after_the_answer(made):
    speaker, _, player, _ = made
    say(speaker, "One moment.")
    speaker.announce("The timer is over.")
    until(lambda: player.text() == "One moment.The timer is over.")
    player.passes(9)
    assert speaker.heard.startswith("One moment.")


@pytest.mark.parametrize("latency", [0.0, 0.05])
def test_a_stop_before_the_first_sound_leaves_nothing_heard_and_no_echo(made, latency):
    speaker, voice, player, _ = made
    player.latency = latency
    voice.free.clear()
    say(speaker, ANSWER)
    until(lambda: voice.texts)
    speaker.stop()
    assert speaker.heard == ""
    assert not speaker.sounding, "there was no sound whose echo a microphone could hear"
    voice.free.set()


def test_an_answer_that_begins_while_another_is_said_is_apart_from_it(made):
    speaker, voice, player, _ = made
    player.latency = 0.05
    voice.free.clear()
    say(speaker, "Hello there. And so on.")
    until(lambda: voice.texts)
    speaker.begin()
    voice.free.set()
    until(lambda: player.text() == "Hello there.And so on.")
    assert speaker.heard == ""
    assert speaker.first_sound_at is None
    speaker.say("Yes. ")
    until(lambda: player.text().endswith("Yes."))
    player.passes(99)
    player.latency = 0.0
    assert speaker.heard == "Yes."


def test_a_voice_that_breaks_its_promise_does_not_silence_the_rest(made, monkeypatch):
    speaker, voice, player, notes = made
    spoken = voice.speak
    monkeypatch.setattr(voice, "speak", lambda text: 1 / 0 if "fail" in text else spoken(text))
    say(speaker, "I fail. But I go on.")
    until(lambda: player.text() == "But I go on.")
    player.passes(99)
    assert speaker.wait(5)
    assert notes == ["not said aloud: ZeroDivisionError('division by zero')"]


def test_a_voice_that_never_ends_is_given_up(made, monkeypatch):
    monkeypatch.setattr(speaker_module, "_LONGEST_S", 0.05)
    speaker, voice, player, notes = made
    say(speaker, "Hello there. Yes.")
    until(lambda: player.text().endswith("Yes."))
    assert notes == ["not said aloud: the voice does not end: 0.05 s of sound for one clause"]
    assert voice.stopped == 1


def test_a_voice_is_closed_where_there_is_no_loudspeaker(monkeypatch):
    FakeSound(monkeypatch)
    voice = Voice()
    with pytest.raises(AudioError, match="'Nose' cannot be used"):
        Speaker(voice, "Nose")
    assert voice.texts == [None]


# --- the loudspeaker --------------------------------------------------------------------------------------------------


def tone(seconds, rate):
    return (np.sin(np.arange(int(seconds * rate)) / 7) * 20_000 + 1).astype(np.int16)


def test_what_is_played_comes_out_exactly(monkeypatch):
    sound = FakeSound(monkeypatch, speed=5)
    samples = tone(1.0, 22_050)
    with Loudspeaker() as loudspeaker:
        assert loudspeaker.name == "Mouth"
        for at in range(0, len(samples), 3000):
            loudspeaker.play(samples[at : at + 3000], 22_050)
        until(lambda: loudspeaker.left == 0)
        assert loudspeaker.played == pytest.approx(1.0)
        time.sleep(0.05)
    played = np.concatenate([block for _, block, _ in sound.played])
    start = np.flatnonzero(played)[0]
    out = played[start : start + len(samples)]
    assert np.array_equal(out[out != 0], samples[samples != 0])


def test_a_device_without_the_voices_rate_is_given_its_own(monkeypatch):
    pytest.importorskip("soxr")
    sound = FakeSound(monkeypatch, refused={22_050}, speed=5)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(1.0, 22_050), 22_050)
        assert sound.streams[0].rate == 48_000
        until(lambda: loudspeaker.left == 0)
        assert loudspeaker.played == pytest.approx(1.0, abs=0.05)


def test_a_device_of_two_channels_plays_the_same_on_both(monkeypatch):
    sound = FakeSound(monkeypatch, refused={(22_050, 1), (48_000, 1)}, speed=5)
    samples = tone(0.2, 22_050)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(samples, 22_050)
        assert (sound.streams[0].rate, sound.streams[0].channels) == (22_050, 2)
        until(lambda: loudspeaker.left == 0)
        time.sleep(0.05)
    played = np.concatenate([block for _, block, _ in sound.played])
    assert np.array_equal(played[played != 0], samples[samples != 0])


def test_a_voice_of_another_rate_follows(monkeypatch):
    sound = FakeSound(monkeypatch, speed=10)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(0.2, 22_050), 22_050)
        loudspeaker.play(tone(0.2, 16_000), 16_000)
        until(lambda: loudspeaker.left == 0)
    assert [stream.rate for stream in sound.streams] == [22_050, 16_000]


def test_silence_comes_within_a_tenth_of_a_second(monkeypatch):
    """In real time; the device's own latency, which it tells, is part of it."""
    sound = FakeSound(monkeypatch)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(5.0, 22_050), 22_050)
        until(lambda: loudspeaker.played > 0.2)
        loudspeaker.stop()
        stopped = time.monotonic()
        time.sleep(0.3)
        last = max(at for at, block, _ in sound.played if np.any(block))
        assert last - stopped + loudspeaker.latency < 0.1
        assert loudspeaker.left == loudspeaker.played == 0


def test_whoever_plays_too_much_waits_until_a_stop(monkeypatch):
    FakeSound(monkeypatch)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(30.0, 8000), 8000)
        threading.Timer(0.2, loudspeaker.stop).start()
        begun = time.monotonic()
        assert loudspeaker.play(tone(1.0, 8000), 8000) == 0
        assert 0.1 < time.monotonic() - begun < 5


def test_loudspeakers_that_cannot_be_used(monkeypatch):
    FakeSound(monkeypatch, refused={22_050, 48_000})
    with pytest.raises(AudioError, match=r"the loudspeaker 'Nose' cannot be used: .*--list-devices"):
        Loudspeaker("Nose")
    with Loudspeaker() as loudspeaker, pytest.raises(AudioError, match="'Mouth' cannot be opened: Invalid sample rate"):
        loudspeaker.play(tone(0.1, 22_050), 22_050)


def test_a_loudspeaker_that_takes_nothing_is_told(monkeypatch):
    sound = FakeSound(monkeypatch)
    monkeypatch.setattr(module, "_AHEAD_S", 0.1)
    monkeypatch.setattr(module, "_STALLED_S", 0.3)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(1.0, 8000), 8000)
        sound.streams[0].close()
        with pytest.raises(AudioError, match="plays nothing: was it unplugged"):
            loudspeaker.play(tone(1.0, 8000), 8000)


def test_a_loudspeaker_that_goes_away_leaves_nothing_waiting_and_may_come_back(monkeypatch):
    sound = FakeSound(monkeypatch)
    monkeypatch.setattr(module, "_STALLED_S", 0.3)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(1.0, 8000), 8000)
        sound.streams[0].close()
        assert loudspeaker.left > 0
        until(lambda: loudspeaker.left == 0)
        with pytest.raises(AudioError, match="plays nothing: was it unplugged"):
            loudspeaker.play(tone(0.1, 8000), 8000)
        loudspeaker.play(tone(0.1, 8000), 8000)
        until(lambda: loudspeaker.played == pytest.approx(0.1, abs=0.01))
    assert len(sound.streams) == 2


def test_a_rate_that_cannot_be_played_never_is(monkeypatch):
    """Without soxr, or where the device has gone meanwhile: at no call is it played at another rate, or kept."""
    sound = FakeSound(monkeypatch, refused={22_050})
    missing = AudioError("soxr is missing")

    def imported(*_):
        raise missing

    monkeypatch.setattr(module, "imported", imported)
    with Loudspeaker() as loudspeaker:
        loudspeaker.play(tone(0.1, 16_000), 16_000)
        for _ in range(2):
            with pytest.raises(AudioError, match="soxr is missing"):
                loudspeaker.play(tone(0.1, 22_050), 22_050)
        sound.refused.update({16_000, 48_000})
        for rate in (22_050, 16_000):
            with pytest.raises(AudioError):
                loudspeaker.play(tone(0.1, rate), rate)
        assert loudspeaker.left == 0
