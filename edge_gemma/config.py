"""What a Gemma text decoder is made of, resolved once.

Owns: reading a `text_config` in the checkpoint's own words, refusing what it does not know, and resolving every
layer's attention type, head sizes, KV source, MLP width and rotary frequencies into a tuple of `LayerSpec`.
Does not know: files, weights, tokenizers. After this module nobody asks "which variant is this?" again.

Sources: transformers 5.23 `configuration_gemma4.py` and `configuration_gemma3.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edge_gemma.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"

# Keys that say nothing about the arithmetic (training, bookkeeping, special token ids kept elsewhere).
_IRRELEVANT = {
    "_attn_implementation", "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout",
    "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
_COMMON = {
    "attention_bias", "final_logit_softcapping", "head_dim", "hidden_activation", "hidden_size", "intermediate_size",
    "layer_types", "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings",
    "use_bidirectional_attention", "vocab_size",
}  # fmt: skip
_KNOWN = {
    "gemma4_text": _COMMON | {
        "attention_k_eq_v", "enable_moe_block", "global_head_dim", "hidden_size_per_layer_input",
        "moe_intermediate_size", "num_experts", "num_global_key_value_heads", "num_kv_shared_layers",
        "per_layer_config", "top_k_experts", "use_double_wide_mlp", "vocab_size_per_layer_input",
    },
    "gemma3_text": _COMMON | {
        "attn_logit_softcapping", "query_pre_attn_scalar", "rope_local_base_freq", "rope_scaling", "rope_theta",
        "sliding_window_pattern",
    },
}  # fmt: skip

# Sizes a file may claim. Far above any Gemma; they bound what a hostile configuration can make us allocate.
_LIMITS = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 16, "intermediate_size": 1 << 19, "num_hidden_layers": 512,
    "num_attention_heads": 512, "num_key_value_heads": 512, "head_dim": 4096, "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}  # fmt: skip


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, fully resolved. Sizes in elements, frequencies in radians a position."""

    index: int
    layer_type: str  # "sliding_attention" | "full_attention"
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    kv_source: int  # the layer whose K and V this layer reads; its own index where it owns them
    sliding_window: int | None  # keys visible, the current one included; None: all before
    attention_scale: float  # factor on q.k: 1 in Gemma 4, query_pre_attn_scalar ** -0.5 in Gemma 3
    attention_k_eq_v: bool  # no v_proj: V is the raw key projection
    v_norm: bool  # weightless RMS norm on V (Gemma 4)
    rope_theta: float
    rope_factor: float  # positions are divided by this (linear scaling)
    rotary_dim: int  # elements of a head that rotate: pairs (i, i + head_dim / 2) for i < rotary_dim / 2

    @property
    def owns_kv(self) -> bool:
        return self.kv_source == self.index


@dataclass(frozen=True)
class GemmaConfig:
    """A text decoder's configuration; `text_config` keeps the checkpoint's own words for the manifest."""

    model_type: str  # "gemma4_text" | "gemma3_text"
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    hidden_size_per_layer_input: int  # 0: no per-layer embeddings
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    text_config: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def has_layer_scalar(self) -> bool:
        return self.model_type == "gemma4_text"

    @property
    def norm_weight_offset(self) -> float:
        """What a checkpoint's RMS-norm weights lack: Gemma 3 stores w - 1 in safetensors, Gemma 4 stores w."""
        return 1.0 if self.model_type == "gemma3_text" else 0.0

    @cached_property
    def last_kv_producer(self) -> int:
        """Index of the last layer that writes a KV cache: above it only rows that reach the logits matter."""
        return max(layer.kv_source for layer in self.layers)

    @classmethod
    def from_text_config(cls, text_config: Mapping[str, Any]) -> "GemmaConfig":
        """Resolve a checkpoint's `text_config`. Raises ConfigError for anything unknown, missing or unsupported."""
        c = dict(text_config)
        model_type = c.get("model_type")
        if model_type not in _KNOWN:
            raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(sorted(_KNOWN))}")
        unknown = sorted(set(c) - _KNOWN[model_type] - _IRRELEVANT)
        if unknown:
            raise ConfigError(f"unknown configuration keys for {model_type}: {', '.join(unknown)}")
        _refuse_unsupported(c)
        depth = _integer(c, "num_hidden_layers")
        layer_types = _layer_types(c, depth)
        kv_sources = _kv_sources(layer_types, _integer(c, "num_kv_shared_layers", 0))
        ple = _integer(c, "hidden_size_per_layer_input", 0, low=0) if model_type == "gemma4_text" else 0
        vocab = _integer(c, "vocab_size")
        if ple and _integer(c, "vocab_size_per_layer_input", vocab) != vocab:
            raise ConfigError(f"vocab_size_per_layer_input is {c['vocab_size_per_layer_input']}, expected {vocab}")
        softcap = c.get("final_logit_softcapping")
        return cls(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=_integer(c, "hidden_size"),
            rms_norm_eps=_number(c, "rms_norm_eps", 1e-6),
            final_logit_softcapping=None if softcap is None else _number(c, "final_logit_softcapping", 30.0),
            hidden_size_per_layer_input=ple,
            max_position_embeddings=_integer(c, "max_position_embeddings", 131072),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", True)),
            layers=tuple(_layer(c, i, layer_types[i], kv_sources[i]) for i in range(depth)),
            text_config=c,
        )

    def read_by_row(self, name: str) -> bool:
        """Whether a matrix is only ever read row by row: the per-layer table, token embeddings apart from the head."""
        apart = name == "embed_tokens.weight" and not self.tie_word_embeddings
        return apart or name == "embed_tokens_per_layer.weight"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the decoder needs: name (the checkpoint's, without `model.language_model.`) -> shape."""
        d, p, depth = self.hidden_size, self.hidden_size_per_layer_input, self.num_hidden_layers
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, d)}
        if p:
            shapes["embed_tokens_per_layer.weight"] = (self.vocab_size, depth * p)
            shapes["per_layer_model_projection.weight"] = (depth * p, d)
            shapes["per_layer_projection_norm.weight"] = (p,)
        for layer in self.layers:
            shapes |= {f"layers.{layer.index}.{name}": shape for name, shape in self._layer_shapes(layer).items()}
        shapes["norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        d, p, hd, ff = self.hidden_size, self.hidden_size_per_layer_input, layer.head_dim, layer.intermediate_size
        q, kv = layer.num_attention_heads * hd, layer.num_key_value_heads * hd
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.q_norm.weight": (hd,),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
            "pre_feedforward_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (ff, d),
            "mlp.up_proj.weight": (ff, d),
            "mlp.down_proj.weight": (d, ff),
            "post_feedforward_layernorm.weight": (d,),
        }
        if layer.owns_kv:
            shapes |= {"self_attn.k_proj.weight": (kv, d), "self_attn.k_norm.weight": (hd,)}
            if not layer.attention_k_eq_v:
                shapes["self_attn.v_proj.weight"] = (kv, d)
        if p:
            shapes["per_layer_input_gate.weight"] = (p, d)
            shapes["per_layer_projection.weight"] = (d, p)
            shapes["post_per_layer_input_norm.weight"] = (d,)
        if self.has_layer_scalar:
            shapes["layer_scalar"] = (1,)
        return shapes


def _refuse_unsupported(c: Mapping[str, Any]) -> None:
    """Known words with a meaning this runtime does not have."""
    expected = {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "enable_moe_block": (False, None),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False, "vision"),
    }
    for key, allowed in expected.items():
        if c.get(key) not in allowed:
            raise ConfigError(f"{key} is {c[key]!r}, which is not supported (expected {allowed[0]!r})")


def _integer(c: Mapping[str, Any], key: str, default: int | None = None, low: int | None = None) -> int:
    value = c.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the configuration lacks {key}")
    least = low if low is not None else (0 if default == 0 else 1)
    most = _LIMITS.get(key, 1 << 24)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key} is {value!r}, expected an integer from {least} to {most}")
    return value


def _number(c: Mapping[str, Any], key: str, default: float) -> float:
    value = c.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ConfigError(f"{key} is {value!r}, expected a positive number")
    return float(value)


def _mapping(c: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = c.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {type(value).__name__}, expected an object")
    return dict(value)


def _layer_types(c: Mapping[str, Any], depth: int) -> list[str]:
    types = c.get("layer_types")
    if types is None:
        pattern = _integer(c, "sliding_window_pattern", 6)
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(depth)]
    if not isinstance(types, list) or len(types) != depth or not all(t in (SLIDING, FULL) for t in types):
        raise ConfigError(f"layer_types must name {SLIDING} or {FULL} for each of the {depth} layers")
    return [*types[:-1], FULL] if c["model_type"] == "gemma4_text" else types  # the reference forces the last one


def _kv_sources(layer_types: list[str], shared: int) -> list[int]:
    """Shared layers read the last unshared layer of their own type (GEMMA 4: one source a type)."""
    first_shared = len(layer_types) - shared
    if first_shared < 1 and shared:
        raise ConfigError(f"num_kv_shared_layers is {shared}, expected fewer than the {len(layer_types)} layers")
    source: dict[str, int] = {}
    result = []
    for i, layer_type in enumerate(layer_types):
        if i < first_shared:
            source[layer_type] = i
        elif layer_type not in source:
            raise ConfigError(f"layer {i} shares the KV of a {layer_type} layer, but no unshared layer is of that type")
        result.append(source[layer_type])
    return result


def _layer(c: Mapping[str, Any], index: int, layer_type: str, kv_source: int) -> LayerSpec:
    gemma4, full = c["model_type"] == "gemma4_text", layer_type == FULL
    head_dim, kv_heads = _integer(c, "head_dim", 256), _integer(c, "num_key_value_heads")
    k_eq_v = gemma4 and full and bool(c.get("attention_k_eq_v", False))
    if gemma4 and full:
        head_dim = _integer(c, "global_head_dim", 512)
        if k_eq_v:
            kv_heads = _integer(c, "num_global_key_value_heads", kv_heads)
    overrides = {key.lstrip("0") or "0": value for key, value in _mapping(c, "per_layer_config").items()}
    override = _mapping(overrides, str(index))  # transformers pads the layers' numbers to equal length: "05"
    if unknown := sorted(set(override) - {"head_dim", "num_key_value_heads"}):
        raise ConfigError(f"unknown keys in per_layer_config of layer {index}: {', '.join(unknown)}")
    head_dim = _integer(override, "head_dim", head_dim)
    kv_heads = _integer(override, "num_key_value_heads", kv_heads)
    heads = _integer(c, "num_attention_heads")
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"layer {index}: {heads} heads of {head_dim} on {kv_heads} KV heads, expected whole groups and an even size"
        )
    wide = gemma4 and bool(c.get("use_double_wide_mlp", False)) and kv_source != index
    theta, factor, rotary_dim = _rope(c, layer_type, head_dim)
    return LayerSpec(
        index=index,
        layer_type=layer_type,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=_integer(c, "intermediate_size") * (2 if wide else 1),
        kv_source=kv_source,
        sliding_window=None if full else _integer(c, "sliding_window", 512),
        attention_scale=1.0 if gemma4 else _number(c, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_k_eq_v=k_eq_v,
        v_norm=gemma4,
        rope_theta=theta,
        rope_factor=factor,
        rotary_dim=rotary_dim,
    )


def _rope(c: Mapping[str, Any], layer_type: str, head_dim: int) -> tuple[float, float, int]:
    """(theta, linear factor, rotating elements a head) of a layer type, from either spelling of the rope keys."""
    full = layer_type == FULL
    rope = _mapping(_mapping(c, "rope_parameters"), layer_type)
    if not rope:
        if c["model_type"] == "gemma4_text":
            rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25} if full else {}
        elif full:
            rope = _mapping(c, "rope_scaling") | {"rope_theta": c.get("rope_theta", 1e6)}
        else:
            rope = {"rope_theta": c.get("rope_local_base_freq", 1e4)}
    kind = rope.pop("rope_type", "default")
    theta = _number(rope, "rope_theta", 1e6 if full else 1e4)
    factor = _number(rope, "factor", 1.0)
    partial = _number(rope, "partial_rotary_factor", 1.0)
    if unknown := sorted(set(rope) - {"rope_theta", "factor", "partial_rotary_factor"}):
        raise ConfigError(f"unknown rope parameters for {layer_type}: {', '.join(unknown)}")
    if kind not in ("default", "linear", "proportional") or partial > 1 or (partial != 1 and kind != "proportional"):
        raise ConfigError(f"rope_type {kind!r} with partial_rotary_factor {partial} is not supported for {layer_type}")
    return theta, factor, 2 * int(partial * head_dim // 2)
