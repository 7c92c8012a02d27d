"""Tiny random checkpoints in the official QAT schema (`quant_method` "gemma"): E2B's architecture, the towers' names.

Owns: integers, scales and activation scales drawn at random in magnitudes that keep the activations within them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.config import GemmaConfig
from tests import tiny
from tests.tiny_audio import tiny_audio_tensors
from tests.tiny_vision import tiny_vision_tensors

PLE = 256  # hidden_size_per_layer_input: one scale a layer's slice, as released
QUANTIZATION: dict[str, Any] = {  # the released words, with the tiny model's layer numbers
    "quant_method": "gemma",
    "num_bits": 4,
    "quantize_embeddings": True,
    "module_quant_configs": {
        "^lm_head$": {"num_bits": 2},
        r"audio_tower(?!.*lconv1d\.linear_start)": {"num_bits": 2},
        r"language_model\.embed_tokens$": {"num_bits": 2},
        r"language_model\.embed_tokens_per_layer$": {"num_bits": 4},
        r"language_model\.layers\.([0-3]|4)\.mlp\.": {"num_bits": 4},
        r"language_model\.layers\.\d+\.mlp\.": {"num_bits": 2},
        r"language_model\.layers\.\d+\.per_layer_input_gate$": {"num_bits": 8},
        r"language_model\.layers\.\d+\.per_layer_projection$": {"num_bits": 8},
        r"language_model\.layers\.\d+\.self_attn\.": {},
    },
    "modules_to_not_convert": [
        "model.vision_tower", "model.audio_tower", "relative_k_proj", "model.embed_audio", "model.embed_vision",
        "per_layer_model_projection",
    ],
}  # fmt: skip


def text_config(kind: str = "e2b") -> dict[str, Any]:
    """`kind`: "e2b", the tiny one; "full_width", one full-attention layer of E2B's own sizes."""
    words = tiny.tiny_config("e2b") | {"hidden_size_per_layer_input": PLE, "tie_word_embeddings": False}
    if kind == "e2b":
        return words
    return words | {
        "hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_hidden_layers": 1, "layer_types": ["full_attention"], "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    }  # fmt: skip


def bits_of(name: str) -> int:
    """What QUANTIZATION says of a canonical tensor name; 0: stays as it is."""
    if "norm" in name or name.endswith(("layer_scalar", "per_layer_model_projection.weight")):
        return 0
    if name in ("lm_head.weight", "embed_tokens.weight"):
        return 2
    if ".per_layer" in name:
        return 8
    return 2 if ".mlp." in name and int(name.split(".")[1]) > 4 else 4


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """int [rows, k] -> uint8, low bits first, offset binary; 8 bits: int8."""
    if bits == 8:
        return values.astype(np.int8)
    per_byte = 8 // bits
    u = np.pad(values + (1 << (bits - 1)), ((0, 0), (0, -values.shape[1] % per_byte)))
    return sum(u[:, i::per_byte] << (bits * i) for i in range(per_byte)).astype(np.uint8)


def qat_tensors(
    seed: int = 0, *, calibrated: bool = True, narrow: bool = False, kind: str = "e2b"
) -> dict[str, np.ndarray]:
    """Canonical names -> arrays as stored: integers, float32 scales, and bfloat16 bits (uint16) of what stays.

    narrow: inputs of 8-bit modules go beyond both ends of their steps.
    """
    shapes = tiny.tiny_shapes("e2b", unused_kv=True, per_layer=PLE) | {"lm_head.weight": (tiny.VOCAB, 64)}
    if kind == "full_width":
        shapes = GemmaConfig.from_text_config(text_config(kind)).tensor_shapes()
    tensors: dict[str, np.ndarray] = {}
    for position, (name, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng([seed, position])
        bits = bits_of(name)
        if not bits:
            tensors[name] = tiny._bfloat16(tiny._random("e2b", name, shape, rng))
            continue
        tensors |= _packed(name.removesuffix(".weight"), shape, bits, rng, calibrated)
        if narrow and bits == 8:
            tensors[name.replace("weight", "input_activation_scale")] *= np.float32(0.15)
    for i in range(text_config(kind)["num_hidden_layers"]):
        for which in "kv":
            tensors[f"layers.{i}.self_attn.{which}_cache_scale"] = np.array(4 / 127 * (1 + i / 10), np.float32)
    return tensors


def _packed(
    module: str, shape: tuple[int, ...], bits: int, rng: np.random.Generator, calibrated: bool
) -> dict[str, np.ndarray]:
    half = 1 << (bits - 1)
    values = rng.integers(-half, half, shape)
    deviation = 0.3 if module.startswith("embed") else 1 / math.sqrt(shape[1])
    blocks = shape[1] // 256 if module == "embed_tokens_per_layer" else 1
    spread = rng.uniform(0.7, 1.3, (shape[0], blocks)) * deviation / (half / math.sqrt(3))
    scales = spread.astype(np.float32)
    if module.startswith("embed"):
        return {f"{module}.embedding_quantized": pack(values, bits), f"{module}.embedding_scale": scales}
    steps = rng.uniform(2, 5, 2) / 127 * (3 if module.endswith(("down_proj", "input_gate")) else 1)
    if module == "lm_head":  # logits in steps would tie
        scales, steps[1] = 4 * scales, 0
    return {
        f"{module}.weight": pack(values, bits),
        f"{module}.weight_scale": scales,
        f"{module}.input_activation_scale": np.array(steps[0] if calibrated else 0, np.float32),
        f"{module}.output_activation_scale": np.array(steps[1] if calibrated else 0, np.float32),
    }


AUDIO_FLOATS = ["input_proj_linear", "output_proj", "relative_k_proj"]  # of the tower; not packed in the release


def audio_bits(name: str) -> int:
    """What the released patterns say of a tensor of the audio tower; 0: stays as it is."""
    return (4 if "linear_start" in name else 2) if name.endswith(".linear.weight") else 0


def qat_audio_tensors(text_hidden_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Name (without `model.`) -> array as stored: the linear layers packed, without clip bounds."""
    tensors: dict[str, np.ndarray] = {}
    for position, (name, value) in enumerate(tiny_audio_tensors(text_hidden_size, seed=seed).items()):
        bits = audio_bits(name)
        if bits:
            rng = np.random.default_rng([seed, 99, position])
            tensors |= _packed(name.removesuffix(".weight"), value.shape, bits, rng, calibrated=True)
            if "q_proj" in name or "k_proj" in name:  # in some layers q, k and v share their input's step
                step = np.float32(4 / 127) if "layers.1" in name else np.float32(rng.uniform(3, 5) / 127)
                tensors[name.replace("weight", "input_activation_scale")] = np.array(step)
            if "layers.1.self_attn.v_proj" in name:
                tensors[name.replace("weight", "input_activation_scale")] = np.array(np.float32(4 / 127))
        elif not name.endswith(("_min", "_max")):
            tensors[name] = value
    return tensors


def dequantised_audio(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with float weights under their names; activation scales stay."""
    tensors = dict(stored)
    for name, value in stored.items():
        if bits := audio_bits(name):
            scales = tensors.pop(name.replace("weight", "weight_scale"))
            tensors[name] = unpack(value, bits) * scales
    return tensors


def qat_vision_tensors(text_hidden_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """As `qat_audio_tensors`, of the vision tower: linear layers in 8 bits."""
    tensors: dict[str, np.ndarray] = {}
    for position, (name, value) in enumerate(tiny_vision_tensors(text_hidden_size, seed=seed, clipped=False).items()):
        if name.endswith(".linear.weight"):
            rng = np.random.default_rng([seed, 98, position])
            tensors |= _packed(name.removesuffix(".weight"), value.shape, 8, rng, calibrated="layers.1.mlp" not in name)
        else:
            tensors[name] = value
    return tensors


def dequantised_vision(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with float weights under their names; activation scales stay."""
    tensors = {name: value for name, value in stored.items() if not name.endswith("weight_scale")}
    for name in stored:
        if name.endswith(".linear.weight"):
            tensors[name] = stored[name] * stored[f"{name}_scale"]
    return tensors


def unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack` for 2 and 4 bits, by way of single bits: int8."""
    single = np.unpackbits(stored, axis=1, bitorder="little").reshape(len(stored), -1, bits)
    return ((single << np.arange(bits)).sum(axis=2) - (1 << (bits - 1))).astype(np.int8)


def write_qat_checkpoint(
    folder: Path, *, seed: int = 0, shards: int = 1, kind: str = "e2b", packed_audio: bool = False,
    packed_vision: bool = False, **options: bool,
) -> Path:  # fmt: skip
    """The released layout: `Gemma4ForConditionalGeneration`'s names with tower tensors. Returns `folder`.

    packed_audio, packed_vision: a tower's linear layers are packed too, else they are floats.
    """
    tiny.write_checkpoint(folder, "e2b", multimodal=True)
    (folder / "model.safetensors").unlink()
    prefixed = {
        name if name.startswith("lm_head.") else f"model.language_model.{name}": value
        for name, value in qat_tensors(seed, kind=kind, **options).items()
    }
    towers, words = tiny._tower_tensors("e2b", seed), QUANTIZATION
    config = json.loads((folder / "config.json").read_text())
    if packed_audio:
        towers = {name: value for name, value in towers.items() if "audio" not in name}
        audio = qat_audio_tensors(text_config(kind)["hidden_size"], seed=seed)
        towers |= {f"model.{name}": value for name, value in audio.items()}
        config["audio_config"] |= {"use_clipped_linears": False}
        skipped = [name for name in QUANTIZATION["modules_to_not_convert"] if name != "model.audio_tower"]
        words = QUANTIZATION | {"modules_to_not_convert": skipped + AUDIO_FLOATS}
    if packed_vision:
        towers = {name: value for name, value in towers.items() if "vision" not in name}
        vision = qat_vision_tensors(text_config(kind)["hidden_size"], seed=seed)
        towers |= {f"model.{name}": value for name, value in vision.items()}
        config["vision_config"] |= {"use_clipped_linears": False}
        skipped = [name for name in words["modules_to_not_convert"] if name != "model.vision_tower"]
        patterns = words["module_quant_configs"] | {"vision_tower": {"num_bits": 8}}
        words = words | {
            "modules_to_not_convert": [*skipped, "model.vision_tower.patch_embedder"],
            "module_quant_configs": patterns,
        }
    tiny._write_weights(folder, prefixed | towers, "float32", shards)
    config["text_config"] |= text_config(kind)
    config |= {"tie_word_embeddings": False, "quantization_config": words}
    tiny._write_json(folder / "config.json", config)
    return folder
