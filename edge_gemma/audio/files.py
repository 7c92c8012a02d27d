"""A sound file, or the sound of a video, as a stream of 16 kHz mono blocks (`AudioFile`).

Owns: decoding (FFmpeg through PyAV), the choice of a sound track, silence where the file's time stamps leave a hole.
Does not know: speech, segments, models. Memory does not grow with a recording's length.

How files are opened: containers.py.
"""

import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from edge_gemma.audio.containers import MP4, open_container
from edge_gemma.audio.lengths import is_cut
from edge_gemma.audio.samples import CHANNELS, Converter, Note, silent
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.host.extras import imported
from edge_gemma.host.sources import Medium, Source, opened

_SOUND = Medium("the sound", "samples", AudioError)
BLOCK_S = 0.5  # seconds of sound in a block, about
_FORMATS = (
    "wav,w64,aiff,au,caf,flac,ogg,mp3,mp2,aac,ac3,eac3,amr,amrnb,amrwb,g722,gsm,wv,ape,tta,asf,avi,flv,"
    "matroska,webm,mpeg,mpegts"
)
_EXACT_DURATION = ("flac", MP4)  # other formats estimate it, or shorten it to what is there
_STAMPED = (MP4, "matroska,webm", "mpegts", "mpeg", "flv", "asf")  # others: counted samples
_JITTER_S = 0.2  # seconds that a time stamp may be off before it counts as a hole
_SILENCE_S = 2 * 3600.0  # seconds of silence put in for missing sound, at most: time stamps are untrusted


class _Clock:
    """Compares the file's time stamps with the sound read so far.

    Time zero is where the first of the file's streams begins, as in players. A time stamp that goes back starts a new
    count.
    """

    def __init__(self, origin: float | None) -> None:
        self.at = 0.0  # seconds handed on so far, silence included
        self.lead: float | None = None  # seconds of silence before the first sound
        self.left_out = 0.0  # seconds of silence beyond the limit, left out
        self._origin = origin  # the time stamp of zero
        self._stamp = -math.inf  # the next frame's time stamp if nothing is missing
        self._room = _SILENCE_S

    def missing(self, time: float | None) -> float:
        """Seconds of silence before a frame with this time stamp."""
        if time is None or not math.isfinite(time):
            stamp = max(self._stamp, 0.0)
        else:
            self._origin = time if self._origin is None else self._origin
            if time - self._origin < self._stamp - _JITTER_S:
                self._origin = time - self._stamp
            stamp = time - self._origin
        gap = stamp - self.at
        gap = gap if gap > _JITTER_S else 0.0
        if gap > self._room:
            self.left_out += gap
            self._origin, stamp, gap = (self._origin or 0.0) + gap, stamp - gap, 0.0
        self._room -= gap
        self._stamp = stamp
        self.lead = gap if self.lead is None else self.lead
        return gap

    def passed(self, silence: float, sound: float) -> None:
        """Count the seconds of silence and sound that were handed on."""
        self.at += silence + sound
        self._stamp += sound


class AudioFile:
    """A sound file (or the sound of a video), opened. Iterating yields float32 [n] blocks of 16 kHz mono.

    duration_s: the length that the file states, None if it states none. tracks: the number of sound tracks. track: the
    number, from 1, of the track that is read.
    """

    def __init__(self, source: Source, note: Note = silent, *, track: int | None = None) -> None:
        """source: a path (a pipe's too), a file's bytes, or a file opened in binary mode.

        track: a number from 1; None takes the track that the file marks as default, else the first. note is called
        with what is wrong with a file that can still be used. Raises AudioError for a file that cannot be read,
        UsageError if there is no such track.
        """
        self._av = imported("av", "reading sound files", "audio", AudioError)
        self._note = note
        self._opened = opened(source, _SOUND)
        self.name = self._opened.name
        self._container: Any = None
        try:
            self._container = self._open()
            self.tracks = len(self._container.streams.audio)
            if not self.tracks:
                raise AudioError(f"{self.name} holds no sound")
            self._take(track)
            self._cut = is_cut(self._container.format.name, self._opened.file, self._opened.size)
        except BaseException:
            self.close()
            raise
        if self._cut:
            self._note(f"{self.name} is cut short: its end is missing")
        if self.tracks > 1:
            self._note(f"{self.name} has {self.tracks} sound tracks: track {self.track} is read")
        duration = self._container.duration  # microseconds
        self.duration_s = duration / 1e6 if duration and duration > 0 else None

    def _open(self) -> Any:
        return open_container(self._av, self._opened, _FORMATS, "a sound file", AudioError)

    def _take(self, track: int | None) -> None:
        streams = self._container.streams.audio
        if track is None:
            default = self._av.stream.Disposition.default
            track = next((number for number, stream in enumerate(streams, 1) if stream.disposition & default), 1)
        if not 1 <= track <= self.tracks:
            raise UsageError(f"sound track {track} was asked for, {self.name} has {self.tracks}")
        self.track, self._stream = track, streams[track - 1]

    def read_track(self, track: int) -> None:
        """Read another track, from its beginning. Raises UsageError if there is none of that number."""
        self._container.close()
        self._container = self._open()
        self._take(track)

    def __iter__(self) -> Iterator[np.ndarray]:
        samples, converter = 0, None
        start = self._container.start_time  # microseconds
        stamped = self._container.format.name in _STAMPED
        clock = _Clock(start / 1e6 if start is not None and stamped else None)
        for rate, frames in self._gathered(clock, stamped):
            if frames.ndim == 2 and frames.shape[1] > CHANNELS:
                raise AudioError(f"{self.name} has {frames.shape[1]} channels, expected at most {CHANNELS}")
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
            raise AudioError(f"{self.name} holds no samples that can be read")
        for text in converter.notes():
            self._note(f"{self.name}: {text}")
        self._compare(clock)

    def _compare(self, clock: _Clock) -> None:
        """Note where the sound read differs from what the file says it holds."""
        if clock.left_out:
            self._note(
                f"{self.name} has time stamps with holes of {clock.left_out:.0f} s, more than {_SILENCE_S:.0f} s in "
                "all: times after them are too early"
            )
        exact = self._container.format.name in _EXACT_DURATION and self._stream.duration
        promised = float(self._stream.duration * self._stream.time_base) if exact else 0.0
        found = clock.at + clock.left_out - (clock.lead or 0.0)
        if not self._cut and found < 0.98 * promised - 0.5:
            self._note(f"{self.name} is cut short or damaged: {found:.1f} s of {promised:.1f} s could be read")

    def _gathered(self, clock: _Clock, stamped: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (rate, samples [n, channels]), about a block each; zeros stand where sound is missing."""
        parts: list[np.ndarray] = []
        kind: tuple[Any, ...] = (0, 0, None)  # rate, channels, dtype
        for rate, part in self._pieces(clock, stamped):
            if parts and (rate, part.shape[1], part.dtype) != kind:
                yield kind[0], np.concatenate(parts)
                parts = []
            kind = (rate, part.shape[1], part.dtype)
            parts.append(part)
            if sum(map(len, parts)) >= BLOCK_S * rate:
                yield rate, np.concatenate(parts)
                parts = []
        if parts:
            yield kind[0], np.concatenate(parts)

    def _pieces(self, clock: _Clock, stamped: bool) -> Iterator[tuple[int, np.ndarray]]:
        for frame in self._frames():
            part, rate = _samples(frame), frame.sample_rate
            missing = round(clock.missing(frame.time if stamped else None) * rate)
            clock.passed(missing / rate, len(part) / rate)
            for start in range(0, missing, rate):
                yield rate, np.zeros((min(rate, missing - start), part.shape[1]), part.dtype)
            yield rate, part

    def _converter(self, rate: int) -> Converter:
        try:
            return Converter(rate)
        except AudioError as error:
            raise AudioError(f"{self.name}: {error}") from None

    def _frames(self) -> Iterator[Any]:
        """Decoded frames. Packets that cannot be decoded are skipped."""
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
            self._note(f"{self.name} is damaged: {damaged} pieces of it could not be decoded")

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._opened.close()

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
