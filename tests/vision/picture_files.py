"""Odd picture files, byte by byte or by Pillow: what Pillow writes is not odd enough."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def colours(height: int = 20, width: int = 28) -> np.ndarray:
    """A picture without any symmetry, of few colours: uint8 [height, width, 3]."""
    y, x = np.ogrid[:height, :width]
    red, green, blue = (y * 9 // height) * 25 + 0 * x, (x * 7 // width) * 40 + 0 * y, (x + y > height) * 200
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


SMALL = colours()
GREY = SMALL[..., 0]


def saved(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """A file that Pillow writes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, *, interlaced: int = 0, extra: bytes = b""
) -> bytes:
    """colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA. extra: chunks before the rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return PNG + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows_of(pixels: np.ndarray) -> bytes:
    """The rows of a PNG, unfiltered; 16-bit values big-endian."""
    pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced(pixels: np.ndarray) -> bytes:
    """An interlaced PNG of uint8 [h, w, 3]."""
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [pixels[y::down, x::right] for y, x, down, right in starts]
    return png(
        pixels.shape[1], pixels.shape[0], 8, 2, b"".join(rows_of(part) for part in passes if part.size), interlaced=1
    )


def tiff(width: int, height: int, data: bytes, bits: int = 8, photometric: int = 1, **more: int) -> bytes:
    """A TIFF of one channel in one strip, or one tile where `more` has the tags tile_width and tile_length."""
    tiled = "tile_width" in more
    tags = {256: width, 257: height, 258: bits, 259: more.get("compression", 1), 262: photometric, 277: 1}
    tags |= {322: more["tile_width"], 323: more["tile_length"], 324: 8, 325: len(data)} if tiled else {}
    tags |= {} if tiled else {273: 8, 278: height, 279: len(data)}
    tags |= {339: more["sample"]} if "sample" in more else {}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def bmp(width: int, height: int, data: bytes, bits: int = 24, compression: int = 0) -> bytes:
    """A BMP; of 8 bits, with a palette of greys."""
    palette = b"".join(bytes([v, v, v, 0]) for v in range(256)) if bits == 8 else b""
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def icon(pictures: list[bytes], sides: list[int]) -> bytes:
    """A Windows icon of PNG files."""
    start = 6 + 16 * len(pictures)
    entries = b""
    for side, picture in zip(sides, pictures, strict=True):
        entries += struct.pack("<BBBBHHII", side % 256, side % 256, 0, 0, 1, 32, len(picture), start)
        start += len(picture)
    return struct.pack("<HHH", 0, 1, len(pictures)) + entries + b"".join(pictures)


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    """A GIF of two colours whose first frame has another size than it says, and one pixel."""
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return start + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp_header(width: int, height: int) -> bytes:
    """The beginning of an extended WebP."""
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + canvas + b"VP8 " + struct.pack("<I", 4) + b"\0" * 4
    return b"RIFF" + struct.pack("<I", len(body)) + body


def psd(pixels: np.ndarray, says: tuple[int, int] | None = None) -> bytes:
    """A Photoshop file without layers. says: the (height, width) in its header, if they are not the pixels'."""
    height, width = says or pixels.shape[:2]
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3)
    return header + b"\0" * 12 + b"\0\0" + pixels.transpose(2, 0, 1).tobytes()


def scanned(times: int) -> bytes:
    """A progressive JPEG whose last scan comes that many times more."""
    file = saved(SMALL, "JPEG", progressive=True)
    start, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    return file[:end] + file[start:end] * times + file[end:]


def damaged(file: bytes, at: int) -> bytes:
    """The file with one byte changed."""
    return file[:at] + bytes([file[at] ^ 0xFF]) + file[at + 1 :]
