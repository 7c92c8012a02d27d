"""Which file holds the towers of a GGUF model, by the names that are in use.

Owns: names. Does not know: what is in a file (export/gguf_towers.py), where it lies.

A released repository has `mmproj-BF16.gguf`, `mmproj-F16.gguf` and `mmproj-F32.gguf` of one model, or names with the
model's in them: `mmproj-gemma-4-E2B-it-Q8_0.gguf`.
"""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

_TYPES = ("bf16", "f32", "f16", "q8_0")  # from the best on: bfloat16 is what the checkpoints are
_NAME = re.compile(r"(?P<stem>.*?)(?:(?:^|[-_.])(?P<type>bf16|f16|f32|q\d_\w+))?")


def is_mmproj(name: str) -> bool:
    """Whether a file's name says that it holds towers."""
    last = PurePosixPath(name).name.lower()
    return "mmproj" in last and last.endswith(".gguf")


def mmproj_of(model: str, names: Collection[str]) -> list[str]:
    """The mmproj file of a model among files that lie in one tree: one, none, or several that may all be meant.

    Files in the model's own folder come before those at the top. Of files that differ by their type alone, bfloat16 is
    taken before float32, float16 and others.
    """
    path = PurePosixPath(model)
    for folder in (path.parent, PurePosixPath()):
        if found := [name for name in sorted(names) if is_mmproj(name) and PurePosixPath(name).parent == folder]:
            return _meant(path.name.lower(), found)
    return []


def mmproj_beside(model: Path) -> list[Path]:
    """As `mmproj_of`, of a file on the disk. No files where the folder cannot be read."""
    try:
        names = [entry.name for entry in model.parent.iterdir()]
    except OSError:
        return []
    return [model.parent / name for name in mmproj_of(model.name, names) if (model.parent / name).is_file()]


def which_mmproj(names: Collection[str]) -> str:
    """A line for the user where several files may hold the towers."""
    shown = ", ".join(sorted(names)[:4]) + (" and others" if len(names) > 4 else "")
    return f"several files may hold its towers ({shown}): without them; export with --mmproj FILE for one"


def _meant(model: str, found: list[str]) -> list[str]:
    """Those of one model, the best type first and alone; all, where the names leave open whose they are."""
    stems: dict[str, list[tuple[int, str]]] = {}
    for name in found:
        plain = PurePosixPath(name).name.lower().removesuffix(".gguf").replace("mmproj", "").strip("-_.")
        match = _NAME.fullmatch(plain)
        assert match is not None  # it matches anything
        kind = match["type"] or ""
        stems.setdefault(match["stem"], []).append((_TYPES.index(kind) if kind in _TYPES else len(_TYPES), name))
    named = [stem for stem in stems if stem in model]
    if not named and len(stems) > 1:
        return found
    stem = max(named or stems, key=len)
    return [min(stems[stem])[1]]
