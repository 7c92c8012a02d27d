"""From a checkpoint, a GGUF file or a model folder to an ONNX folder.

Owns: the order of work, which recipes fit which source, the folder's files and manifest. Does not know: the graphs
(onnx_decoder.py, onnx_vision.py), how weights are read (onnx_weights.py, onnx_vision_weights.py). What an ONNX folder
holds: edge_gemma/backends/onnx.py.

A source becomes a model folder first: whatever rounds or carries over weights there does so here too, and ONNX takes
over that folder's integers and scales as they are. Memory: a few blocks of rows at a time, whatever the model's size.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma import __version__
from edge_gemma.backends.onnx import DECODER, EMBED, FOLDER
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.drafter import is_drafter
from edge_gemma.export.folder_writer import DigestedFile
from edge_gemma.folder.atomic import new_folder, scratch_folder
from edge_gemma.folder.folder import (
    GENERATION,
    MANIFEST,
    ONNX_FORMAT,
    ONNX_VERSION,
    REPLACEABLE,
    TEMPLATE,
    TOKENIZER,
    VISION_GRAPH,
    ModelFolder,
    Progress,
    manifest_digest,
)
from edge_gemma.quant.calibrate import refuse_unused

FLOAT16 = "float16"  # the recipe that only ONNX has: float weights in half the bytes, computed in float32
_ARCHITECTURES = {"gemma4_text": "Gemma4ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}


def export_onnx(
    source: Path,
    dest: Path,
    recipe: str | None = None,
    *,
    calibration: str | None = None,
    audio: bool = True,
    vision: bool = True,
    mmproj: Path | None = None,
    ignore_keys: Collection[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write `source` (a model folder, a safetensors folder or a GGUF file) as an ONNX folder. Returns `dest`.

    recipe: of a checkpoint as in `export_checkpoint`, and "float16"; a model folder keeps the one it has, but a float
    one may become "float16". calibration, mmproj, ignore_keys, note: as there; a model folder has neither an
    mmproj nor keys to ignore. audio, vision: with its encoder, where there is one.
    The folder appears whole or not at all. Raises CheckpointError, ConfigError, ModelFolderError, UsageError: one
    line each.
    """
    from edge_gemma.export import onnx_graph  # noqa: F401  (says at once that the onnx package is missing)

    with (
        new_folder(dest, force=force, having=REPLACEABLE) as out,
        _model_folder(
            source,
            dest,
            recipe,
            calibration=calibration,
            audio=audio,
            vision=vision,
            mmproj=mmproj,
            ignore_keys=ignore_keys,
            progress=progress,
            note=note,
        ) as folder,
    ):
        recipe = FLOAT16 if recipe == FLOAT16 else folder.manifest["recipe"]
        if not vision:
            folder = replace(folder, vision=None)
        files = _write_graphs(folder, out / FOLDER, "float16" if recipe == FLOAT16 else "float32", progress)
        if audio:
            files |= _copy_encoders(folder, out)
        files |= _write_texts(folder, out)
        (out / MANIFEST).write_text(json.dumps(_manifest(folder, recipe, files, audio), indent=1))
    return dest


def _manifest(folder: ModelFolder, recipe: str, files: dict[str, Any], audio: bool) -> dict[str, Any]:
    """The manifest of an ONNX folder made from `folder`. audio: its encoders are among the files."""
    manifest: dict[str, Any] = {
        "format": ONNX_FORMAT,
        "version": ONNX_VERSION,
        "created_by": f"edge_gemma {__version__}",
        "recipe": recipe,
        "source": folder.manifest.get("source"),
        "config": dict(folder.config.text_config),
        "files": files,
    }
    if audio and "audio" in folder.manifest:
        manifest["audio"] = folder.manifest["audio"]
    if folder.vision is not None:
        manifest["vision"] = {k: v for k, v in folder.manifest["vision"].items() if k != "tensors"}
    return manifest | {"digest": manifest_digest(manifest)}


@contextmanager
def _model_folder(source: Path, dest: Path, recipe: str | None, **options: Any) -> Iterator[ModelFolder]:
    """The source itself where it is a model folder, otherwise one made for the while.

    options: of `export_checkpoint`.
    """
    if (source / MANIFEST).is_file():
        if options["ignore_keys"]:
            raise UsageError(f"{source} is a model folder, which has no configuration keys to ignore")
        if options["mmproj"] is not None:
            raise UsageError(f"{source} is a model folder, which holds its encoders itself: leave --mmproj out")
        folder = ModelFolder.open(source)
        has = folder.manifest.get("recipe")
        if recipe not in (None, has) and (recipe, has) != (FLOAT16, "float"):
            raise UsageError(
                f"{source} is a model folder of recipe {has}, which ONNX carries over as it is: "
                f"leave --recipe out, or export the checkpoint itself for {recipe}"
            )
        refuse_unused(options["calibration"], "a model folder, whose weights are rounded already")
        yield folder
        return
    if is_drafter(source):
        raise UsageError(f"{source} is a drafter, which only this package's own decoder runs: leave --onnx out")
    with scratch_folder(dest.absolute()) as scratch:
        rounding = "float" if recipe == FLOAT16 else recipe
        path = scratch / "model"
        export_checkpoint(source, path, rounding, **options)
        yield ModelFolder.open(path)


def _write_graphs(folder: ModelFolder, out: Path, float_type: str, progress: Progress | None) -> dict[str, Any]:
    """The graphs of text and pictures with their weights; the manifest's entries of their files."""
    from edge_gemma.export.onnx_decoder import build_decoder, build_embed
    from edge_gemma.export.onnx_graph import ExternalData, Graph
    from edge_gemma.export.onnx_vision import build_vision
    from edge_gemma.export.onnx_vision_weights import VisionWeights
    from edge_gemma.export.onnx_weights import OnnxWeights

    out.mkdir()
    config, weights = folder.config, OnnxWeights(folder, float_type, progress)
    builders = {EMBED: partial(build_embed, config=config, weights=weights),
                DECODER: partial(build_decoder, config=config, weights=weights)}  # fmt: skip
    nbytes = weights.nbytes
    if folder.vision is not None:
        seeing = VisionWeights(folder)
        builders[Path(VISION_GRAPH).stem] = partial(
            build_vision, config=folder.vision.config, weights=seeing, text_hidden_size=config.hidden_size
        )
        nbytes += seeing.nbytes
    if nbytes > (free := shutil.disk_usage(out).free):
        raise UsageError(
            f"the graphs need {nbytes / 1e9:.2f} GB, {out.parent.parent} has {free / 1e9:.2f} GB free: "
            "make room or choose another place"
        )
    files = {}
    for name, build in builders.items():
        path = out / f"{name}.onnx"
        with (out / f"{name}.onnx_data").open("xb") as raw:
            data = DigestedFile(raw)
            graph = Graph(ExternalData(data, f"{name}.onnx_data"))
            build(graph)
        path.write_bytes(graph.model(name))
        _check(path)
        files[f"{FOLDER}/{name}.onnx_data"] = {"bytes": data.bytes, "sha256": data.digest.hexdigest()}
        files[f"{FOLDER}/{name}.onnx"] = _entry(path.read_bytes())
    return files


def _check(path: Path) -> None:
    """onnx's checker, by the path and so with the data beside it. Raises CheckpointError."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckpointError(f"{path.name} does not pass onnx's checker: {error}") from None


def _copy_encoders(folder: ModelFolder, out: Path) -> dict[str, Any]:
    """The model folder's own ONNX graphs, as they are; the manifest's entries."""
    files = {}
    for name, entry in folder.manifest["files"].items():
        if Path(name).suffix in (".onnx", ".onnx_data"):
            shutil.copyfile(folder.path / name, out / FOLDER / name)
            files[f"{FOLDER}/{name}"] = entry
    return files


def _write_texts(folder: ModelFolder, out: Path) -> dict[str, Any]:
    """Configuration, tokenizer and chat template; the manifest's entries of their files."""
    config = folder.config.text_config
    architectures = [_ARCHITECTURES[folder.config.model_type]]
    texts = {"config.json": json.dumps({"architectures": architectures, **config}, indent=1).encode()}
    for name in (TOKENIZER, TEMPLATE, GENERATION):
        if name in folder.manifest["files"]:
            texts[name] = (folder.path / name).read_bytes()
    for name, data in texts.items():
        (out / name).write_bytes(data)
    return {name: _entry(data) for name, data in texts.items()}


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
