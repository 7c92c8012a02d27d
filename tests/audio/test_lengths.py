"""Files cut short are told, whole ones never, whatever wrote them."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.audio import lengths
from tests.audio.test_files import encode, read, tone, write_wav

av = pytest.importorskip("av", reason="the audio extra is not installed")

WHOLE = [
    ("x.wav", "pcm_s16le", 16_000), ("x.aiff", "pcm_s16be", 16_000), ("x.mp3", "libmp3lame", 44_100),
    ("x.ogg", "libopus", 48_000), ("x.webm", "libopus", 48_000), ("x.mkv", "pcm_s16le", 16_000),
    ("x.flac", "flac", 44_100), ("x.m4a", "aac", 44_100),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "rate"), WHOLE)
def test_every_cut_is_told_once(tmp_path, name, codec, rate):
    path, notes = encode(tmp_path / name, tone(4, rate), codec, rate), []
    read(path, notes)
    assert notes == []
    data = path.read_bytes()
    if name == "x.m4a":
        path = tmp_path / "front.mp4"
        with av.open(str(tmp_path / name)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as to:
            stream = to.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(source.streams.audio[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        data = path.read_bytes()
    for share in (0.5, 0.7, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        notes = []
        read(path, notes)
        assert sum("cut short" in note for note in notes) == 1, (share, notes)


LIVE = [("x.webm", "libopus", 48_000, {"live": "1"}), ("x.mp3", "libmp3lame", 44_100, {"write_xing": "0"}),
        ("low.mp3", "libmp3lame", 16_000, {"write_xing": "0"}),
        ("tagged.mp3", "libmp3lame", 44_100, {"write_xing": "0", "write_id3v1": "1"})]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "rate", "options"), LIVE)
def test_a_cut_without_a_length_in_front(tmp_path, name, codec, rate, options):
    """Where the last frame or block is not whole; between two of them nothing is missing that could be known."""
    path = tmp_path / name
    with av.open(str(path), "w", options=options) as to:
        stream = to.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((tone(4, rate)[None] * 32767).astype("int16"), "s16", "mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            to.mux(packet)
    data, told = path.read_bytes(), []
    for end in (len(data), *range(len(data) // 2, len(data) // 2 + 60)):
        path.write_bytes(data[:end])
        notes = []
        read(path, notes)
        told.append(sum("cut short" in note for note in notes))
    assert told[0] == 0
    assert set(told) <= {0, 1}
    assert sum(told) >= 55


# Sizes that programs write into a pipe: SoX, arecord, FFmpeg, Python's wave, none.
@pytest.mark.parametrize(
    ("riff", "data"),
    [(0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFDB),
     (36, 0), (0, 0), (35, 0xFFFFFFFF)],
)  # fmt: skip
def test_a_recording_written_into_a_pipe_is_whole(tmp_path, riff, data):
    path, notes = write_wav(tmp_path / "x.wav", tone(1)), []
    content = bytearray(path.read_bytes())
    content[4:8], content[40:44] = riff.to_bytes(4, "little"), data.to_bytes(4, "little")
    path.write_bytes(content)
    assert len(read(path, notes)) == 16_000
    assert notes == []


def test_what_follows_the_sound_is_no_cut(tmp_path):
    for name, codec, rate in WHOLE[:4]:
        path, notes = encode(tmp_path / name, tone(1, rate), codec, rate), []
        path.write_bytes(path.read_bytes() + bytes(3000))
        read(path, notes)
        assert not any("cut short" in note for note in notes), name


LIVE_SEGMENT = b"\x1a\x45\xdf\xa3\x80" + lengths._SEGMENT + b"\xff" + lengths._CLUSTER
BEGINNINGS = [b"RIFF", b"FORM", b"OggS", LIVE_SEGMENT[:9], LIVE_SEGMENT, b"\0\0\0\x08ftyp", b"\xff\xfb\x90\0", b"ID3"]


@given(st.sampled_from(sorted(lengths._ENDS)), st.sampled_from(BEGINNINGS), st.binary(max_size=400), st.integers(0, 9))
def test_any_bytes_have_a_length_or_none(name, beginning, rest, position):
    """Every cut of them too; the file is left where it was."""
    data = beginning + rest
    for size in (len(data), len(data) // 2, 3, 0):
        file = io.BytesIO(data[:size])
        file.seek(position)
        assert lengths.is_cut(name, file, size) in (True, False)
        assert file.tell() == position
