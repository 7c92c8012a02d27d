"""Tiny random checkpoints in the layout Google ships, made with NumPy alone.

Owns: four small configurations that exercise every variant of the decoder (`KINDS`), deterministic weights for them,
and writing them as a Hugging Face folder (one file or shards, float32, float16 or bfloat16, text-only or multimodal).
Does not know: how a decoder computes; nothing of edge_gemma is imported here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_audio import TOKEN_IDS, tiny_audio_config, tiny_audio_tensors
from tests.tiny_tokenizer import write_tokenizer_json
from tests.tiny_vision import TOKEN_IDS as VISION_IDS
from tests.tiny_vision import tiny_vision_config, tiny_vision_tensors

KINDS = ("e2b", "e4b", "dense", "gemma3")
VOCAB = 640
PLE = 32  # hidden_size_per_layer_input
_TYPES = {"s": "sliding_attention", "F": "full_attention"}
_ROPE4 = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}

# kind -> (layers in order, shared layers, window, D, F, heads, KV heads, head_dim, global head_dim).
# e2b: the top KV producer is a full layer (as released); e4b: it is a sliding one, so that both orders are covered.
_POST_NORM = {"e2b": 0.6, "e4b": 0.6, "dense": 0.8, "gemma3": 1.5}  # how much a branch adds to the residual stream
_SIZES: dict[str, tuple[str, int, int, int, int, int, int, int, int]] = {
    "e2b": ("ssFsFssFsF", 5, 7, 64, 96, 4, 1, 16, 32),
    "e4b": ("sFsFssFsF", 4, 6, 96, 160, 4, 2, 32, 64),
    "dense": ("ssFssF", 0, 8, 64, 128, 8, 4, 16, 32),
    "gemma3": ("ssFssF", 0, 6, 64, 160, 4, 1, 32, 32),
}


def tiny_config(kind: str, *, spelling: str = "released") -> dict[str, Any]:
    """The `text_config` of a kind. `spelling`: "released" (global_head_dim, rope_theta: what Google ships) or
    "saved" (per_layer_config, rope_parameters: what transformers 5.23's save_pretrained writes)."""
    types, shared, window, d, ff, heads, kv_heads, head_dim, global_head_dim = _SIZES[kind]
    config: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": d,
        "initializer_range": 0.02,
        "intermediate_size": ff,
        "layer_types": [_TYPES[t] for t in types],
        "max_position_embeddings": 1024,
        "num_attention_heads": heads,
        "num_hidden_layers": len(types),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "sliding_window": window,
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    if kind == "gemma3":
        return config | _gemma3_words(spelling)
    config |= {
        "attention_k_eq_v": kind == "dense",
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0 if kind == "dense" else PLE,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_kv_shared_layers": shared,
        "rope_parameters": json.loads(json.dumps(_ROPE4)),
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": "vision" if kind == "dense" else None,
        "use_double_wide_mlp": kind == "e2b",
        "vocab_size_per_layer_input": VOCAB,
    }
    override: dict[str, int] = {"head_dim": global_head_dim} | ({"num_key_value_heads": 2} if kind == "dense" else {})
    if spelling == "saved":
        return config | {"per_layer_config": {str(i): dict(override) for i, t in enumerate(types) if t == "F"}}
    return config | {
        "global_head_dim": global_head_dim,
        "num_global_key_value_heads": override.get("num_key_value_heads"),
    }


def _gemma3_words(spelling: str) -> dict[str, Any]:
    words: dict[str, Any] = {
        "_sliding_window_pattern": 3,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 24,  # unlike head_dim, as in the 27B
        "use_bidirectional_attention": False,
    }
    if spelling == "saved":
        full = {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"}
        local = {"rope_theta": 10000.0, "rope_type": "default"}
        return words | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    return words | {"rope_local_base_freq": 10000.0, "rope_scaling": scaling, "rope_theta": 1000000.0}


def tiny_shapes(kind: str, *, unused_kv: bool = False, per_layer: int = PLE) -> dict[str, tuple[int, ...]]:
    """Canonical tensor name -> shape; with `unused_kv` also the K and V the release carries in shared layers."""
    types, shared, _, d, ff, heads, kv_heads, head_dim, global_head_dim = _SIZES[kind]
    depth, ple, gemma4 = len(types), per_layer if kind in ("e2b", "e4b") else 0, kind != "gemma3"
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, d), "norm.weight": (d,)}
    if ple:
        shapes["embed_tokens_per_layer.weight"] = (VOCAB, depth * ple)
        shapes["per_layer_model_projection.weight"] = (depth * ple, d)
        shapes["per_layer_projection_norm.weight"] = (ple,)
    for i, letter in enumerate(types):
        full, is_shared = letter == "F", i >= depth - shared
        hd = global_head_dim if full else head_dim
        kv = hd * (2 if full and kind == "dense" else kv_heads)
        wide = ff * (2 if is_shared and kind == "e2b" else 1)
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "pre_feedforward_layernorm.weight": (d,),
            "post_feedforward_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (heads * hd, d),
            "self_attn.q_norm.weight": (hd,),
            "self_attn.o_proj.weight": (d, heads * hd),
            "mlp.gate_proj.weight": (wide, d),
            "mlp.up_proj.weight": (wide, d),
            "mlp.down_proj.weight": (d, wide),
        }
        if not is_shared or unused_kv:
            layer |= {"self_attn.k_proj.weight": (kv, d), "self_attn.k_norm.weight": (hd,)}
            if not (full and kind == "dense"):
                layer["self_attn.v_proj.weight"] = (kv, d)
        if ple:
            layer |= {
                "per_layer_input_gate.weight": (ple, d),
                "per_layer_projection.weight": (d, ple),
                "post_per_layer_input_norm.weight": (d,),
            }
        if gemma4:
            layer["layer_scalar"] = (1,)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def tiny_weights(kind: str, *, seed: int = 0, dtype: str = "float32", stored: bool = False) -> dict[str, np.ndarray]:
    """Canonical name -> float32 array, rounded to `dtype`. Effective values: Gemma 3's norm weights are 1 + what its
    checkpoint holds; `stored` gives what the checkpoint holds."""
    weights = {}
    for position, (name, shape) in enumerate(sorted(tiny_shapes(kind, unused_kv=True).items())):
        value = _round(_random(kind, name, shape, np.random.default_rng([seed, position])), dtype)
        if kind == "gemma3" and name.endswith("norm.weight"):
            value = _round(value - np.float32(1), dtype)  # the checkpoint's form
            value = value if stored else np.float32(1) + value
        weights[name] = value
    needed = tiny_shapes(kind)
    return {name: value for name, value in weights.items() if stored or name in needed}


def _random(kind: str, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Magnitudes that spread the logits (standard deviation about 4) and keep greedy text from settling on one."""
    if name.endswith("layer_scalar"):
        return rng.uniform(0.6, 1.1, shape).astype(np.float32)
    if name.endswith("norm.weight"):
        value = rng.normal(1.0, 0.25, shape)
        if name.endswith("k_norm.weight"):
            return (value * 1.2 / np.sqrt(shape[0])).astype(
                np.float32
            )  # it replaces 1/sqrt(head_dim), as in the release
        if "post_" in name:
            value *= _POST_NORM[kind]
        if not name.endswith("q_norm.weight"):
            value[rng.random(shape) < (0.4 if name == "norm.weight" else 0.1)] *= -1
            value[rng.integers(shape[0])] *= 4  # one outlier channel
        return value.astype(np.float32)
    if name.startswith("embed_tokens"):
        return rng.normal(0, 0.3, shape).astype(np.float32)
    gain = 0.5 if name.endswith("per_layer_input_gate.weight") else 1.0
    return rng.normal(0, gain / np.sqrt(shape[1]), shape).astype(np.float32)


def _round(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (_bfloat16(value).astype(np.uint32) << 16).view(np.float32)
    return value.astype(dtype).astype(np.float32)


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits, rounded to nearest, ties to even."""
    bits = value.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file: u64 header length, JSON header padded to 8 bytes, data in the header's order.

    Floats are stored as `dtype`; integers as they are, uint16 being the bits of bfloat16."""
    stored_as = {"int8": "I8", "int64": "I64", "uint8": "U8", "uint16": "BF16"}
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, value in tensors.items():
        if value.dtype.kind == "f":
            value = _bfloat16(value) if dtype == "bfloat16" else value.astype(dtype)
        blob = value.tobytes()
        header[name] = {
            "dtype": stored_as.get(value.dtype.name, code),
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_checkpoint(
    folder: Path,
    kind: str,
    *,
    dtype: str = "float32",
    seed: int = 0,
    multimodal: bool = False,
    shards: int = 1,
    spelling: str = "released",
) -> Path:
    """Write a tiny checkpoint of `kind` ("e2b", "e4b", "dense", "gemma3") in Hugging Face's layout; returns `folder`.

    `multimodal`: the `Gemma4ForConditionalGeneration` layout, with tower tensors and unused K and V of shared layers.
    """
    if multimodal and kind == "gemma3":
        raise ValueError("gemma3 is text-only here")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "model.language_model." if multimodal else "model."
    stored = tiny_weights(kind, seed=seed, dtype=dtype, stored=True)
    keep = tiny_shapes(kind, unused_kv=multimodal)
    tensors = {prefix + name: value for name, value in stored.items() if name in keep}
    if multimodal:
        tensors |= _tower_tensors(kind, seed)
    _write_weights(folder, tensors, dtype, shards)
    config = _top_level(kind, tiny_config(kind, spelling=spelling), dtype, multimodal)
    _write_json(folder / "config.json", config)
    if kind != "gemma3":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_tokenizer_json(folder, vocab_size=VOCAB)
    ids = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]}
    eos = [ids["<eos>"]] + ([] if kind == "gemma3" else [ids["<turn|>"], ids["<|tool_response>"]])
    words = {"bos_token_id": ids["<bos>"], "eos_token_id": eos, "pad_token_id": ids["<pad>"]}
    _write_json(
        folder / "generation_config.json", words | {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    )
    return folder


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    weight_map, total = {}, 0
    for part, names in enumerate(np.array_split(np.array(list(tensors)), shards), start=1):
        file = f"model-{part:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {str(n): tensors[str(n)] for n in names}, dtype)
        weight_map |= {str(n): file for n in names}
        total += sum(tensors[str(n)].size for n in names) * (4 if dtype == "float32" else 2)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tower_tensors(kind: str, seed: int) -> dict[str, np.ndarray]:
    """A vision tower and an audio tower, in the release's names and in tiny shapes."""
    d = _SIZES[kind][3]
    tensors = tiny_vision_tensors(d, seed=seed)
    if kind != "dense":
        tensors |= tiny_audio_tensors(d, seed=seed)
    return {f"model.{name}": value for name, value in tensors.items()}


def _top_level(kind: str, text_config: dict[str, Any], dtype: str, multimodal: bool) -> dict[str, Any]:
    """config.json: the text configuration itself, or wrapped as `Gemma4ForConditionalGeneration` is."""
    common = {"dtype": dtype, "transformers_version": "5.23.0"}
    if not multimodal:
        architecture = "Gemma3ForCausalLM" if kind == "gemma3" else "Gemma4ForCausalLM"
        return {"architectures": [architecture]} | text_config | common
    audio = tiny_audio_config() | {"dtype": dtype}
    return (
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "audio_config": None if kind == "dense" else audio,
            "audio_token_id": TOKEN_IDS["audio_token_id"],
            "boa_token_id": TOKEN_IDS["boa_token_id"],
            "eoa_token_index": TOKEN_IDS["eoa_token_id"],
            "eos_token_id": [1, 106],
            "initializer_range": 0.02,
            "model_type": "gemma4",
            "text_config": text_config | {"dtype": dtype},
            "tie_word_embeddings": True,
            "vision_config": tiny_vision_config(dtype=dtype),
            "vision_soft_tokens_per_image": 280,
        }
        | VISION_IDS
        | common
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# A chat template of Gemma 4's form, written for this project from the description of the format (turns, tools).
CHAT_TEMPLATE = (Path(__file__).parents[1] / "training" / "chat_template.jinja").read_text("utf-8")
