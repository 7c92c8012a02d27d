"""Which sources compiled code comes from: a module, and every module of this package that it imports.

A constant of an imported module is compiled into a kernel as much as the kernel's own text is.

Owns: finding the files, and their digest. Does not know: kernels, where machine code is kept.
"""

import functools
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = __name__.split(".")[0]
_IMPORT = re.compile(rf"^[ \t]*(?:from\s+({_PACKAGE}[\w.]*)\s+import\s+(\([^)]*\)|.*)|import\s+(.*))", re.MULTILINE)


def digest(modules: Iterable[str]) -> str:
    """Changes with the text of every module that `modules`, by their full names, need; reads the files as they are."""
    result = hashlib.sha256()
    for name, text in sorted(needed(modules).items()):
        result.update(name.encode() + b"\0" + text)
    return result.hexdigest()[:24]


def needed(modules: Iterable[str]) -> dict[str, bytes]:
    """The sources of `modules` and of all that they import of this package, at the top or inside a function."""
    found: dict[str, bytes] = {}
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found and (path := _file(name)) is not None:
            found[name] = path.read_bytes()
            left += _imported(found[name])
    return found


@functools.cache
def _imported(source: bytes) -> list[str]:
    """Modules of this package that a source imports. `from a import b` is a.b where that is a module, and else a."""
    names = []
    for match in _IMPORT.finditer(source.decode(errors="replace")):
        origin, what, plain = match.groups()
        if origin is None:
            names += [name for name in re.findall(r"[\w.]+", plain) if name.split(".")[0] == _PACKAGE]
            continue
        for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", what.partition("#")[0] if what[0] != "(" else what):
            names.append(inside if _file(inside := f"{origin}.{name}") is not None else origin)
    return names


@functools.cache
def _file(module: str) -> Path | None:
    """Where a module's text is; None where there is no such module."""
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file else None
    package, _, name = module.rpartition(".")
    for folder in _folders(package):
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                return path
    return None


@functools.cache
def _folders(package: str) -> list[Path]:
    """Where the modules of a package lie; none where it is no package."""
    if package in sys.modules:
        return [Path(folder) for folder in getattr(sys.modules[package], "__path__", [])]
    above, _, name = package.rpartition(".")
    return [folder / name for folder in _folders(above) if (folder / name).is_dir()] if above else []
