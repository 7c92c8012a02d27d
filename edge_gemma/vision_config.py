"""The configuration of a Gemma 4 vision encoder, resolved once.

Owns: reading a `vision_config` in the checkpoint's own words (which keys count: config_keys.py), the tensors that an
encoder has. Does not know: files, where tensors are stored, arithmetic.

Source: transformers 5.23 `configuration_gemma4.py` (Gemma4VisionConfig) and `modeling_gemma4.py` (Gemma4VisionModel).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edge_gemma.config_keys import checked_positive, checked_size, known_keys, with_defaults
from edge_gemma.errors import ConfigError

_PART = "the vision tower"  # for messages
# The keys that are read, and what the reference assumes without them.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 768,
    "intermediate_size": 3072, "model_type": "gemma4_vision", "num_attention_heads": 12, "num_hidden_layers": 16,
    "num_key_value_heads": 12, "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 10240,
    "rms_norm_eps": 1e-6, "rope_parameters": None, "standardize": False, "use_clipped_linears": False,
}  # fmt: skip
KNOWN = frozenset({*DEFAULTS, "default_output_length", "global_head_dim", "max_position_embeddings"})
# The most that is believed of a size.
_SIZES = {
    "head_dim": 1 << 10, "hidden_size": 1 << 14, "intermediate_size": 1 << 16, "num_attention_heads": 256,
    "num_hidden_layers": 256, "position_embedding_size": 1 << 16,
}  # fmt: skip
_FIXED = ("attention_bias", "hidden_activation", "model_type", "patch_size", "pooling_kernel_size")
_ROPES = ("axial", "default")  # the same, in newer and older configurations
CLIPS = ("input_min", "input_max", "output_min", "output_max")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes in elements. D hidden_size, H heads, hd head_dim, F intermediate_size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    position_embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    standardize: bool
    use_clipped_linears: bool
    patch_size: int = 16
    pooling_kernel_size: int = 3

    @classmethod
    def from_vision_config(cls, words: Mapping[str, Any], ignored: Collection[str] = ()) -> "VisionConfig":
        """Resolve a checkpoint's `vision_config`; keys that are missing or null have the reference's defaults.

        ignored: names of unknown keys to pass over. Raises ConfigError for anything unknown or not supported.
        """
        c = with_defaults(known_keys(words, KNOWN, _PART, ignored=ignored), DEFAULTS)
        for key in _FIXED:
            if c[key] != DEFAULTS[key]:
                raise ConfigError(
                    f"the vision tower's {key} is {c[key]!r}, which is not supported ({DEFAULTS[key]!r} is)"
                )
        sizes = {key: checked_size(_PART, key, c[key], most) for key, most in _SIZES.items()}
        if sizes["head_dim"] % 4:
            raise ConfigError(f"the vision tower's head_dim is {sizes['head_dim']}, expected a multiple of 4")
        if c["num_key_value_heads"] != c["num_attention_heads"]:
            raise ConfigError("the vision tower shares keys among heads (num_key_value_heads), which is not supported")
        return cls(
            **sizes,
            rms_norm_eps=checked_positive(_PART, "rms_norm_eps", c["rms_norm_eps"]),
            rope_theta=_theta(c.get("rope_parameters")),
            standardize=bool(c["standardize"]),
            use_clipped_linears=bool(c["use_clipped_linears"]),
        )

    def tensor_shapes(self, text_hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the tower and its projection: name (the checkpoint's, without `model.`) -> shape."""
        d, tower = self.hidden_size, "vision_tower"
        shapes: dict[str, tuple[int, ...]] = {
            f"{tower}.patch_embedder.input_proj.weight": (d, 3 * self.patch_size**2),
            f"{tower}.patch_embedder.position_embedding_table": (2, self.position_embedding_size, d),
        }
        for i in range(self.num_hidden_layers):
            shapes |= {f"{tower}.encoder.layers.{i}.{name}.weight": shape for name, shape in self._layer().items()}
        shapes |= {f"{name}.{clip}": () for name in self.clipped() for clip in CLIPS}
        if self.standardize:
            shapes |= {f"{tower}.std_bias": (d,), f"{tower}.std_scale": (d,)}
        return shapes | {"embed_vision.embedding_projection.weight": (text_hidden_size, d)}

    def stored_shapes(self, text_hidden_size: int) -> dict[str, tuple[int, ...]]:
        """As `tensor_shapes`, in a model folder: the four bounds of a layer are one tensor, CLIPS in order."""
        shapes = self.tensor_shapes(text_hidden_size)
        return {name: s for name, s in shapes.items() if s} | {f"{name}.bounds": (4,) for name in self.clipped()}

    def clipped(self) -> list[str]:
        """The names of the layers that clamp their inputs and outputs."""
        if not self.use_clipped_linears:
            return []
        return [f"vision_tower.encoder.layers.{i}.{name}" for i in range(self.num_hidden_layers) for name in LINEARS]

    def _layer(self) -> dict[str, tuple[int, ...]]:
        d, f, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        return {
            **dict.fromkeys(NORMS, (d,)),
            **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_dim,)),
            **dict.fromkeys((f"{name}.linear" for name in LINEARS[:3]), (heads, d)),
            "self_attn.o_proj.linear": (d, heads),
            "mlp.gate_proj.linear": (f, d), "mlp.up_proj.linear": (f, d), "mlp.down_proj.linear": (d, f),
        }  # fmt: skip


def _theta(rope: Any) -> float:
    """Radians of the slowest pair, inverted; 100 in all releases."""
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping) or rope.get("rope_type", "axial") not in _ROPES:
        raise ConfigError(f"the vision tower's rope_parameters are {rope!r:.80}, expected type axial or default")
    return checked_positive(_PART, "rope_theta", rope.get("rope_theta", 100.0))
