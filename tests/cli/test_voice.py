"""The options of a spoken conversation as a user meets them: keys, wake words, voices."""

import os
import pty
import sys
import termios
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner

from edge_gemma.audio import gates, listen, mic
from edge_gemma.cli import options, tools, voice
from edge_gemma.cli.main import cli
from edge_gemma.errors import AudioError
from edge_gemma.text.tool_call import ToolCall
from edge_gemma.voice import speaker
from tests.fake_sound import FakeSound
from tests.fake_speech import LevelDetector, SpeechEngine, say, understand

SPOKEN = say(-5, 1, 2, -15)


class Microphone:
    """Hears what is said after a while, then is closed."""

    name = "Fake mic"

    def __init__(self, device, note):
        pass

    def __iter__(self):
        time.sleep(0.5)
        yield from (SPOKEN[at : at + 512] for at in range(0, len(SPOKEN), 512))

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Tone:
    """A voice that notes what it says."""

    said: list[str] = []  # noqa: RUF012

    def __init__(self, name):
        if name == "hoarse":
            raise AudioError("the voice is hoarse")
        self.said.clear()

    def speak(self, text):
        self.said.append(text)
        yield np.full(1600, 5000, np.int16), 16_000

    def stop(self):
        pass

    close = stop


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(listen, "open_detector", lambda note: LevelDetector())
    monkeypatch.setattr(mic, "Microphone", Microphone)
    engine = SpeechEngine(lambda levels: f"You said {understand(levels)}.")
    monkeypatch.setattr(options, "load_engine", lambda model, **options: engine)
    monkeypatch.setattr(options, "check_memory", lambda *_, **__: None)
    return FakeSound(monkeypatch, speed=20)


def invoke(*arguments, said=""):
    return CliRunner().invoke(cli, ["listen", *arguments], input=said)


def test_answers_are_said_to_the_end(monkeypatch, machine):
    monkeypatch.setattr(speaker, "named", Tone)
    result = invoke("--ask", "--speak")
    assert (result.exit_code, result.stdout) == (0, "You said w1 w2.\n")
    assert Tone.said == ["You said w1 w2."]
    assert np.any(machine.heard()[0])


def test_a_voice_that_cannot_be_had_is_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(speaker, "named", Tone)
    monkeypatch.setattr(options, "load_engine", lambda model, **options: pytest.fail("a model was loaded"))
    result = invoke("--ask", "--speak", "hoarse")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: the voice is hoarse")
    result = invoke("--ask", "--speak", "--loudspeaker", "7")
    assert result.exit_code == 1
    assert "the loudspeaker 7 cannot be used" in result.stderr
    result = invoke("--wake-word", "computer")
    assert result.exit_code == 1
    assert "the wake word is 'computer', expected okay_nabu" in result.stderr


def test_a_key_lets_through_what_is_said():
    """Without a terminal each line is a press."""
    assert invoke("--push-to-talk", said="").stdout == ""
    result = invoke("--push-to-talk", said="\n")
    assert (result.exit_code, result.stdout) == (0, "You said w1 w2.\n")
    assert "press the space bar to talk" in result.stderr
    assert invoke("--push-to-talk", said="\n\n").stdout == ""


def test_nothing_is_heard_before_the_wake_word(monkeypatch):
    monkeypatch.setattr(gates, "detector", lambda name: lambda block: False)
    assert invoke("--wake-word", "alexa").stdout == ""
    monkeypatch.setattr(gates, "detector", lambda name: lambda block: True)
    assert invoke("--wake-word", "alexa").stdout == "You said w1 w2.\n"


def test_what_is_written_down_first_is_shown():
    result = invoke("--ask", "--by-text")
    assert "(heard: You said w1 w2.)" in result.stderr  # the fake writes the same of sound and text


def test_keys_of_a_terminal_come_one_by_one_and_it_is_left_as_it_was(monkeypatch):
    ours, theirs = pty.openpty()
    pressed = []
    with os.fdopen(theirs, "r", buffering=1) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin)
        with voice._single_keys():
            assert not termios.tcgetattr(stdin)[3] & (termios.ICANON | termios.ECHO)
            thread = threading.Thread(target=voice._read_keys, args=(lambda: pressed.append(1),), daemon=True)
            thread.start()
            for key in (b" ", b"x", b" "):
                os.write(ours, key)
            end = time.monotonic() + 10
            while len(pressed) < 2 and time.monotonic() < end:
                time.sleep(0.01)
        assert termios.tcgetattr(stdin) == before
        assert len(pressed) == 2
        os.close(ours)
        thread.join(5)


def test_what_answers_a_question_is_no_key_to_talk(monkeypatch):
    ours, theirs = pty.openpty()
    pressed, answers = [], []
    with os.fdopen(theirs, "r", buffering=1) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        keys = threading.Thread(target=voice._read_keys, args=(lambda: pressed.append(1),), daemon=True)
        question = threading.Thread(target=lambda: answers.append(tools._ask(ToolCall("launch", {}))), daemon=True)
        try:
            with voice._single_keys():
                keys.start()
                question.start()
                time.sleep(0.2)
                for key in b"yes\n":
                    os.write(ours, bytes([key]))
                    time.sleep(0.02)
                question.join(5)
                os.write(ours, b" ")
                end = time.monotonic() + 5
                while not pressed and time.monotonic() < end:
                    time.sleep(0.01)
            assert (answers, len(pressed)) == ([True], 1)
        finally:
            os.close(ours)
            keys.join(5)
    assert not keys.is_alive()
