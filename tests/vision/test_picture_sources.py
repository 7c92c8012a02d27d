"""What can be given as a picture: paths, bytes, open files, PIL images, arrays; what each refuses."""

import io
import logging
import os
import struct
import sys
import threading
import warnings

import numpy as np
import pytest

from edge_gemma.errors import EdgeGemmaError, PictureError, UsageError
from edge_gemma.vision import picture
from edge_gemma.vision.patches import cut
from edge_gemma.vision.picture import read_picture
from tests.open_files import open_below

Image = pytest.importorskip("PIL.Image", reason="the vision extra is not installed")

from tests.vision.picture_files import GREY, SMALL, png, saved, tiff  # noqa: E402  (after the skip without Pillow)

FILE = saved(SMALL, "PNG")


def told(source, error: type[EdgeGemmaError] = PictureError) -> str:
    with pytest.raises(error) as caught:
        read_picture(source)
    return str(caught.value)


def test_files_in_every_form(tmp_path) -> None:
    path = tmp_path / "a picture.txt"
    path.write_bytes(FILE)
    reading, writing = os.pipe()
    os.write(writing, FILE)
    os.close(writing)
    with path.open("rb") as file, open(reading, "rb") as pipe, path.open("r+b", buffering=0) as raw:
        file.seek(9)  # it is read from its start
        for source in (path, str(path), FILE, bytearray(FILE), memoryview(FILE), io.BytesIO(FILE), file, pipe, raw):
            assert np.array_equal(read_picture(source), SMALL)
        assert not file.closed
        assert len(open_below(tmp_path)) == 2
    assert path.read_bytes() == FILE


def test_sources_that_are_none(tmp_path) -> None:
    for source in (5, None, [[0]], {"a": 1}, object()):
        assert "expected a path, a file's bytes, a file opened in binary mode, or a PIL image, or an array" in told(
            source, UsageError
        )
    assert "binary mode" in told(io.StringIO("x"), UsageError)
    closed = io.BytesIO(FILE)
    closed.close()
    assert "closed" in told(closed)
    assert "is not a file" in told(tmp_path)
    assert told(tmp_path / "none.png").endswith("none.png: No such file or directory")
    assert "null" in told("a\0b")


def test_files_that_are_too_long_are_not_read(monkeypatch) -> None:
    monkeypatch.setattr(picture, "MAX_BYTES", 1 << 20)
    assert "has 2 MB, expected a picture of at most 1 MB" in told(bytes(2 << 20))
    assert np.array_equal(read_picture(FILE), SMALL)


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000"])
def test_formats_whose_decoders_take_more_memory(kind: str, monkeypatch) -> None:
    """Half as many pixels are read of them."""
    assert picture._COSTLY[kind] * 2 == picture.MAX_PIXELS
    monkeypatch.setitem(picture._COSTLY, kind, SMALL.size // 3 - 1)
    assert "has 28x20 pixels, expected at most" in told(saved(SMALL, kind))
    monkeypatch.setitem(picture._COSTLY, kind, SMALL.size // 3)
    assert read_picture(saved(SMALL, kind)).shape == SMALL.shape


def test_files_that_cannot_be_read() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            if size:
                raise OSError(5, "Input/output error")
            return b""

    assert told(Broken(FILE)) == "the picture: Input/output error"


def test_pil_images_of_every_mode() -> None:
    image = Image.fromarray(SMALL)
    for mode in ("RGB", "RGBA", "RGBX", "CMYK", "HSV", "YCbCr", "RGBa"):
        assert np.abs(read_picture(image.convert(mode)).astype(int) - SMALL).max() <= 12, mode
    grey = Image.fromarray(GREY)
    given = [grey, grey.convert("LA"), grey.convert("LA").convert("La"), grey.convert("P")]
    given += [Image.fromarray(GREY.astype(kind) << 8) for kind in (np.int32, np.uint16)]
    given += [Image.fromarray(GREY / np.float32(255))]
    assert [image.mode for image in given] == ["L", "LA", "La", "P", "I", "I;16", "F"]
    for image in given:
        assert np.array_equal(read_picture(image), np.repeat(GREY[..., None], 3, axis=2)), image.mode
    assert np.array_equal(read_picture(Image.new("PA", (2, 2))), np.full((2, 2, 3), 255))
    assert np.array_equal(read_picture(Image.new("1", (2, 2), 1)), np.full((2, 2, 3), 255))


def test_pil_images_stay_as_they_are() -> None:
    file = io.BytesIO(saved(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]))
    with Image.open(file) as image:
        image.seek(1)
        notes: list[str] = []
        assert np.array_equal(read_picture(image, notes.append)[..., 0], 255 - GREY)  # the frame that it is at
        assert image.tell() == 1
        assert not notes
        image.seek(0)
    assert not file.closed
    with Image.open(io.BytesIO(FILE)) as closed:
        pass
    assert "the picture is damaged or cut short" in told(closed)
    assert "70000x1 pixels" in told(Image.open(io.BytesIO(png(70_000, 1, 8, 2, b""))))
    assert "0x5 pixels, expected at least 1x1" in told(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4", np.uint8])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays(kind, channels: int) -> None:
    values = np.concatenate([SMALL, np.full_like(SMALL[..., :1], 51)], axis=2)[..., :channels] if channels else GREY
    given = values.astype(kind) if kind == np.uint8 else (values / 255).astype(kind)
    before = given.copy()
    pixels = read_picture(given)
    if channels == 4:
        expected = np.rint(SMALL * 0.2 + 255 * 0.8)
    else:
        expected = np.broadcast_to(values.reshape(*GREY.shape, -1), SMALL.shape)
    assert np.array_equal(pixels, expected)
    assert pixels.dtype == np.uint8
    pixels[:] = 0
    assert np.array_equal(given, before)


def test_floats_are_rounded() -> None:
    assert read_picture(np.array([[0, 0.0019, 0.002, 0.499, 0.997, 0.999, 1]]))[0, :, 0].tolist() == [
        0,
        0,
        1,
        127,
        254,
        255,
        255,
    ]


def test_arrays_in_any_order_of_memory() -> None:
    assert np.array_equal(read_picture(SMALL[::-1, ::2]), SMALL[::-1, ::2])
    assert np.array_equal(read_picture(np.asfortranarray(SMALL)), SMALL)
    assert np.array_equal(read_picture(SMALL[:1, :1]), SMALL[:1, :1])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (SMALL.astype(np.int64), "an array of int64, expected [h, w] or [h, w, 1, 3 or 4] of uint8"),
        (SMALL.astype(np.uint16), "an array of uint16"),
        (SMALL > 3, "an array of bool"),
        (SMALL.astype(object), "an array of object"),
        (SMALL.astype(np.complex64), "an array of complex64"),
        (np.array("a picture"), "an array of shape []"),
        (SMALL[0, 0], "an array of shape [3]"),
        (SMALL.transpose(2, 0, 1), "an array of shape [3, 20, 28]"),
        (SMALL[None], "an array of shape [1, 20, 28, 3]"),
        (SMALL[..., :2], "an array of shape [20, 28, 2]"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, reason: str) -> None:
    assert reason in told(array, UsageError)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 5)), "has 5x0 pixels, expected at least 1x1"),
        (np.zeros((5, 0, 3), np.uint8), "has 0x5 pixels"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "has 20000x20000 pixels, expected at most 100 million"),
        (np.full((2, 2), 1.01), "has floats from 1.01 to 1.01, expected 0 to 1"),
        (np.full((2, 2), -0.01), "has floats from -0.01 to -0.01"),
        (np.array([[0, np.nan]]), "has floats from nan to nan"),
        (np.array([[0, np.inf]]), "has floats from 0 to inf"),
        (SMALL.astype(np.float32), "has floats from 0 to 240, expected 0 to 1: scale or clip them"),
    ],
)
def test_arrays_that_cannot_be_pixels(array: np.ndarray, reason: str) -> None:
    assert reason in told(array)


def test_without_pillow(monkeypatch) -> None:
    class Absent:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name.split(".")[0] == "PIL":
                raise ModuleNotFoundError(name=name)

    monkeypatch.delitem(sys.modules, "PIL")
    monkeypatch.delitem(sys.modules, "PIL.Image")
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    assert told(FILE) == "reading pictures needs PIL: pip install 'edge-gemma[vision]'"
    with pytest.raises(PictureError, match="vision"):
        cut(SMALL, 70)
    assert np.array_equal(read_picture(SMALL), SMALL)
    assert cut(np.zeros((48, 3360, 3), np.uint8), 70).tokens == 70


def test_pillow_s_own_limit_and_warnings(monkeypatch) -> None:
    """They belong to the whole program. The file has 560 pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns
    before = warnings.filters[:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(read_picture(FILE), SMALL)
        assert not caught
        warnings.simplefilter("error")
        assert np.array_equal(read_picture(FILE), SMALL)
    assert warnings.filters == before
    assert Image.MAX_IMAGE_PIXELS == 300
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow refuses
    assert "is too large for Pillow: Image size (560 pixels)" in told(FILE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "20000x20000 pixels" in told(png(20_000, 20_000, 8, 2, b""))


def test_pillow_s_log_does_not_come_on_the_terminal(monkeypatch, capsys) -> None:
    """As in a program that has not set up logging."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("PIL"), "handlers", [])
    file = tiff(2, 1, b"ab").replace(struct.pack("<HHI", 277, 4, 1) + b"\1", struct.pack("<HHI", 277, 4, 1) + b"\x99")
    assert "no picture" in told(file)
    assert capsys.readouterr().err == ""


def test_pillow_without_memory(monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    assert told(FILE) == "the picture needs more memory than there is"


def test_many_threads_at_once() -> None:
    """Some read, some fail, and one decodes at a time."""
    before, results = warnings.filters[:], []

    def work(number: int) -> None:
        for _ in range(30):
            try:
                results.append(np.array_equal(read_picture(FILE if number % 2 else FILE[:-40]), SMALL))
            except PictureError as error:
                results.append("cut short" in str(error) and not number % 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 240
    assert warnings.filters == before
