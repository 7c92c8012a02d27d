"""Reads whatever can be given as a picture, as one array of 8-bit RGB (`read_picture`).

Owns: which formats are read (by Pillow), limits, orientation, transparency, depths of more than 8 bits. Does not know:
patches, budgets, models.

Files are untrusted. Formats that run other programs or hold files of other formats are not read. The size that a file
states is checked before memory for its pixels is taken. Colour profiles are ignored, as the reference does.
"""

import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from edge_gemma.audio.samples import Note, silent
from edge_gemma.errors import EdgeGemmaError, PictureError, UsageError
from edge_gemma.host.extras import imported
from edge_gemma.host.sources import Medium, Source, opened

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # pixels; the most that JPEG and GIF can state
_COSTLY = {"WEBP": MAX_PIXELS // 2, "JPEG2000": MAX_PIXELS // 2}  # their decoders take 16 bytes a pixel, others 4 to 8
_SCANS = 100  # of a JPEG, at most: files have about ten, and each takes a pass over the whole picture
MAX_BYTES = 256 << 20  # of a file
# Pillow's names, in the order in which they are tried. Left out: EPS and WMF (run programs), ICNS, IPTC, FPX and MIC
# (hold files of other formats), and formats of scientific data and of single programs.
FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "ICO", "CUR", "JPEG2000", "PPM", "PSD", "DDS", "QOI",
    "SGI", "SUN", "XBM", "XPM", "DCX", "PCX", "TGA",
)  # fmt: skip
_FILE = Medium("the picture", "a PIL image, or an array", PictureError)
_EXPECTED = "expected [h, w] or [h, w, 1, 3 or 4] of uint8, or of floats in [0, 1]"
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of one channel with more than 8 bits
_ONE = ("MPO", "PSD")  # formats whose other pictures are previews and layers of the first
_BAND = 1 << 20  # pixels that are converted at a time
_ORIENTATION = 0x0112  # tags of EXIF and TIFF
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 0x0102, 0x0106, 0x0142, 0x0143
# EXIF's orientations: rows and columns swapped, then the steps through rows and through columns.
_TURNS = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # of JPEG: those with a length, and the end
# One picture at a time: what one may take bounds the memory, and `warnings` has one state for all threads.
_decoder = threading.Lock()
_nowhere = logging.NullHandler()

Picture = Any  # what `read_picture` takes


def read_picture(source: Picture, note: Note = silent) -> np.ndarray:
    """Read a picture. Returns uint8 [height, width, 3], RGB, upright, over white, in memory of its own.

    source: a path, a file's bytes, a file opened in binary mode, a PIL image, or an array: [h, w], [h, w, 1], [h, w, 3]
    or [h, w, 4] of uint8 or of floats in [0, 1]. note is called with what is left out. Raises PictureError for a file
    that cannot be read to its end, for more than MAX_PIXELS and if Pillow is missing, UsageError for anything that is
    no picture.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    pillow = imported("PIL.Image", "reading pictures", "vision", PictureError)
    if isinstance(source, pillow.Image):
        with _decoding(_FILE.name):
            return _from_pillow(source, _FILE.name)
    name, data = _read_bytes(source)
    _check_icons(data, name)
    _check_scans(data, name)
    pillow.init()  # loads Pillow's formats
    with (
        _decoding(name),
        pillow.open(io.BytesIO(data), formats=[word for word in FORMATS if word in pillow.OPEN]) as file,
    ):
        pixels = _from_pillow(file, name)
        several = False
        with suppress(Exception):  # what comes after the first frame may be damaged
            several = file.is_animated and file.format not in _ONE
    if several:
        note(f"{name} holds several pictures: only the first is read")
    return pixels


def _read_bytes(source: Source) -> tuple[str, bytes]:
    """Returns a file's name, for messages, and all of its bytes."""
    found = opened(source, _FILE)
    try:
        if found.size > MAX_BYTES:
            raise PictureError(
                f"{found.name} has {found.size >> 20} MB, expected a picture of at most {MAX_BYTES >> 20} MB"
            )
        return found.name, bytes(found.file.read(MAX_BYTES))
    except OSError as error:
        raise PictureError(f"{found.name}: {error.strerror or error}") from None
    finally:
        found.close()


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Pillow at work: one picture at a time, no warnings, and a PictureError for whatever it raises."""
    try:
        with _decoder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("PIL").addHandler(_nowhere)  # else its errors come on the terminal of a quiet program
            yield
    except EdgeGemmaError:
        raise
    except MemoryError:
        raise PictureError(f"{name} needs more memory than there is") from None
    except Exception as error:  # Pillow raises nearly everything, depending on where a file is damaged
        raise PictureError(_reason(error, name)) from None


def _reason(error: Exception, name: str) -> str:
    kind, told = type(error).__name__, " ".join(str(error).split())[:200]
    if kind == "UnidentifiedImageError":
        known = ", ".join(FORMATS)
        return f"{name} is no picture or its beginning is damaged, expected a picture that Pillow reads: {known}"
    if kind == "DecompressionBombError":  # of the limit that this program has set in Pillow
        return f"{name} is too large for Pillow: {told}"
    return f"{name} is damaged or cut short: {told or kind}"


def _check_size(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} has {width}x{height} pixels, expected at least 1x1")
    if max(width, height) > MAX_SIDE or width * height > most:
        raise PictureError(
            f"{name} has {width}x{height} pixels, expected at most {most // 10**6} million, "
            f"and at most {MAX_SIDE} a side: make it smaller"
        )


def _check_icons(data: bytes, name: str) -> None:
    """Check the sizes in a Windows icon's pictures, which Pillow decodes as it opens the file."""
    if not data.startswith(b"\0\0\1\0"):
        return
    with suppress(struct.error):  # beyond the end: Pillow will refuse it
        for entry in range(struct.unpack_from("<H", data, 4)[0]):
            (start,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
            png = data.startswith(b"\x89PNG", start)
            width, height = struct.unpack_from(">II" if png else "<ii", data, start + (16 if png else 4))
            _check_size(abs(width), abs(height), name)


def _check_scans(data: bytes, name: str) -> None:
    """Check how often a JPEG goes over its pixels: a small file can do it for hours."""
    if not data.startswith(b"\xff\xd8"):
        return
    at, scans = 2, 0
    while (marker := _MARKER.search(data, at)) and marker[0] != b"\xff\xd9":  # the end of the picture
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    if scans > _SCANS:
        raise PictureError(f"{name} is a JPEG of {scans} scans, expected at most {_SCANS}: save it anew")


def _from_pillow(picture: Any, name: str) -> np.ndarray:
    width, height = picture.size
    _check_size(width, height, name, _COSTLY.get(picture.format, MAX_PIXELS))
    tags = getattr(picture, "tag_v2", {})
    if (tags.get(_TILE_WIDTH) or 0) * (tags.get(_TILE_LENGTH) or 0) > MAX_PIXELS:
        raise PictureError(f"{name} has tiles of more than {MAX_PIXELS // 10**6} million pixels: save it without tiles")
    bits, inverted = tags.get(_BITS, (16,)), tags.get(_PHOTOMETRIC) == 0
    picture.load()
    width, height = picture.size  # Pillow turns TIFF's itself
    full = 4095 if bits == (12,) else 65535

    def part(top: int, bottom: int) -> np.ndarray:
        band = picture.crop((0, top, width, bottom))
        if picture.mode not in _DEEP:
            return _from_band(band)
        values = np.asarray(band)
        grey = _from_floats(values, name) if picture.mode == "F" else _from_integers(values, full, name)
        if inverted and picture.mode.startswith("I;16"):
            grey = 255 - grey
        if "transparency" in picture.info:
            grey = np.where(values == picture.info["transparency"], np.uint8(255), grey)
        return grey[..., None]

    return _filled(height, width, part, _turn(picture))


def _turn(picture: Any) -> tuple[bool, int, int]:
    """How a loaded picture has to be turned: what its EXIF data says, if that is readable."""
    with suppress(Exception):  # damaged EXIF data says nothing
        return _TURNS[picture.getexif()[_ORIENTATION]]
    return _TURNS[1]


def _filled(height: int, width: int, part: Callable[[int, int], np.ndarray], turn: tuple[bool, int, int]) -> np.ndarray:
    """The whole picture, converted band by band so that little memory is taken beside it.

    part(top, bottom) gives rows of it as uint8 [bottom - top, width, 1 or 3].
    """
    swapped, rows, columns = turn
    pixels = np.empty((width, height, 3) if swapped else (height, width, 3), np.uint8)
    stored = pixels[::rows, ::columns]  # a view of the pixels in the order of the file
    stored = stored.swapaxes(0, 1) if swapped else stored
    step = max(1, _BAND // width)
    for top in range(0, height, step):
        stored[top : top + step] = part(top, min(top + step, height))
    return pixels


def _from_band(band: Any) -> np.ndarray:
    """Pillow's image of any mode with 8 bits. Returns uint8 [h, w, 3]."""
    if not band.has_transparency_data:
        return np.asarray(band.convert("RGB"))
    key = band.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits; Pillow reads the pixels' upper 8
        band.info["transparency"] = tuple(value >> 8 for value in key)
    if band.mode == "La":
        band = band.convert("LA")
    return _over_white(np.asarray(band.convert("RGBA")))


def _over_white(values: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 4] over white. Returns uint8 [h, w, 3]."""
    alpha = values[..., 3:].astype(np.uint16)
    total = values[..., :3] * alpha + 255 * (255 - alpha) + 128
    return ((total + (total >> 8)) >> 8).astype(np.uint8)  # total / 255, rounded


def _from_integers(values: np.ndarray, full: int, name: str) -> np.ndarray:
    """The upper 8 bits of integers from 0 to `full`, as Pillow takes them of colours with 16 bits."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > full:
        raise PictureError(f"{name} has integers from {low} to {high}, expected 0 to {full}: scale them")
    return (values >> (full.bit_length() - 8)).astype(np.uint8)


def _from_floats(values: np.ndarray, name: str) -> np.ndarray:
    """Floats in [0, 1] as uint8."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # not a number is neither
        raise PictureError(f"{name} has floats from {low:.4g} to {high:.4g}, expected 0 to 1: scale or clip them")
    return np.rint(values * 255).astype(np.uint8)


def _from_array(values: np.ndarray) -> np.ndarray:
    shape, kind = list(values.shape), values.dtype
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise UsageError(f"the picture is an array of shape {shape}, {_EXPECTED}")
    if kind != np.uint8 and kind.kind != "f":
        raise UsageError(f"the picture is an array of {kind}, {_EXPECTED}")
    height, width = shape[:2]
    _check_size(width, height, _FILE.name)

    def part(top: int, bottom: int) -> np.ndarray:
        band = values[top:bottom].reshape(bottom - top, width, -1)
        band = band if kind == np.uint8 else _from_floats(band, _FILE.name)
        return _over_white(band) if band.shape[2] == 4 else band

    return _filled(height, width, part, _TURNS[1])
