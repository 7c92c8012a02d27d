"""Waveform to log-mel features, for a whole clip or for samples as they arrive.

Owns: the front end's constants and arithmetic. Does not know: files, sample rates other than 16 kHz, the encoder.

Source: transformers 5.23 `feature_extraction_gemma4.py`. 20 ms frames every 10 ms, half a frame of zeros in front
("semicausal"), periodic Hann window, magnitude (not power) spectrum of 512 points, 128 triangular HTK mel filters
without area norm, ln(mel + 0.001). No dither, pre-emphasis or normalisation.
"""

from functools import cache

import numpy as np

from edge_gemma.errors import UsageError

SAMPLE_RATE = 16_000  # Hz
MEL_BINS = 128
FRAME = SAMPLE_RATE * 20 // 1000  # samples under the window: 320
HOP = SAMPLE_RATE * 10 // 1000  # samples from frame to frame: 160
FFT = 512  # points; a frame is padded with zeros on the right
LEFT_PAD = FRAME // 2  # zeros before the first sample
NEEDED = FRAME + 1  # samples that a frame needs: its window and one more
MEL_FLOOR = 0.001  # added to the magnitudes before the logarithm

FRAMES_PER_TOKEN = 4  # two convolutions of stride 2 in the encoder
SAMPLES_PER_TOKEN = FRAMES_PER_TOKEN * HOP  # 640: a soft token every 40 ms
MAX_SAMPLES = 30 * SAMPLE_RATE  # the longest clip that the model was trained on; callers cut longer sound


def frame_count(samples: int) -> int:
    """The number of frames of a clip of that many samples: 99 for 16,000."""
    return max(0, (samples + LEFT_PAD - NEEDED) // HOP + 1)


def token_count(samples: int) -> int:
    """The number of soft tokens of a clip of that many samples: a quarter of its frames, rounded up."""
    return -(-frame_count(samples) // FRAMES_PER_TOKEN)


@cache
def window() -> np.ndarray:
    """The periodic Hann window: float32 [FRAME]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)


def to_mel(hz: np.ndarray | float) -> np.ndarray:
    """Hz to HTK's mel: 2595 log10(1 + Hz / 700). Returns the same shape, float64."""
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


@cache
def mel_edges() -> np.ndarray:
    """float64 [MEL_BINS + 2], Hz, equally spaced in mel. Filter i rises from edge i to i + 1 and falls to i + 2."""
    return 700 * (10 ** (np.linspace(0, to_mel(SAMPLE_RATE / 2), MEL_BINS + 2) / 2595) - 1)


@cache
def mel_filters() -> np.ndarray:
    """The triangular filters: float64 [FFT / 2 + 1, MEL_BINS].

    The first triangle lies between two bins of the spectrum and is empty: feature 0 is always ln(MEL_FLOOR).
    """
    edges = mel_edges()
    bins = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)[:, None]  # Hz
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    return np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))


@cache
def _spans() -> tuple[np.ndarray, np.ndarray]:
    """Each filter's bins and weights: int64 and float64 [MEL_BINS, widest], a dozen bins instead of 257.

    A matrix product is not used: NumPy's starts threads of its own, which compete with the encoder's for the cores.
    """
    filters = mel_filters().T
    widest = int((filters > 0).sum(axis=1).max())
    first = np.minimum((filters > 0).argmax(axis=1), filters.shape[1] - widest)
    bins = first[:, None] + np.arange(widest)
    return bins, np.take_along_axis(filters, bins, axis=1)


def checked(samples: np.ndarray) -> np.ndarray:
    """Mono samples as float32 [n]. Raises UsageError for another shape, for integers and for values not finite."""
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise UsageError(f"audio is {samples.dtype} of shape {list(samples.shape)}, expected mono floats from -1 to 1")
    samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise UsageError("the audio has samples that are not finite: it is damaged")
    return samples


class MelStream:
    """Features of one clip, as its samples arrive. An incomplete frame at the end does not count."""

    def __init__(self) -> None:
        self._tail = np.zeros(LEFT_PAD, np.float32)  # samples from the start of the next frame on

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Append samples, float32 [n] at SAMPLE_RATE. Returns the rows that became final: float32 [f, MEL_BINS]."""
        audio = np.concatenate([self._tail, checked(samples)])
        count = max(0, (len(audio) - NEEDED) // HOP + 1)
        self._tail = audio[count * HOP :]
        if not count:
            return np.zeros((0, MEL_BINS), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(audio, FRAME)[: count * HOP : HOP]
        magnitudes = np.abs(np.fft.rfft(frames * window(), FFT))  # [f, FFT / 2 + 1]
        bins, weights = _spans()
        return np.log(np.einsum("fmb,mb->fm", magnitudes[:, bins], weights) + MEL_FLOOR).astype(np.float32)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """The features of a whole clip. samples: float32 [n] at SAMPLE_RATE. Returns float32 [frame_count(n), MEL_BINS]."""
    return MelStream().feed(samples)
