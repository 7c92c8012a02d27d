"""Text files under folders that the user names: listed, read, searched. Nothing is written.

Owns: that no path leads out of those folders, by "..", absolute or through a link; limits of size. Does not know: which
folders.
"""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.tools.function import RunnableTool, tool

_LARGEST = 4_000_000  # bytes of a file that is read
_PAGE = 6000  # characters that are read at once
_FOUND = 50  # lines or files
_LINE = 300  # characters of a line that is found
_SEARCH_S = 20.0


class TextFiles:
    """The text files under some folders."""

    def __init__(self, folders: list[Path]) -> None:
        """Raises UsageError for what is no folder."""
        for folder in folders:
            if not folder.is_dir():
                raise UsageError(f"{folder} is not a folder")
        self._roots = list(dict.fromkeys(folder.resolve() for folder in folders))

    @property
    def tools(self) -> list[RunnableTool]:
        methods: list[Any] = [self.read_file, self.search_files, self.list_files]
        return [tool(method) for method in methods]

    def read_file(self, path: str, line: int = 1) -> str:
        """Read a text file

        Args:
            path: as list_files or search_files name it
            line: the first one to read
        """
        lines = self._text(self._inside(path)).splitlines(keepends=True)
        if not 1 <= line <= max(1, len(lines)):
            raise UsageError(f"the line is {line}, the file has {len(lines)}")
        taken, size = 0, 0
        for each in lines[int(line) - 1 :]:
            if size and size + len(each) > _PAGE:
                break
            taken, size = taken + 1, size + len(each)
        last = int(line) - 1 + taken
        more = f"\n(lines {line} to {last} of {len(lines)}; go on with line {last + 1})" if last < len(lines) else ""
        return "".join(lines[int(line) - 1 : last]).rstrip("\n") + more

    def search_files(self, text: str) -> list[str]:
        """Find the lines of all text files that have a text

        Args:
            text: upper and lower case are the same
        """
        if not text.strip():
            raise UsageError("there is no text to search for")
        found: list[str] = []
        for path in self._files(until := time.monotonic() + _SEARCH_S):
            try:
                lines = self._text(path).splitlines()
            except (UsageError, OSError):
                continue
            for number, each in enumerate(lines, 1):
                if text.lower() in each.lower():
                    found.append(f"{self._name(path)}:{number}: {each.strip()[:_LINE]}")
            if len(found) >= _FOUND:
                return [*found[:_FOUND], "(there are more)"]
        return [*found, "(not all files were searched)"] if time.monotonic() > until else found

    def list_files(self) -> list[str]:
        """List the files that can be read"""
        names: list[str] = []
        for path in self._files(time.monotonic() + _SEARCH_S):
            if len(names) == _FOUND:
                return [*names, "(there are more: search_files finds text in all of them)"]
            names.append(self._name(path))
        return names

    def _inside(self, name: str) -> Path:
        """The file of that name. Raises UsageError for one that lies outside, and for what is no file."""
        refused = UsageError(f"there is no file {name}: list_files names those that there are")
        if "\0" in name:
            raise refused
        first, _, rest = name.replace("\\", "/").partition("/")
        tries = [root / name for root in self._roots]
        tries += [root / rest for root in self._roots if rest and first == root.name]
        for path in tries:
            try:
                resolved = path.resolve(strict=True)
            except (OSError, RuntimeError, ValueError):
                continue
            if any(_visible(resolved, root) for root in self._roots) and resolved.is_file():
                return resolved
        raise refused

    def _files(self, until: float) -> Iterator[Path]:
        """Files in order of their names; hidden ones and links are passed over."""
        folders = self._roots[::-1]
        while folders:
            within: list[Path] = []
            for path in _listed(folders.pop()):
                if time.monotonic() > until:
                    return
                if path.name.startswith(".") or path.is_symlink():
                    continue
                if path.is_dir():
                    within.append(path)
                elif path.is_file():
                    yield path
            folders += within[::-1]

    def _text(self, path: Path) -> str:
        """A regular file's text. Raises UsageError for one that is too large or no text."""
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(fd, "rb") as file:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST:
                raise UsageError(f"{self._name(path)} has {facts.st_size} bytes, expected a file of at most {_LARGEST}")
            data = file.read(_LARGEST + 1)
        if b"\0" in data[:8192]:
            raise UsageError(f"{self._name(path)} is no text")
        return data.decode("utf-8", "replace")

    def _name(self, path: Path) -> str:
        """A path as the model sees it: the folder's own name first where there are several."""
        root = next(root for root in self._roots if path.is_relative_to(root))
        name = path.relative_to(root).as_posix()
        return name if len(self._roots) == 1 else f"{root.name}/{name}"


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, in order of the names; nothing for one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _visible(path: Path, root: Path) -> bool:
    """Whether a resolved path lies in a folder, not hidden there."""
    return path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts)
