"""Videos: which frames are shown, what stands before them, files that are odd or broken."""

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_gemma.engine import Engine
from edge_gemma.errors import PictureError, UsageError
from edge_gemma.export.synth import synthesize
from edge_gemma.folder.folder import ModelFolder
from edge_gemma.measure import memory
from edge_gemma.vision import video
from edge_gemma.vision.video import MOST, frames, sampled
from tests.cli.test_commands import invoke

av = pytest.importorskip("av", reason="the audio extra is not installed")
SMALL = np.zeros((48, 48, 3), np.uint8)


def written(
    path: Path | io.BytesIO, shades: list[int], *, rate: int = 5, form: str = "matroska", codec: str = "mpeg4",
    times: list[int] | None = None, sound: bool = False,
) -> Any:  # fmt: skip
    """A video of one shade a frame. times: time stamps in frames, in place of 0, 1, 2, ..."""
    with av.open(path, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        heard = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound else None
        for number, shade in enumerate(shades):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), shade, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard is not None:
            noise = np.random.default_rng(0).integers(-3000, 3000, (1, 32000), np.int16)
            tone = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            tone.sample_rate = 16000
            container.mux(heard.encode(tone))
            container.mux(heard.encode())
    return path


def shades(found: list[tuple[str, Any]]) -> list[int]:
    return [round(float(patches.values.mean())) for _, patches in found]


@pytest.mark.parametrize(("form", "codec"), [("matroska", "mpeg4"), ("mp4", "mpeg4"), ("avi", "mjpeg")])
def test_a_frame_each_second(tmp_path, form, codec):
    given = [10 * second for second in range(7) for _ in range(5)]
    found = frames(written(tmp_path / "a", given, form=form, codec=codec))
    assert [text for text, _ in found] == ["00:00 ", *(f" 00:0{second} " for second in range(1, 7))]
    assert np.abs(np.array(shades(found)) - np.arange(0, 70, 10)).max() <= 3
    assert {patches.tokens for _, patches in found} == {60}


def test_stamps_beyond_a_minute():
    found = sampled((float(second), lambda: SMALL) for second in range(59))
    assert [at for at, _ in found] == list(range(59))
    assert len(sampled((second * 70.0, lambda: SMALL) for second in range(3))) == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e5), max_size=400), st.integers(1, 9))
def test_any_times(times: list[float], most: int) -> None:
    """Never more than are wanted, in order, a step apart at least, and from the whole length."""
    times = sorted(times)
    counted = []

    def pixels(at: float) -> np.ndarray:
        counted.append(at)
        return SMALL

    found = [at for at, _ in sampled(((at, partial(pixels, at)) for at in times), most)]
    assert len(found) <= most
    assert found == sorted(found)
    assert found[:1] == times[:1]
    steps = np.diff(found)
    assert (steps >= 1 - 1e-9).all()
    if times and times[-1] - times[0] >= 1 and most > 1:
        assert times[-1] - found[-1] < 2 * max(2.0, *(np.diff(times)), *steps, 0) * 2


def test_memory_does_not_grow_with_the_length(monkeypatch):
    held: list[int] = []
    monkeypatch.setattr(video, "cut", lambda picture, budget: held.append(1) or len(held))
    assert len(sampled((float(second), lambda: SMALL) for second in range(100_000))) <= MOST
    assert len(held) < 20 * MOST


@pytest.mark.parametrize("times", [[0, 5, 3, 9, 2, 30, 1], [0] * 7, [900, 905, 910, 915, 920, 925, 930]])
def test_times_that_are_broken(tmp_path, times):
    """They go back, stand still, or begin late: there are frames all the same, in order."""
    path = tmp_path / "a.mkv"
    written(path, [9, 60, 99, 130, 160, 190, 220])
    data = [(Fraction(time, 5), lambda: SMALL) for time in times]
    found = sampled((float(at), pixels) for at, pixels in data)
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    stream = _Stream([None if time == 0 else time / 5 for time in times])
    upright = [at for at, _ in video._upright(av, stream, stream, "a")]
    assert upright == sorted(upright)
    assert upright[0] == 0


class _Stream:
    """As much of a container and its stream as `_upright` uses."""

    def __init__(self, times: list[float | None]) -> None:
        self.codec_context, self.average_rate, self._times = self, 5, times
        self.width, self.height, self.rotation = 96, 64, 0

    def decode(self, stream: Any) -> Iterator[Any]:
        for time in self._times:
            frame = _Stream([])
            frame.time = time
            yield frame


def test_frames_are_upright():
    frame = _Stream([])
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)[..., None].repeat(3, -1)
    frame.to_ndarray = lambda format: pixels
    for turn, expected in ((0, pixels), (90, np.rot90(pixels)), (-90, np.rot90(pixels, -1)), (180, pixels[::-1, ::-1])):
        frame.rotation = turn
        assert np.array_equal(video._pixels(frame), expected)


def test_a_folder_of_pictures(tmp_path):
    for number in range(3):
        Image.fromarray(np.full((60, 90, 3), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    found = frames(tmp_path)
    assert [text for text, _ in found] == ["00:00 ", " 00:01 ", " 00:02 "]
    assert shades(found) == [0, 50, 100]
    assert shades(frames(str(tmp_path))) == [0, 50, 100]
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(PictureError, match=r"notes\.txt"):
        frames(tmp_path)


def test_a_video_of_one_frame_from_bytes_and_open_files(tmp_path):
    file = io.BytesIO()
    written(file, [77])
    assert shades(frames(file.getvalue())) == shades(frames(io.BytesIO(file.getvalue())))
    assert abs(shades(frames(file.getvalue()))[0] - 77) <= 3


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def sound_alone(data: bytes) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        heard = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
        silence.sample_rate = 16000
        container.mux(heard.encode(silence))
        container.mux(heard.encode())
    return out.getvalue()


@pytest.mark.parametrize(("change", "told"), [
    (lambda data: b"", "is empty"), (lambda data: b"hello" * 99, "is not a video that can be read"),
    (lambda data: data[:300], "video"), (sound_alone, "holds no pictures"),
    (lambda data: b"#EXTM3U\nhttp://127.0.0.1:1/a.ts\n", "is not a video that can be read"),
])  # fmt: skip
def test_what_is_no_video(change: Callable[[bytes], bytes], told: str) -> None:
    file = io.BytesIO()
    written(file, [1, 2, 3])
    with pytest.raises(PictureError, match=told) as error:
        frames(change(file.getvalue()))
    assert "\n" not in str(error.value)


def test_what_came_before_damage_is_shown(tmp_path):
    written(tmp_path / "a.mkv", [10 * second for second in range(7) for _ in range(5)])
    data = (tmp_path / "a.mkv").read_bytes()
    assert 1 <= len(frames(cut_short(data))) < 7


def test_a_size_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    file = io.BytesIO()
    written(file, [1])
    with pytest.raises(PictureError, match="has 96x64 pixels, expected 1000 at most"):
        frames(file.getvalue())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return synthesize("tiny", tmp_path_factory.mktemp("seeing") / "tiny", "q8", vision=True, audio=True)


def test_a_video_in_a_conversation(model, tmp_path):
    path = written(tmp_path / "a.mkv", [0, 90, 180], rate=1, sound=True)
    with Engine.load(model, cache_size=0) as engine:
        vision = engine.manifest["vision"]
        chat = engine.chat(max_tokens=2, temperature=0)
        chat.send("What happens?", videos=[path]).result()
        ids = chat.session.ids
        assert ids.count(vision["video_token_id"]) == 180
        assert ids.count(vision["boi_token_id"]) == ids.count(vision["eoi_token_id"]) == 3
        assert "00:01" in engine.tokenizer.decode(ids)
        assert engine._eyes.encoded == 3
        chat.send("And?").result()
        assert engine._eyes.encoded == 3
        both = engine.chat(max_tokens=2, temperature=0)
        both.send("What is said?", path, images=[np.zeros((60, 90, 3), np.uint8)], videos=[path]).result()
        ids = both.session.ids
        order = [ids.index(vision[name]) for name in ("image_token_id", "video_token_id")]
        assert order[0] < order[1] < ids.index(engine.manifest["audio"]["audio_token_id"])
        with pytest.raises(UsageError, match="videos is"):
            chat.send("x", videos=path)


def test_the_command(model, tmp_path):
    path = written(tmp_path / "a.mkv", [0, 90, 180], rate=1, sound=True)
    common = ("run", "-m", model, "What happens?", "--max-tokens", "2", "--json")
    seen = invoke(*common, "--video", path)
    heard = invoke(*common, "--video", path, "--video-sound")
    assert (seen.exit_code, heard.exit_code) == (0, 0)
    assert '"prefill_tokens"' in seen.output
    assert invoke(*common, "--video-sound").exit_code == 2
    assert "no such file" in invoke(*common, "--video", tmp_path / "none.mp4").stderr.lower()


def test_the_memory_limit_counts_frames(model, tmp_path):
    path = written(tmp_path / "a.mkv", [0, 90, 180], rate=1)
    enough = memory.footprint(ModelFolder.open(model), vision=video.BUDGET).total / 1e6 + 35  # and what tests leave
    common = ("run", "-m", model, "What happens?", "--max-tokens", "1", "--cache-size", "0")
    assert invoke(*common, "--memory-limit", round(enough), "--video", path).exit_code == 0
    refused = invoke(*common, "--memory-limit", round(enough), "--video", path, "--video", path)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "the limit is" in refused.stderr
