"""A tiny random audio tower in the checkpoint's names, made with NumPy alone; clip bounds that bind, some infinite.

Does not know how an encoder computes; nothing of edge_gemma is imported here.
"""

import numpy as np

from tests.tiny_tokenizer import SPECIAL_TOKENS

HIDDEN, LAYERS, HEADS, CHANNELS, PROJECTED, TAPS = 32, 3, 4, 8, 48, 5
TOKEN_IDS = {
    "audio_token_id": SPECIAL_TOKENS.index("<|audio|>"),
    "boa_token_id": SPECIAL_TOKENS.index("<|audio>"),
    "eoa_token_id": SPECIAL_TOKENS.index("<audio|>"),
}
LINEARS = {
    "feed_forward1.ffw_layer_1": (4 * HIDDEN, HIDDEN), "feed_forward1.ffw_layer_2": (HIDDEN, 4 * HIDDEN),
    "feed_forward2.ffw_layer_1": (4 * HIDDEN, HIDDEN), "feed_forward2.ffw_layer_2": (HIDDEN, 4 * HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.post": (HIDDEN, HIDDEN), "lconv1d.linear_start": (2 * HIDDEN, HIDDEN),
    "lconv1d.linear_end": (HIDDEN, HIDDEN),
}  # fmt: skip
NORMS = (
    "feed_forward1.pre_layer_norm", "feed_forward1.post_layer_norm", "feed_forward2.pre_layer_norm",
    "feed_forward2.post_layer_norm", "norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm",
    "lconv1d.conv_norm",
)  # fmt: skip


def tiny_audio_config() -> dict[str, object]:
    """An `audio_config`."""
    return {
        "model_type": "gemma4_audio",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "silu",
        "subsampling_conv_channels": [128, CHANNELS],  # the reference derives the mel bins from the first
        "conv_kernel_size": TAPS,
        "residual_weight": 0.5,
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_logit_cap": 50.0,
        "attention_invalid_logits_value": -1e9,
        "use_clipped_linears": True,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1e10,
        "output_proj_dims": PROJECTED,
    }


def tiny_audio_tensors(text_hidden_size: int, *, seed: int = 0, grid: int = 0) -> dict[str, np.ndarray]:
    """Name (without `model.`) -> float32. grid: linear weights are integers of that many bits times a
    scale a row."""
    rng = np.random.default_rng([seed, 77])

    def matrix(*shape: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0, gain / np.sqrt(np.prod(shape[1:])), shape)

    def norm(size: int) -> np.ndarray:
        return rng.normal(1, 0.3, size) * np.where(rng.random(size) < 0.1, -1, 1)

    convs = "audio_tower.subsample_conv_projection"
    tensors = {
        f"{convs}.layer0.conv.weight": matrix(128, 1, 3, 3),
        f"{convs}.layer0.norm.weight": norm(128),
        f"{convs}.layer1.conv.weight": matrix(CHANNELS, 128, 3, 3),
        f"{convs}.layer1.norm.weight": norm(CHANNELS),
        f"{convs}.input_proj_linear.weight": matrix(HIDDEN, 32 * CHANNELS),
        "audio_tower.output_proj.weight": matrix(PROJECTED, HIDDEN),
        "audio_tower.output_proj.bias": rng.normal(0, 0.3, PROJECTED),
        "embed_audio.embedding_projection.weight": matrix(text_hidden_size, PROJECTED),
    }
    for i in range(LAYERS):
        at = f"audio_tower.layers.{i}"
        tensors |= {f"{at}.{name}.weight": norm(HIDDEN) for name in NORMS}
        tensors[f"{at}.self_attn.per_dim_scale"] = rng.normal(0, 1, HIDDEN // HEADS)
        tensors[f"{at}.self_attn.relative_k_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{at}.lconv1d.depthwise_conv1d.weight"] = matrix(HIDDEN, 1, TAPS)
        for name, shape in LINEARS.items():
            tensors[f"{at}.{name}.linear.weight"] = _on_grid(shape, grid, rng) if grid else matrix(*shape, gain=1.2)
            bounds = (-2.0, 127 / 64, -2.5, 2.25) if rng.random() < 0.7 else (-np.inf, np.inf, -np.inf, 3.0)
            tensors |= {f"{at}.{name}.{key}": np.array(bound) for key, bound in zip(_CLIPS, bounds, strict=True)}
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


_CLIPS = ("input_min", "input_max", "output_min", "output_max")


def _on_grid(shape: tuple[int, ...], bits: int, rng: np.random.Generator) -> np.ndarray:
    half = 1 << (bits - 1)
    scales = rng.uniform(1, 2, (shape[0], 1)) / half / np.sqrt(shape[1])
    integers = rng.integers(-half, half, shape)
    integers[:, 0] = 1  # a row that has only large integers is not told from one of other steps
    return integers * scales.astype(np.float32)


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    """Noise under a slow envelope, float32 [samples], within -1 to 1."""
    rng = np.random.default_rng([seed, samples])
    envelope = 0.3 * (1 + np.sin(np.arange(samples) / 3000))
    return np.clip(rng.normal(0, 1, samples) * envelope, -1, 1).astype(np.float32)
