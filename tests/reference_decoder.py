"""The decoder as a formula: a whole sequence at once, plain NumPy, no cache. The oracle of every faster implementation.

The names and their order are those of edge_gemma/model/decoder.py, so that the two can be diffed.
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
    return ReferenceDecoder(w, config, dtype, rounded).logits(ids)


class ReferenceDecoder:
    """One pass. h: [T, D], every row; x: the rounded input of matrix products; K, V: [T, KV, head_dim]."""

    def __init__(self, w: Weights, config: dict[str, Any], dtype: Any, rounded: Rounding) -> None:
        self.w, self.config, self.dtype, self.rounded = w, config, dtype, rounded
        self.eps = config["rms_norm_eps"]
        self.caches: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # layer type -> K, V of its last unshared layer

    def logits(self, ids: list[int]) -> np.ndarray:
        w = self.w
        logits = self.rounded(self.hidden(ids)) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T
        cap = self.config.get("final_logit_softcapping")
        return cap * np.tanh(logits / cap) if cap else logits

    def hidden(self, ids: list[int]) -> np.ndarray:
        """What enters the head."""
        w, config = self.w, self.config
        first_shared = config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
        h = w["embed_tokens.weight"][ids] * np.sqrt(self.dtype(config["hidden_size"]))
        per_layer = self.per_layer_inputs(h, ids) if config.get("hidden_size_per_layer_input") else None
        for i in range(first_shared):
            h = self.layer(h, self.extend_cache(h, i), i, per_layer)
        for i in range(first_shared, config["num_hidden_layers"]):
            h = self.layer(h, self.attention_input(h, i), i, per_layer)
        return self.norm(h, w["norm.weight"])

    def layer(self, h: np.ndarray, x: np.ndarray, i: int, per_layer: np.ndarray | None) -> np.ndarray:
        """One layer on rows h, with x = input_layernorm(h)."""
        # 1. attention
        a = self.product(self.attention(x, i), i, "self_attn.o_proj")
        h = self.add_norm(h, a, i, "post_attention_layernorm.weight")

        # 2. feed-forward
        x = self.rounded(self.norm(h, self.weight(i, "pre_feedforward_layernorm.weight")))
        m = _gelu(x @ self.weight(i, "mlp.gate_proj.weight").T) * (x @ self.weight(i, "mlp.up_proj.weight").T)
        m = self.product(m, i, "mlp.down_proj")
        h = self.add_norm(h, m, i, "post_feedforward_layernorm.weight")

        # 3. per-layer input
        if per_layer is not None:  # the gate reads h as it is, not normalised
            b = _gelu(self.product(h, i, "per_layer_input_gate")) * per_layer[:, i]
            b = self.product(b, i, "per_layer_projection")
            h = self.add_norm(h, b, i, "post_per_layer_input_norm.weight")

        # 4. scale
        return h * self.weight(i, "layer_scalar") if self.config["model_type"] == "gemma4_text" else h

    def extend_cache(self, h: np.ndarray, i: int) -> np.ndarray:
        """K normalised then rotated, V (Gemma 4) normalised without a weight. Returns x = input_layernorm(h)."""
        config, layer_type = self.config, self.config["layer_types"][i]
        x, head_dim = self.attention_input(h, i), head_dim_of(config, i, layer_type)
        k = (x @ self.weight(i, "self_attn.k_proj.weight").T).reshape(len(x), -1, head_dim)
        if config.get("attention_k_eq_v") and layer_type == FULL:
            v = self.norm(k, None)
        else:
            v = (x @ self.weight(i, "self_attn.v_proj.weight").T).reshape(len(x), -1, head_dim)
            v = self.norm(v, None) if config["model_type"] == "gemma4_text" else v
        k = rope(self.norm(k, self.weight(i, "self_attn.k_norm.weight")), config, layer_type)
        self.caches[layer_type] = k, v
        return x

    def attention(self, x: np.ndarray, i: int) -> np.ndarray:
        """softmax(q k^T * scale + mask) v: [T, H * head_dim]."""
        config, layer_type = self.config, self.config["layer_types"][i]
        heads, n = config["num_attention_heads"], len(x)
        q = (x @ self.weight(i, "self_attn.q_proj.weight").T).reshape(n, heads, head_dim_of(config, i, layer_type))
        q = rope(self.norm(q, self.weight(i, "self_attn.q_norm.weight")), config, layer_type)
        if config["model_type"] == "gemma3_text":
            q = q * q.dtype.type(config["query_pre_attn_scalar"]) ** -0.5
        k, v = self.caches[layer_type]
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

    def per_layer_inputs(self, embeds: np.ndarray, ids: list[int]) -> np.ndarray:
        """[T, layers, P]: (rms(projection(e) / sqrt(D)) + table[id] * sqrt(P)) / sqrt(2), each layer's slice alone."""
        w, depth, p = self.w, self.config["num_hidden_layers"], self.config["hidden_size_per_layer_input"]
        x = (self.rounded(embeds) @ w["per_layer_model_projection.weight"].T) * self.dtype(
            self.config["hidden_size"]
        ) ** -0.5
        x = self.norm(x.reshape(-1, depth, p), w["per_layer_projection_norm.weight"])
        own = w["embed_tokens_per_layer.weight"][ids].reshape(-1, depth, p) * np.sqrt(self.dtype(p))
        return (x + own) * self.dtype(2) ** -0.5

    # -- building blocks -------------------------------------------------------------------------------------------

    def attention_input(self, h: np.ndarray, i: int) -> np.ndarray:
        """x = input_layernorm(h), rounded."""
        return self.rounded(self.norm(h, self.weight(i, "input_layernorm.weight")))

    def norm(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        y = x * (np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(self.eps)) ** x.dtype.type(-0.5)
        return y if weight is None else y * weight

    def add_norm(self, h: np.ndarray, x: np.ndarray, i: int, name: str) -> np.ndarray:
        """h + norm(x, weight)."""
        return h + self.norm(x, self.weight(i, name))

    def product(self, x: np.ndarray, i: int, name: str) -> np.ndarray:
        return self.rounded(x) @ self.weight(i, f"{name}.weight").T

    def weight(self, i: int, name: str) -> np.ndarray:
        return self.w[f"layers.{i}.{name}"]


def head_dim_of(config: dict[str, Any], i: int, layer_type: str) -> int:
    if "per_layer_config" in config:
        return config["per_layer_config"].get(str(i), {}).get("head_dim", config["head_dim"])
    return config.get("global_head_dim", config["head_dim"]) if layer_type == FULL else config["head_dim"]


def rope(x: np.ndarray, config: dict[str, Any], layer_type: str) -> np.ndarray:
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


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))
