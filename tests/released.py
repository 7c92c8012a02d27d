"""Checkpoints under the headers of the published files, made by rule: names, types, shapes, order, sizes to the byte.

Owns: the configurations and tensor lists of Gemma 3 and 4 releases and of folders that others saved again, spelled out
here once more, and writing them over a hole (a file of 10 GB takes a few megabytes). Does not know: our readers;
nothing of edge_gemma is imported here. GGUF files: released_gguf.py.

Weights are zero, norms one, scales small and positive: files that can be opened and converted, not models that speak.
There is no tokenizer: the published one has 32 MB.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape), rows first
VOCAB, PLE = 262144, 256
_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "I8": 1, "U8": 1}
_ORDER = ("I64", "F32", "BF16", "I8", "U8")  # the safetensors library writes wide types first, then by name
CLIPS = ("input_min", "input_max", "output_min", "output_max")
_TYPES = {"s": "sliding_attention", "F": "full_attention"}


@dataclass(frozen=True)
class Size:
    """A decoder's sizes. period: every so manieth layer attends to everything; wide: MLP width of KV-shared layers."""

    layers: int
    hidden: int
    ff: int
    wide: int
    heads: int
    kv_heads: int
    shared: int
    period: int
    head_dim: int = 256
    global_head_dim: int = 512
    ple: int = PLE
    vocab: int = VOCAB

    def full(self, layer: int) -> bool:
        return (layer + 1) % self.period == 0

    def is_shared(self, layer: int) -> bool:
        return layer >= self.layers - self.shared


E2B = Size(layers=35, hidden=1536, ff=6144, wide=12288, heads=8, kv_heads=1, shared=20, period=5)
E4B = Size(layers=42, hidden=2560, ff=10240, wide=10240, heads=8, kv_heads=2, shared=18, period=6)
_GEMMA3 = {"global_head_dim": 256, "ple": 0, "shared": 0, "period": 6}
G3_1B = Size(layers=26, hidden=1152, ff=6912, wide=6912, heads=4, kv_heads=1, **_GEMMA3)
G3_4B = Size(layers=34, hidden=2560, ff=10240, wide=10240, heads=8, kv_heads=4, vocab=262208, **_GEMMA3)


# --- tensor lists -----------------------------------------------------------------------------------------------------


def decoder_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors as released, K and V of KV-shared layers included; names without a prefix."""
    d, p = size.hidden, size.ple
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (size.vocab, d), "norm.weight": (d,)}
    if p:
        shapes["embed_tokens_per_layer.weight"] = (size.vocab, size.layers * p)
        shapes["per_layer_model_projection.weight"] = (size.layers * p, d)
        shapes["per_layer_projection_norm.weight"] = (p,)
    for i in range(size.layers):
        hd = size.global_head_dim if size.full(i) else size.head_dim
        q, kv, ff = size.heads * hd, size.kv_heads * hd, size.wide if size.is_shared(i) else size.ff
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q), "self_attn.q_norm.weight": (hd,), "self_attn.k_norm.weight": (hd,),
            "mlp.gate_proj.weight": (ff, d), "mlp.up_proj.weight": (ff, d), "mlp.down_proj.weight": (d, ff),
        }  # fmt: skip
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        layer |= {f"{norm}_layernorm.weight": (d,) for norm in norms}
        if p:
            layer |= {
                "per_layer_input_gate.weight": (p, d), "per_layer_projection.weight": (d, p),
                "post_per_layer_input_norm.weight": (d,), "layer_scalar": (1,),
            }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _clipped(name: str, shape: tuple[int, ...], clips: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.linear.weight": shape} | ({f"{name}.{clip}": () for clip in CLIPS} if clips else {})


def audio_shapes(hidden: int, clips: bool) -> dict[str, tuple[int, ...]]:
    """The audio tower and its projection."""
    h, convs = 1024, "subsample_conv_projection"
    shapes: dict[str, tuple[int, ...]] = {
        f"{convs}.layer0.conv.weight": (128, 1, 3, 3), f"{convs}.layer0.norm.weight": (128,),
        f"{convs}.layer1.conv.weight": (32, 128, 3, 3), f"{convs}.layer1.norm.weight": (32,),
        f"{convs}.input_proj_linear.weight": (h, h), "output_proj.weight": (1536, h), "output_proj.bias": (1536,),
    }  # fmt: skip
    linears = {
        **{f"feed_forward{i}.ffw_layer_1": (4 * h, h) for i in (1, 2)},
        **{f"feed_forward{i}.ffw_layer_2": (h, 4 * h) for i in (1, 2)},
        **{f"self_attn.{name}": (h, h) for name in ("q_proj", "k_proj", "v_proj", "post")},
        "lconv1d.linear_start": (2 * h, h), "lconv1d.linear_end": (h, h),
    }  # fmt: skip
    norms = [f"feed_forward{i}.{side}_layer_norm" for i in (1, 2) for side in ("pre", "post")]
    norms += ["norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm", "lconv1d.conv_norm"]
    for i in range(12):
        layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (h,) for norm in norms}
        for name, shape in linears.items():
            layer |= _clipped(name, shape, clips)
        layer |= {
            "self_attn.per_dim_scale": (128,), "self_attn.relative_k_proj.weight": (h, h),
            "lconv1d.depthwise_conv1d.weight": (h, 1, 5),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    named = {f"audio_tower.{name}": shape for name, shape in shapes.items()}
    return named | {"embed_audio.embedding_projection.weight": (hidden, 1536)}


def vision_shapes(hidden: int, clips: bool) -> dict[str, tuple[int, ...]]:
    """Gemma 4's vision tower and its projection."""
    h, ff = 768, 3072
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedder.input_proj.weight": (h, 768), "patch_embedder.position_embedding_table": (2, 10240, h)
    }  # fmt: skip
    linears = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
    linears |= {"mlp.gate_proj": (ff, h), "mlp.up_proj": (ff, h), "mlp.down_proj": (h, ff)}
    for i in range(16):
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        layer: dict[str, tuple[int, ...]] = {f"{norm}_layernorm.weight": (h,) for norm in norms}
        layer |= {"self_attn.q_norm.weight": (64,), "self_attn.k_norm.weight": (64,)}
        for name, shape in linears.items():
            layer |= _clipped(name, shape, clips)
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    named = {f"vision_tower.{name}": shape for name, shape in shapes.items()}
    return named | {"embed_vision.embedding_projection.weight": (hidden, h)}


def siglip_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Gemma 3's vision tower and its projector."""
    h, ff, model = 1152, 4304, "vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        "multi_modal_projector.mm_input_projection_weight": (h, hidden),
        "multi_modal_projector.mm_soft_emb_norm.weight": (h,),
        f"{model}embeddings.patch_embedding.weight": (h, 3, 14, 14), f"{model}embeddings.patch_embedding.bias": (h,),
        f"{model}embeddings.position_embedding.weight": (4096, h),
        f"{model}post_layernorm.weight": (h,), f"{model}post_layernorm.bias": (h,),
    }  # fmt: skip
    linears: dict[str, tuple[int, ...]] = {f"self_attn.{x}": (h, h) for x in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": (ff, h), "mlp.fc2": (h, ff), "layer_norm1": (h,), "layer_norm2": (h,)}
    for i in range(27):
        for name, shape in linears.items():
            shapes[f"{model}encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{model}encoder.layers.{i}.{name}.bias"] = shape[:1]
    return shapes


def gemma4_tensors(size: Size, decoder: str = "model.language_model.", towers: str = "model.") -> Tensors:
    """A bfloat16 release of Gemma 4 E2B or E4B; `decoder` and `towers` are what stands in front of the names."""
    shapes = {decoder + name: shape for name, shape in decoder_shapes(size).items()}
    for part in (audio_shapes(size.hidden, True), vision_shapes(size.hidden, True)):
        shapes |= {towers + name: shape for name, shape in part.items()}
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def gemma3_tensors(size: Size, decoder: str, towers: str | None = None) -> Tensors:
    """A bfloat16 release of Gemma 3; towers: None where it is text only."""
    shapes = {decoder + name: shape for name, shape in decoder_shapes(size).items()}
    if towers is not None:
        shapes |= {towers + name: shape for name, shape in siglip_shapes(size.hidden).items()}
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def mobile_tensors(size: Size, per_layer_bits: int, mlp_bits: Callable[[int], int]) -> Tensors:
    """A mobile QAT release: linears packed with their scales, lm_head stored, norms of shared K left out."""
    result: Tensors = {}

    def packed(module: str, shape: tuple[int, ...], bits: int) -> None:
        rows, columns = shape
        result[f"{module}.weight"] = ("I8" if bits == 8 else "U8", (rows, -(-columns * bits // 8)))
        result[f"{module}.weight_scale"] = ("F32", (rows, 1))
        result[f"{module}.input_activation_scale"] = result[f"{module}.output_activation_scale"] = ("F32", ())

    for name, shape in decoder_shapes(size).items():
        module, kind = name.removesuffix(".weight"), name.split(".", 2)[-1]
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        target = f"model.language_model.{module}"
        if name.startswith("embed_tokens"):
            bits, blocks = (per_layer_bits, size.layers) if "per_layer" in name else (2, 1)
            result[f"{target}.embedding_quantized"] = ("U8", (size.vocab, shape[1] * bits // 8))
            result[f"{target}.embedding_scale"] = ("F32", (size.vocab, blocks))
        elif kind.startswith("mlp."):
            packed(target, shape, mlp_bits(layer))
        elif kind.startswith("self_attn.") and "_proj" in kind:
            packed(target, shape, 4)
        elif kind in ("per_layer_input_gate.weight", "per_layer_projection.weight"):
            packed(target, shape, 8)
        elif not (kind == "self_attn.k_norm.weight" and size.is_shared(layer)):
            result[f"model.language_model.{name}"] = ("BF16", shape)
    for i in range(size.layers):
        for x in "kv":
            result[f"model.language_model.layers.{i}.self_attn.{x}_cache_scale"] = ("F32", ())
    for name, shape in (audio_shapes(size.hidden, False) | vision_shapes(size.hidden, False)).items():
        if name.endswith(".linear.weight"):
            bits = 8 if name.startswith("vision") else 4 if "linear_start" in name else 2
            packed(f"model.{name.removesuffix('.weight')}", shape, bits)
        else:
            result[f"model.{name}"] = ("BF16" if name.startswith("vision_tower.") else "F32", shape)
    packed("lm_head", (size.vocab, size.hidden), 2)
    return result


def assistant_tensors() -> Tensors:
    """E2B's drafter."""
    d, ff, heads = 256, 2048, 4
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (d, 2 * E2B.hidden), "post_projection.weight": (E2B.hidden, d),
        "masked_embedding.centroids.weight": (2048, d), "model.embed_tokens.weight": (VOCAB, d),
        "model.norm.weight": (d,),
    }  # fmt: skip
    for i in range(4):
        q = 512 if i == 3 else 256
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        layer: dict[str, tuple[int, ...]] = {f"{norm}_layernorm.weight": (d,) for norm in norms}
        layer |= {
            "self_attn.q_proj.weight": (heads * q, d), "self_attn.q_norm.weight": (q,), "layer_scalar": (1,),
            "self_attn.o_proj.weight": (d, heads * q), "mlp.gate_proj.weight": (ff, d), "mlp.up_proj.weight": (ff, d),
            "mlp.down_proj.weight": (d, ff),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    floats: Tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    return floats | {"masked_embedding.token_ordering": ("I64", (VOCAB,))}


# --- configurations ---------------------------------------------------------------------------------------------------

# Written by older transformers into each part of a configuration.
_BOOKKEEPING: dict[str, Any] = {
    "_name_or_path": "", "architectures": None, "chunk_size_feed_forward": 0, "dtype": "bfloat16",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "output_attentions": False, "output_hidden_states": False,
    "problem_type": None, "return_dict": True,
}  # fmt: skip


def gemma4_config(size: Size, *, mobile: bool = False) -> dict[str, Any]:
    """The released config.json: its spelling of the experts' width is the older one in bfloat16 releases."""
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2,
        "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": size.hidden,
        "hidden_size_per_layer_input": size.ple, "initializer_range": 0.02, "intermediate_size": size.ff,
        "layer_types": [_TYPES["F" if size.full(i) else "s"] for i in range(size.layers)],
        "max_position_embeddings": 131072, "model_type": "gemma4_text", "num_attention_heads": size.heads,
        "num_experts": None, "num_global_key_value_heads": None, "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads, "num_kv_shared_layers": size.shared, "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512, "tie_word_embeddings": not mobile, "top_k_experts": None,
        "use_bidirectional_attention": None, "use_cache": True, "use_double_wide_mlp": size.wide != size.ff,
        "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
        "moe_intermediate_size" if mobile else "expert_intermediate_size": None,
    }  # fmt: skip
    audio = _BOOKKEEPING | {
        "attention_chunk_size": 12, "attention_context_left": 13, "attention_context_right": 0,
        "attention_invalid_logits_value": -1e9, "attention_logit_cap": 50.0, "conv_kernel_size": 5,
        "gradient_clipping": 1e10, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "model_type": "gemma4_audio", "num_attention_heads": 8, "num_hidden_layers": 12, "output_proj_dims": 1536,
        "residual_weight": 0.5, "rms_norm_eps": 1e-06, "subsampling_conv_channels": [128, 32],
        "use_clipped_linears": not mobile,
    }  # fmt: skip
    vision = _BOOKKEEPING | {
        "attention_bias": False, "attention_dropout": 0.0, "default_output_length": 280, "global_head_dim": 64,
        "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 131072, "model_type": "gemma4_vision",
        "num_attention_heads": 12, "num_hidden_layers": 16, "num_key_value_heads": 12, "patch_size": 16,
        "pooling_kernel_size": 3, "position_embedding_size": 10240, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "standardize": False,
        "use_clipped_linears": not mobile,
    }  # fmt: skip
    top = {
        "audio_config": audio, "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999,
        "eoa_token_id": 258883, "eoa_token_index": 258883, "eoi_token_id": 258882, "eos_token_id": [1, 106],
        "image_token_id": 258880, "initializer_range": 0.02, "model_type": "gemma4", "text_config": text,
        "tie_word_embeddings": not mobile, "transformers_version": "5.10.0.dev0" if mobile else "5.5.0.dev0",
        "video_token_id": 258884, "vision_config": vision, "vision_soft_tokens_per_image": 280,
    }  # fmt: skip
    if mobile:
        return top | {"quantization_config": _quantization(size)}
    return top | {"architectures": ["Gemma4ForConditionalGeneration"], "dtype": "bfloat16"}


def assistant_config() -> dict[str, Any]:
    """The released config.json of E2B's drafter."""
    target = gemma4_config(E2B)["text_config"]
    own = {
        "final_logit_softcapping": None, "hidden_size": 256, "hidden_size_per_layer_input": 0,
        "intermediate_size": 2048, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 4, "num_hidden_layers": 4, "num_kv_shared_layers": 4, "moe_intermediate_size": None,
        "tie_word_embeddings": True, "use_double_wide_mlp": False, "vocab_size_per_layer_input": 0,
    }  # fmt: skip
    text = {key: value for key, value in (target | _BOOKKEEPING | own).items() if key != "expert_intermediate_size"}
    return {
        "architectures": ["Gemma4AssistantForCausalLM"], "audio_token_id": 258881, "backbone_hidden_size": 1536,
        "boa_token_id": 256000, "boi_token_id": 255999, "centroid_intermediate_top_k": 32, "dtype": "bfloat16",
        "eoa_token_id": 258883, "eoi_token_id": 258882, "image_token_id": 258880, "model_type": "gemma4_assistant",
        "num_centroids": 2048, "text_config": text, "tie_word_embeddings": True,
        "transformers_version": "5.7.0.dev0", "use_ordered_embeddings": True,
    }  # fmt: skip


def _quantization(size: Size) -> dict[str, Any]:
    """The mobile releases' quantization_config; the MLPs of E2B's KV-shared layers have 2 bits."""
    mlps = {r"language_model\.layers\.(\d|1[0-4])\.mlp\.": 4, r"language_model\.layers\.\d+\.mlp\.": 2}
    if size is E4B:
        mlps = {r"language_model\.layers\.\d+\.mlp\.": 4}
    bits = {
        "^lm_head$": 2, r"audio_tower(?!.*lconv1d\.linear_start)": 2,
        r"audio_tower\.layers\.\d+\.lconv1d\.linear_start\.": 4, r"language_model\.embed_tokens$": 2,
        r"language_model\.embed_tokens_per_layer$": 2 if size is E4B else 4, **mlps,
        r"language_model\.layers\.\d+\.per_layer_input_gate$": 8,
        r"language_model\.layers\.\d+\.per_layer_projection$": 8, r"language_model\.layers\.\d+\.self_attn\.": 4,
        "vision_tower": 8,
    }  # fmt: skip
    return {
        "module_quant_configs": {pattern: {"num_bits": n} for pattern, n in bits.items()},
        "modules_to_not_convert": [
            "model.vision_tower.patch_embedder", "model.audio_tower.subsample_conv_projection",
            "model.audio_tower.output_proj", "relative_k_proj", "model.embed_audio", "model.embed_vision",
            "per_layer_model_projection",
        ],
        "num_bits": 4, "quant_method": "gemma", "quantize_embeddings": True,
    }  # fmt: skip


GEMMA3_1B_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
# Sparse: what is not said is the default of transformers' Gemma3TextConfig.
GEMMA3_4B_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
# What Unsloth adds to a configuration that it saves.
UNSLOTH = {
    "bos_token_id": 2, "eos_token_id": 106, "model_name": "unsloth/gemma-4-E4B-it", "pad_token_id": 0,
    "unsloth_fixed": True, "unsloth_version": "2026.4.4",
}  # fmt: skip
GENERATION = {
    "bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "temperature": 1.0,
    "top_k": 64, "top_p": 0.95,
}  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A checkpoint folder. size: bytes of model.safetensors as published, 0 where that is not known."""

    config: dict[str, Any]
    tensors: Tensors
    size: int = 0
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    generation: dict[str, Any] | None = field(default_factory=lambda: dict(GENERATION))


def releases() -> dict[str, Release]:
    """Every release by its name."""
    e2b, e4b = gemma4_config(E2B), gemma4_config(E4B)
    g3_1b, g3_4b = {"eos_token_id": [1, 106]}, gemma3_tensors(G3_4B, "language_model.model.", "")
    mobile_e2b = mobile_tensors(E2B, 4, lambda layer: 4 if layer < 15 else 2)
    mobile_e4b = mobile_tensors(E4B, 2, lambda layer: 4)
    peft = "base_model.model.model."
    return {
        "e2b": Release(e2b, gemma4_tensors(E2B), 10_246_621_918),
        "e4b": Release(e4b, gemma4_tensors(E4B), 15_992_595_884),
        "e2b-mobile": Release(gemma4_config(E2B, mobile=True), mobile_e2b, 2_458_111_846, None),
        "e4b-mobile": Release(gemma4_config(E4B, mobile=True), mobile_e4b, 3_525_094_516, None),
        "gemma-3-1b": Release(GEMMA3_1B_CONFIG, gemma3_tensors(G3_1B, "model."), generation=g3_1b),
        "gemma-3-4b": Release(GEMMA3_4B_CONFIG, g3_4b, generation=g3_1b),
        # the same, saved by others
        "gemma-3-4b-resaved": Release(
            GEMMA3_4B_CONFIG, gemma3_tensors(G3_4B, "model.language_model.", "model."), generation=g3_1b
        ),
        "e4b-unsloth": Release(e4b | UNSLOTH, gemma4_tensors(E4B), generation=None),
        "e2b-peft": Release(e2b, gemma4_tensors(E2B, peft + "language_model.", peft)),
        "e2b-outer-towers": Release(e2b, gemma4_tensors(E2B, "language_model.model.", "")),
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def header_bytes(tensors: Tensors, metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """(the JSON header, each tensor's offset in the data, bytes of data), as the safetensors library writes them."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        offsets[name], begin = end, end
        end += math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8), offsets, end


def _value(name: str) -> float:
    """What a small tensor holds."""
    if name.endswith(("weight_scale", "embedding_scale")):
        return 0.01
    if name.startswith("lm_head.") or not name.endswith("_scale"):
        bounds = {"input_min": -5.0, "output_min": -5.0, "input_max": 5.0, "output_max": 5.0}
        return bounds.get(name.split(".")[-1], 1.0 if "norm" in name or name.endswith("layer_scalar") else 0.0)
    return 1.0 if name.endswith("per_dim_scale") else 0.05


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """A file of the published size; float tensors of at most a megabyte have values, all else is a hole."""
    raw, offsets, data = header_bytes(tensors, metadata)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        base = file.tell()
        file.truncate(base + data)
        for name, (dtype, shape) in tensors.items():
            count, value = math.prod(shape), np.float32(_value(name))
            small = count <= 1 << 18 or name.endswith("embedding_scale")
            if dtype == "I64":  # an ordering of the vocabulary
                file.seek(base + offsets[name])
                file.write(np.arange(count)[::-1].astype("<i8").tobytes())
            if value and small and dtype in ("F32", "BF16"):
                file.seek(base + offsets[name])
                bits = value if dtype == "F32" else np.uint16(value.view(np.uint32) >> 16)
                file.write(np.full(count, bits).tobytes())


def write_assistant_release(dest: Path) -> Path:
    """The folder of E2B's drafter: config.json and model.safetensors. Returns `dest`."""
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "config.json").write_text(json.dumps(assistant_config(), indent=2))
    write_safetensors(dest / "model.safetensors", assistant_tensors(), {"format": "pt"})
    return dest


def write_release(dest: Path, name: str) -> Path:
    """A release's folder: config.json, generation_config.json and model.safetensors. Returns `dest`."""
    release = releases()[name]
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "config.json").write_text(json.dumps(release.config, indent=2))
    if release.generation is not None:
        (dest / "generation_config.json").write_text(json.dumps(release.generation, indent=2))
    write_safetensors(dest / "model.safetensors", release.tensors, release.metadata)
    return dest
