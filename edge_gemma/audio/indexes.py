"""Tells whether an MP4 file's index would fill the memory: a few bytes of it can state millions of samples.

Owns: where such files keep their numbers of samples, how many are believed (`check_index`). Does not know: decoding.

FFmpeg makes an entry of about 35 bytes for each sample that is stated, before it reads any. Boxes are found here by
their names, not by their places: a file that hides one from this would have to hide it from FFmpeg.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

from edge_gemma.errors import AudioError

# Types of the box that an MP4 or QuickTime file begins with. What begins otherwise is not to be read as one.
_FIRST = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"sidx", b"moof", b"uuid", b"junk")
_DATA = (b"mdat", b"skip", b"wide")  # boxes without an index in them; FFmpeg may look for one in "free"
_ENTRIES = 8 << 20  # of all tracks: a day of sound beside a day of video
_INDEX_BYTES = 128 << 20
_BOXES = 1 << 20  # at the top: a fragment of two seconds has two
_SHORT = 160  # samples of one tick, as PCM has them: so many share an entry, or more
_TICKS = re.compile(rb"stts....\0\0\0\x01....\0\0\0\x01", re.DOTALL)


def is_mp4(head: bytes) -> bool:
    """Whether a file that begins like this, with 8 bytes or more, can be MP4 or QuickTime."""
    return head[4:8] in _FIRST


def check_index(file: BinaryIO, size: int) -> None:
    """Raises AudioError for an MP4 file that states more samples than any recording has. The position changes."""
    entries, has_fragments = 0, False
    for start, end in _boxes(file, size):
        if end - start > _INDEX_BYTES:
            raise AudioError(f"a part of its index has {end - start} bytes, expected {_INDEX_BYTES} at most")
        file.seek(start)
        data = file.read(end - start)
        if re.search(b"cmov....dcom", data, re.DOTALL):
            raise AudioError("its index is compressed, which is not read: save it again with another program")
        has_fragments = has_fragments or b"tfhd" in data
        entries += sum(map(_of_track, _tracks(data))) + (sum(_numbers(data, b"trun", 4)) if has_fragments else 0)
        if entries > _ENTRIES:
            raise AudioError(f"its index states {entries} samples, expected {_ENTRIES} at most")


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """The boxes at the top that may hold an index: where each begins and ends."""
    at = 0
    for _ in range(_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\x01" else head[:4], "big")
        end = min(size, at + length) if length >= 8 else size  # 0: up to the file's end
        if head[4:8] not in _DATA:
            yield at, end
        at = end
    raise AudioError(f"it has more than {_BOXES} boxes")


def _tracks(data: bytes) -> Iterator[bytes]:
    """The tracks' bytes. Those that overlap, which no honest ones do, count as one."""
    start = end = 0
    for found in re.finditer(b"trak", data):
        at = found.start() - 4
        length = int.from_bytes(data[max(0, at) : at + 4], "big")
        if at >= end:
            yield data[start:end]
            start = at
        end = max(end, at + length if length >= 8 else len(data))
    yield data[start:end]


def _of_track(track: bytes) -> int:
    """Entries that are made for a track."""
    samples = sum(_numbers(track, b"stsz|stz2", 8))
    times = track.count(b"stts")
    if times and times == len(_TICKS.findall(track)):
        samples //= _SHORT
    edits = sum(min(number, len(track) // 12) for number in _numbers(track, b"elst", 4))
    return samples * max(1, edits - 1)


def _numbers(data: bytes, kinds: bytes, offset: int) -> Iterator[int]:
    """The numbers that stand so many bytes behind the names of boxes."""
    for found in re.finditer(kinds, data):
        at = found.end() + offset
        yield int.from_bytes(data[at : at + 4], "big")
