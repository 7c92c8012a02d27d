"""From a checkpoint to a model folder: the conversion pipeline.

Owns: the order of work, the plan (recipe -> layouts), row blocks, progress. Does not know: how a source is stored
(checkpoint.py and its readers), how values are rounded (quant/rtn.py), how the folder is laid out (folder_writer.py).

Memory: one block of rows of one tensor at a time, whatever the checkpoint's size; the largest tensor of E2B has 4.7 GB.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma import qformat
from edge_gemma.atomic import new_folder
from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError
from edge_gemma.export.audio_tower import AudioTower
from edge_gemma.export.checkpoint import Checkpoint, open_checkpoint
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.model_folder import GENERATION, TEMPLATE, TOKENIZER, Progress, Tensor, plan_tensor
from edge_gemma.quant.recipes import tensor_format
from edge_gemma.quant.rtn import round_to_nearest

_BLOCK_WEIGHTS = 1 << 20  # weights a worker rounds at a time: 4 MB of float32 stays near the caches
_AHEAD = 4  # blocks in flight


def export_checkpoint(
    source: Path,
    dest: Path,
    recipe: str = "q4",
    *,
    audio: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert `source` (a safetensors folder or a GGUF file) into the model folder `dest`. Returns `dest`.

    audio: with its audio tower, where it has one.

    The folder appears whole or not at all; an interrupted run leaves nothing behind that the next one does not remove.
    Raises CheckpointError, ConfigError, UsageError: one line each.
    """
    checkpoint = open_checkpoint(source)
    try:
        config = GemmaConfig.from_text_config(checkpoint.text_config)
        plan = {name: plan_weight(checkpoint, recipe, name, shape) for name, shape in config.tensor_shapes().items()}
        tokenizer = checkpoint.tokenizer_model()
        tower = checkpoint.audio_tower() if audio else None
        with new_folder(dest, force=force) as folder, FolderWriter(folder, plan) as writer:
            writer.add_file(TOKENIZER, tokenizer)
            if checkpoint.chat_template is not None:
                writer.add_file(TEMPLATE, checkpoint.chat_template.encode())
            writer.add_file(GENERATION, json.dumps(checkpoint.generation_config, indent=1).encode())
            content = _write_tensors(checkpoint, plan, writer, progress)
            section = write_tower(writer, tower, recipe) if tower else None
            writer.finish(
                dict(config.text_config),
                recipe,
                {
                    "name": source.name,
                    "digest": checkpoint.digest(),
                    "content_sha256": content,
                    "license": checkpoint.license,
                },
                section,
            )
    finally:
        checkpoint.close()
    return dest


def plan_weight(checkpoint: Checkpoint, recipe: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """How a recipe stores one tensor of this checkpoint."""
    fmt = tensor_format(recipe, name, shape)
    if fmt.bits == 0:
        # bfloat16 is kept as it is; every other source type is wider than it looks and becomes float32.
        keep = len(shape) == 2 and checkpoint.tensors[name].dtype == "BF16"
        return plan_tensor(name, shape, "dense", dtype="BF16" if keep else "F32")
    layout = "rows" if name.startswith("embed_tokens_per_layer.") else "panels"
    return plan_tensor(name, shape, layout, bits=fmt.bits, group=fmt.group)


def write_tower(writer: FolderWriter, tower: AudioTower, recipe: str) -> dict[str, Any]:
    """The audio encoder as a recipe stores it. Returns the manifest's section. Raises UsageError without onnx."""
    from edge_gemma.export.audio_encoder import write_audio_encoder

    return write_audio_encoder(writer, tower)


def encode_block(tensor: Tensor, weights: np.ndarray) -> dict[str, np.ndarray]:
    """A block of whole rows (whole panels but for the tensor's end) as the bytes of each part.

    weights: float32 [n, columns] or [n]. Raises CheckpointError if one is not finite.
    """
    if not np.isfinite(weights).all():
        raise CheckpointError("a weight is not finite: the checkpoint is damaged")
    if tensor.layout == "dense":
        if tensor.parts["values"].dtype == "F32":
            return {"values": weights}
        return {"values": (weights.view(np.uint32) >> 16).astype(np.uint16)}  # exact: the source was bfloat16
    values, scales = round_to_nearest(weights, tensor.bits, tensor.group)
    if tensor.layout == "rows":
        return {"records": qformat.pack_rows(values, scales, tensor.bits, tensor.group)}
    return {
        "packed": qformat.pack_panels(values, tensor.bits),
        "scales": qformat.pack_scales(scales, tensor.group),
    }


def _write_tensors(
    checkpoint: Checkpoint, plan: dict[str, Tensor], writer: FolderWriter, progress: Progress | None
) -> str:
    """Stream every tensor through. Returns the sha256 over all values read, as float32, in the plan's order."""
    content = hashlib.sha256()
    total = sum(4 * int(np.prod(tensor.shape)) for tensor in plan.values())
    done = 0
    with ThreadPoolExecutor() as pool:
        for name, tensor in plan.items():
            pending: list[Future[dict[str, np.ndarray]]] = []
            for weights in _blocks(checkpoint, name, tensor.shape):
                pending.append(pool.submit(encode_block, tensor, weights))
                content.update(weights.data)
                done += weights.nbytes
                while len(pending) >= _AHEAD:
                    _append(writer, name, pending.pop(0))
                if progress:
                    progress(done, total, name)
            for block in pending:
                _append(writer, name, block)
    return content.hexdigest()


def _append(writer: FolderWriter, name: str, block: Future[dict[str, np.ndarray]]) -> None:
    try:
        parts = block.result()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    for key, values in parts.items():
        writer.append(name, key, values)


def _blocks(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Blocks of whole panels of 8 rows, about _BLOCK_WEIGHTS each."""
    columns = int(np.prod(shape[1:]))
    step = max(8, _BLOCK_WEIGHTS // columns // 8 * 8)
    for start in range(0, shape[0], step):
        yield checkpoint.rows(name, start, min(start + step, shape[0]))
