"""Writes a model folder's containers and manifest, one block of rows at a time.

Owns: the containers' layout (a safetensors header, parts in plan order, 64-byte alignment), running digests, the
manifest. Does not know: where values come from or how they are quantised. It writes into a folder that
`edge_gemma.folder.atomic.new_folder` renames once it is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from edge_gemma import __version__
from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import sync_tree, write_file
from edge_gemma.folder.folder import (
    ALIGNMENT,
    FORMAT,
    MANIFEST,
    VISION,
    Part,
    Tensor,
    manifest_digest,
    tensor_entry,
    version_of,
)
from edge_gemma.host import system

_READ = 1 << 24  # bytes


@dataclass
class _Growing:
    """A part that is being written: its start, its length so far, its digest so far."""

    part: Part
    written: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class DigestedFile:
    """A file that is written from start to end and digested meanwhile."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._raw.write(data)
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes


class FolderWriter:
    """Fill `folder` with the planned tensors. Parts are appended in any interleaving, each from its first row on."""

    def __init__(self, folder: Path, plan: dict[str, Tensor], *, beside: int = 0) -> None:
        """Lays out and sizes the containers, or takes over those of an interrupted run.

        Raises UsageError if the disk has no room for them and `beside` bytes.
        """
        self.folder = folder
        self._plan = plan
        self._files: dict[str, dict[str, Any]] = {}
        self._fds: dict[str, int] = {}
        self._growing: dict[tuple[str, str], _Growing] = {}
        by_file: dict[str, list[tuple[str, str, Part]]] = {}
        for name, tensor in plan.items():
            for key, part in _own_parts(tensor).items():
                by_file.setdefault(part.file, []).append((name, key, part))
        needed = beside + sum(part.nbytes for parts in by_file.values() for _, _, part in parts)
        free = shutil.disk_usage(folder).free + sum(system.allocated(path) for path in folder.iterdir())
        if needed > free:
            raise UsageError(
                f"the model needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free: "
                "make room or choose another place"
            )
        for file, parts in by_file.items():
            self._lay_out(file, parts)
        for name, tensor in plan.items():
            for key in tensor.parts if tensor.same_as else ():
                self._growing[name, key] = self._growing[tensor.same_as, key]

    def _lay_out(self, file: str, parts: list[tuple[str, str, Part]]) -> None:
        """A safetensors file whose every part starts on a cache line; fillers leave no holes, as it asks."""
        entries: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
        spans, offset = [], 0
        for name, key, part in parts:
            entries[f"{name}.{key}"] = _entry(part.dtype, part.shape, offset, part.nbytes)
            spans.append((name, key, part, offset))
            offset += part.nbytes
            if gap := -offset % ALIGNMENT:
                entries[f"filler.{offset}"] = _entry("U8", (gap,), offset, gap)
                offset += gap
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(len(header) + 8) % ALIGNMENT)
        start = 8 + len(header)
        fd = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | system.BINARY, 0o666)
        self._fds[file] = fd
        head = len(header).to_bytes(8, "little") + header
        if system.read(fd, len(head), 0) != head:
            os.ftruncate(fd, 0)  # what lies here was laid out otherwise: its bytes would show between the parts
        os.ftruncate(fd, start + offset)
        system.write_at(fd, head, 0)
        self._files[file] = {"bytes": start + offset}
        for name, key, part, begin in spans:
            self._growing[name, key] = _Growing(replace(part, offset=start + begin))

    def append(self, name: str, key: str, values: np.ndarray) -> None:
        """Append whole rows (or panels) to a part, in order. Bytes that another tensor brings are not written again."""
        if self._plan[name].same_as:
            return
        growing = self._growing[name, key]
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        if growing.written + len(data) > growing.part.nbytes:
            raise AssertionError(f"{name}.{key} was given more than its {growing.part.nbytes} bytes")
        fd, done = self._fds[growing.part.file], 0
        while done < len(data):
            done += system.write_at(fd, data[done:], growing.part.offset + growing.written + done)
        growing.digest.update(data)
        growing.written += len(data)

    def read(self, name: str, key: str, start: int, stop: int) -> np.ndarray:
        """Rows (or panels) start to stop - 1 of a part, as they lie in the file."""
        part = self._growing[name, key].part
        row = part.nbytes // part.shape[0] if part.nbytes else 0
        data = system.read(self._fds[part.file], (stop - start) * row, part.offset + start * row)
        return np.frombuffer(data, part.numpy_dtype).reshape(stop - start, *part.shape[1:])

    def digests(self, name: str) -> dict[str, str]:
        """sha256 of each of a tensor's own parts as far as they have been appended."""
        return {key: self._growing[name, key].digest.hexdigest() for key in _own_parts(self._plan[name])}

    def adopt(self, name: str, digests: dict[str, str]) -> None:
        """A tensor that an earlier run has written to its end; digests: sha256 of its parts."""
        for key, digest in digests.items():
            growing = self._growing[name, key]
            growing.part, growing.written = replace(growing.part, sha256=digest), growing.part.nbytes

    def sync(self) -> None:
        """Flush the containers to the disk."""
        for fd in self._fds.values():
            system.flush(fd)

    def adopt_file(self, name: str, entry: dict[str, Any]) -> bool:
        """A file that an earlier run has written, if it still is what `entry` says."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return False
        found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if found == entry:
            self._files[name] = found
        return found == entry

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """What the manifest will say of each file."""
        return dict(self._files)

    def stored_digests(self, name: str) -> dict[str, str]:
        """sha256 of each of a tensor's own parts as they lie in the file, whoever wrote them."""
        found = {}
        for key, part in _own_parts(self._plan[name]).items():
            digest, rows = hashlib.sha256(), part.shape[0]
            step = max(1, _READ * rows // max(1, part.nbytes))
            for start in range(0, rows, step):
                digest.update(self.read(name, key, start, min(start + step, rows)).data)
            found[key] = digest.hexdigest()
        return found

    def add_file(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self._files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator["DigestedFile"]:
        """A file of the folder that is written piece by piece."""
        with (self.folder / name).open("wb") as raw:
            file = DigestedFile(raw)
            yield file
        self._files[name] = {"bytes": file.bytes, "sha256": file.digest.hexdigest()}

    def finish(
        self,
        text_config: dict[str, Any],
        recipe: str,
        source: dict[str, Any],
        sections: dict[str, dict[str, Any]] | None = None,
        *,
        kind: str = FORMAT,
    ) -> None:
        """Write the manifest, once all else is on the disk: where it lies, the folder is whole.

        Every part must be complete. sections: of the encoders that were written; that of pictures gets its tensors.
        kind: the folder's format.
        """
        tensors: dict[str, dict[str, Any]] = {}
        seen: dict[str, dict[str, Any]] = {}
        for name, tensor in self._plan.items():
            parts = {}
            for key in tensor.parts:
                growing = self._growing[name, key]
                if growing.written != growing.part.nbytes:
                    raise AssertionError(f"{name}.{key}: {growing.written} of {growing.part.nbytes} bytes were written")
                parts[key] = replace(growing.part, sha256=growing.part.sha256 or growing.digest.hexdigest())
            table = seen if any(part.file == VISION for part in parts.values()) else tensors
            table[name] = tensor_entry(replace(tensor, parts=parts))
        manifest: dict[str, Any] = {
            "format": kind,
            "version": version_of(self._plan.values()),
            "created_by": f"edge_gemma {__version__}",
            "recipe": recipe,
            "source": source,
            "config": text_config,
            "files": self._files,
            "tensors": tensors,
        }
        manifest |= sections or {}
        if seen:
            manifest["vision"] |= {"tensors": seen}
        manifest["digest"] = manifest_digest(manifest)
        sync_tree(self.folder)
        write_file(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)


def _own_parts(tensor: Tensor) -> dict[str, Part]:
    """The parts of a tensor, without those whose bytes another tensor writes."""
    return {} if tensor.same_as else tensor.parts


def _entry(dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
