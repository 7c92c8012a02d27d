"""A spoken conversation from end to end: what is said to a microphone, what comes out of a loudspeaker."""

import shlex
import sys
import threading
import time

import numpy as np
import pytest

import edge_gemma
from edge_gemma.cli.main import cli
from tests import ROOT
from tests.embedded import FOLDER, TIMER, samples
from tests.fake_sound import FakeSound

pytest.importorskip("espeakng_loader", reason="the voice for tests is not installed")
pytest.importorskip("av", reason="the audio extra is not installed")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the demonstration model is not there")
VOICE = shlex.join([sys.executable, str(ROOT / "tests" / "espeak.py")])


@pytest.fixture(scope="module")
def engine():
    with edge_gemma.load("demo") as engine:
        yield engine


def quiet(seconds):
    return np.zeros(int(seconds * 16_000), np.float32)


def test_a_timer_is_set_by_voice_and_the_answer_is_heard(engine, monkeypatch, capsys):
    """The command itself: the answer that comes out of the loudspeaker is understood by `transcribe`."""
    sound = FakeSound(monkeypatch)
    sound.say(np.concatenate([quiet(0.5), samples(TIMER), quiet(1.5)]))
    begun = threading.Event()

    def leave():
        while not sound.silent or not sound.played or np.any(sound.played[-1][1]) or not begun.is_set():
            if any(np.any(block) for _, block, _ in sound.played):
                begun.set()
            time.sleep(0.1)
        time.sleep(1)
        sound.streams[-1].close()

    threading.Thread(target=leave, daemon=True).start()
    cli(["listen", "--ask", "--speak", VOICE, "--json"], standalone_mode=False)
    out = capsys.readouterr().out
    print(out)
    heard, rate = sound.heard()
    assert engine.transcribe(heard, rate=rate).text == "the timer is set for ten minutes"
