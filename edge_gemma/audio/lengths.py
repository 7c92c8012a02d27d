"""Is a sound file shorter than it says? By its bytes alone, where its format says how many there are.

Owns: where each format keeps its length (`is_cut`). Does not know: decoding.

Programs that write into a pipe do not know the length when they write the header. What they put there instead is
taken as no length: zero, or a size just below 2 GiB or above it (SoX: 0x7ffff000 in WAV and 0x7f000000 in AIFF,
arecord: 0x80000000, FFmpeg: 0xffffffff).
"""

from collections.abc import Callable
from typing import BinaryIO

_UNKNOWN = 0x7F00_0000  # bytes; sizes from here on in a header of 32 bits
_PAGE = 65_307  # bytes of an Ogg page at most
_BOXES = 100_000  # of an MP4 file looked at: a fragment of two seconds has two


def is_cut(format_name: str, file: BinaryIO, size: int) -> bool:
    """True if `file`, of `size` bytes, lacks bytes that it says it has. format_name: FFmpeg's. Its position stays."""
    position, end = file.tell(), _ENDS.get(format_name)
    try:
        return end is not None and end(file, size) > size
    finally:
        file.seek(position)


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _riff_end(file: BinaryIO, size: int) -> int:
    """RIFF (little-endian) and AIFF's FORM (big-endian): the size of all that follows the first 8 bytes."""
    head = _at(file, 0, 8)
    promised = int.from_bytes(head[4:8], "big" if head[:4] == b"FORM" else "little")
    return 8 + promised if head[:4] in (b"RIFF", b"FORM") and promised < _UNKNOWN else 0


def _matroska_end(file: BinaryIO, size: int) -> int:
    """The EBML header and the one Segment after it; a live stream's has no size."""
    end = 0
    for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        head = _at(file, end, 12)
        width = 9 - head[4].bit_length() if len(head) > 4 and head[4] else 9  # the leading zeros say how many bytes
        if head[:4] != element or width > 8:
            return 0
        value = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if value == (1 << 7 * width) - 1:
            return 0
        end += 4 + width + value
    return end


def _ogg_end(file: BinaryIO, size: int) -> int:
    """The end of the last page."""
    start = max(0, size - _PAGE)
    tail = _at(file, start, _PAGE)
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0
    head = tail[page : page + 27 + 255]
    segments = head[26] if len(head) > 26 else 255
    return start + page + 27 + segments + sum(head[27 : 27 + segments])


def _mp4_end(file: BinaryIO, size: int) -> int:
    """The end of the last box."""
    end = 0
    for _ in range(_BOXES):
        head = _at(file, end, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if len(head) < 8 or length < 8:  # 0: up to the file's end
            break
        end += length
    return end


def _mp3_end(file: BinaryIO, size: int) -> int:
    """The bytes that the first frame's Xing or Info header counts, from that frame on."""
    tag, start = _at(file, 0, 10), 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    head = _at(file, start, 64)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    if at < 0 or head[0] != 0xFF:
        return 0
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    at += 8 + 4 * (flags & 1)  # the number of frames comes first
    return start + int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0


_ENDS: dict[str, Callable[[BinaryIO, int], int]] = {
    "wav": _riff_end,
    "aiff": _riff_end,
    "matroska,webm": _matroska_end,
    "ogg": _ogg_end,
    "mov,mp4,m4a,3gp,3g2,mj2": _mp4_end,
    "mp3": _mp3_end,
}
