"""The vision encoder in plain NumPy, float64, from the published description. Nothing of edge_gemma is imported.

Owns: an independent way to the same numbers, with the checkpoint's own tensors. int8: activations rounded to 8 bits,
in steps of each row's largest value. Trained steps are always used.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_EPS = 1e-6


def reference_encoder(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], values: np.ndarray, positions: np.ndarray,
    *, int8: bool = False,
) -> np.ndarray:  # fmt: skip
    """float64 [n / 9, D of the decoder]. values: uint8 [n, 768]; positions: (x, y) [n, 2]."""
    t = {name.removeprefix("vision_tower."): value.astype(np.float64) for name, value in tensors.items()}
    x = (2 * (values / 255 - 0.5)) @ t["patch_embedder.input_proj.weight"].T
    table = t["patch_embedder.position_embedding_table"]
    x = x + table[0][positions[:, 0]] + table[1][positions[:, 1]]
    for i in range(config["num_hidden_layers"]):
        x = _layer(t, f"encoder.layers.{i}", config, x, positions, int8)
    width = positions[:, 0].max() + 1
    cells = positions[:, 0] // 3 + width // 3 * (positions[:, 1] // 3)
    pooled = np.stack([x[cells == cell].mean(0) for cell in range(len(x) // 9)]) * math.sqrt(x.shape[1])
    if "std_bias" in t:
        pooled = (pooled - t["std_bias"]) * t["std_scale"]
    return _rms(pooled) @ t["embed_vision.embedding_projection.weight"].T


def _layer(
    t: Mapping[str, np.ndarray], at: str, config: Mapping[str, Any], x: np.ndarray, positions: np.ndarray, int8: bool
) -> np.ndarray:
    def norm(name: str, value: np.ndarray) -> np.ndarray:
        return _rms(value) * t[f"{at}.{name}.weight"]

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        bounds = [
            float(t.get(f"{at}.{name}.{bound}", default))
            for bound, default in (("input_min", -np.inf), ("input_max", np.inf), ("output_min", -np.inf),
                                   ("output_max", np.inf))
        ]  # fmt: skip
        steps = [float(t.get(f"{at}.{name}.linear.{way}_activation_scale", 0)) for way in ("input", "output")]
        value = np.clip(value, *bounds[:2])
        value = _rounded(value) if int8 and not steps[0] else _in_steps(value, steps[0])
        return np.clip(_in_steps(value @ t[f"{at}.{name}.linear.weight"].T, steps[1]), *bounds[2:])

    heads, hd = config["num_attention_heads"], config["head_dim"]
    y = norm("input_layernorm", x)
    q, k, v = (linear(f"self_attn.{name}_proj", y).reshape(-1, heads, hd) for name in "qkv")
    q = _turn(norm("self_attn.q_norm", q), positions)
    k = _turn(norm("self_attn.k_norm", k), positions)
    scores = np.einsum("qhd,khd->hqk", q, k)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    a = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), _rms(v)).reshape(len(x), -1)
    x = x + norm("post_attention_layernorm", linear("self_attn.o_proj", a))
    y = norm("pre_feedforward_layernorm", x)
    gate, up = linear("mlp.gate_proj", y), linear("mlp.up_proj", y)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return x + norm("post_feedforward_layernorm", linear("mlp.down_proj", gelu * up))


def _rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + _EPS)


def _turn(x: np.ndarray, positions: np.ndarray, theta: float = 100.0) -> np.ndarray:
    """Two halves of a head: the first turns by x, the second by y; pairs are (i, i + quarter) in each half."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-2 * np.arange(half // 2) / half)
    turned = []
    for axis in range(2):
        angles = (positions[:, axis, None] * frequencies)[:, None]
        a, b = np.split(x[..., axis * half : (axis + 1) * half], 2, axis=-1)
        turned += [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate(turned, axis=-1)


def _in_steps(x: np.ndarray, step: float) -> np.ndarray:
    """Rounded to trained steps; 0: as it is."""
    return np.clip(np.rint(x / step), -128, 127) * step if step else x


def _rounded(x: np.ndarray) -> np.ndarray:
    """To 8 bits, each row in steps of its own."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / step) * step
