"""Sound of any kind as a stream of 16 kHz mono blocks: files (`AudioFile`), arrays (`array_blocks`).

Owns: decoding (FFmpeg through PyAV), channels, sample rates, samples that are not numbers. Does not know: speech,
segments, models. Memory does not grow with a recording's length.

Files are untrusted. FFmpeg gets an open file and never a name, and only formats that hold sound themselves: playlists,
which name other files and addresses, are refused.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.errors import AudioError

BLOCK_S = 0.5  # of sound handed on at a time, about
RATES = (2_000, 768_000)  # Hz
_FORMATS = (
    "wav,w64,aiff,au,caf,flac,ogg,mp3,mp2,aac,ac3,eac3,amr,amrnb,amrwb,g722,gsm,wv,ape,tta,asf,avi,flv,"
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts"
)
_BY_SUFFIX = {".g722": "g722", ".gsm": "gsm"}  # formats without a header
_EXACT_DURATION = ("flac", "mov,mp4,m4a,3gp,3g2,mj2")  # the others estimate it, or shorten it to what is there
_FULL_SCALE = 0.999
_CLIPPED_SHARE = 0.01  # of the samples at full scale: worth telling
_STREAMED = 0x7FFF_FFFF  # RIFF sizes from here on were written before the length was known

Note = Callable[[str], None]


def silent(_: str) -> None:
    """The note taker of who does not want notes."""


class Converter:
    """Samples of any rate and channel count to 16 kHz mono, as they come.

    16 kHz mono passes unchanged. Channels are averaged. Values beyond [-1, 1] are clipped; what is not a number becomes
    0. `clipped` counts samples at full scale, `strange` those that were not numbers, `seen` all.
    """

    def __init__(self, rate: int) -> None:
        """Raises AudioError for a rate outside RATES, or if soxr is missing and needed."""
        if not RATES[0] <= rate <= RATES[1]:
            raise AudioError(f"the sound has {rate} samples a second, expected {RATES[0]} to {RATES[1]}")
        self.rate = rate
        self.seen = self.clipped = self.strange = 0
        self._resampler: Any = None
        if rate != SAMPLE_RATE:
            try:
                import soxr
            except ImportError:
                raise AudioError(
                    f"the sound has {rate} samples a second, which needs soxr: pip install 'edge-gemma[audio]'"
                ) from None
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """samples: [n] or [n, channels], floats in [-1, 1] or signed integers. Returns float32 [m], what is ready."""
        mono = self._mono(samples)
        return mono if self._resampler is None else np.clip(self._resampler.resample_chunk(mono), -1, 1)

    def finish(self) -> np.ndarray:
        """The rest: float32 [m]."""
        empty = np.zeros(0, np.float32)
        if self._resampler is None or not self.seen:
            return empty
        return np.clip(self._resampler.resample_chunk(empty, last=True), -1, 1)

    def _mono(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype.kind == "u":
            raise AudioError(f"samples are {samples.dtype}, expected floats in [-1, 1] or signed integers")
        if samples.dtype.kind == "i":
            samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        if samples.ndim == 2:
            samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
        mono = samples.astype(np.float32)  # a copy: what follows changes it
        finite = np.isfinite(mono)
        if not finite.all():
            self.strange += int((~finite).sum())
            mono[~finite] = 0
        self.seen += len(mono)
        self.clipped += int((np.abs(mono) >= _FULL_SCALE).sum())
        return np.clip(mono, -1, 1, out=mono)

    def notes(self) -> list[str]:
        """What the user should know about the samples so far."""
        found = []
        if self.strange:
            found.append(f"{self.strange} of {self.seen} samples are not numbers and were taken as silence")
        if self.clipped > _CLIPPED_SHARE * self.seen:
            found.append(
                f"the recording is clipped, {self.clipped / self.seen:.0%} of it at full scale: expect mistakes"
            )
        return found


def array_blocks(samples: np.ndarray, rate: int = SAMPLE_RATE, note: Note = silent) -> Iterator[np.ndarray]:
    """An array as blocks of 16 kHz mono. samples: [n] or [n, channels], floats in [-1, 1] or signed integers.

    Raises AudioError for other shapes, dtypes and rates, and for an empty array.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fi" or not samples.size:
        raise AudioError(
            f"samples are {samples.dtype} of shape {list(samples.shape)}, expected [n] or [n, channels] of floats in "
            "[-1, 1] or signed integers, n at least 1"
        )
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0] and samples.shape[0] <= 8:
        raise AudioError(f"samples have shape {list(samples.shape)}, expected [n, channels]: transpose them")
    converter, step = Converter(rate), max(1, rate // 2)
    for start in range(0, len(samples), step):
        yield converter.feed(samples[start : start + step])
    yield converter.finish()
    for text in converter.notes():
        note(text)


class AudioFile:
    """A sound file (or the sound of a video), opened. Iterate over it once for float32 [n] blocks of 16 kHz mono.

    duration_s: what the file says of itself, None where it does not say.
    """

    def __init__(self, path: Path | str, note: Note = silent) -> None:
        """note is told what is wrong with a file that can be used nevertheless. Raises AudioError if it cannot."""
        try:
            import av
        except ImportError:
            raise AudioError("reading sound files needs PyAV: pip install 'edge-gemma[audio]'") from None
        self.path, self._note, self._av = Path(path), note, av
        size = self._checked_size()
        self._file = self.path.open("rb")
        self._container = self._opened()
        if not self._container.streams.audio:
            self.close()
            raise AudioError(f"{self.path} holds no sound")
        self._stream = self._container.streams.audio[0]
        duration = self._container.duration  # microseconds
        self.duration_s = duration / 1e6 if duration and duration > 0 else None
        if self._container.format.name == "wav" and size < self._promised_bytes():
            self._note(f"{self.path} is cut short: its end is missing")

    def _opened(self) -> Any:
        try:
            return self._av.open(
                self._file,
                format=_BY_SUFFIX.get(self.path.suffix.lower()),
                options={"format_whitelist": _FORMATS},
                metadata_errors="replace",
            )
        except (self._av.FFmpegError, ValueError, OSError) as error:
            self._file.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise AudioError(f"{self.path} is not a sound file that can be read: {reason}") from None

    def _checked_size(self) -> int:
        try:
            status = self.path.stat()
        except OSError as error:
            raise AudioError(f"{self.path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{self.path} is not a file")
        if not status.st_size:
            raise AudioError(f"{self.path} is empty")
        if not os.access(self.path, os.R_OK):
            raise AudioError(f"{self.path}: permission denied")
        return status.st_size

    def _promised_bytes(self) -> int:
        """The file's length as a RIFF header has it, 0 where it was not known."""
        head = os.pread(self._file.fileno(), 8, 0)
        size = int.from_bytes(head[4:8], "little")
        return size + 8 if head[:4] == b"RIFF" and size < _STREAMED else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        samples, converter = 0, None
        for rate, frames in self._gathered():
            if converter is None or rate != converter.rate:  # a rate may change midway
                if converter is not None:
                    yield converter.finish()
                converter = self._converter(rate)
            block = converter.feed(frames)
            samples += len(block)
            yield block
        if converter is not None:
            block = converter.finish()
            samples += len(block)
            yield block
        if converter is None or not samples:
            raise AudioError(f"{self.path} holds no samples that can be read")
        for text in converter.notes():
            self._note(f"{self.path}: {text}")
        seconds, exact = samples / SAMPLE_RATE, self._container.format.name in _EXACT_DURATION
        if exact and self.duration_s and seconds < 0.98 * self.duration_s - 0.5:
            self._note(f"{self.path} is cut short or damaged: {seconds:.1f} s of {self.duration_s:.1f} s could be read")

    def _gathered(self) -> Iterator[tuple[int, np.ndarray]]:
        """Decoded samples of about a block, [n, channels], with their rate."""
        parts: list[np.ndarray] = []
        rate, channels = 0, 0
        for frame in self._frames():
            part = _samples(frame)
            if parts and (frame.sample_rate, part.shape[1]) != (rate, channels):
                yield rate, np.concatenate(parts)
                parts = []
            rate, channels = frame.sample_rate, part.shape[1]
            parts.append(part)
            if sum(map(len, parts)) >= BLOCK_S * rate:
                yield rate, np.concatenate(parts)
                parts = []
        if parts:
            yield rate, np.concatenate(parts)

    def _converter(self, rate: int) -> Converter:
        try:
            return Converter(rate)
        except AudioError as error:
            raise AudioError(f"{self.path}: {error}") from None

    def _frames(self) -> Iterator[Any]:
        """Decoded frames; packets that cannot be decoded are passed over."""
        damaged = 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except (self._av.FFmpegError, ValueError, OSError):
                damaged += 1
                if damaged > 1000:  # nothing but noise
                    break
                continue
            yield from frames
        if damaged:
            self._note(f"{self.path} is damaged: {damaged} pieces of it could not be decoded")

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _samples(frame: Any) -> np.ndarray:
    """A decoded frame as [n, channels], floats or signed integers."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.int16) - 128).astype(np.int8)
    return samples.T
