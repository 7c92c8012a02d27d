"""Voices as commands and as Wyoming servers: what they send is played, what goes wrong is one line."""

import contextlib
import itertools
import json
import shlex
import socket
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import AudioError, UsageError
from edge_gemma.voice import voices
from edge_gemma.voice.voices import CommandVoice, WyomingVoice, named

TONE = (np.sin(np.arange(9000) / 10) * 20000).astype("<i2")
WAV = """
import sys, wave
text = sys.stdin.read()
{before}
with wave.open(sys.stdout.buffer, "wb") as file:
    file.setparams(({channels}, {width}, {rate}, 0, "NONE", ""))
    file.writeframes(bytes(range(200)) * len(text))
"""

RATE_0 = """
import io, sys, wave
kept = io.BytesIO()
with wave.open(kept, "wb") as file:
    file.setparams((1, 2, 8000, 0, "NONE", ""))
    file.writeframes(bytes(200))
sys.stdin.read()
sys.stdout.buffer.write(kept.getvalue().replace((8000).to_bytes(4, "little"), bytes(4)))
"""


def command(code):
    return shlex.join([sys.executable, "-c", code])


def program(before="", channels=1, width=2, rate=22_050):
    return command(WAV.format(before=before, channels=channels, width=width, rate=rate))


def spoken(voice, text="hello"):
    blocks = list(voice.speak(text))
    return np.concatenate([block for block, _ in blocks]), {rate for _, rate in blocks}


@pytest.fixture
def open_voice():
    opened = []

    def make(code):
        opened.append(CommandVoice(code))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_a_command_reads_the_text_and_its_sound_is_played(open_voice):
    voice = open_voice(program())
    for text in ("hello", "a longer text", "é"):
        samples, rates = spoken(voice, text)
        expected = np.frombuffer(bytes(range(200)) * (len(text) + 1), "<i2")  # a line
        assert np.array_equal(samples, expected)
        assert rates == {22_050}


def test_stereo_is_made_one_channel(open_voice):
    samples, rates = spoken(open_voice(program(channels=2, rate=48_000)))
    frames = np.frombuffer(bytes(range(200)) * 6, "<i2").reshape(-1, 2)
    assert np.array_equal(samples, frames.mean(1).astype(np.int16))
    assert rates == {48_000}


def test_the_next_run_is_ready_before_it_is_asked_for(open_voice):
    """What a voice loads when it starts is loaded while nothing is said."""
    voice = open_voice(
        command("import time; time.sleep(0.7)\n" + WAV.format(before="", channels=1, width=2, rate=8000))
    )
    time.sleep(1.5)
    begun = time.monotonic()
    spoken(voice)
    assert time.monotonic() - begun < 0.6


def test_a_command_that_ended_while_nothing_was_said_is_run_again(open_voice):
    idle = "import os, select, sys; select.select([sys.stdin], [], [], 0.3)[0] or os._exit(1)\n"
    voice = open_voice(command(idle + WAV.format(before="", channels=1, width=2, rate=8000)))
    for _ in range(2):
        time.sleep(1.0)
        assert len(spoken(voice)[0])


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit('no such voice: amy')", "has written no WAV file: no such voice: amy"),
        ("print('hello')", "has written no WAV file"),
        ("pass", "has written no WAV file"),
        (WAV.format(before="", channels=1, width=1, rate=8000), "writes samples of 8 bits, expected 16"),
        (RATE_0, "writes 0 samples a second, expected 1000 to 192000"),
        (WAV.format(before="text = ''", channels=1, width=2, rate=8000), "has written no sound"),
    ],
)
def test_a_command_that_fails_is_one_line(open_voice, code, told):
    voice = open_voice(command(code))
    for _ in range(2):
        with pytest.raises(AudioError, match=told) as error:
            spoken(voice)
        assert "\n" not in str(error.value)


def test_a_command_that_hangs_is_given_up(open_voice, monkeypatch):
    monkeypatch.setattr(voices, "_SILENT_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(AudioError, match="has written no WAV file"):
        spoken(open_voice(command("import time; time.sleep(60)")))
    assert time.monotonic() - begun < 20


def test_a_shells_children_end_with_it(open_voice, monkeypatch):
    """They hold its output open: who killed the shell alone would read on for as long as they live."""
    monkeypatch.setattr(voices, "_SILENT_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(AudioError, match="has written no WAV file"):
        spoken(open_voice("sh -c 'cat >/dev/null; sleep 20; true'"))
    assert time.monotonic() - begun < 10


def test_a_clause_may_sound_for_longer_than_a_voice_may_be_silent(open_voice, monkeypatch):
    monkeypatch.setattr(voices, "_SILENT_S", 1.0)
    code = WAV.format(before="", channels=1, width=2, rate=8000).replace("len(text)", "10000")
    samples = 0
    for block, _ in open_voice(command(code)).speak("x"):
        samples += len(block)
        time.sleep(0.004)  # a loudspeaker that has enough
    assert samples == 1_000_000


def test_a_command_is_stopped_in_the_middle(open_voice):
    code = WAV.format(before="", channels=1, width=2, rate=8000).replace("len(text)", "100000")
    voice = open_voice(command(code))
    sound = voice.speak("x")
    next(sound)
    voice.stop()
    assert len(list(sound)) < 1000
    assert len(next(voice.speak("x"))[0]), "and it speaks again"


def test_voices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(voices.shutil, "which", lambda name: None)
    for name, told in (("", "espeak-ng is not installed"), ("piper -m x", "is no command that is installed")):
        with pytest.raises(UsageError, match=told):
            named(name)
    with pytest.raises(UsageError, match="cannot be read as a command"):
        named("piper 'x")


def test_espeak_alone_is_told_how_to_read_and_write(monkeypatch):
    monkeypatch.setattr(voices.shutil, "which", lambda name: "/bin/" + name)
    started = []
    monkeypatch.setattr(CommandVoice, "_start", lambda self: started.append(list(self._argv)))
    named("")
    named("espeak-ng -v de --stdin --stdout")
    assert started == [
        ["espeak-ng", "--stdin", "--stdout"],
        ["espeak-ng", "-v", "de", "--stdin", "--stdout"],
    ]


# --- Wyoming ----------------------------------------------------------------------------------------------------------


class Server:
    """A server whose answers are given by the test, as bytes; it keeps what it was asked."""

    def __init__(self, answer):
        self.asked, self._answer = [], answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
            for line in stream:
                header = json.loads(line)
                data = json.loads(stream.read(header["data_length"])) if header.get("data_length") else {}
                self.asked.append((header["type"], data))
                describe = header["type"] == "describe"
                for part in [event("info", {"tts": [{"name": "test"}]})] if describe else self._answer:
                    stream.write(part)
                stream.flush()

    def close(self):
        self._socket.close()


def event(kind, data=None, payload=b""):
    body = json.dumps(data or {}).encode()
    header = {"type": kind, "data_length": len(body), "payload_length": len(payload)}
    return json.dumps(header).encode() + b"\n" + body + payload


def chunk(samples, **changed):
    data = {"rate": 22_050, "width": 2, "channels": 1, "timestamp": None} | changed
    return event("audio-chunk", data, samples.tobytes())


@pytest.fixture
def serve():
    pytest.importorskip("wyoming", reason="the voice extra is not installed")
    servers = []

    def start(*answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


START, STOP = event("audio-start", {"rate": 22_050, "width": 2, "channels": 1}), event("audio-stop")


def test_a_server_is_asked_for_each_text(serve):
    server = serve(START, chunk(TONE[:4000]), chunk(TONE[4000:]), STOP)
    voice = named(server.address)
    for _ in range(2):
        samples, rates = spoken(voice, "Hello there.")
        assert np.array_equal(samples, TONE)
        assert rates == {22_050}
    assert [kind for kind, _ in server.asked] == ["describe", "synthesize", "synthesize"]
    assert server.asked[1][1]["text"] == "Hello there."


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((event("error", {"text": "no such voice"}),), "no such voice"),
        ((START, STOP), "has sent no sound"),
        ((b"not json\n",), "has sent no sound"),
        ((b"[1, 2]\n",), "what is no Wyoming event"),
        ((b'{"type": "audio-chunk", "payload_length": 99999999999}\n',), "a message of 99999999999 bytes"),
        ((chunk(TONE, width=4),), "sends sound of 4 bytes a sample"),
        ((chunk(TONE, rate="x"),), "sends sound of"),
        ((chunk(TONE, channels=0),), "sends sound of"),
    ],
)  # fmt: skip
def test_a_server_that_answers_something_else_is_one_line(serve, answer, told, monkeypatch):
    monkeypatch.setattr(voices, "_SILENT_S", 1.0)
    voice = WyomingVoice(serve(*answer).address)
    with pytest.raises(AudioError, match=told) as error:
        spoken(voice)
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.sampled_from([START, STOP, chunk(TONE[:100]), b"{}\n", b"\n"]), max_size=5))
def test_nothing_that_a_server_sends_ends_otherwise(answer):
    pytest.importorskip("wyoming", reason="the voice extra is not installed")
    server = Server([*answer, STOP])
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(AudioError):
        patch.setattr(voices, "_SILENT_S", 0.3)
        for block, rate in itertools.islice(WyomingVoice(server.address).speak("x"), 100):
            assert block.dtype == np.int16
            assert rate > 0
    server.close()


def test_a_server_is_stopped_in_the_middle(serve):
    voice = WyomingVoice(serve(START, chunk(TONE)).address)
    sound = voice.speak("x")
    next(sound)
    threading.Timer(0.2, voice.stop).start()
    begun = time.monotonic()
    assert list(sound) == []
    assert time.monotonic() - begun < 5


def test_servers_that_are_not_there():
    pytest.importorskip("wyoming", reason="the voice extra is not installed")
    for address in ("http://localhost:1", "tcp://", "tcp://host:99999", "tcp://localhost/path"):
        with pytest.raises(UsageError, match="expected tcp://HOST:PORT or a command"):
            WyomingVoice(address)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(AudioError, match="cannot be reached: Connection refused"):
        WyomingVoice(f"tcp://127.0.0.1:{port}")


def test_a_server_that_says_nothing_is_told_soon(monkeypatch):
    pytest.importorskip("wyoming", reason="the voice extra is not installed")
    monkeypatch.setattr(voices, "_CONNECT_S", 0.3)
    monkeypatch.setattr(voices, "_SILENT_S", 10.0)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(AudioError, match="cannot be reached"):
        WyomingVoice(f"tcp://127.0.0.1:{mute.getsockname()[1]}")
    assert time.monotonic() - begun < 5


def test_a_server_of_another_kind_is_told(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(sys.modules[__name__], "event", lambda kind, data: json.dumps({"type": kind}).encode() + b"\n")
    with pytest.raises(AudioError, match="has no voice: it is another kind of server"):
        WyomingVoice(server.address)
