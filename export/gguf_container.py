"""The GGUF container: metadata and the tensor table of one file.

Owns: parsing versions 2 and 3 (little endian) with every length checked against the file before it is used. Does not
know: architectures, tensor names, what any metadata key means.

Layout: "GGUF", u32 version, u64 tensor count, u64 key count; per key: string, u32 type, value; per tensor: string name,
u32 dimensions, u64 sizes (fastest first), u32 type, u64 offset; padding to `general.alignment`; data.
A string is u64 length and UTF-8; an array is u32 type, u64 count, values. Source: ggml/docs/gguf.md.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.errors import CheckpointError
from edge_gemma.export.gguf_types import GGUF_TYPES, UNREAD_TYPES
from edge_gemma.export.source_file import SourceFile, StoredTensor, show

_MAX_HEADER = 128 << 20  # metadata and tensor table; Gemma 4's is 16 MB
_MAX_TENSORS = 1 << 20
_MAX_KEYS = 1 << 16
_FIRST_READ = 4 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type id -> (struct letter, NumPy type).
_SCALARS = {
    0: ("B", "<u1"), 1: ("b", "<i1"), 2: ("H", "<u2"), 3: ("h", "<i2"), 4: ("I", "<u4"), 5: ("i", "<i4"),
    6: ("f", "<f4"), 7: ("B", "<u1"), 10: ("Q", "<u8"), 11: ("q", "<i8"), 12: ("d", "<f8"),
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Cursor:
    """Reads forward through the header, fetching more of the file as it is needed."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._limit = min(file.size, _MAX_HEADER)
        self._buffer = file.read(0, min(_FIRST_READ, self._limit))
        self.at = 0

    def _need(self, length: int) -> None:
        """Makes `length` bytes from `at` available."""
        end = self.at + length
        if end <= len(self._buffer):
            return
        if end > self._limit:
            raise CheckpointError(
                f"{self._file.name} is truncated or damaged: its header needs {length} bytes at {self.at}, "
                f"the file has {self._file.size}"
            )
        want = min(max(end, 2 * len(self._buffer)), self._limit)
        self._buffer += self._file.read(len(self._buffer), want - len(self._buffer))

    def scalar(self, letter: str) -> Any:
        form = struct.Struct("<" + letter)
        self._need(form.size)
        (value,) = form.unpack_from(self._buffer, self.at)
        self.at += form.size
        return value

    def string(self, what: str) -> str:
        length = self.scalar("Q")
        self._need(length)
        data = self._buffer[self.at : self.at + length]
        self.at += length
        return _decode(data, f"{self._file.name}: {what}")

    def skip(self, length: int) -> None:
        self._need(length)
        self.at += length

    def skip_strings(self, count: int) -> None:
        """Moves past `count` strings, checking each length."""
        self._need(8 * count)  # the least they can take: a huge claimed count ends here
        for _ in range(count):
            if self.at + 8 > len(self._buffer):
                self._need(8)
            (length,) = _U64.unpack_from(self._buffer, self.at)
            self.at += 8 + length
            if self.at > len(self._buffer):
                self.at -= length
                self._need(length)
                self.at += length


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{what} is not UTF-8") from e


class _ArrayRange:
    """Where an array's values are in the file; read when asked for."""

    def __init__(self, kind: int, count: int, offset: int, length: int) -> None:
        self.kind, self.count, self.offset, self.length = kind, count, offset, length


class Metadata(Mapping[str, Any]):
    """Key -> int, float, bool or str. Arrays are read from the file at each access: list[str], list[bool], or a NumPy
    array of the stored type."""

    def __init__(self, file: SourceFile, values: dict[str, Any]) -> None:
        self._file, self._values = file, values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, _ArrayRange):
            return value
        data = self._file.read(value.offset, value.length)
        if value.kind == _STRING:
            return _strings(data, value.count, f"{self._file.name}: a string of {show(key)}")
        array = np.frombuffer(data, _SCALARS[value.kind][1])
        return [bool(v) for v in array] if value.kind == _BOOL else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def scalar(self, key: str, default: Any = None) -> Any:
        """The value of a key that must not be an array."""
        if (count := self.length(key)) is not None:
            raise CheckpointError(f"{self._file.name}: {show(key)} is an array of {count}, expected one value")
        return self._values.get(key, default)

    def summary(self, key: str) -> Any:
        """The value for a message; an array's length in words, without reading it, [] where it is empty."""
        count = self.length(key)
        return self._values[key] if count is None else f"an array of {count}" if count else []

    def length(self, key: str) -> int | None:
        """Elements of an array, without reading it; None where the key is missing or not an array."""
        value = self._values.get(key)
        return value.count if isinstance(value, _ArrayRange) else None


def _strings(data: bytes, count: int, what: str) -> list[str]:
    result, at, unpack = [], 0, _U64.unpack_from
    for _ in range(count):
        if at + 8 > len(data):  # the file was changed after its header was checked
            raise CheckpointError(f"{what} is cut off")
        begin = at + 8
        at = begin + unpack(data, at)[0]
        result.append(_decode(data[begin:at], what))
    return result


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the stored float32: 9.99999997e-07 was written as 1e-06."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


class GgufFile:
    """One open GGUF file: `metadata` and `tensors` (the file's names; shapes rows first). Raises CheckpointError."""

    def __init__(self, file: SourceFile | Path) -> None:
        self.file = SourceFile(file) if isinstance(file, Path) else file
        self.name = self.file.name
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def digest(self) -> str:
        """sha256 over the file's size and everything before the tensor data."""
        digest = hashlib.sha256(self.file.size.to_bytes(8, "little"))
        for at in range(0, self._header_end, 1 << 20):
            digest.update(self.file.read(at, min(1 << 20, self._header_end - at)))
        return digest.hexdigest()

    def _parse(self) -> None:
        if self.file.size < 24 or self.file.read(0, 4) != b"GGUF":
            raise CheckpointError(f"{self.name} is not a GGUF file (nor a folder with config.json)")
        cursor = _Cursor(self.file)
        cursor.skip(4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            big = version in (2 << 24, 3 << 24)
            raise CheckpointError(
                f"{self.name} is GGUF {'of a big-endian machine' if big else f'version {version}'}, "
                "expected version 2 or 3, little endian"
            )
        tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise CheckpointError(f"{self.name} claims {tensors} tensors and {keys} keys: the file is damaged")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.string("a metadata key")
            if key in values:
                raise CheckpointError(f"{self.name}: the metadata key {show(key)} occurs twice")
            values[key] = self._value(cursor, key, cursor.scalar("I"))
        self.metadata = Metadata(self.file, values)
        entries = [self._entry(cursor) for _ in range(tensors)]
        self._header_end = cursor.at
        self.tensors = self._place(entries)

    def _value(self, cursor: _Cursor, key: str, kind: int) -> Any:
        if kind == _STRING:
            return cursor.string(f"the value of {show(key)}")
        if kind == _ARRAY:
            return self._array(cursor, key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.name}: {show(key)} is of the unknown type {kind}")
        value = cursor.scalar(_SCALARS[kind][0])
        if kind != _BOOL:
            return value
        if value > 1:
            raise CheckpointError(f"{self.name}: {show(key)} is {value}, expected a boolean (0 or 1)")
        return bool(value)

    def _array(self, cursor: _Cursor, key: str) -> _ArrayRange:
        kind, count = cursor.scalar("I"), cursor.scalar("Q")
        begin = cursor.at
        if kind == _STRING:
            cursor.skip_strings(count)
        elif kind in _SCALARS:
            cursor.skip(count * struct.calcsize("<" + _SCALARS[kind][0]))
        else:
            raise CheckpointError(f"{self.name}: {show(key)} is an array of the unknown type {kind}")
        return _ArrayRange(kind, count, begin, cursor.at - begin)

    def _entry(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type id, offset in the data) of the next tensor."""
        name = cursor.string("a tensor name")
        dimensions = cursor.scalar("I")
        if not 1 <= dimensions <= 4:
            raise CheckpointError(f"{self.name}: {show(name)} has {dimensions} dimensions, expected 1 to 4")
        sizes = [cursor.scalar("Q") for _ in range(dimensions)]
        if not all(0 < n < 1 << 48 for n in sizes):
            raise CheckpointError(f"{self.name}: {show(name)} has the sizes {sizes}, expected positive ones")
        return name, tuple(reversed(sizes)), cursor.scalar("I"), cursor.scalar("Q")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, StoredTensor]:
        """Checks types, sizes, alignment and that no two tensors share bytes."""
        alignment = self.metadata.scalar("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise CheckpointError(f"{self.name}: general.alignment is {show(alignment)}, expected a multiple of 8")
        base = -(-self._header_end // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        spans = []
        for name, shape, type_id, offset in entries:
            where = f"{self.name}: {show(name)}"
            kind = GGUF_TYPES.get(type_id)
            if name in tensors:
                raise CheckpointError(f"{where} occurs twice")
            if kind is None and type_id not in UNREAD_TYPES:
                raise CheckpointError(f"{where} is of the unknown type {type_id}")
            if offset % alignment:
                raise CheckpointError(f"{where} begins at {offset}, expected a multiple of {alignment}")
            if kind and shape[-1] % kind.block_elements:
                raise CheckpointError(
                    f"{where} has rows of {shape[-1]}, which {kind.name} cannot hold (blocks of {kind.block_elements})"
                )
            length = kind.nbytes(math.prod(shape)) if kind else 0
            if base + offset + length > self.file.size:
                raise CheckpointError(
                    f"{self.name} is truncated: {show(name)} ends at byte {base + offset + length}, "
                    f"the file has {self.file.size}"
                )
            dtype = kind.name if kind else UNREAD_TYPES[type_id]
            tensors[name] = StoredTensor(self.file, base + offset, shape, dtype, kind, length)
            spans.append((base + offset, base + offset + length, name))
        spans.sort()
        for (_, end, before), (begin, _, name) in itertools.pairwise(spans):
            if begin < end:
                raise CheckpointError(f"{self.name}: {show(before)} and {show(name)} share bytes")
        return tensors
