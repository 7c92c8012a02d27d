"""Converts samples of any kind (arrays, lists, bytes from a sound card) to blocks of 16 kHz mono.

Owns: what counts as samples (`as_samples`), channels, sample rates, samples that are not numbers. Does not know: files,
speech, models.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.host.extras import imported

RATES = (2_000, 768_000)  # Hz
CHANNELS = 128  # at most: a wider array is probably [channels, n]
_FULL_SCALE = 0.999
_CLIPPED_SHARE = 0.01  # share of samples at full scale from which on the user is told
_WRONG_SCALE = 16.0  # a peak beyond it means integers stored as floats
_FIRST_TOLD = 2 * SAMPLE_RATE  # samples of a live stream before the first note about it
_EXPECTED = "expected [n] or [n, channels] of floats in [-1, 1], int8, int16 or int32"

SAMPLE_TYPES = (np.ndarray, list, tuple, array)  # bytes are not here: given whole, they are a file's
Samples = Any  # what `as_samples` takes
Note = Callable[[str], None]


def silent(_: str) -> None:
    """Ignores a note: the default for callers that want none."""


def checked_rate(rate: Any) -> int:
    """A sample rate in Hz as an int; 16000.0 is accepted. Raises UsageError for other numbers and outside RATES."""
    try:
        whole = int(rate)
        if isinstance(rate, (bool, str, bytes)) or whole != rate:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"the rate is {rate!r:.60}, expected samples a second, for example 16000") from None
    if not RATES[0] <= whole <= RATES[1]:
        raise UsageError(f"the rate is {whole} samples a second, expected {RATES[0]} to {RATES[1]}")
    return whole


def as_samples(value: Any) -> np.ndarray:
    """Samples as an array. Returns [n] or [n, channels], floats or signed integers of at most 32 bits; n may be 0.

    value: an array, a list of floats, or a bytes-like object of 16-bit mono samples, as a sound card's raw stream
    gives them. Raises UsageError for anything else.
    """
    try:
        view = None if isinstance(value, (np.ndarray, list, tuple)) else memoryview(value)
    except TypeError:
        view = None
    try:
        raw = view is not None and view.itemsize == 1
        samples = np.frombuffer(value, "<i2") if raw else np.asarray(value)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"samples are {type(value).__name__} ({reason}), {_EXPECTED}") from None
    if samples.size == 0 and samples.ndim in (1, 2):
        return np.zeros(0, np.float32)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi":
        raise UsageError(f"samples are {samples.dtype} of shape {list(samples.shape)}, {_EXPECTED}")
    if samples.dtype.kind == "i" and samples.dtype.itemsize > 4:
        raise UsageError(f"samples are {samples.dtype}, whose full scale is not known, {_EXPECTED}")
    if samples.ndim == 2 and samples.shape[1] > CHANNELS:
        raise UsageError(f"samples have shape {list(samples.shape)}, expected [n, channels]: transpose them")
    return samples


def from_pcm(data: bytes, width: int, channels: int) -> np.ndarray:
    """Whole samples of `width` bytes, 1 to 4, little-endian, as WAV files have them: 8 bits without a sign.

    Returns [n, channels] of int8, int16 or int32.
    """
    if width == 1:
        samples = (np.frombuffer(data, np.uint8) ^ 0x80).view(np.int8)
    elif width == 3:  # in the upper bytes of 32 bits
        samples = np.zeros((len(data) // 3, 4), np.uint8)
        samples[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = samples.view("<i4")
    else:
        samples = np.frombuffer(data, f"<i{width}")
    return samples.reshape(-1, channels)


class Converter:
    """Converts samples of any rate and channel count to 16 kHz mono, block by block.

    16 kHz mono passes unchanged. Channels are averaged. Values beyond [-1, 1] are clipped; what is not a number becomes
    0. seen: samples so far. clipped: those at full scale. strange: those that were not numbers. peak: the largest
    magnitude.
    """

    def __init__(self, rate: int) -> None:
        """rate: Hz. Raises AudioError for a rate outside RATES, or if soxr is needed and missing."""
        if not RATES[0] <= rate <= RATES[1]:
            raise AudioError(f"the sound has {rate} samples a second, expected {RATES[0]} to {RATES[1]}")
        self.rate = rate
        self.seen = self.clipped = self.strange = 0
        self.peak = 0.0
        self._resampler: Any = None
        if rate != SAMPLE_RATE:
            soxr = imported("soxr", f"sound of {rate} samples a second", "audio", AudioError)
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def feed(self, samples: Any) -> np.ndarray:
        """Append samples, as `as_samples` takes them. Returns the converted samples that are ready: float32 [m]."""
        mono = self._mono(as_samples(samples))
        return mono if self._resampler is None else np.clip(self._resampler.resample_chunk(mono), -1, 1)

    def finish(self) -> np.ndarray:
        """End the sound. Returns the rest: float32 [m]."""
        empty = np.zeros(0, np.float32)
        if self._resampler is None or not self.seen:
            return empty
        return np.clip(self._resampler.resample_chunk(empty, last=True), -1, 1)

    def _mono(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype.kind == "i":
            samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        if samples.ndim == 2:
            samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
        with np.errstate(over="ignore"):  # a double beyond a float's range is infinite: not a number either
            mono = samples.astype(np.float32)  # a copy: the lines below change it
        finite = np.isfinite(mono)
        if not finite.all():
            self.strange += int((~finite).sum())
            mono[~finite] = 0
        self.seen += len(mono)
        loud = np.abs(mono)
        self.peak = max(self.peak, float(loud.max(initial=0)))
        self.clipped += int((loud >= _FULL_SCALE).sum())
        return np.clip(mono, -1, 1, out=mono)

    def notes(self) -> list[str]:
        """One-line texts that the user should know about the samples so far."""
        found = []
        if self.strange:
            found.append(f"{self.strange} of {self.seen} samples are not numbers and were taken as silence")
        if self.clipped > _CLIPPED_SHARE * self.seen:
            text = f"the recording is clipped, {self.clipped / self.seen:.0%} of it at full scale: expect mistakes"
            if self.peak > _WRONG_SCALE:
                text += f"; floats up to {self.peak:.0f} were given, expected -1 to 1: divide them, or give int16"
            found.append(text)
        return found


def array_blocks(samples: Any, rate: int = SAMPLE_RATE, note: Note = silent) -> Iterator[np.ndarray]:
    """Yields samples, as `as_samples` takes them, as blocks of 16 kHz mono: float32 [n].

    rate: of `samples`, Hz. note is called at the end with what is wrong with them. Raises UsageError for other shapes,
    dtypes and rates, and if there are no samples.
    """
    samples, rate = as_samples(samples), checked_rate(rate)
    if not len(samples):
        raise UsageError(f"there are no samples, {_EXPECTED}")
    converter, step = Converter(rate), max(1, rate // 2)
    for start in range(0, len(samples), step):
        yield converter.feed(samples[start : start + step])
    yield converter.finish()
    for text in converter.notes():
        note(text)


def live_blocks(blocks: Iterable[Any], rate: int = SAMPLE_RATE, note: Note = silent) -> Iterator[np.ndarray]:
    """Yields blocks of samples as they arrive, each as `as_samples` takes it, as 16 kHz mono: float32 [n].

    note is called once, as soon as something is known to be wrong with them. A block may be empty. Raises as
    `array_blocks`.
    """
    converter, told = Converter(checked_rate(rate)), False
    for block in blocks:
        yield converter.feed(block)
        if not told and converter.seen >= _FIRST_TOLD and (found := converter.notes()):
            told = True
            for text in found:
                note(text)
    yield converter.finish()
    for text in [] if told else converter.notes():
        note(text)
