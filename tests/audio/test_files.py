"""Sound files good and bad: each gives its samples, or one line that says what is wrong with it."""

import contextlib
import io
import os
import threading
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.errors import AudioError, UsageError
from edge_gemma.host import sources
from edge_gemma.measure.memory import resident

av = pytest.importorskip("av", reason="the audio extra is not installed")
pytest.importorskip("soxr", reason="the audio extra is not installed")


def tone(seconds, rate=SAMPLE_RATE, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    """samples: [n] or [n, channels] in [-1, 1], stored as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return path


def write_float_wav(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    data = samples.astype("<f4").tobytes()
    header = b"WAVEfmt " + np.array([16, 3 | 1 << 16, rate, 4 * rate, 4 | 32 << 16], "<u4").tobytes()
    chunk = b"data" + len(data).to_bytes(4, "little") + data
    path.write_bytes(b"RIFF" + (len(header) + len(chunk)).to_bytes(4, "little") + header + chunk)
    return path


def encode(path: Path, samples: np.ndarray, codec: str, rate: int = SAMPLE_RATE) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.rint(samples * 32767).astype(np.int16)[None], "s16", "mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(piece))
    return path


def read(path, notes=None):
    with AudioFile(path, (notes if notes is not None else []).append) as file:
        blocks = list(file)
    samples = np.concatenate(blocks)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()
    assert np.abs(samples).max(initial=0) <= 1
    return samples


def fails(path):
    with pytest.raises(AudioError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def hum(samples, hz=440.0):
    """The share of the energy at one frequency, and its amplitude."""
    middle = samples[len(samples) // 4 : len(samples) * 3 // 4]
    wave_ = np.exp(-2j * np.pi * hz * np.arange(len(middle)) / SAMPLE_RATE)
    amplitude = 2 * abs((middle * wave_).mean())
    return amplitude**2 / 2 / np.square(middle).mean(), amplitude


# --- good files -------------------------------------------------------------------------------------------------------


def test_16_khz_mono_arrives_sample_by_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-32767, 32768, 100_001) / 32767
    got = read(write_wav(tmp_path / "x.wav", samples))
    assert np.array_equal(got, (np.rint(samples * 32767) / 32768).astype(np.float32))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_any_rate_and_channel_count(tmp_path, rate, channels):
    samples = np.repeat(tone(2, rate)[:, None], channels, axis=1)
    got = read(write_wav(tmp_path / "x.wav", samples, rate))
    assert abs(len(got) - 32_000) <= 1
    share, amplitude = hum(got)
    assert share > 0.999
    assert amplitude == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("x.flac", "flac", 44_100), ("x.ogg", "libopus", 48_000), ("x.opus", "libopus", 48_000),
        ("x.mp3", "libmp3lame", 44_100), ("x.m4a", "aac", 44_100), ("x.g722", "g722", 16_000),
        ("x.webm", "libopus", 48_000), ("x.wav", "pcm_f64le", 16_000), ("x.wav", "pcm_u8", 16_000),
        ("x.aiff", "pcm_s24be", 16_000),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, codec, rate):
    notes = []
    got = read(encode(tmp_path / name, tone(3, rate), codec, rate), notes)
    assert 2.95 < len(got) / SAMPLE_RATE < 3.15
    share, amplitude = hum(got)
    assert share > 0.98
    assert amplitude == pytest.approx(0.5, abs=0.03)
    assert notes == []


def test_a_recording_that_was_streamed_has_no_length_and_that_is_fine(tmp_path):
    path, notes = write_wav(tmp_path / "x.wav", tone(1)), []
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(read(path, notes)) == 16_000
    assert notes == []


def test_an_hour_in_flat_memory(tmp_path):
    path = tmp_path / "hour.wav"
    minute = np.rint(tone(60, 8_000) * 32767).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        for _ in range(60):
            file.writeframesraw(minute)
    total, largest, sizes = 0, 0, []
    with AudioFile(path) as file:
        assert file.duration_s == 3600
        for block in file:
            total += len(block)
            largest = max(largest, len(block))
            sizes.append(resident() or 0)
    assert abs(total - 3600 * SAMPLE_RATE) <= 1
    assert largest < 1.1 * SAMPLE_RATE
    assert sizes[-1] - sizes[20] < 5_000_000


# --- bad files --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_sound(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "is empty" in fails(tmp_path / "empty.wav")
    for name in ("text.wav", "text.mp3", "text.g722x", "text"):
        (tmp_path / name).write_text("Only words, no sound.\n" * 200)
        assert "not a sound file" in fails(tmp_path / name)
    assert "No such file" in fails(tmp_path / "missing.wav")
    assert "not a file" in fails(tmp_path)
    (tmp_path / "head.wav").write_bytes(write_wav(tmp_path / "x.wav", tone(1)).read_bytes()[:44])
    assert "no samples" in fails(tmp_path / "head.wav")


def test_playlists_and_pictures_are_refused(tmp_path):
    write_wav(tmp_path / "secret.wav", tone(1))
    playlists = {
        "x.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n",
        "x.ffconcat": f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
        "x.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        assert "not a sound file" in fails(tmp_path / name)
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=32, height=32)
        stream.pix_fmt = "yuv420p"
        for packet in stream.encode(av.VideoFrame(32, 32, "yuv420p")) + stream.encode(None):
            container.mux(packet)
    assert "holds no sound" in fails(tmp_path / "film.mp4")


def test_pipes_bytes_and_open_files(tmp_path):
    path = encode(tmp_path / "x.m4a", tone(2), "aac")  # its index is at the end: it cannot be read as it comes
    expected = read(path)
    assert np.array_equal(read(path.read_bytes()), expected)
    with path.open("rb") as file:
        file.seek(100)
        assert np.array_equal(read(file), expected)
        assert not file.closed
        assert np.array_equal(read(file), expected), "twice"
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(path.read_bytes(),))
    writer.start()
    assert np.array_equal(read(tmp_path / "pipe"), expected)
    writer.join()
    reading, writing = os.pipe()
    os.write(writing, write_wav(tmp_path / "x.wav", tone(1)).read_bytes())
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert len(read(pipe)) == 16_000


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIPE_S", 0.1)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file but a pipe" in fails(tmp_path / "pipe")
    for source, told in ((5, "is int, expected a path"), (None, "is NoneType"), (io.StringIO("x"), "binary mode")):
        with pytest.raises(UsageError, match=told):
            read(source)
    for source, told in ((b"", "is empty"), (io.BytesIO(), "is empty"), ("a\0b", "null"), (b"RIFF", "not a sound")):
        with pytest.raises(AudioError, match=told):
            read(source)


def test_a_pipe_without_end_does_not_fill_the_disk(monkeypatch):
    monkeypatch.setattr(sources, "_PIPE_BYTES", 3 << 20)

    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(AudioError, match="save it as a file first"):
        read(endless)
    assert endless.given <= 5 << 20


def test_names_are_never_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:x.wav", "concat:a.wav", "data:x", "-"):
        write_wav(tmp_path / name, tone(0.1))
        assert len(read(Path(name))) == 1600


def test_truncated_files_give_what_they_have_and_say_so(tmp_path):
    for name, codec in (("x.wav", "pcm_s16le"), ("x.flac", "flac"), ("x.mp3", "libmp3lame"), ("x.aiff", "pcm_s16be")):
        whole, notes = encode(tmp_path / name, np.random.default_rng(0).uniform(-0.5, 0.5, 160_000), codec), []
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert 3 < len(read(whole, notes)) / SAMPLE_RATE < 6.5, name
        assert sum("cut short" in note for note in notes) == 1, name
    moov_at_the_end = encode(tmp_path / "x.m4a", tone(3), "aac")
    moov_at_the_end.write_bytes(moov_at_the_end.read_bytes()[:5000])
    fails(moov_at_the_end)


def test_damage_in_the_middle_is_passed_over(tmp_path):
    path = encode(tmp_path / "x.mp3", tone(10), "libmp3lame")
    data = bytearray(path.read_bytes())
    data[20_000:23_000] = np.random.default_rng(1).bytes(3000)
    path.write_bytes(data)
    assert 8 < len(read(path)) / SAMPLE_RATE < 10.5


def test_nan_and_infinity_become_silence_and_are_told(tmp_path):
    samples = tone(1)
    samples[100:200] = np.nan
    samples[300] = np.inf
    notes = []
    got = read(write_float_wav(tmp_path / "x.wav", samples), notes)
    assert not got[100:200].any()
    assert got[300] == 0
    assert np.allclose(got[400:], samples[400:], atol=1e-6)
    assert notes == [f"{tmp_path}/x.wav: 101 of 16000 samples are not numbers and were taken as silence"]


def test_clipping_is_told(tmp_path):
    notes = []
    read(write_wav(tmp_path / "x.wav", np.clip(10 * tone(1), -1, 1)), notes)
    assert len(notes) == 1
    assert "clipped" in notes[0]
    assert np.abs(read(write_float_wav(tmp_path / "y.wav", 1e30 * tone(1)))).max() == 1


def test_too_many_channels(tmp_path):
    path = write_wav(tmp_path / "x.wav", tone(1))
    content = bytearray(path.read_bytes())
    content[22] = 129
    path.write_bytes(content)
    assert fails(path) == f"{path} has 129 channels, expected at most 128"


def test_impossible_rates(tmp_path):
    for rate in (1, 1_999, 4_000_000):
        assert "expected 2000 to 768000" in fails(write_wav(tmp_path / "x.wav", tone(1), rate))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_an_audio_error_or_sound(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    name, codec = data.draw(st.sampled_from([("x.wav", "pcm_s16le"), ("x.flac", "flac"), ("x.m4a", "aac")]))
    path = encode(folder / name, tone(0.3), codec)
    content = bytearray(path.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6)):
        content[at] = value
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(AudioError):
        read(path)
