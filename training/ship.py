"""Exports a trained checkpoint into the package, with digests of its data, code and configuration.

    python -m training.ship CHECKPOINT DATA --recipe q8        # to edge_gemma/demo

Owns: the manifest's section `training` and the limit on size. Does not know: how a checkpoint is trained or exported.

CHECKPOINT is a folder in the layout of transformers' save_pretrained, tokenizer and chat template included. `training`
holds SHA-256 digests: `data` over names and contents of DATA/clips, `code` over those of training/, `config` of the
checkpoint's config.json; and the versions of the libraries it was trained with.
"""

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.folder import find
from edge_gemma.folder.atomic import write_file
from edge_gemma.folder.folder import MANIFEST, ModelFolder, manifest_digest

MOST_BYTES = 12_000_000
NAME = "demonstration model"
_CODE = (".py", ".txt", ".jinja", ".json", ".toml")


def digest(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over files in order of name: for each its name below `root`, a zero byte, the SHA-256 of its content."""
    total = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + content)
    return total.hexdigest()


def made_from(checkpoint: Path, data: Path, code: Path) -> dict[str, Any]:
    """The manifest's section `training`. Raises SystemExit if there are no clips."""
    clips = [path for path in (data / "clips").glob("*") if path.suffix in (".i16", ".jsonl")]
    if not clips:
        raise SystemExit(f"{data / 'clips'} holds no clips: expected the data that the checkpoint was trained with")
    return {
        "data": digest(data, clips),
        "code": digest(code, [path for path in code.rglob("*") if path.suffix in _CODE]),
        "config": hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }


def add_section(folder: Path, section: dict[str, Any]) -> None:
    """Write the section `training` and the displayed name into the manifest, whose digest covers them."""
    manifest = json.loads((folder / MANIFEST).read_bytes()) | {"training": section}
    manifest["source"]["name"] = NAME
    manifest["digest"] = manifest_digest(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    (folder / MANIFEST).chmod(0o644)  # all users of an installation read it


def ship(checkpoint: Path, data: Path, dest: Path, recipe: str | None, *, audio: bool = True) -> int:
    """Export, add the section `training`, verify every byte. Returns the folder's size in bytes.

    Raises EdgeGemmaError as `export_checkpoint`, SystemExit for a model that is too large, which is left in place.
    """
    section = made_from(checkpoint, data, Path(__file__).parent)
    export_checkpoint(checkpoint, dest, recipe, audio=audio, force=True)
    add_section(dest, section)
    ModelFolder.open(dest).verify()
    return size_of(dest)


def size_of(dest: Path) -> int:
    """The folder's size in bytes. Raises SystemExit if it is too large."""
    size = sum(path.stat().st_size for path in dest.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"{dest} has {size / 1e6:.1f} MB, expected at most {MOST_BYTES / 1e6:.0f}: use fewer bits")
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ship", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", help="q8, q4, ... [default: as it was trained, else q4]")
    parser.add_argument("--dest", type=Path, default=find.EMBEDDED)
    options = parser.parse_args(arguments)
    try:
        size = ship(options.checkpoint, options.data, options.dest, options.recipe)
    except (EdgeGemmaError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{options.dest}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
