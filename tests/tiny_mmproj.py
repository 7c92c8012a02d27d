"""Tiny towers as GGUF files: as llama.cpp's converter writes an mmproj, and as Ollama writes its single file.

Owns: both spellings, spelled out here a second time; which types the converter gives. Does not know: our readers;
nothing of edge_gemma is imported here. What the converter itself writes of the same tensors is recorded in CONVERTED.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests import tiny_audio, tiny_vision
from tests.tiny_gguf import _add, tiny_metadata, tiny_tensors

D = 64  # hidden size of the tiny E2B
# Digest of names, types, shapes and bytes (but of per_dim_scale) of the files that convert_hf_to_gguf.py --mmproj of
# llama.cpp (in llama-cpp-python 0.3.36) made of tests.tiny.write_checkpoint(..., "e2b", multimodal=True).
CONVERTED = {
    "F32": "90e43a83a02a19ccb20163666a4e5e6fd9623f4958a44253c0b7713f5a964da8",
    "F16": "4e560fc4325977aee08f7448a16334c71799f13527bf746e8608a11331356a2f",
    "BF16": "d4b42cd70c90ef91ec0a5e85a2d7e89715487cca67a9094e669a5fe43215e5fa",
    "Q8_0": "37ff2d8bc297bec7555e584d985455aa1791d1249b21b4de93513ec32e3fe649",
}

_LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out", "self_attn.post": "attn_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "feed_forward1.ffw_layer_1": "ffn_up", "feed_forward1.ffw_layer_2": "ffn_down",
    "feed_forward2.ffw_layer_1": "ffn_up_1", "feed_forward2.ffw_layer_2": "ffn_down_1",
    "lconv1d.linear_start": "conv_pw1", "lconv1d.linear_end": "conv_pw2",
}  # fmt: skip
_OTHER = {
    "input_layernorm": "ln1", "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "feed_forward1.pre_layer_norm": "ffn_norm", "feed_forward1.post_layer_norm": "ffn_post_norm",
    "feed_forward2.pre_layer_norm": "ffn_norm_1", "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "norm_pre_attn": "attn_pre_norm", "norm_post_attn": "attn_post_norm", "norm_out": "ln2",
    "lconv1d.pre_layer_norm": "conv_norm", "lconv1d.conv_norm": "norm_conv", "lconv1d.depthwise_conv1d": "conv_dw",
    "self_attn.relative_k_proj": "attn_k_rel", "self_attn.per_dim_scale": "per_dim_scale",
}  # fmt: skip
_SINGLE = {
    "vision_tower.patch_embedder.input_proj": "v.patch_embd",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd",
    "vision_tower.std_bias": "v.std_bias", "vision_tower.std_scale": "v.std_scale",
    "embed_vision.embedding_projection": "mm.input_projection",
    "embed_audio.embedding_projection": "mm.a.input_projection",
    "audio_tower.subsample_conv_projection.layer0.conv": "a.conv1d.0",
    "audio_tower.subsample_conv_projection.layer0.norm": "a.conv1d.0.norm",
    "audio_tower.subsample_conv_projection.layer1.conv": "a.conv1d.1",
    "audio_tower.subsample_conv_projection.layer1.norm": "a.conv1d.1.norm",
    "audio_tower.subsample_conv_projection.input_proj_linear": "a.input_projection",
    "audio_tower.output_proj": "a.pre_encode.out",
}  # fmt: skip
# Audio names of llama.cpp -> Ollama's.
_OLLAMA = {
    "attn_pre_norm": "ln1", "attn_post_norm": "ln2", "ln2": "layer_pre_norm", "attn_k_rel": "linear_pos",
    "a.input_projection": "a.pre_encode.out", "a.pre_encode.out": "mm.a.fc",
}  # fmt: skip


def mmproj_name(name: str, *, ollama: bool = False) -> str:
    """audio_tower.layers.0.norm_out.weight -> a.blk.0.ln2.weight"""
    plain, _, suffix = name.rpartition(".")
    if name in ("vision_tower.patch_embedder.position_embedding_table",) or name.endswith("per_dim_scale"):
        plain, suffix = name, "weight"
    if name in ("vision_tower.std_bias", "vision_tower.std_scale"):
        return _SINGLE[name]
    if ".layers." not in plain:
        single = _SINGLE[plain]
        return f"{_OLLAMA.get(single, single) if ollama else single}.{suffix}"
    tower, _, rest = plain.partition(".layers.")
    index, _, rest = rest.partition(".")
    rest = rest.removesuffix(".linear")
    short = _LINEAR.get(rest) or _OTHER[rest]
    audio = tower == "audio_tower"
    if ollama and audio:
        short = _OLLAMA.get(short, short)
    return f"{'a' if audio else 'v'}.blk.{index}.{short}.{suffix}"


def mmproj_values(name: str, value: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor as an mmproj has it."""
    if name.endswith("patch_embedder.input_proj.weight"):
        return np.ascontiguousarray(value.reshape(len(value), 16, 16, 3).transpose(0, 3, 1, 2))
    if name.endswith("per_dim_scale"):
        return np.logaddexp(0, value.astype(np.float64)).astype(np.float32)
    if name.endswith("depthwise_conv1d.weight"):
        return value[:, 0]
    return value.reshape(1) if value.ndim == 0 else value


def mmproj_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type that the converter gives a tensor. name: the file's; kind: "F32", "F16", "BF16", "Q8_0"."""
    if len(shape) == 1 or name.endswith("_norm.weight") or name.startswith("v.position_embd"):
        return "F32"
    if name.startswith("a.") and any(part in name for part in (".conv1d.", ".conv_dw.", "a.input_proj")):
        return "F32"
    if name.startswith("v.patch_embd"):
        return "F16" if kind == "F16" else "F32"
    return kind if kind != "Q8_0" or shape[-1] % 32 == 0 else "F16"


def tower_tensors(*, grid: bool = False, standardize: bool = False) -> dict[str, np.ndarray]:
    """Both towers in the checkpoint's names, as tests.tiny.write_checkpoint has them for an E2B."""
    vision = tiny_vision.tiny_vision_tensors(D, grid=grid, standardize=standardize)
    return vision | tiny_audio.tiny_audio_tensors(D, grid=4 if grid else 0)


def mmproj_metadata(*, ollama: bool = False) -> dict[str, Any]:
    """The keys that are about towers."""
    audio: dict[str, Any] = {
        "embedding_length": tiny_audio.HIDDEN, "feed_forward_length": 4 * tiny_audio.HIDDEN,
        "block_count": tiny_audio.LAYERS, "attention.head_count": tiny_audio.HEADS,
        "attention.layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "embedding_length": tiny_vision.HIDDEN, "feed_forward_length": tiny_vision.WIDE,
        "block_count": tiny_vision.LAYERS, "attention.head_count": tiny_vision.HEADS,
        "attention.layer_norm_epsilon": 1e-6, "patch_size": 16,
    }  # fmt: skip
    if ollama:
        audio |= {"conv_kernel_size": tiny_audio.TAPS}
        vision |= {"num_channels": 3, "projector.scale_factor": 3}
        prefix, general = "gemma4", {}
    else:
        audio |= {"projection_dim": D, "projector_type": "gemma4a", "num_mel_bins": 128}
        vision |= {"projection_dim": D, "projector_type": "gemma4v", "image_size": 224}
        vision |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        prefix = "clip"
        general = {"general.architecture": "clip", "general.type": "mmproj"}
        general |= {"clip.has_vision_encoder": True, "clip.has_audio_encoder": True}
    words = {f"audio.{k}": v for k, v in audio.items()} | {f"vision.{k}": v for k, v in vision.items()}
    return general | {f"{prefix}.{k}": v for k, v in words.items()}


def write_mmproj(
    path: Path,
    kind: str = "F32",
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], object] = lambda stored: None,
) -> Path:
    """An mmproj. tensors: in the checkpoint's names; metadata: keys to change, None to leave out; change: of the
    tensors as they are stored."""
    stored = {mmproj_name(name): mmproj_values(name, value) for name, value in (tensors or tower_tensors()).items()}
    change(stored)
    return _write(path, mmproj_metadata() | dict(metadata or {}), stored, kind)


def write_single_file(path: Path, kind: str = "F32", metadata: Mapping[str, Any] | None = None) -> Path:
    """Decoder and towers in one file, as Ollama has them."""
    towers = {mmproj_name(n, ollama=True): mmproj_values(n, v) for n, v in tower_tensors().items()}
    words = tiny_metadata("e2b") | mmproj_metadata(ollama=True) | dict(metadata or {})
    return _write(path, words, tiny_tensors("e2b") | towers, kind, towers=set(towers))


def _write(
    path: Path, words: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: str, towers: set[str] | None = None
) -> Path:
    words = {key: value for key, value in words.items() if value is not None}
    writer = gguf.GGUFWriter(path, words.pop("general.architecture", "clip"))
    for key, value in words.items():
        _add(writer, key, value)
    for name, value in tensors.items():
        chosen = mmproj_type(name, value.shape, kind) if towers is None or name in towers else "F32"
        raw = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def digest(path: Path) -> str:
    """Of what a GGUF file's tensors are, in order of their names. Not of per_dim_scale, whose softplus may differ in
    its last bit."""
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}\n".encode())
        if "per_dim_scale" not in tensor.name:
            found.update(tensor.data.tobytes())
    return found.hexdigest()
