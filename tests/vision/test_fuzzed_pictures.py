"""12,000 damaged files: each is a picture or a PictureError, and nothing is left open."""

import gc
import os
import random
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from edge_gemma.errors import PictureError
from edge_gemma.vision import picture
from edge_gemma.vision.picture import read_picture

pytest.importorskip("PIL.Image", reason="the vision extra is not installed")

from PIL import Image

from tests.vision.picture_files import SMALL, icon, saved

EXIF = Image.Exif()
EXIF[274] = 6
EXIF[0x9286] = "a comment"
ANIMATED = {"save_all": True, "append_images": [Image.fromarray(SMALL[::-1].copy())]}
FILES = {
    "PNG": [
        saved(SMALL, "PNG", exif=EXIF),
        saved(SMALL, "PNG", **ANIMATED),
        saved(SMALL[..., 0], "PNG", transparency=9),
    ],
    "JPEG": [saved(SMALL, "JPEG", exif=EXIF), saved(SMALL, "JPEG", progressive=True), saved(SMALL, "MPO", **ANIMATED)],
    "GIF": [saved(SMALL, "GIF"), saved(Image.fromarray(SMALL).quantize(32), "GIF", **ANIMATED, transparency=3)],
    "WEBP": [saved(SMALL, "WEBP", exif=EXIF), saved(SMALL, "WEBP", lossless=True), saved(SMALL, "WEBP", **ANIMATED)],
    "TIFF": [saved(SMALL, "TIFF", compression="tiff_lzw", exif=EXIF), saved(SMALL, "TIFF")],
    "others": [saved(SMALL, "BMP"), icon([saved(SMALL, "PNG")], [28]), saved(SMALL, "TGA"), saved(SMALL, "JPEG2000")],
}
HEADER = 64  # bytes in which most changes are


def mutated(file: bytes, rng: random.Random) -> bytes:
    """A file with up to eight bytes changed, most of them in its header, sometimes cut or lengthened."""
    data = bytearray(file)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(min(HEADER, len(data)) if rng.random() < 0.8 else len(data))
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.2:
        at = rng.randrange(len(data))
        data[at:] = data[at + rng.randint(0, 9) :] if rng.random() < 0.5 else b""
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:  # else nearly all end at the header's checksum
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path, monkeypatch, capfd) -> None:
    """With a limit that leaves the time to files that are decoded."""
    monkeypatch.setattr(picture, "MAX_PIXELS", 300_000)
    rng, path = random.Random(kind), tmp_path / "picture"
    count = 2500 if kind in ("PNG", "JPEG", "GIF", "WEBP") else 1000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
        before = descriptors()
        read = 0
        for number in range(count):
            data = mutated(rng.choice(FILES[kind]), rng)
            path.write_bytes(data)
            with suppress(PictureError):
                pixels = read_picture(path if number % 2 else data)
                read += 1
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3
                assert pixels.size
        gc.collect()
        assert descriptors() == before
    assert not caught
    written = capfd.readouterr()
    assert not written.out
    assert not written.err or kind == "TIFF"  # libtiff's own, which cannot be turned off
    assert 50 < read < count - 200  # damage that is passed over, damage that is not
