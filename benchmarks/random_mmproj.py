"""Writes the full-size vision tower of a random Gemma 4 E2B as a GGUF file for llama.cpp's mtmd.

    python benchmarks/random_mmproj.py F16 e2b-mmproj-f16.gguf

Owns: llama.cpp's names and types of the tower's tensors (as its converter writes them from the release). Does not know:
how the weights are drawn. They are those of `edge-gemma synth e2b DEST --vision`, so that both engines' soft tokens can
be compared, not only timed. Like the converter, it leaves `clip.use_gelu` out: llama.cpp then computes the quick GELU.
"""

import sys
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_gguf import add
from edge_gemma.config import GemmaConfig
from edge_gemma.export.synth import TEXT_CONFIGS, random_vision_tower
from edge_gemma.export.vision_tower import VisionTower
from edge_gemma.vision_config import CLIPS, LINEARS, NORMS

KINDS = ("F16", "BF16", "Q8_0")
_PATCHES = "vision_tower.patch_embedder.input_proj.weight"
_OUTSIDE = {
    _PATCHES: "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
}
_NORMS = dict(zip(NORMS, ("ln1", "attn_post_norm", "ln2", "ffn_post_norm"), strict=True))
_LINEARS = dict(zip(LINEARS, ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down"), strict=True))
_INSIDE = _NORMS | _LINEARS | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tower's tensor. Raises KeyError for one that E2B does not have."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, rest = name.removeprefix("vision_tower.encoder.layers.").partition(".")
    tensor, _, last = rest.rpartition(".")
    return f"v.blk.{layer}.{_INSIDE[tensor.removesuffix('.linear')]}.{last}"


def stored_type(kind: str, name: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor, by the checkpoint's name: matrices have the file's, except where the converter insists."""
    if len(shape) == 1 or "position_embedding_table" in name:
        return "F32"
    return "F16" if name == _PATCHES or shape[-1] % 32 else kind


def metadata(tower: VisionTower) -> dict[str, Any]:
    """What llama.cpp's converter writes of the tower."""
    c = tower.config
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.projector_type": "gemma4v",
        "clip.vision.projection_dim": tower.text_hidden_size,
        "clip.vision.image_size": 224,  # not used
        "clip.vision.patch_size": c.patch_size,
        "clip.vision.embedding_length": c.hidden_size,
        "clip.vision.feed_forward_length": c.intermediate_size,
        "clip.vision.block_count": c.num_hidden_layers,
        "clip.vision.attention.head_count": c.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": c.rms_norm_eps,
        "clip.vision.image_mean": [0.0, 0.0, 0.0],
        "clip.vision.image_std": [1.0, 1.0, 1.0],
    }


def write(path: Path, kind: str, seed: int = 0, size: str = "e2b") -> None:
    """Write the file. It gets its name when it is whole."""
    tower = random_vision_tower(size, GemmaConfig.from_text_config(TEXT_CONFIGS[size]), seed)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "clip")
    for key, value in metadata(tower).items():
        add(writer, key, value)
    shapes = tower.config.tensor_shapes(tower.text_hidden_size)
    for name in shapes:
        clip = name.rpartition(".")[2] in CLIPS
        values = _values(tower, name) if not clip else np.array([_bound(tower, name)], np.float32)
        quant = gguf.GGMLQuantizationType[stored_type(kind, name, values.shape)]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _bound(tower: VisionTower, name: str) -> float:
    layer, _, clip = name.rpartition(".")
    return float(tower.clip(layer)[CLIPS.index(clip)])


def _values(tower: VisionTower, name: str) -> np.ndarray:
    """float32; a patch's values stand in the order (rgb, y, x) in GGUF, (y, x, rgb) in the checkpoint."""
    values = np.asarray(tower.tensor(name), np.float32)
    if name == _PATCHES:
        side = tower.config.patch_size
        values = values.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values)


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="That of `edge-gemma synth`.")
def main(kind: str, path: Path, seed: int) -> None:
    """Write the vision tower of this KIND to PATH."""
    write(path, kind, seed)
    click.echo(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
