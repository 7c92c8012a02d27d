"""The decoder as a formula: a whole sequence at once, plain NumPy, no cache. The oracle of every faster implementation.

Owns: reading a raw `text_config` for itself and the arithmetic of Gemma 4 E2B, E4B and dense, and of Gemma 3 text.
Does not know: anything of edge_gemma. It shares no code with what it judges and favours clarity over speed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
Rounding = Callable[[np.ndarray], np.ndarray]
SLIDING, FULL = "sliding_attention", "full_attention"


def reference_logits(
    weights: Weights, config: dict[str, Any], ids: list[int], dtype: Any = np.float64, rounded: Rounding = lambda x: x
) -> np.ndarray:
    """Logits [len(ids), vocab] in `dtype`. `weights`: canonical names, effective values (Gemma 3's norms with the 1
    added); `config`: a raw text_config in either spelling; `rounded`: done to the input of every matrix product."""
    w = {name: value.astype(dtype) for name, value in weights.items()}
    gemma4, depth, d = config["model_type"] == "gemma4_text", config["num_hidden_layers"], config["hidden_size"]
    eps = config["rms_norm_eps"]
    first_shared = depth - (config.get("num_kv_shared_layers") or 0)
    e = w["embed_tokens.weight"][ids] * np.sqrt(dtype(d))
    ple = _per_layer_inputs(w, config, ids, e, rounded(e)) if config.get("hidden_size_per_layer_input") else None
    h = e
    latest: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # layer type -> K, V of the last unshared layer of that type
    for i, layer_type in enumerate(config["layer_types"]):
        p = f"layers.{i}."
        layer = {name.removeprefix(p): value for name, value in w.items() if name.startswith(p)}
        x = rounded(_rms(h, layer["input_layernorm.weight"], eps))
        if i < first_shared:
            latest[layer_type] = _keys_values(x, layer, config, i, layer_type)
        a = _attention(x, layer, config, i, layer_type, *latest[layer_type])
        a = rounded(a) @ layer["self_attn.o_proj.weight"].T
        h = h + _rms(a, layer["post_attention_layernorm.weight"], eps)
        x = rounded(_rms(h, layer["pre_feedforward_layernorm.weight"], eps))
        m = _gelu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        h = h + _rms(rounded(m) @ layer["mlp.down_proj.weight"].T, layer["post_feedforward_layernorm.weight"], eps)
        if ple is not None:
            g = _gelu(rounded(h) @ layer["per_layer_input_gate.weight"].T) * ple[:, i]
            h = h + _rms(
                rounded(g) @ layer["per_layer_projection.weight"].T, layer["post_per_layer_input_norm.weight"], eps
            )
        if gemma4:
            h = h * layer["layer_scalar"]
    logits = rounded(_rms(h, w["norm.weight"], eps)) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
    cap = config.get("final_logit_softcapping")
    return cap * np.tanh(logits / cap) if cap else logits


def _per_layer_inputs(w: Weights, config: dict[str, Any], ids: list[int], e: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[T, layers, P]: the token's own rows and a projection of its embedding e (x: e rounded), in equal parts."""
    depth, width = config["num_hidden_layers"], config["hidden_size_per_layer_input"]
    tok = w["embed_tokens_per_layer.weight"][ids].reshape(-1, depth, width) * np.sqrt(e.dtype.type(width))
    ctx = (x @ w["per_layer_model_projection.weight"].T) * e.dtype.type(config["hidden_size"]) ** -0.5
    ctx = _rms(ctx.reshape(-1, depth, width), w["per_layer_projection_norm.weight"], config["rms_norm_eps"])
    return (ctx + tok) * e.dtype.type(2) ** -0.5


def _keys_values(x: np.ndarray, layer: Weights, config: dict[str, Any], i: int, layer_type: str) -> tuple:
    """K and V [T, KV heads, head_dim]: K normalised then rotated, V (Gemma 4) normalised without a weight."""
    head_dim, eps = _head_dim(config, i, layer_type), config["rms_norm_eps"]
    raw = (x @ layer["self_attn.k_proj.weight"].T).reshape(len(x), -1, head_dim)
    k = _rope(_rms(raw, layer["self_attn.k_norm.weight"], eps), config, layer_type)
    if config.get("attention_k_eq_v") and layer_type == FULL:
        return k, _rms(raw, None, eps)
    v = (x @ layer["self_attn.v_proj.weight"].T).reshape(len(x), -1, head_dim)
    return k, _rms(v, None, eps) if config["model_type"] == "gemma4_text" else v


def _attention(x: np.ndarray, layer: Weights, config: dict[str, Any], i: int, layer_type: str, k: Any, v: Any) -> Any:
    heads, n = config["num_attention_heads"], len(x)
    q = (x @ layer["self_attn.q_proj.weight"].T).reshape(n, heads, _head_dim(config, i, layer_type))
    q = _rope(_rms(q, layer["self_attn.q_norm.weight"], config["rms_norm_eps"]), config, layer_type)
    if config["model_type"] == "gemma3_text":
        q = q * q.dtype.type(config["query_pre_attn_scalar"]) ** -0.5
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    hidden = distance < 0
    if layer_type == SLIDING:
        hidden |= distance >= config["sliding_window"]
    out = np.empty_like(q)
    for j in range(heads):
        source = j * k.shape[1] // heads
        scores = np.where(hidden, -np.inf, q[:, j] @ k[:, source].T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, j] = (p / p.sum(axis=1, keepdims=True)) @ v[:, source]
    return out.reshape(n, -1)


def _head_dim(config: dict[str, Any], i: int, layer_type: str) -> int:
    if "per_layer_config" in config:
        return config["per_layer_config"].get(str(i), {}).get("head_dim", config["head_dim"])
    return config.get("global_head_dim", config["head_dim"]) if layer_type == FULL else config["head_dim"]


def _rope(x: np.ndarray, config: dict[str, Any], layer_type: str) -> np.ndarray:
    """Rotate pairs (i, i + head_dim/2) of x [T, heads, head_dim] by position * theta^(-2i/head_dim) / factor."""
    n, _, head_dim = x.shape
    half, factor, partial = head_dim // 2, 1.0, 1.0
    theta = 1e6 if layer_type == FULL else 1e4
    rope = (config.get("rope_parameters") or {}).get(layer_type)
    if rope:
        theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
        partial = rope.get("partial_rotary_factor", 1.0)
    elif layer_type == FULL:
        theta, factor = config["rope_theta"], (config.get("rope_scaling") or {}).get("factor", 1.0)
    else:
        theta = config["rope_local_base_freq"]
    frequency = theta ** (-2.0 * np.arange(half) / head_dim) / factor
    frequency[int(partial * half) :] = 0  # proportional: only the leading pairs turn
    angle = np.arange(n)[:, None, None] * frequency
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _rms(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    y = x * (np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) ** x.dtype.type(-0.5)
    return y if weight is None else y * weight


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))
