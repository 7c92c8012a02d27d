"""The models this user has: pulled from a hub, or converted from a GGUF file.

Owns: their list, finding and removing one, when one was last used. Does not know: how they are made, where the folders
are that hold them (find.py).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.folder.atomic import unused
from edge_gemma.folder.file_names import DRAFTER_FORMAT, MANIFEST
from edge_gemma.host import system

_USED = ".used"  # empty files: their times are when the models were last opened


@dataclass(frozen=True)
class Entry:
    """A model of the store. last_used: seconds since 1970, None if never."""

    name: str
    path: Path
    bytes: int
    recipe: str | None
    source: str | None  # repository@commit, or the file's name
    last_used: float | None
    unfinished: bool = False  # an interrupted pull or conversion
    drafter: bool = False  # it guesses for another model


def find(name: str, folders: Sequence[Path]) -> Path | None:
    """The folder of the model called `name`, or pulled from the repository `name`; None where there is none."""
    for folder in folders:
        if name == Path(name).name and (folder / name / MANIFEST).is_file():
            _touch(folder, name)
            return folder / name
    for entry in entries(folders) if "/" in name else []:
        if entry.source and entry.source.partition("@")[0] == name and not entry.unfinished:
            _touch(entry.path.parent, entry.name)
            return entry.path
    return None


def entries(folders: Sequence[Path]) -> list[Entry]:
    """All models, and what interrupted runs have left, sorted by name."""
    found = [entry for folder in folders for entry in _entries(folder)]
    return sorted(found, key=lambda entry: (entry.name, entry.unfinished))


def is_drafter(path: Path) -> bool:
    """Whether a folder holds a drafter, as far as its manifest can be read."""
    return bool(_source(path).get("drafter"))


def remove(name: str, folders: Sequence[Path]) -> list[Entry]:
    """Remove the model called `name` and what interrupted runs have left of it. Raises UsageError for no such model."""
    found = [entry for entry in entries(folders) if entry.name == name]
    if not found:
        names = ", ".join(sorted({entry.name for entry in entries(folders)})) or "none"
        raise UsageError(f"there is no model {name!r} to remove: there are {names}")
    for entry in sorted(found, key=lambda entry: not entry.unfinished):  # a removal that was interrupted goes first
        aside = entry.path.with_name(f".{name}.removed.partial")
        if entry.path.is_symlink():
            entry.path.unlink()
            continue
        with unused(entry.path):
            os.rename(entry.path, aside)  # gone at once, whatever happens to the rest
            shutil.rmtree(aside)
        with contextlib.suppress(OSError):
            (entry.path.parent / _USED / name).unlink()
    return found


def _entries(folder: Path) -> Iterator[Entry]:
    try:
        names = [path.name for path in folder.iterdir() if (path / MANIFEST).is_file() and path.name[0] != "."]
        left = [path for path in folder.glob(".*.partial") if path.is_dir()]
    except OSError:
        return
    for name in names:
        source = _source(folder / name)
        recipe = source.get("recipe")
        path, used = folder / name, _last_used(folder, name)
        yield Entry(name, path, _bytes(path), recipe, source.get("from"), used, drafter=source.get("drafter", False))
    for path in left:
        yield Entry(path.name[1:].rpartition(".")[0].rpartition(".")[0], path, _bytes(path), None, None, None, True)


def _source(path: Path) -> dict[str, Any]:
    """Recipe, origin and kind from the manifest. Empty where it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        source = manifest["source"]
        where = source.get("repository")
        revision = str(source.get("revision"))[:12]
        named = f"{where}@{revision}" if where else source.get("name")
        return {"recipe": manifest["recipe"], "from": named, "drafter": manifest.get("format") == DRAFTER_FORMAT}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _bytes(path: Path) -> int:
    """The bytes a folder takes on the disk. Files that are being filled have holes, which do not count."""
    return sum(system.allocated(file) for file in path.rglob("*") if file.is_file())


def _touch(folder: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        (folder / _USED).mkdir(exist_ok=True)
        (folder / _USED / name).touch()


def _last_used(folder: Path, name: str) -> float | None:
    try:
        return (folder / _USED / name).stat().st_mtime
    except OSError:
        return None
