"""Tells whether a sound file is cut off: it has fewer bytes than its format says.

Owns: where each format keeps its length (`is_cut`). Does not know: decoding.

Programs that write into a pipe do not know the length when they write the header. Their placeholders count as no
length: zero, or a size just below 2 GiB or above it (SoX: 0x7ffff000 in WAV and 0x7f000000 in AIFF, arecord:
0x80000000, FFmpeg: 0xffffffff).
"""

from collections.abc import Callable
from typing import BinaryIO

_UNKNOWN = 0x7F00_0000  # bytes: a 32-bit size from here on means that the length is not known
_PAGE = 65_307  # bytes: the largest Ogg page
_BOXES = 100_000  # boxes of an MP4 file that are read, at most: a fragment of two seconds has two
_ELEMENTS = 1 << 20  # elements of a live WebM stream that are read, at most: a block is 20 ms or more
_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_FRAMES = 8  # frames at an MP3 file's end that are read
_FRAME = 1_729  # bytes: the largest MP3 frame
# Layer III. kbit/s by the header's index, for version 1 and for versions 2 and 2.5; Hz by its index, for version 1.
_BITRATES = (
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_HERTZ = (44_100, 48_000, 32_000)


def is_cut(format_name: str, file: BinaryIO, size: int) -> bool:
    """True if `file`, of `size` bytes, lacks bytes that it says it has. The file's position stays.

    format_name: FFmpeg's name of the format. Returns False for a format that states no length.
    """
    position, end = file.tell(), _ENDS.get(format_name)
    try:
        return end is not None and end(file, size) > size
    finally:
        file.seek(position)


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _riff_end(file: BinaryIO, size: int) -> int:
    """The end of a RIFF (little-endian) or AIFF FORM (big-endian) chunk: its size counts what follows 8 bytes."""
    head = _at(file, 0, 8)
    promised = int.from_bytes(head[4:8], "big" if head[:4] == b"FORM" else "little")
    return 8 + promised if head[:4] in (b"RIFF", b"FORM") and promised < _UNKNOWN else 0


def _element(file: BinaryIO, at: int) -> tuple[bytes, int, int | None]:
    """An EBML element: its id, where its content begins, and the content's length (None if unknown).

    The number of leading zero bits gives the number of bytes of an id or a length. The id is empty if there is no
    element.
    """
    head = _at(file, at, 12)
    of_id = 9 - head[0].bit_length() if head and head[0] else 9
    first = head[of_id] if len(head) > of_id else 0
    width = 9 - first.bit_length()
    if of_id > 4 or width > 8 or len(head) < of_id + width:
        return b"", at, 0
    most = (1 << 7 * width) - 1
    length = int.from_bytes(head[of_id : of_id + width], "big") & most
    return head[:of_id], at + of_id + width, None if length == most else length


def _matroska_end(file: BinaryIO, size: int) -> int:
    """The end of the Segment after the EBML header; of the last element if the Segment has no size (a live stream)."""
    at = 0
    for expected in (b"\x1a\x45\xdf\xa3", _SEGMENT):
        found, start, length = _element(file, at)
        if found != expected:
            return 0
        at = start if length is None else start + length
    if length is not None:
        return at
    for _ in range(_ELEMENTS):
        found, start, length = _element(file, at)
        if not found or (length is None and found != _CLUSTER):
            break
        at = start if length is None else start + length  # a live cluster's elements follow
    return at


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
    """The end by the byte count of the first frame's Xing or Info header; without one, the end of the last frame."""
    tag, start = _at(file, 0, 10), 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    head = _at(file, start, 64)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    if not head or head[0] != 0xFF:
        return 0
    if at < 0:
        return _last_mp3_frame(file, size)
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    at += 8 + 4 * (flags & 1)  # the number of frames comes first
    return start + int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0


def _last_mp3_frame(file: BinaryIO, size: int) -> int:
    """The end of the last of a chain of frames, 0 if there is none. What follows it (a tag) does not matter."""
    start = max(0, size - _FRAMES * _FRAME)
    tail = _at(file, start, _FRAMES * _FRAME)
    for first in range(min(_FRAME, len(tail))):
        at, frames = first, 0
        while length := _mp3_frame(tail[at : at + 4]):
            at, frames = at + length, frames + 1
        if frames > _FRAMES // 2:
            return start + at
    return 0


def _mp3_frame(header: bytes) -> int:
    """The number of bytes of the frame that begins with this header, 0 if it is no header.

    Source: ISO/IEC 11172-3 2.4.1.3 and 13818-3; version 2.5 as decoders treat it.
    """
    bits = int.from_bytes(header, "big")
    version, layer = bits >> 19 & 3, bits >> 17 & 3  # 3: version 1, 2: 2, 0: 2.5; 1: layer III
    rate, hertz, padding = bits >> 12 & 15, bits >> 10 & 3, bits >> 9 & 1
    if len(header) < 4 or bits >> 21 != 0x7FF or version == 1 or layer != 1 or rate in (0, 15) or hertz == 3:
        return 0
    later = version != 3
    sampled = _HERTZ[hertz] >> {3: 0, 2: 1, 0: 2}[version]
    return (72 if later else 144) * 1000 * _BITRATES[later][rate - 1] // sampled + padding


_ENDS: dict[str, Callable[[BinaryIO, int], int]] = {
    "wav": _riff_end,
    "aiff": _riff_end,
    "matroska,webm": _matroska_end,
    "ogg": _ogg_end,
    "mov,mp4,m4a,3gp,3g2,mj2": _mp4_end,
    "mp3": _mp3_end,
}
