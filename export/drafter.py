"""Converts the checkpoint of a drafter (`gemma4_assistant`) to a drafter folder.

Owns: reading such a checkpoint, the recipes that a drafter may have, the order of the head's rows. Does not know: how
tensors are streamed (stream.py), rounded (quant/) and laid out (folder_writer.py), what a drafter computes.

A drafter is small (E2B's: 78 million weights, of which a draft reads 11.7 million), so that 8 bits are the default: a
draft reads 13 MB then, a token of its target 790 MB.
"""

import hashlib
import json
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.config_keys import check_ignored
from edge_gemma.drafter_config import MODEL_TYPE, ORDERING, TEXT_KNOWN, TOP_KNOWN, DrafterConfig
from edge_gemma.errors import CheckpointError, ConfigError, UsageError
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.safetensors_reader import license_of, parse_json, read_header
from edge_gemma.export.source_file import (
    SourceFile,
    SourceFolder,
    StoredTensor,
    bind_tensors,
    read_rows,
    same_bytes,
)
from edge_gemma.export.stream import TensorStream
from edge_gemma.export.tensor_names import TensorNames
from edge_gemma.folder.atomic import new_folder
from edge_gemma.folder.folder import DRAFTER_FORMAT, REPLACEABLE, Progress, Tensor, plan_tensor
from edge_gemma.host.pool import Pool
from edge_gemma.quant.recipes import DENSE, tensor_format

RECIPES = ("q8", "q4", "float")
_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
_MAX_JSON = 8 << 20
_INTEGERS = {"I64": "<i8", "I32": "<i4"}


def is_drafter(source: Path) -> bool:
    """Whether a folder holds a drafter's checkpoint, as far as its config.json can be read."""
    try:
        return is_drafters((source / "config.json").read_bytes()[:_MAX_JSON])
    except OSError:
        return False


def is_drafters(config: bytes) -> bool:
    """Whether a config.json is a drafter's, as far as it can be read."""
    try:
        return json.loads(config)["model_type"] == MODEL_TYPE
    except (ValueError, RecursionError, TypeError, KeyError):
        return False


def export_drafter(
    source: Path,
    dest: Path,
    recipe: str | None = None,
    *,
    ignore_keys: Collection[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert the checkpoint folder of a drafter into the drafter folder `dest`. Returns `dest`.

    recipe: of RECIPES, None for the first. The other arguments as for `export_checkpoint`. The folder appears whole or
    not at all. Raises CheckpointError, ConfigError, UsageError: one line each.
    """
    recipe = checked_recipe(recipe)
    with (
        closing(DrafterCheckpoint(SourceFolder(source), ignore_keys)) as checkpoint,
        new_folder(dest, force=force, having=REPLACEABLE) as folder,
    ):
        write_drafter(checkpoint, folder, recipe, {"name": source.name}, progress)
    return dest


def write_drafter(
    checkpoint: "DrafterCheckpoint",
    folder: Path,
    recipe: str,
    source: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint into an empty folder. recipe: of RECIPES; source: where it is from, for the manifest."""
    plan = plan_drafter(checkpoint.config, recipe, checkpoint.kept)
    with FolderWriter(folder, plan) as writer, Pool() as pool:
        if checkpoint.ordering is not None:
            writer.append(ORDERING, "values", checkpoint.ordering.astype(np.uint32))
        streamed = {name: tensor for name, tensor in plan.items() if name != ORDERING}
        content = TensorStream(checkpoint, streamed, {}, writer, pool, progress).put_rest()
        digests = {"digest": checkpoint.digest, "content_sha256": content, "license": checkpoint.license}
        ignored = {"ignored_keys": sorted(checkpoint.ignored)} if checkpoint.ignored else {}
        words = dict(checkpoint.config.config)
        writer.finish(words, recipe, source | digests | ignored, kind=DRAFTER_FORMAT)


def checked_recipe(recipe: str | None) -> str:
    """The recipe, the first where it is None. Raises UsageError for one that a drafter cannot have."""
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"recipe {recipe} is none for a drafter, which is small: choose one of {', '.join(RECIPES)}")
    return recipe or RECIPES[0]


def plan_drafter(config: DrafterConfig, recipe: str, kept: Collection[str] = ()) -> dict[str, Tensor]:
    """How a recipe stores every tensor. kept: those that are bfloat16 in the source, which float keeps.

    Matrices stay as they are where their end, or the ends of the head's groups, would lie inside of panels of 8 rows.
    """
    plan = {}
    for name, shape in config.tensor_shapes().items():
        if name == ORDERING:
            plan[name] = plan_tensor(name, shape, "dense", dtype="U32")
            continue
        fmt = tensor_format(recipe, name, shape, config.decoder)
        fmt = DENSE if shape[0] % 8 or (name == _EMBEDDINGS and config.group_size % 8) else fmt
        if fmt.bits:
            plan[name] = plan_tensor(name, shape, "panels", bits=fmt.bits, group=fmt.group)
            plan[name] = replace(plan[name], origin=f"rounded by recipe {recipe}")
        else:
            dense = plan_tensor(name, shape, "dense", dtype="BF16" if name in kept and len(shape) == 2 else "F32")
            plan[name] = replace(dense, origin="as in the checkpoint")
    return plan


class DrafterCheckpoint:
    """A drafter's checkpoint folder: config.json and model.safetensors."""

    def __init__(self, folder: SourceFolder, ignored: Collection[str] = ()) -> None:
        """Raises CheckpointError for files that cannot be read or do not fit, ConfigError, UsageError."""
        self._name, self.ignored = folder.name, set(ignored)
        config = folder.read("config.json", _MAX_JSON)
        top = parse_json(config, f"{folder.name}/config.json")
        text = top.get("text_config")
        check_ignored(ignored, [(top, TOP_KNOWN), (text if isinstance(text, dict) else {}, TEXT_KNOWN)])
        try:
            self.config = DrafterConfig.from_config(top, ignored)
        except ConfigError as error:
            raise ConfigError(f"{folder.name}: {error}") from None
        self._file = folder.open("model.safetensors")
        try:
            self._read(config)
            self.license = license_of(folder.read("README.md", _MAX_JSON) if folder.has("README.md") else None)
        except BaseException:
            self.close()
            raise

    def _read(self, config: bytes) -> None:
        stored, header = read_header(self._file)
        names = TensorNames(self._name, stored)
        # What is no decoder's has its own name behind "//".
        spelled = {names.canonical(name).removeprefix("//"): name for name in stored}
        canonical = {name: stored[original] for name, original in spelled.items()}
        shapes = self.config.tensor_shapes()
        head = canonical.pop(_HEAD, None)
        ordering = canonical.pop(ORDERING, None) if ORDERING in shapes else None
        floats = {name: shape for name, shape in shapes.items() if name != ORDERING}
        decoders = self.config.decoder.tensor_shapes()

        def original(name: str) -> str:
            return spelled.get(name, names.original(name) if name in decoders else name)

        self._stored = bind_tensors(self._name, floats, canonical, self._unused, original)
        if head and not same_bytes(head, self._stored[_EMBEDDINGS]):
            raise CheckpointError(f"{self._name}: lm_head.weight differs from embed_tokens.weight, expected the same")
        self.ordering = _ordering(self._name, ordering, shapes[ORDERING][0]) if ORDERING in shapes else None
        self.kept = [name for name, tensor in self._stored.items() if tensor.dtype == "BF16"]
        self.digest = hashlib.sha256(config + self._file.size.to_bytes(8, "little") + header).hexdigest()

    def _unused(self, name: str) -> bool:
        """K and V that nothing reads, as the models' own KV-shared layers have them."""
        return name.startswith("layers.") and name.split(".")[-2] in ("k_proj", "v_proj", "k_norm")

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32, those of the head in the order of the groups."""
        tensor = self._stored[name]
        if name != _EMBEDDINGS or self.ordering is None:
            return read_rows(tensor, start, stop)
        return np.concatenate([read_rows(tensor, i, i + 1) for i in self.ordering[start:stop].tolist()])

    def close(self) -> None:
        self._file.close()


def _ordering(source: str, tensor: StoredTensor | None, tokens: int) -> NDArray[np.int64]:
    """The tokens, group by group. Raises CheckpointError unless every token is there once."""
    if tensor is None or tensor.shape != (tokens,) or tensor.dtype not in _INTEGERS:
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError(f"{source}: {ORDERING} is {found}, expected I64 [{tokens}]")
    file: SourceFile = tensor.file
    ordering = np.frombuffer(file.read(tensor.offset, tensor.nbytes), _INTEGERS[tensor.dtype]).astype(np.int64)
    if not np.array_equal(np.sort(ordering), np.arange(tokens)):
        raise CheckpointError(f"{source}: {ORDERING} does not name each of the {tokens} tokens once")
    return ordering
