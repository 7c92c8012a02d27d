"""Drafter folders of random weights at full size, to measure what a draft costs.

Owns: the sizes (`DRAFTER_CONFIGS`), a random grouping of the vocabulary. Does not know: how random weights are made
(synth.py), which recipes a drafter may have (drafter.py).

A random drafter and a random model agree on next to nothing: what a draft costs is real, what it wins is not.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.config import FULL, SLIDING
from edge_gemma.drafter_config import MODEL_TYPE, ORDERING, DrafterConfig
from edge_gemma.errors import UsageError
from edge_gemma.export.drafter import checked_recipe, plan_drafter
from edge_gemma.export.folder_writer import FolderWriter
from edge_gemma.export.synth import TEXT_CONFIGS, write_noise
from edge_gemma.folder.atomic import new_folder
from edge_gemma.folder.folder import DRAFTER_FORMAT, Progress

_KEPT = (
    "global_head_dim", "head_dim", "hidden_activation", "max_position_embeddings", "model_type", "num_key_value_heads",
    "rms_norm_eps", "sliding_window", "vocab_size",
)  # fmt: skip
_RELEASED: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
_TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def _words(target: str, sizes: dict[str, Any], centroids: int, top: int) -> dict[str, Any]:
    """The config.json of the drafter of a synthetic model."""
    text = {key: TEXT_CONFIGS[target][key] for key in _KEPT} | sizes | {
        "hidden_size_per_layer_input": 0, "layer_types": [SLIDING] * 3 + [FULL], "num_hidden_layers": 4,
        "num_kv_shared_layers": 4, "use_double_wide_mlp": False, "vocab_size_per_layer_input": 0,
    }  # fmt: skip
    return {
        "backbone_hidden_size": TEXT_CONFIGS[target]["hidden_size"], "centroid_intermediate_top_k": top,
        "model_type": MODEL_TYPE, "num_centroids": centroids, "text_config": text, "use_ordered_embeddings": True,
    }  # fmt: skip


DRAFTER_CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": _words("e2b", _RELEASED, 2048, 32),
    "e4b": _words("e4b", _RELEASED, 2048, 32),
    "tiny": _words("tiny", _TINY, 64, 8),
}


def synthesize_drafter(
    size: str, dest: Path, recipe: str | None = None, *, seed: int = 0, force: bool = False,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write a drafter folder of random weights, for the model of `synthesize` of that size. Returns `dest`.

    size: a key of DRAFTER_CONFIGS, its target's; recipe: as for `export_drafter`. Raises UsageError for another size or
    recipe, a `dest` that is taken, or a disk without room.
    """
    if size not in DRAFTER_CONFIGS:
        raise UsageError(f"unknown size {size!r}: choose one of {', '.join(DRAFTER_CONFIGS)}")
    recipe = checked_recipe(recipe)
    config = DrafterConfig.from_config(DRAFTER_CONFIGS[size])
    plan = plan_drafter(config, recipe, kept=list(config.tensor_shapes()))
    plan = {name: replace(tensor, origin="random") for name, tensor in plan.items()}
    with new_folder(dest, force=force) as folder, FolderWriter(folder, plan) as writer:
        noise = {name: tensor for name, tensor in plan.items() if name != ORDERING}
        write_noise(noise, config.decoder, seed, writer, progress)
        tokens = np.random.default_rng(seed).permutation(config.decoder.vocab_size)
        writer.append(ORDERING, "values", tokens.astype(np.uint32))
        name = f"random {size} drafter, seed {seed}"
        digest = hashlib.sha256(f"{name}, {recipe}".encode()).hexdigest()
        source = {"name": name, "digest": digest, "license": None}
        writer.finish(dict(config.config), recipe, source, kind=DRAFTER_FORMAT)
    return dest
