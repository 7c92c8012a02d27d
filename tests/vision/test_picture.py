"""Pictures as they come: odd ones are read exactly, hostile ones are refused with a line, nothing is left open."""

import warnings
import zlib

import numpy as np
import pytest

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.measure.memory import resident
from edge_gemma.vision import picture
from edge_gemma.vision.picture import read_picture
from tests.open_files import open_below

Image = pytest.importorskip("PIL.Image", reason="the vision extra is not installed")

from tests.vision.picture_files import (  # noqa: E402  (after the skip without Pillow)
    GREY,
    SMALL,
    bmp,
    chunk,
    colours,
    damaged,
    gif,
    icon,
    interlaced,
    png,
    psd,
    rows_of,
    saved,
    scanned,
    tiff,
    webp_header,
)

Image.init()
HEIGHT, WIDTH = GREY.shape
IMAGE = Image.fromarray(SMALL)
SMOOTH = np.broadcast_to(np.linspace(40, 200, WIDTH).astype(np.uint8)[:, None], SMALL.shape)
GREYS = np.repeat(GREY[..., None], 3, axis=2)
BLACK_AND_WHITE = np.where(SMALL[..., 2:] > 0, np.uint8(255), np.uint8(0)).repeat(3, axis=2)
BITS = Image.fromarray(BLACK_AND_WHITE).convert("1")
WIDE = GREY.astype(np.uint16) * 257  # 8 bits as 16
REVERSED = np.ascontiguousarray(SMALL[::-1])


def told(source) -> str:
    """The error for a source that cannot be read: one line."""
    with pytest.raises(EdgeGemmaError) as caught:
        read_picture(source)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def over_white(rgba: np.ndarray) -> np.ndarray:
    """By floats: uint8 [h, w, 4] to [h, w, 3]."""
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


RGBA = np.concatenate([SMALL, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1) % 256], axis=2).astype(np.uint8)
GREY_ALPHA = RGBA[..., [0, 3]]
PALETTE = IMAGE.quantize(64)
INDICES = np.asarray(PALETTE)
COLOURS = np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)
ALPHAS = bytes(range(0, 256, 4))[: len(COLOURS)]
WITH_ALPHAS = over_white(np.concatenate([COLOURS, np.frombuffer(ALPHAS, np.uint8)[:, None]], axis=1)[INDICES])
ONE_CLEAR = np.where((INDICES == 3)[..., None], 255, COLOURS[INDICES])
FIRST = GREY[0, 0]
FIRST_CLEAR = np.where(GREYS == FIRST, 255, GREYS)
CYAN_CLEAR = np.where((SMALL == (0, 240, 200)).all(axis=2, keepdims=True), 255, SMALL)
TRANSPARENT_CYAN = chunk(b"tRNS", b"\0\x3f\xf0\x3f\xc8\x3f")

EXACT = {
    "png": (saved(SMALL, "PNG"), SMALL),
    "png, interlaced": (interlaced(SMALL), SMALL),
    "png, grey": (saved(GREY, "PNG"), GREYS),
    "png, 1 bit": (saved(BITS, "PNG"), BLACK_AND_WHITE),
    "png, 16 bits, grey": (saved(WIDE, "PNG"), GREYS),
    "png, 16 bits": (png(WIDTH, HEIGHT, 16, 2, rows_of(SMALL.astype(np.uint16) * 257)), SMALL),
    "png, 16 bits, alpha": (png(WIDTH, HEIGHT, 16, 6, rows_of(RGBA.astype(np.uint16) * 257)), over_white(RGBA)),
    "png, 16 bits, grey, one transparent": (
        png(WIDTH, HEIGHT, 16, 0, rows_of(WIDE), extra=chunk(b"tRNS", bytes([FIRST, FIRST]))),
        FIRST_CLEAR,
    ),
    "png, 16 bits, one transparent": (
        png(WIDTH, HEIGHT, 16, 2, rows_of(SMALL.astype(np.uint16) * 256 + 0x3F), extra=TRANSPARENT_CYAN),
        CYAN_CLEAR,
    ),
    "png, alpha": (saved(RGBA, "PNG"), over_white(RGBA)),
    "png, grey, alpha": (saved(GREY_ALPHA, "PNG"), over_white(GREY_ALPHA[..., [0, 0, 0, 1]])),
    "png, grey, one transparent": (saved(GREY, "PNG", transparency=int(FIRST)), FIRST_CLEAR),
    "png, one transparent": (saved(SMALL, "PNG", transparency=(0, 240, 200)), CYAN_CLEAR),
    "png, palette": (saved(PALETTE, "PNG"), COLOURS[INDICES]),
    "png, palette with alphas": (saved(PALETTE, "PNG", transparency=ALPHAS), WITH_ALPHAS),
    "png, palette, one transparent": (saved(PALETTE, "PNG", transparency=3), ONE_CLEAR),
    "png, without its end": (saved(SMALL, "PNG")[:-12], SMALL),
    "png, a chunk of text": (png(WIDTH, HEIGHT, 8, 2, rows_of(SMALL), extra=chunk(b"tEXt", b"a\0b")), SMALL),
    "png, damaged EXIF": (png(WIDTH, HEIGHT, 8, 2, rows_of(SMALL), extra=chunk(b"eXIf", b"II*\0\xff\xff")), SMALL),
    "gif": (saved(PALETTE, "GIF"), COLOURS[INDICES]),
    "gif, one transparent": (saved(PALETTE, "GIF", transparency=3), ONE_CLEAR),
    "webp": (saved(SMALL, "WEBP", lossless=True), SMALL),
    "webp, alpha": (saved(RGBA, "WEBP", lossless=True, exact=True), over_white(RGBA)),
    "bmp": (saved(SMALL, "BMP"), SMALL),
    "bmp, top first": (bmp(WIDTH, -HEIGHT, SMALL[..., ::-1].tobytes()), SMALL),
    "bmp, palette": (saved(PALETTE, "BMP"), COLOURS[INDICES]),
    "bmp, 1 bit": (saved(BITS, "BMP"), BLACK_AND_WHITE),
    "bmp, run lengths": (
        bmp(4, 2, bytes([3, 7, 1, 9, 0, 0, 0, 4, 1, 2, 3, 4, 0, 1]), 8, 1),
        np.array([[1, 2, 3, 4], [7, 7, 7, 9]], np.uint8)[..., None].repeat(3, 2),
    ),
    "tiff": (saved(SMALL, "TIFF"), SMALL),
    "tiff, lzw": (saved(SMALL, "TIFF", compression="tiff_lzw"), SMALL),
    "tiff, deflate": (saved(SMALL, "TIFF", compression="tiff_adobe_deflate"), SMALL),
    "tiff, packbits": (saved(SMALL, "TIFF", compression="packbits"), SMALL),
    "tiff, fax": (saved(BITS, "TIFF", compression="group4"), BLACK_AND_WHITE),
    "tiff, alpha": (saved(RGBA, "TIFF"), over_white(RGBA)),
    "tiff, 16 bits": (tiff(WIDTH, HEIGHT, WIDE.astype("<u2").tobytes(), 16), GREYS),
    "tiff, 16 bits, white is 0": (tiff(WIDTH, HEIGHT, (65535 - WIDE).astype("<u2").tobytes(), 16, 0), GREYS),
    "tiff, 8 bits, white is 0": (tiff(WIDTH, HEIGHT, (255 - GREY).tobytes(), 8, 0), GREYS),
    "tiff, 12 bits": (tiff(2, 1, b"\xff\xf8\x0f", 12), np.array([[[255] * 3, [128] * 3]], np.uint8)),
    "tiff, floats": (tiff(WIDTH, HEIGHT, (GREY / 255).astype("<f4").tobytes(), 32, sample=3), GREYS),
    "tiff, 32 bits": (tiff(WIDTH, HEIGHT, WIDE.astype("<i4").tobytes(), 32, sample=2), GREYS),
    "tiff, tiles": (
        tiff(16, 16, GREY[:16, :16].tobytes(), tile_width=16, tile_length=16),
        GREYS[:16, :16],
    ),
    "jpeg2000": (saved(SMALL, "JPEG2000"), SMALL),
    "ppm": (saved(SMALL, "PPM"), SMALL),
    "pgm, 16 bits": (b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + WIDE.astype(">u2").tobytes(), GREYS),
    "pbm, as text": (b"P1\n# a comment\n2 1\n0 1\n", np.array([[[255] * 3, [0] * 3]], np.uint8)),
    "tga": (saved(SMALL, "TGA"), SMALL),
    "tga, run lengths, alpha": (saved(RGBA, "TGA", compression="tga_rle"), over_white(RGBA)),
    "pcx": (saved(SMALL, "PCX"), SMALL),
    "sgi": (saved(SMALL, "SGI"), SMALL),
    "dds": (saved(SMALL, "DDS"), SMALL),
    "xbm": (saved(BITS, "XBM"), BLACK_AND_WHITE),
    "psd": (psd(SMALL), SMALL),
    "ico, png": (icon([saved(SMALL[:16, :16], "PNG"), saved(SMALL, "PNG")], [16, 28]), SMALL),
    "ico, bmp": (saved(colours(32, 32), "ICO", bitmap_format="bmp", sizes=[(32, 32)]), colours(32, 32)),
    "one row": (saved(SMALL[:1], "PNG"), SMALL[:1]),
    "one column": (saved(SMALL[:, :1], "BMP"), SMALL[:, :1]),
    "a long row": (saved(np.tile(SMALL[:1], (1, 2000, 1)), "PNG"), np.tile(SMALL[:1], (1, 2000, 1))),
}


@pytest.mark.parametrize("name", EXACT)
def test_files_are_read_exactly(name: str) -> None:
    file, expected = EXACT[name]
    notes: list[str] = []
    pixels = read_picture(file, notes.append)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(pixels, expected)
    assert not notes


INK = np.stack([SMOOTH[..., 0], 255 - SMOOTH[..., 0], SMOOTH[..., 0] // 2, SMOOTH[..., 0] // 4], axis=-1)
UNDER_INK = np.rint((255.0 - INK[..., :3]) * (255.0 - INK[..., 3:]) / 255).astype(np.uint8)
LOSSY = {
    "jpeg": (saved(SMOOTH, "JPEG", quality=98, subsampling=0), SMOOTH),
    "jpeg, subsampled": (saved(SMOOTH, "JPEG", quality=98), SMOOTH),
    "jpeg, progressive": (saved(SMOOTH, "JPEG", quality=98, progressive=True), SMOOTH),
    "jpeg, grey": (saved(SMOOTH[..., 0], "JPEG", quality=98), SMOOTH),
    "jpeg, cmyk": (saved(Image.fromarray(INK, mode="CMYK"), "JPEG", quality=98), UNDER_INK),
    "tiff, cmyk": (saved(Image.fromarray(INK, mode="CMYK"), "TIFF"), UNDER_INK),
    "tiff, jpeg": (saved(SMOOTH, "TIFF", compression="jpeg", quality=98), SMOOTH),
    "tiff, lab": (saved(Image.new("LAB", (9, 9), (255, 128, 128)), "TIFF"), np.full((9, 9, 3), 255)),
    "webp": (saved(SMOOTH, "WEBP", quality=98), SMOOTH),
    "mpo": (saved(SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(SMALL)], quality=98), SMOOTH),
}


if "AVIF" in Image.SAVE:  # Pillow 11.3 or later, built with it
    LOSSY["avif"] = (saved(SMOOTH, "AVIF", quality=98), SMOOTH)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_files_are_read_nearly(name: str) -> None:
    """A wrong channel, an inverted one or another picture of the file is off by far more."""
    file, expected = LOSSY[name]
    notes: list[str] = []
    assert np.abs(read_picture(file, notes.append).astype(int) - expected).max() <= 4
    assert not notes


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", *(["AVIF"] if "AVIF" in Image.SAVE else [])])
def test_of_several_pictures_the_first_is_read_and_it_is_told(kind: str) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "AVIF" else {}
    first = Image.fromarray(SMOOTH).quantize(64) if kind == "GIF" else Image.fromarray(SMOOTH)
    file = saved(
        first, kind, save_all=True, append_images=[Image.fromarray(SMALL), Image.fromarray(REVERSED)], **options
    )
    notes: list[str] = []
    pixels = read_picture(file, notes.append)
    assert np.abs(pixels.astype(int) - np.asarray(first.convert("RGB"))).max() <= (4 if kind == "AVIF" else 0)
    assert notes == ["the picture holds several pictures: only the first is read"]


def test_damage_after_the_first_picture_does_not_matter() -> None:
    file = saved(PALETTE, "GIF", save_all=True, append_images=[Image.fromarray(REVERSED).quantize(16)])
    first = file.index(b"\0\x21\xf9", len(saved(PALETTE, "GIF")) - 20)  # its end
    for end in range(first + 1, len(file)):
        assert np.array_equal(read_picture(file[:end]), COLOURS[INDICES]), end


# Where row 0 and column 0 of the file are when the picture is seen: the EXIF standard, tag 274.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def seen(stored: np.ndarray, orientation: int) -> np.ndarray:
    row_side, column_side = SIDES[orientation]
    seen = stored if row_side in ("top", "bottom") else stored.transpose(1, 0, 2)
    seen = seen[::-1] if "bottom" in (row_side, column_side) else seen
    return seen[:, ::-1] if "right" in (row_side, column_side) else seen


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 65535])
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = SMOOTH if kind == "JPEG" else SMALL
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    pixels = read_picture(saved(np.ascontiguousarray(stored), kind, exif=exif, **options))
    expected = seen(stored, orientation if orientation in SIDES else 1)
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


def test_turning_works_across_bands(monkeypatch) -> None:
    exif = Image.Exif()
    exif[274] = 7
    monkeypatch.setattr(picture, "_BAND", 3 * WIDTH)
    assert np.array_equal(read_picture(saved(SMALL, "PNG", exif=exif)), seen(SMALL, 7))
    assert np.array_equal(read_picture(RGBA), over_white(RGBA))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n"
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5 << 20)))
NO_PICTURE = "is no picture or its beginning is damaged, expected a picture that Pillow reads: PNG, JPEG, GIF"
DAMAGED = "is damaged or cut short"
TOO_LARGE = "expected at most 100 million, and at most 65535 a side"
REFUSED = {
    "svg": (SVG, NO_PICTURE),
    "svg with a declaration": (b'<?xml version="1.0"?>' + SVG, NO_PICTURE),
    "eps": (EPS, NO_PICTURE),
    "eps with a preview": (b"\xc5\xd0\xd3\xc6" + bytes(28) + EPS, NO_PICTURE),
    "wmf": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(60), NO_PICTURE),
    "icns": (b"icns\0\0\0\x40ic07\0\0\0\x38" + saved(SMALL, "PNG")[:48], NO_PICTURE),
    "iptc": (b"\x1c\x03\x0a\0\x01\x01" * 9, NO_PICTURE),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", NO_PICTURE),
    "mpeg": (b"\0\0\1\xb3\x16\0\xf0\x13" + bytes(40), NO_PICTURE),
    "heif": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", NO_PICTURE),
    "text": (b"This is not a picture.\n", NO_PICTURE),
    "html": (b"<!doctype html><title>404</title>", NO_PICTURE),
    "zeros": (bytes(5000), NO_PICTURE),
    "noise": (np.random.default_rng(0).bytes(5000), NO_PICTURE),
    "one byte": (b"\x89", NO_PICTURE),
    "nothing": (b"", "is empty"),
    "png, header only": (saved(SMALL, "PNG")[:20], DAMAGED),
    "png, cut": (saved(SMALL, "PNG")[:-40], DAMAGED),
    "png, wrong checksum in the header": (damaged(saved(SMALL, "PNG"), 30), NO_PICTURE),
    "png, wrong data": (damaged(saved(SMALL, "PNG"), len(saved(SMALL, "PNG")) - 18), DAMAGED),
    "png, text of 5 MB in 5 kB": (png(WIDTH, HEIGHT, 8, 2, rows_of(SMALL), extra=TEXT_BOMB), DAMAGED),
    "png, 0x0": (png(0, 0, 8, 2, b""), NO_PICTURE),
    "png, 0 wide": (png(0, 5, 8, 2, b"\0" * 5), NO_PICTURE),
    "png, 20000x20000": (png(20_000, 20_000, 8, 2, b""), "is too large for Pillow"),
    "png, 10001x10000": (png(10_001, 10_000, 8, 2, b""), TOO_LARGE),
    "png, 70000x1": (png(70_000, 1, 8, 2, b"\0" * 210_001), TOO_LARGE),
    "jpeg, cut": (saved(SMOOTH, "JPEG")[:-30], DAMAGED),
    "jpeg, 210 scans": (scanned(200), "a JPEG of 210 scans, expected at most 100"),
    "gif, cut": (saved(PALETTE, "GIF")[:-90], DAMAGED),
    "gif, 60000x60000": (gif(60_000, 60_000, (1, 1)), "is too large for Pillow"),
    "gif, 0x0": (gif(0, 0, (0, 0)), NO_PICTURE),
    "gif, a frame of 12000x12000": (gif(1, 1, (12_000, 12_000)), TOO_LARGE),
    "webp, cut": (saved(SMALL, "WEBP")[:-40], DAMAGED),
    "webp, 16000x16000": (webp_header(16_000, 16_000), "it.jpg is "),  # too large; for older Pillows, damaged
    "bmp, cut": (saved(SMALL, "BMP")[:-40], DAMAGED),
    "bmp, 11000x11000": (bmp(11_000, 11_000, b""), TOO_LARGE),
    "bmp, 0x0": (bmp(0, 0, b""), NO_PICTURE),
    "bmp, empty rows of 100 million": (bmp(100_000_000, 1, b"\0\2\0\xff" * 9, 8, 1), TOO_LARGE),
    "tiff, cut": (saved(SMALL, "TIFF")[:-40], DAMAGED),
    "tiff, tiles of 20000x20000": (
        tiff(16, 16, bytes(64), tile_width=20_000, tile_length=20_000, compression=8),
        "tiles of more than 100 million pixels",
    ),
    "tiff, floats up to 255": (
        tiff(2, 1, np.array([0, 255], "<f4").tobytes(), 32, sample=3),
        "floats from 0 to 255, expected 0 to 1",
    ),
    "tiff, not a number": (tiff(2, 1, np.array([0, np.nan], "<f4").tobytes(), 32, sample=3), "floats from nan"),
    "tiff, integers below 0": (
        tiff(2, 1, np.array([-1, 70_000], "<i4").tobytes(), 32, sample=2),
        "integers from -1 to 70000, expected 0 to 65535",
    ),
    "ico, cut": (icon([saved(SMALL, "PNG")], [28])[:-60], DAMAGED),
    "ico, 12000x12000 inside": (icon([saved(SMALL, "PNG"), png(12_000, 12_000, 8, 2, b"")], [28, 99]), TOO_LARGE),
    "ico, of nothing": (b"\0\0\1\0\0\0", NO_PICTURE),
    "jpeg2000, cut": (saved(SMALL, "JPEG2000")[:60], DAMAGED),
    "psd, 30000x30000": (psd(np.zeros((1, 1, 3), np.uint8), (30_000, 30_000)), "is too large for Pillow"),
    "ppm, 0 high": (b"P6 5 0 255\n", NO_PICTURE),
    "ppm, cut": (saved(SMALL, "PPM")[:-9], DAMAGED),
}


if "AVIF" in Image.SAVE:
    REFUSED["avif, cut"] = (saved(SMOOTH, "AVIF")[:-40], DAMAGED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path, capfd) -> None:
    """From a file, so that one left open is seen; without warnings and without a word on the terminal."""
    data, reason = REFUSED[name]
    (tmp_path / "it.jpg").write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = resident()
        assert reason in told(tmp_path / "it.jpg")
        assert resident() - before < 250 << 20
    assert not caught
    assert not open_below(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_what_is_made_transparent_is_in_the_pictures() -> None:
    for clear, whole in ((CYAN_CLEAR, SMALL), (FIRST_CLEAR, GREYS), (ONE_CLEAR, COLOURS[INDICES])):
        assert (clear != whole).any()


def test_at_least_sixty_odd_and_hostile_files() -> None:
    assert len(EXACT) + len(LOSSY) + len(REFUSED) >= 60
