"""MP4 files whose index states more than a recording has. FFmpeg would make an entry for each sample that is stated."""

import io
import struct

import av
import numpy as np
import pytest

from edge_gemma.audio.files import AudioFile
from edge_gemma.errors import AudioError

MANY = 50_000_000
MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def box(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", 8 + len(data)) + kind + data


def full(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    return box(kind, words(flags), *parts)


def aac() -> bytes:
    """The description of a track of AAC, 16 kHz, one channel."""
    decoder = b"\x04\x11\x40\x15" + bytes(11) + b"\x05\x02\x14\x08"
    esds = full(b"esds", b"\x03" + bytes([len(decoder) + 6]) + b"\0\x01\0" + decoder + b"\x06\x01\x02")
    entry = bytes(6) + b"\0\x01" + bytes(8) + struct.pack(">HHHHI", 1, 16, 0, 0, 16000 << 16)
    return full(b"stsd", words(1), box(b"mp4a", entry, esds))


def track(samples: int, *, edits: int = 0, extra: bytes = b"") -> bytes:
    table = box(
        b"stbl", aac(), full(b"stts", words(1, samples, 1024)), full(b"stsc", words(1, 1, samples, 1)),
        full(b"stsz", words(1, samples)), full(b"stco", words(1, 48)),
    )  # fmt: skip
    head = full(b"tkhd", words(0, 0, 1, 0, 100), bytes(8), struct.pack(">4h", 0, 0, 256, 0), MATRIX, words(0, 0))
    listed = box(b"edts", full(b"elst", words(edits), words(100, 0, 0x10000) * edits)) if edits else b""
    media = box(
        b"mdia", full(b"mdhd", words(0, 0, 16000, 100), b"\x55\xc4\0\0"),
        full(b"hdlr", words(0), b"soun", bytes(13)),
        box(b"minf", full(b"smhd", bytes(4)), box(b"dinf", full(b"dref", words(1), full(b"url ", flags=1))), table),
    )  # fmt: skip
    return box(b"trak", head, extra, listed, media)


def file(*boxes: bytes, kind: bytes = b"moov") -> bytes:
    head = full(b"mvhd", words(0, 0, 1000, 1000, 0x10000), b"\x01\0", bytes(10), MATRIX, bytes(24), words(2))
    return box(b"ftyp", b"M4A \0\0\0\0M4A ") + box(b"mdat", bytes(64)) + box(kind, head, *boxes)


def fragments(samples: int, number: int = 1) -> bytes:
    part = box(
        b"moof", full(b"mfhd", words(1)),
        box(b"traf", full(b"tfhd", words(1), flags=0x20000), full(b"trun", words(samples))),
    )  # fmt: skip
    return file(track(0), box(b"mvex", full(b"trex", words(1, 1, 1024, 1, 0)))) + part * number


HIDDEN = box(b"free", words(8), b"trak", b"stts", words(0, 1, MANY, 1))  # in a track: words that look like another one


@pytest.mark.parametrize("data", [
    file(track(MANY)), file(*[track(MANY // 50)] * 50), file(track(MANY, extra=HIDDEN)), file(HIDDEN, track(MANY)),
    file(track(MANY), kind=b"free"), file(track(100_000, edits=1000)), fragments(MANY), fragments(MANY // 500, 500),
], ids=["one", "many", "hidden", "before", "free", "edits", "fragment", "fragments"])  # fmt: skip
def test_an_index_that_states_too_much(data: bytes) -> None:
    with pytest.raises(AudioError, match=r"the sound is not read: its index states .* expected 8388608 at most"):
        AudioFile(data)


def test_such_a_file_is_mp4_only_if_it_begins_so() -> None:
    with pytest.raises(AudioError, match="not a sound file that can be read"):
        AudioFile(box(b"what", bytes(8)) + file(track(MANY)))


@pytest.mark.parametrize(("data", "told"), [
    (file(box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", words(1 << 30)))), "compressed"),
    (file() + box(b"free") * (1 << 20), "more than 1048576 boxes"),
    (file(box(b"what", bytes(128 << 20))), "has 134217"),
])  # fmt: skip
def test_an_index_that_is_not_read(data: bytes, told: str) -> None:
    with pytest.raises(AudioError, match=told):
        AudioFile(data)


@pytest.mark.parametrize(("name", "codec", "flags"), [
    ("mp4", "aac", ""), ("mp4", "aac", "frag_keyframe+empty_moov"), ("mov", "pcm_s16le", ""),
])  # fmt: skip
def test_honest_files_are_read(name: str, codec: str, flags: str) -> None:
    """PCM states more samples than are believed of others."""
    written, rate = io.BytesIO(), 48000
    with av.open(written, "w", format=name, options={"movflags": flags} if flags else {}) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        form, kind = ("fltp", np.float32) if codec == "aac" else ("s16", np.int16)
        for at in range(0, 240 * rate, rate):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, rate), kind), format=form, layout="mono")
            frame.sample_rate, frame.pts = rate, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with AudioFile(written.getvalue()) as opened:
        assert sum(map(len, opened)) == pytest.approx(240 * 16000, abs=2000)
