"""Augments speech: speed, room, noise, telephone band, gain. Pure functions of float32 waveforms at 16 kHz.

Owns: the transformations and their probabilities. Does not know: files, features.
"""

import numpy as np

RATE = 16_000  # Hz


def augment(samples: np.ndarray, rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """A random augmentation of a clip, float32 [n]. Returns float32 [n'] within [-1, 1]. others: clips for babble."""
    if rng.random() < 0.8:
        samples = speed(samples, float(rng.uniform(0.9, 1.1)))
    if rng.random() < 0.35:
        samples = room(samples, rng)
    if rng.random() < 0.7:
        samples = noisy(samples, rng, others, snr=float(rng.uniform(5, 30)))
    if rng.random() < 0.25:
        samples = band_limited(samples, *TELEPHONE)
    elif rng.random() < 0.3:
        samples = tilted(samples, float(rng.uniform(-6, 6)))
    return gained(samples, float(rng.uniform(-14, 8)))


def speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Resample: faster and higher by `factor`, like a tape. 1.1 makes a clip a tenth shorter."""
    import soxr

    return soxr.resample(samples, RATE * factor, RATE, quality="LQ").astype(np.float32)


def gained(samples: np.ndarray, decibels: float) -> np.ndarray:
    """Louder or softer, at most to full scale (never clipped)."""
    factor = 10 ** (decibels / 20)
    peak = float(np.abs(samples).max(initial=1e-9))
    return (samples * min(factor, 0.99 / peak)).astype(np.float32)


def room(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A simple room: the clip plus its convolution with noise that decays by 60 dB in 0.1 to 0.6 s."""
    length = rng.uniform(0.1, 0.6)
    count = int(length * RATE)
    tail = rng.standard_normal(count).astype(np.float32) * np.exp(-6.9 * np.arange(count) / count).astype(np.float32)
    tail[: int(rng.uniform(0.002, 0.02) * RATE)] = 0  # the delay of the nearest wall
    tail *= 10 ** (rng.uniform(-12, 0) / 20) / np.sqrt((tail**2).sum())
    size = _fast_length(len(samples) + count)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    return (samples + wet).astype(np.float32)


def noise(count: int, rng: np.random.Generator, colour: float) -> np.ndarray:
    """Noise whose power falls with frequency to the power `colour`: 0 white, 1 pink, 2 brown; float32, rms 1."""
    size = _fast_length(count)
    bins = size // 2 + 1
    spectrum = rng.standard_normal((bins, 2), np.float32).view(np.complex64)[:, 0]
    spectrum *= np.maximum(np.arange(bins), 20 * size / RATE).astype(np.float32) ** (-colour / 2)
    wave = np.fft.irfft(spectrum, size)[:count]
    return (wave / np.sqrt((wave**2).mean() + 1e-12)).astype(np.float32)


def babble(count: int, rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """A mixture of two to five of the other clips, repeated as needed: float32 [count], rms 1."""
    mixed = np.zeros(count, np.float32)
    for _ in range(int(rng.integers(2, 6))):
        other = others[int(rng.integers(len(others)))]
        mixed += np.resize(np.roll(other, int(rng.integers(len(other)))), count)
    return mixed / np.sqrt((mixed**2).mean() + 1e-12)


def noisy(samples: np.ndarray, rng: np.random.Generator, others: list[np.ndarray], *, snr: float) -> np.ndarray:
    """White, pink or brown noise or babble added, `snr` dB below the clip."""
    kind = int(rng.integers(4))
    added = babble(len(samples), rng, others) if kind == 3 and others else noise(len(samples), rng, min(kind, 2))
    level = float(np.sqrt((samples**2).mean()))
    return samples + added * np.float32(level * 10 ** (-snr / 20))


TELEPHONE = (300.0, 3400.0)  # Hz


def band_limited(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """Only what lies between two frequencies, with edges a quarter of an octave wide."""
    return _filtered(samples, lambda hertz: _edge(hertz / low) * _edge(high / np.maximum(hertz, 1)))


def tilted(samples: np.ndarray, decibels: float) -> np.ndarray:
    """The spectrum tilted by that many dB an octave around 1 kHz, within 12 dB: another microphone."""
    limit = 12.0

    def gain(hertz: np.ndarray) -> np.ndarray:
        octaves = np.log2(np.maximum(hertz, 50) / 1000)
        return 10 ** (np.clip(decibels / 2 * octaves, -limit, limit) / 20)

    return _filtered(samples, gain)


def _edge(ratio: np.ndarray) -> np.ndarray:
    """0 below 2**-1/4, 1 above 1, a cosine between."""
    position = np.clip(1 + 4 * np.log2(np.maximum(ratio, 1e-6)), 0, 1)
    return (1 - np.cos(np.pi * position)) / 2


def _filtered(samples: np.ndarray, gain) -> np.ndarray:
    size = _fast_length(len(samples) + RATE // 50)
    hertz = np.fft.rfftfreq(size, 1 / RATE)
    return np.fft.irfft(np.fft.rfft(samples, size) * gain(hertz), size)[: len(samples)].astype(np.float32)


def _fast_length(count: int) -> int:
    """The next multiple of 4096: its transform is fast enough, and few sizes occur."""
    return -(-count // 4096) * 4096
