"""A tiny random vision tower in the checkpoint's names, made with NumPy alone; clip bounds that bind, some infinite.

Does not know how an encoder computes; nothing of edge_gemma is imported here.
"""

from typing import Any

import numpy as np

from tests.tiny_tokenizer import SPECIAL_TOKENS

HIDDEN, LAYERS, HEADS, HEAD_DIM, WIDE, PLACES = 48, 2, 3, 16, 80, 64
TOKEN_IDS = {
    "image_token_id": SPECIAL_TOKENS.index("<|image|>"),
    "boi_token_id": SPECIAL_TOKENS.index("<|image>"),
    "eoi_token_id": SPECIAL_TOKENS.index("<image|>"),
    "video_token_id": SPECIAL_TOKENS.index("<|video|>"),
}
LINEARS = {
    **{f"self_attn.{name}_proj": (HEADS * HEAD_DIM, HIDDEN) for name in "qkv"},
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def tiny_vision_config(**other: Any) -> dict[str, Any]:
    """A `vision_config`, with keys as the releases write them."""
    return {
        "model_type": "gemma4_vision", "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "global_head_dim": HEAD_DIM,
        "default_output_length": 280, "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": PLACES,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "standardize": False, "use_clipped_linears": True,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "id2label": {"0": "LABEL_0"},
    } | other  # fmt: skip


def tiny_vision_tensors(
    text_hidden_size: int, *, seed: int = 0, grid: bool = False, clipped: bool = True, standardize: bool = False
) -> dict[str, np.ndarray]:
    """Name (without `model.`) -> float32. grid: linear weights are integers of 8 bits times a scale a row."""
    rng = np.random.default_rng([seed, 78])

    def norm(size: int) -> np.ndarray:
        return rng.normal(1, 0.3, size) * np.where(rng.random(size) < 0.1, -1, 1)

    tower = "vision_tower"
    tensors = {
        f"{tower}.patch_embedder.input_proj.weight": rng.normal(0, 1 / 16, (HIDDEN, 768)),
        f"{tower}.patch_embedder.position_embedding_table": rng.normal(0, 1, (2, PLACES, HIDDEN)),
        "embed_vision.embedding_projection.weight": rng.normal(0, HIDDEN**-0.5, (text_hidden_size, HIDDEN)),
    }
    if standardize:
        tensors |= {f"{tower}.std_bias": rng.normal(0, 3, HIDDEN), f"{tower}.std_scale": rng.uniform(0.1, 2, HIDDEN)}
    for i in range(LAYERS):
        at = f"{tower}.encoder.layers.{i}"
        tensors |= {f"{at}.{name}.weight": norm(HIDDEN) for name in NORMS}
        tensors |= {f"{at}.self_attn.{name}_norm.weight": norm(HEAD_DIM) * 0.7 for name in "qk"}
        for name, shape in LINEARS.items():
            tensors[f"{at}.{name}.linear.weight"] = _matrix(shape, rng, grid=grid)
            bounds = (-2.0, 127 / 64, -2.5, 2.25) if rng.random() < 0.7 else (-np.inf, np.inf, -np.inf, 3.0)
            if clipped:
                tensors |= {f"{at}.{name}.{key}": np.array(bound) for key, bound in zip(_CLIPS, bounds, strict=True)}
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


_CLIPS = ("input_min", "input_max", "output_min", "output_max")


def _matrix(shape: tuple[int, ...], rng: np.random.Generator, *, grid: bool) -> np.ndarray:
    if not grid:
        return rng.normal(0, 1.2 / np.sqrt(shape[1]), shape)
    scales = rng.uniform(1, 2, (shape[0], 1)) / 128 / np.sqrt(shape[1])
    integers = rng.integers(-128, 128, shape)
    integers[:, 0] = 1  # a row that has only large integers is not told from one of other steps
    return integers * scales.astype(np.float32)
