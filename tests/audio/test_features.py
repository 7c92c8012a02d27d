"""The front end against a frame-by-frame NumPy reference and against recorded transformers outputs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.audio import features
from edge_gemma.audio.features import FRAME, MEL_BINS, MEL_FLOOR, SAMPLE_RATE, MelStream, log_mel
from edge_gemma.errors import UsageError
from tests.make_audio_goldens import CLIPS, golden
from tests.reference_audio import reference_features
from tests.tiny_audio import speech_like


@pytest.mark.parametrize("samples", CLIPS)
def test_equals_transformers(samples):
    recorded = golden("features")[f"mel.{samples}"]
    ours = log_mel(speech_like(samples))
    assert ours.dtype == np.float32
    assert ours.shape == recorded.shape == (features.frame_count(samples), MEL_BINS)
    print(f"{samples} samples: max {np.abs(ours - recorded).max(initial=0):.1e}")
    assert np.abs(ours - recorded).max(initial=0) <= 2e-5


@pytest.mark.parametrize("samples", [161, 481, 1603])
def test_equals_the_reference(samples):
    audio = speech_like(samples, seed=5)
    assert np.abs(log_mel(audio) - reference_features(audio)).max() <= 2e-5


@given(st.integers(0, 3000), st.lists(st.integers(0, 700), max_size=12))
def test_any_chunking_gives_the_same_rows(samples, cuts):
    audio, stream = speech_like(samples), MelStream()
    rows = [stream.feed(part) for part in np.split(audio, sorted(min(cut, samples) for cut in np.cumsum(cuts)))]
    assert np.abs(np.concatenate(rows) - log_mel(audio)).max(initial=0) <= 1e-6
    assert len(np.concatenate(rows)) == features.frame_count(samples)


def test_counts():
    """16,000 samples have 99 frames; 6,080 have 37 and one more has 38; 30 s have 2,999 and 750 soft tokens."""
    assert [features.frame_count(n) for n in (0, 160, 161, 6080, 6081, 16_000, 480_000)] == [0, 0, 1, 37, 38, 99, 2999]
    assert features.token_count(480_000) == 750
    for n in range(0, 5000, 37):
        frames = features.frame_count(n)
        assert features.token_count(n) == math.ceil(math.ceil(frames / 2) / 2)


def test_silence_is_the_floor():
    """Silence is ln(0.001), not the zero of a frame that is not there; so is feature 0, whose filter is empty."""
    assert np.allclose(log_mel(np.zeros(SAMPLE_RATE, np.float32)), np.log(MEL_FLOOR))
    assert np.allclose(log_mel(speech_like(SAMPLE_RATE))[:, 0], np.log(MEL_FLOOR))


def test_the_window_is_periodic():
    window = features.window()
    assert window[0] == 0
    assert window[FRAME // 2] == 1
    assert np.allclose(window[1:], window[:0:-1])


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros((2, 100), np.float32),
        np.zeros(100, np.int16),
        np.array([0.0, np.nan], np.float32),
        np.array([np.inf] * 500),
        np.array(0.5),
        np.zeros(3, np.complex64),
    ],
)
def test_other_arrays_are_refused(audio):
    with pytest.raises(UsageError, match="audio"):
        MelStream().feed(audio)
