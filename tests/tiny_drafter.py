"""Tiny random drafters in the layout Google ships (`Gemma4AssistantForCausalLM`), made with NumPy alone.

Owns: a drafter for the tiny targets "e2b" (a head of centroids), "e4b" and "dense" (a dense head), its deterministic
weights, and writing it as a Hugging Face folder. Does not know: how a drafter computes. Nothing of edge_gemma is
imported here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import VOCAB, _random, tiny_config, write_safetensors

HIDDEN, INTERMEDIATE, HEADS = 32, 64, 4
CENTROIDS, TOP = 40, 6  # 40 groups of 16 tokens
KINDS = ("e2b", "e4b", "dense")


def tiny_drafter_config(kind: str) -> dict[str, Any]:
    """The config.json of the drafter of a tiny target."""
    target = tiny_config(kind)
    kept = (
        "attention_k_eq_v",
        "global_head_dim",
        "head_dim",
        "num_global_key_value_heads",
        "num_key_value_heads",
        "rope_parameters",
        "sliding_window",
        "vocab_size",
    )
    layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    text = {key: target[key] for key in kept} | {
        "attention_bias": False, "enable_moe_block": False, "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": HIDDEN, "hidden_size_per_layer_input": 0,
        "intermediate_size": INTERMEDIATE, "layer_types": layer_types, "max_position_embeddings": 1024,
        "model_type": "gemma4_text", "num_attention_heads": HEADS, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    }  # fmt: skip
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": target["hidden_size"],
        "centroid_intermediate_top_k": TOP,
        "dtype": "float32",
        "model_type": "gemma4_assistant",
        "num_centroids": CENTROIDS,
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.7.0.dev0",
        "use_ordered_embeddings": kind == "e2b",
    }


def tiny_drafter_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Tensor name, as in the file, -> shape."""
    config = tiny_drafter_config(kind)
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (HIDDEN, 2 * backbone),
        "post_projection.weight": (backbone, HIDDEN),
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i, layer_type in enumerate(text["layer_types"]):
        q = text["global_head_dim" if layer_type == "full_attention" else "head_dim"]
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (HIDDEN,) for norm in norms}
        layer |= {
            "self_attn.q_proj.weight": (HEADS * q, HIDDEN),
            "self_attn.q_norm.weight": (q,),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * q),
            "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            "layer_scalar": (1,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if config["use_ordered_embeddings"]:
        shapes["masked_embedding.centroids.weight"] = (CENTROIDS, HIDDEN)
        shapes["masked_embedding.token_ordering"] = (VOCAB,)
    return shapes


def tiny_drafter_weights(kind: str, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Name, as in the file, -> float32 array; the ordering is int64, a permutation of the vocabulary."""
    weights = {}
    for position, (name, shape) in enumerate(sorted(tiny_drafter_shapes(kind).items())):
        rng = np.random.default_rng([seed, position, 22])
        if name.endswith("token_ordering"):
            weights[name] = rng.permutation(shape[0]).astype(np.int64)
        else:
            weights[name] = _random(kind, name.removeprefix("model."), shape, rng)
    return weights


def write_drafter_checkpoint(folder: Path, kind: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write the drafter of a tiny target in Hugging Face's layout; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tiny_drafter_weights(kind, seed=seed), dtype)
    (folder / "config.json").write_text(json.dumps(tiny_drafter_config(kind), indent=2), encoding="utf-8")
    return folder
