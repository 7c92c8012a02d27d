"""The live path through a real sound system: a private PulseAudio whose only microphone repeats what is played to it.

Skips, with the reason, where PulseAudio, its ALSA plugin or PortAudio is missing (Debian: pulseaudio pulseaudio-utils
libasound2-plugins libportaudio2), or where the daemon does not start.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import ROOT
from tests.fake_speech import say, text_of

_DAEMON = """\
load-module module-native-protocol-unix auth-anonymous=1
load-module module-null-sink sink_name=micfeed rate=16000 channels=1 format=s16le
load-module module-remap-source source_name=mic master=micfeed.monitor
set-default-source mic
"""
_ALSA = "pcm.!default { type pulse }\nctl.!default { type pulse }\n"

# In a process of its own: PortAudio looks for devices once, when it is loaded.
_LISTEN = """
import signal, sys
import numpy as np
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.mic import Microphone, devices
from tests.fake_speech import LevelDetector, SpeechEngine

out, seconds = sys.argv[1], float(sys.argv[2])
raw, notes = [], []
print("devices", len(devices()), flush=True)
engine = SpeechEngine()
listener = Listener(engine, detector=LevelDetector)
with Microphone(note=notes.append) as microphone:
    def blocks():
        samples = 0
        for block in microphone:
            raw.append(block)
            samples += len(block)
            if samples == len(block):
                print("listening to", microphone.name, flush=True)
            if samples > seconds * 16000:
                return
            yield block
    texts = [event.text for event in listener.events(blocks()) if event.kind == "segment"]
streamed = np.concatenate(engine.audio.streamed)
np.savez(out, raw=np.concatenate(raw), streamed=streamed, text=" ".join(texts), notes=notes)
"""


def _missing() -> str | None:
    programs = [name for name in ("pulseaudio", "pacat") if not shutil.which(name)]
    if programs:
        return f"{' and '.join(programs)} not installed"
    if not list(Path("/usr/lib").glob("**/alsa-lib/libasound_module_pcm_pulse.so")):
        return "ALSA's PulseAudio plugin (libasound2-plugins) is not installed"
    if importlib.util.find_spec("sounddevice") is None:
        return "the mic extra is not installed"
    try:
        import sounddevice  # noqa: F401
    except OSError as error:
        return str(error)
    return None


_UNTIL_IT_ENDS = """
from edge_gemma.audio.mic import Microphone
from edge_gemma.errors import AudioError

try:
    with Microphone() as microphone:
        for i, block in enumerate(microphone):
            print(i, flush=True)
except AudioError as error:
    print(error, flush=True)
"""


@pytest.fixture
def sound_system(tmp_path):
    """Starts the daemon; yields the environment in which its microphone is the default one, and the daemon."""
    if reason := _missing():
        pytest.skip(reason)
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    (home / "run").chmod(0o700)
    (home / "mic.pa").write_text(_DAEMON)
    (home / ".asoundrc").write_text(_ALSA)
    environment = os.environ | {
        "HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), "PULSE_RUNTIME_PATH": str(home / "run"),
        "PULSE_SERVER": f"unix:{home}/run/native", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    options = "-n --daemonize=no --exit-idle-time=-1 --use-pid-file=no --realtime=no --high-priority=no".split()  # noqa: SIM905
    with open(home / "log", "w") as log:
        daemon = subprocess.Popen(["pulseaudio", *options, "-F", home / "mic.pa"], env=environment, stderr=log)
    feeder = None
    try:
        for _ in range(100):
            if daemon.poll() is not None or (home / "run" / "native").exists():
                break
            time.sleep(0.05)
        if not (home / "run" / "native").exists():
            pytest.skip(f"PulseAudio did not start: {(home / 'log').read_text()[-300:]}")
        with open("/dev/zero", "rb") as zeros:  # keeps the sink awake: else it loses the first 20 ms of what is played
            feeder = subprocess.Popen(pacat(20), env=environment, stdin=zeros)
        yield environment, daemon
    finally:
        for process in (feeder, daemon):
            if process is not None:
                process.terminate()
                process.wait(10)


def pacat(latency_ms):
    options = f"--raw --rate=16000 --channels=1 --format=s16le --latency-msec={latency_ms} --device=micfeed"
    return ["pacat", "--playback", *options.split()]


def test_what_is_spoken_arrives_sample_by_sample_and_is_written_down(sound_system, tmp_path):
    words = [*range(10, 25), -12, *range(40, 50), -3, *range(60, 66)]
    spoken = np.rint(say(*words) * 32767).astype("<i2")
    seconds = 3 + len(spoken) / 16_000 + 1.5
    command = [sys.executable, "-W", "ignore", "-c", _LISTEN, str(tmp_path / "out.npz"), str(seconds)]
    environment, _ = sound_system
    listener = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout.readline().startswith("devices "), "PortAudio sees the sound system"
        assert "listening to" in listener.stdout.readline()
        time.sleep(1.0)
        # buffered by the daemon as a whole: on a busy machine a player would be late, and zeros played instead
        subprocess.run(pacat(10_000), env=environment, input=spoken.tobytes(), check=True, timeout=60)
        assert listener.wait(60) == 0
    finally:
        listener.kill()
        listener.stdout.close()
    heard = np.load(tmp_path / "out.npz")
    raw = np.rint(heard["raw"] * 32768).astype(np.int16)
    start = int(np.flatnonzero(raw)[0])
    assert np.array_equal(raw[start : start + len(spoken)], spoken), "every sample, none twice, none changed"
    assert not raw[start + len(spoken) :].any()
    streamed = np.rint(heard["streamed"] * 32768).astype(np.int16)
    assert np.array_equal(streamed[streamed != 0], spoken[spoken != 0]), "and so they reach the encoder"
    assert str(heard["text"]) == text_of(words)
    assert list(heard["notes"]) == []


def test_a_sound_system_that_goes_away_is_told(sound_system):
    environment, daemon = sound_system
    command = [sys.executable, "-W", "ignore", "-c", _UNTIL_IT_ENDS]
    listener = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout.readline() == "0\n"
        daemon.kill()
        lines = listener.communicate(timeout=60)[0].splitlines()
    finally:
        listener.kill()
    assert "was it unplugged?" in lines[-1]
