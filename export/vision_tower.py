"""The vision tower as its checkpoint describes it, and its form in a model folder.

Owns: which of a checkpoint's tensors are the tower's, which order the rows of queries and keys get, what is stored in 8
bits. Does not know: containers, how an encoder computes (vision/encoder.py).

Queries and keys: the reference turns the pairs (i, i + hd / 4) of the first half of a head by a patch's x, those of
the second half by its y. Rows are stored so that both are pairs (j, j + hd / 2), as the decoder's kernels turn them:
products of queries and keys do not change if both are stored so.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.packed import encode_dense, encode_packed
from edge_gemma.export.source_file import GlanceError, StoredTensor, read_rows
from edge_gemma.export.tower import Tower, TowerSource, is_bfloat16
from edge_gemma.folder.folder import Progress, Tensor, plan_tensor
from edge_gemma.quant.grid import find_grid
from edge_gemma.quant.rtn import round_to_nearest
from edge_gemma.vision_config import KNOWN, VisionConfig

# Keys of a multimodal config.json, and the special tokens they name in the release.
TOKEN_IDS = {
    "image_token_id": ("image_token_id", 258880),
    "boi_token_id": ("boi_token_id", 255999),
    "eoi_token_id": ("eoi_token_id", 258882),
    "video_token_id": ("video_token_id", 258884),
}
BOTH_WAYS = "this model attends to pictures in both directions, which is not supported: without them"
_PLACES = "vision_tower.patch_embedder.position_embedding_table"  # 16 M values; a picture reads some hundred rows
_TURNED = ("q_proj.linear.weight", "k_proj.linear.weight", "q_norm.weight", "k_norm.weight")

VisionTower = Tower[VisionConfig]


def bind_vision_tower(source: TowerSource) -> VisionTower | None:
    """The vision tower of a multimodal checkpoint, None where it has none. Raises ConfigError, CheckpointError."""
    if (words := source.words("vision_config")) is None:
        return None
    config = VisionConfig.from_vision_config(words, source.ignored)
    without = "--no-vision leaves the vision tower out"
    tower = source.bind(config, words, TOKEN_IDS, ("vision_tower.", "embed_vision."), without)
    places = source.stored[_PLACES]
    if places.dtype == "F32" and _halves(places):
        tower = replace(tower, bfloat16=tower.bfloat16 | {_PLACES})
    return tower


def _halves(places: StoredTensor) -> bool:
    """Whether the table of places was bfloat16 before: an mmproj has it in float32 always.

    Of a table that lies elsewhere the first rows say so; writing it raises GlanceError where they are wrong.
    """
    rows = replace(places, shape=(places.shape[0] * places.shape[1], places.shape[2]))
    looked = min(8, rows.shape[0]) if places.file.elsewhere else rows.shape[0]
    return all(is_bfloat16(read_rows(rows, at, min(at + 512, looked))) for at in range(0, looked, 512))


def without_promises(tower: VisionTower, mistaken: Collection[str]) -> VisionTower:
    """The tower, less what a glance at the tensors `mistaken` has promised."""
    return replace(tower, bfloat16=tower.bfloat16 - set(mistaken))


def plan_vision(tower: VisionTower, recipe: str) -> dict[str, Tensor]:
    """How a recipe stores the tower: layers in 8 bits, one scale a row, or in float32; everything else in float32, but
    for places that are bfloat16 already.
    """
    plan = {}
    for name, shape in tower.config.stored_shapes(tower.text_hidden_size).items():
        packed = tower.packed.get(name)
        if recipe == "float" or not name.endswith(".linear.weight"):
            half = name == _PLACES and name in tower.bfloat16
            plan[name] = plan_tensor(name, shape, "dense", dtype="BF16" if half else "F32")
        else:
            tensor = plan_tensor(name, shape, "panels", bits=8)
            steps = (packed.input_scale, packed.output_scale) if packed else (0.0, 0.0)
            plan[name] = replace(tensor, input_scale=steps[0], output_scale=steps[1])
        origin = packed.origin if packed else "as in the checkpoint"
        plan[name] = replace(plan[name], origin=origin)
    return plan


def write_vision(
    writer: FolderWriter, tower: VisionTower, recipe: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the tower's tensors, which the writer's plan has. Returns the manifest's `vision` section."""
    done, total = 0, 4 * tower.weights
    for name, tensor in plan_vision(tower, recipe).items():
        for key, values in _parts(tower, name, tensor).items():
            writer.append(name, key, values)
        done += 4 * int(np.prod(tensor.shape))
        if progress:
            progress(min(done, total), total, name)
    known = {key: value for key, value in tower.words.items() if key in KNOWN}  # no key that was ignored at export
    return {"vision_config": known, **tower.token_ids}


def _parts(tower: VisionTower, name: str, tensor: Tensor) -> dict[str, np.ndarray]:
    if name.endswith(".bounds"):
        return {"values": np.array(tower.clip(name.removesuffix(".bounds")), np.float32)}
    order = turned_rows(tower.config, tensor.shape[0]) if name.endswith(_TURNED) else slice(None)
    if tensor.layout == "dense":
        values = tower.tensor(name)[order]
        if tensor.parts["values"].dtype == "BF16" and not is_bfloat16(values):
            raise GlanceError(name, "has values that bfloat16 does not hold, unlike its first rows")
        return encode_dense(tensor, values)
    if (given := tower.integers([name.removesuffix(".weight")])) is not None:
        integers, scales = given
    else:
        weights = tower.tensor(name)
        grid = find_grid(weights, tower.float_type(weights))
        integers, scales = (grid.integers, grid.scales) if grid else round_to_nearest(weights, 8, 0)
    return encode_packed(tensor, integers[order], scales[order])


def turned_rows(config: VisionConfig, rows: int) -> np.ndarray:
    """Which row of the checkpoint each stored row of queries or keys is: int64 [rows], head by head."""
    quarters = np.arange(rows).reshape(-1, 4, config.head_dim // 4)
    return quarters[:, [0, 2, 1, 3]].reshape(-1)
