"""What a file is, told by its first bytes: a sound or a picture.

Owns: the marks of the formats. Does not know: how they are decoded.
"""

from typing import Literal

HEAD = 12  # bytes that are looked at

_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_SOUNDS = (
    b"fLaC",
    b"OggS",
    b"ID3",
    b"caff",
    b".snd",
    b"#!AMR",
    b"wvpk",
    b"MAC ",
    b"\x1a\x45\xdf\xa3",
)  # WebM
_PICTURE_BRANDS = (b"heic", b"heix", b"hevc", b"avif", b"avis", b"mif1", b"msf1")  # of MP4's container


def kind_of(head: bytes) -> Literal["sound", "picture"] | None:
    """Whether a file that begins like this is a sound (or a video) or a picture; None if it is neither."""
    container, form = head[:4], head[8:12]
    if container in (b"RIFF", b"FORM"):
        return "picture" if form == b"WEBP" else "sound" if form in (b"WAVE", b"AVI ", b"AIFF", b"AIFC") else None
    if head[4:8] == b"ftyp":
        return "picture" if form in _PICTURE_BRANDS else "sound"
    if head.startswith(_PICTURES):
        return "picture"
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return "sound" if is_mpeg or head.startswith(_SOUNDS) else None
