"""A spoken conversation from end to end: what is said to a microphone, what comes out of a loudspeaker."""

import json
import shlex
import signal
import sys
import threading
import time

import numpy as np
import pytest

import edge_gemma
from edge_gemma.cli.main import cli
from edge_gemma.errors import AudioError
from tests import ROOT
from tests.embedded import FOLDER, SPEECH, TIMER, samples
from tests.fake_sound import FakeSound
from tests.waiting import until

pytest.importorskip("espeakng_loader", reason="the voice for tests is not installed")
pytest.importorskip("av", reason="the audio extra is not installed")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the demonstration model is not there")
VOICE = shlex.join([sys.executable, str(ROOT / "tests" / "espeak.py")])
LISTEN = ["listen", "--ask", "--by-text", "--speak", VOICE, "--json"]


def quiet(seconds):
    return np.zeros(int(seconds * 16_000), np.float32)


def talked(capsys, sound, script):
    """Runs the command, and `script` beside it, which ends it with Ctrl-C. Returns its events."""

    def beside():
        try:
            script()
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=beside)
    thread.start()
    cli(LISTEN, standalone_mode=False)
    thread.join()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def answered(sound, answers=1):
    """Whether so many answers were heard, each with silence after it."""
    loud = [bool(np.any(block)) for _, block, _ in sound.played]
    rests = "".join("x" if each else "." for each in loud).split("." * 40)  # 0.8 s
    return loud[-40:] == [False] * 40 and sum("x" in part for part in rests) >= answers


@pytest.fixture
def text_of():
    """What the demonstration model understands of a sound."""
    with edge_gemma.load("demo") as engine:
        yield lambda sound, rate: engine.transcribe(np.pad(sound, rate // 2), rate=rate).text


def test_a_timer_is_set_by_voice_and_the_answer_is_heard(monkeypatch, capsys, text_of):
    sound = FakeSound(monkeypatch)

    def script():
        until(lambda: sound.streams)
        sound.say(np.concatenate([quiet(0.5), samples(TIMER), quiet(1.0)]))
        until(lambda: answered(sound))

    events = talked(capsys, sound, script)
    (segment,) = [event for event in events if event["kind"] == "segment"]
    assert segment["heard"] == "set a timer for ten minutes"
    assert segment["text"] == "The timer is set for 10 minutes."
    assert 0 < segment["first_token_s"] < 60
    assert text_of(*sound.heard()).endswith("timer is set for ten minutes")


def test_the_model_does_not_hear_itself(monkeypatch, capsys):
    """With a loudspeaker beside the microphone there is one utterance: what the person said."""
    sound = FakeSound(monkeypatch, echo=True)

    def script():
        until(lambda: sound.streams)
        sound.say(np.concatenate([quiet(0.5), samples(TIMER), quiet(1.0)]))
        until(lambda: answered(sound))
        time.sleep(1.0)

    events = talked(capsys, sound, script)
    assert [event["kind"] for event in events if event["kind"] != "text"] == ["speech", "segment"]


def test_whoever_speaks_over_the_answer_is_heard_and_the_answer_ends(monkeypatch):
    """With headphones. The conversation keeps the words that were heard, and goes on."""
    sound = FakeSound(monkeypatch)

    def script():
        until(lambda: sound.streams)
        sound.say(np.concatenate([quiet(0.5), samples(TIMER), quiet(1.0)]))
        until(lambda: sum(bool(np.any(block)) for _, block, _ in sound.played) > 20)  # 0.4 s of the answer
        sound.say(np.concatenate([samples(SPEECH / "11.flac"), quiet(1.0)]))
        until(lambda: sound.silent and answered(sound, 2))
        sound.streams[0].close()  # unplugged

    with edge_gemma.load("demo") as engine, edge_gemma.Speaker(VOICE) as speaker:
        chat = engine.chat(temperature=0)
        threading.Thread(target=script, daemon=True).start()
        events = engine.listen(chat=chat, speaker=speaker, full_duplex=True, by_text=True)
        segments = []
        with pytest.raises(AudioError, match="unplugged"):
            segments.extend(event for event in events if event.kind == "segment")
    assert [segment.heard for segment in segments] == ["set a timer for ten minutes", "who are you"]
    written, kept = segments[0].reply.text, chat.messages[1].content
    assert written.startswith(kept)
    assert 0 < len(kept) < len(written)
    assert chat.messages[3].content == segments[1].text == segments[1].reply.text
