"""The configuration of a Gemma text decoder, resolved once.

Owns: reading a `text_config` with the checkpoint's own keys (which keys count: config_keys.py), the reference's
defaults, and resolving every layer's attention type, head sizes, KV source, MLP width and rotary frequencies into a
tuple of `LayerSpec`. Does not know: files, weights, tokenizers. No other module distinguishes model variants.

Sources: transformers 5.23 `configuration_gemma4.py` and `configuration_gemma3.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edge_gemma.config_keys import known_keys, with_defaults
from edge_gemma.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
ELSEWHERE = -1  # the kv_source of a drafter's layers, which read K and V of another model

# The keys that are read, and the reference's defaults (transformers' configuration classes).
_COMMON: dict[str, Any] = {
    "attention_bias": False, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216, "layer_types": None,
    "max_position_embeddings": 131072, "model_type": None, "num_attention_heads": 8, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "rope_parameters": None, "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_text": _COMMON | {
        "attention_k_eq_v": False, "enable_moe_block": False, "global_head_dim": 512,
        "hidden_size_per_layer_input": 256, "num_global_key_value_heads": None, "num_hidden_layers": 30,
        "num_kv_shared_layers": 0, "per_layer_config": None, "sliding_window": 512,
        "use_bidirectional_attention": None, "use_double_wide_mlp": False, "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
    "gemma3_text": _COMMON | {
        "attn_logit_softcapping": None, "num_hidden_layers": 26, "per_layer_config": None,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 1e4, "rope_scaling": None, "rope_theta": 1e6,
        "sliding_window": 4096, "sliding_window_pattern": 6, "use_bidirectional_attention": False,
        "vocab_size": 262208,
    },
}  # fmt: skip
# Sizes of experts. They only matter with `enable_moe_block`, which is refused. The first is an older name.
_EXPERTS = {"expert_intermediate_size", "moe_intermediate_size", "num_experts", "top_k_experts"}
KNOWN = {model_type: {*defaults, *_EXPERTS} for model_type, defaults in DEFAULTS.items()}

_ROPE = ("factor", "partial_rotary_factor", "rope_theta", "rope_type", "type")

# The largest accepted sizes, far above any Gemma: they bound what a hostile configuration can make us allocate.
_LIMITS = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 16, "intermediate_size": 1 << 19, "num_hidden_layers": 512,
    "num_attention_heads": 512, "num_key_value_heads": 512, "head_dim": 4096, "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}  # fmt: skip


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, fully resolved. Sizes are numbers of elements."""

    index: int
    layer_type: str  # "sliding_attention" | "full_attention"
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    kv_source: int  # the layer whose K and V this layer reads; its own index where it owns them; or ELSEWHERE
    sliding_window: int | None  # keys that a query sees, its own included; None: all before it
    attention_scale: float  # factor on q.k: 1 in Gemma 4, query_pre_attn_scalar ** -0.5 in Gemma 3
    attention_k_eq_v: bool  # no v_proj: V is the raw key projection
    v_norm: bool  # V gets an RMS norm without weights (Gemma 4)
    rope_theta: float
    rope_factor: float  # positions are divided by this (linear scaling)
    rotary_dim: int  # elements of a head that rotate: pairs (i, i + head_dim / 2) for i < rotary_dim / 2

    @property
    def owns_kv(self) -> bool:
        """True if the layer writes a KV cache of its own."""
        return self.kv_source == self.index


@dataclass(frozen=True)
class GemmaConfig:
    """A text decoder's configuration, resolved. text_config: as in the checkpoint, for the manifest."""

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
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def has_layer_scalar(self) -> bool:
        """True if each layer's output is multiplied by a scalar (Gemma 4)."""
        return self.model_type == "gemma4_text"

    @property
    def norm_weight_offset(self) -> float:
        """The number to add to a safetensors checkpoint's RMS-norm weights: Gemma 3 stores w - 1, Gemma 4 stores w."""
        return 1.0 if self.model_type == "gemma3_text" else 0.0

    @cached_property
    def last_kv_producer(self) -> int:
        """The index of the last layer that writes a KV cache. Above it only rows that reach the logits are needed."""
        return max(layer.kv_source for layer in self.layers)

    @classmethod
    def from_text_config(
        cls, text_config: Mapping[str, Any], ignored: Collection[str] = (), *, drafter: bool = False
    ) -> "GemmaConfig":
        """Resolve a checkpoint's `text_config`. Keys that are missing or null get the reference's defaults.

        ignored: unknown keys to ignore. drafter: all layers read K and V of another model (drafter_config.py). Raises
        ConfigError for a key that is unknown, or a value not supported.
        """
        model_type = text_config.get("model_type")
        if not isinstance(model_type, str) or model_type not in DEFAULTS:
            raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(sorted(DEFAULTS))}")
        known = known_keys(text_config, KNOWN[model_type], model_type, ignored=ignored)
        c = with_defaults(known, DEFAULTS[model_type])
        _refuse_unsupported(c)
        depth = _integer(c, "num_hidden_layers")
        layer_types = _layer_types(c, depth)
        shared = _integer(c, "num_kv_shared_layers", 0)
        kv_sources = _all_elsewhere(c, depth, shared) if drafter else _kv_sources(layer_types, shared)
        ple = _integer(c, "hidden_size_per_layer_input", 0)
        vocab = _integer(c, "vocab_size")
        if ple and _integer(c, "vocab_size_per_layer_input") != vocab:
            raise ConfigError(f"vocab_size_per_layer_input is {c['vocab_size_per_layer_input']}, expected {vocab}")
        softcap = c.get("final_logit_softcapping")
        return cls(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=_integer(c, "hidden_size"),
            rms_norm_eps=_number(c, "rms_norm_eps"),
            final_logit_softcapping=None if softcap is None else _number(c, "final_logit_softcapping"),
            hidden_size_per_layer_input=ple,
            max_position_embeddings=_integer(c, "max_position_embeddings"),
            tie_word_embeddings=bool(c["tie_word_embeddings"]),
            layers=tuple(_layer(c, i, layer_types[i], kv_sources[i]) for i in range(depth)),
            text_config=c,
        )

    def read_by_row(self, name: str) -> bool:
        """True for a matrix of which only single rows are read: the per-layer table, untied token embeddings."""
        apart = name == "embed_tokens.weight" and not self.tie_word_embeddings
        return apart or name == "embed_tokens_per_layer.weight"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the decoder: name (the checkpoint's, without `model.language_model.`) -> shape."""
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
    """Raises ConfigError for a known key whose value this runtime does not support."""
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


def _integer(c: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size, or `default` if it is missing. 0 is only accepted if it is the default; then it means "none"."""
    value = default if c.get(key) is None else c[key]
    least = 0 if default == 0 else 1
    most = _LIMITS.get(key, 1 << 24)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key} is {value!r}, expected an integer from {least} to {most}")
    return value


def _number(c: Mapping[str, Any], key: str, default: float | None = None) -> float:
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
        pattern = _integer(c, "sliding_window_pattern", 6)  # the reference: 5 sliding layers, then a full one
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(depth)]
    if not isinstance(types, list) or len(types) != depth or not all(t in (SLIDING, FULL) for t in types):
        raise ConfigError(f"layer_types must name {SLIDING} or {FULL} for each of the {depth} layers")
    return [*types[:-1], FULL] if c["model_type"] == "gemma4_text" else types  # the reference makes the last layer full


def _kv_sources(layer_types: list[str], shared: int) -> list[int]:
    """For each layer, the layer whose K and V it reads: shared layers read the last unshared layer of their type."""
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


def _all_elsewhere(c: Mapping[str, Any], depth: int, shared: int) -> list[int]:
    """The KV sources of a drafter's layers. Raises ConfigError for what the reference refuses in one."""
    if shared not in (0, depth):  # the reference takes 0 for all
        raise ConfigError(f"num_kv_shared_layers is {shared}, expected {depth}: all layers of a drafter")
    for key in ("hidden_size_per_layer_input", "use_double_wide_mlp"):
        if c[key]:
            raise ConfigError(f"{key} is {c[key]!r}, which a drafter does not have")
    return [ELSEWHERE] * depth


def _layer(c: Mapping[str, Any], index: int, layer_type: str, kv_source: int) -> LayerSpec:
    gemma4, full = c["model_type"] == "gemma4_text", layer_type == FULL
    head_dim, kv_heads = _integer(c, "head_dim"), _integer(c, "num_key_value_heads")
    k_eq_v = gemma4 and full and bool(c["attention_k_eq_v"])
    if gemma4 and full:
        head_dim = _integer(c, "global_head_dim")
        if k_eq_v:
            kv_heads = _integer(c, "num_global_key_value_heads", kv_heads)
    overrides = {key.lstrip("0") or "0": value for key, value in _mapping(c, "per_layer_config").items()}
    override = _mapping(overrides, str(index))  # transformers pads the layers' numbers to equal length: "05"
    override = known_keys(override, ("head_dim", "num_key_value_heads"), f"per_layer_config of layer {index}")
    head_dim = _integer(override, "head_dim", head_dim)
    kv_heads = _integer(override, "num_key_value_heads", kv_heads)
    heads = _integer(c, "num_attention_heads")
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"layer {index}: {heads} heads of {head_dim} on {kv_heads} KV heads, expected whole groups and an even size"
        )
    wide = gemma4 and bool(c["use_double_wide_mlp"]) and kv_source != index
    theta, factor, rotary_dim = _rope(c, layer_type, head_dim)
    return LayerSpec(
        index=index,
        layer_type=layer_type,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=_integer(c, "intermediate_size") * (2 if wide else 1),
        kv_source=kv_source,
        sliding_window=None if full else _integer(c, "sliding_window"),
        attention_scale=1.0 if gemma4 else _number(c, "query_pre_attn_scalar") ** -0.5,
        attention_k_eq_v=k_eq_v,
        v_norm=gemma4,
        rope_theta=theta,
        rope_factor=factor,
        rotary_dim=rotary_dim,
    )


def _rope(c: Mapping[str, Any], layer_type: str, head_dim: int) -> tuple[float, float, int]:
    """(theta, linear factor, rotary elements of a head) for a layer type, from either spelling of the rope keys."""
    full = layer_type == FULL
    by_type = known_keys(_mapping(c, "rope_parameters"), (SLIDING, FULL), "rope_parameters")
    rope = _mapping(by_type, layer_type)
    if not rope:
        if c["model_type"] == "gemma4_text":
            rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25} if full else {}
        elif full:
            rope = _mapping(c, "rope_scaling") | {"rope_theta": c["rope_theta"]}
        else:
            rope = {"rope_theta": c["rope_local_base_freq"]}
    rope = known_keys(rope, _ROPE, f"the rope parameters of {layer_type}")
    kind = rope.get("rope_type", rope.get("type", "default"))  # `type` is an older spelling
    theta = _number(rope, "rope_theta", 1e6 if full else 1e4)
    factor = _number(rope, "factor", 1.0)
    partial = _number(rope, "partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "proportional") or partial > 1 or (partial != 1 and kind != "proportional"):
        raise ConfigError(f"rope_type {kind!r} with partial_rotary_factor {partial} is not supported for {layer_type}")
    return theta, factor, 2 * int(partial * head_dim // 2)
