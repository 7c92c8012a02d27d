"""The audio tower as its checkpoint describes it: configuration, names and shapes of its tensors.

Owns: reading `audio_config` in the checkpoint's own words (which keys count: config_keys.py); which tensors the tower
has. Does not know: how tensors are stored (the readers), how graphs are built (audio_graph.py).

Source: transformers 5.23 `configuration_gemma4.py` (Gemma4AudioConfig) and `modeling_gemma4.py` (Gemma4AudioModel).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edge_gemma.config_keys import checked_positive, checked_size, known_keys, with_defaults
from edge_gemma.errors import ConfigError
from edge_gemma.export.tower import Tower, TowerSource
from edge_gemma.vision_config import CLIPS

MEL_BINS = 128
_PART = "the audio tower"  # for messages
# The keys that are read, and what the reference assumes without them.
DEFAULTS: dict[str, Any] = {
    "attention_chunk_size": 12, "attention_context_left": 13, "attention_context_right": 0,
    "attention_invalid_logits_value": -1e9, "attention_logit_cap": 50.0, "conv_kernel_size": 5,
    "gradient_clipping": 1e10, "hidden_act": "silu", "hidden_size": 1024, "model_type": "gemma4_audio",
    "num_attention_heads": 8, "num_hidden_layers": 12, "output_proj_dims": 1536, "residual_weight": 0.5,
    "rms_norm_eps": 1e-6, "subsampling_conv_channels": (128, 32), "use_clipped_linears": True,
}  # fmt: skip
KNOWN = frozenset(DEFAULTS)
# The most that is believed of a size.
_SIZES = {
    "hidden_size": 1 << 14, "num_hidden_layers": 256, "num_attention_heads": 256, "conv_kernel_size": 64,
    "attention_context_left": 24, "output_proj_dims": 1 << 16,
}  # fmt: skip
_NUMBERS = ("residual_weight", "attention_logit_cap", "rms_norm_eps", "gradient_clipping")
_FIXED = ("model_type", "hidden_act", "attention_context_right")  # only the default is supported


@dataclass(frozen=True)
class AudioConfig:
    """The conformer's configuration. Sizes in elements."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    conv_kernel_size: int
    attention_context_left: int
    output_proj_dims: int
    residual_weight: float
    attention_logit_cap: float
    rms_norm_eps: float
    gradient_clipping: float  # +-1e10 in the reference: it never binds, and the graphs leave it out
    subsampling_conv_channels: tuple[int, int]
    use_clipped_linears: bool

    @property
    def band(self) -> int:
        """Keys a query sees, itself included, as the reference counts them; DeepMind's own code has one more."""
        return self.attention_context_left - 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_audio_config(cls, audio_config: Mapping[str, Any], ignored: Collection[str] = ()) -> "AudioConfig":
        """Resolve a checkpoint's `audio_config`; keys that are missing or null have the reference's defaults.

        ignored: names of unknown keys to pass over. Raises ConfigError for anything unknown or not supported.
        """
        c = with_defaults(known_keys(audio_config, KNOWN, _PART, ignored=ignored), DEFAULTS)
        for key in _FIXED:
            if c[key] != DEFAULTS[key]:
                raise ConfigError(
                    f"the audio tower's {key} is {c[key]!r}, which is not supported ({DEFAULTS[key]!r} is)"
                )
        sizes = {key: checked_size(_PART, key, c[key], most) for key, most in _SIZES.items()}
        if sizes["hidden_size"] % (2 * sizes["num_attention_heads"]):
            raise ConfigError(
                f"the audio tower has hidden_size {sizes['hidden_size']} on {sizes['num_attention_heads']} heads, "
                "expected an even size in whole heads"
            )
        if c["attention_chunk_size"] != sizes["attention_context_left"] - 1:
            raise ConfigError("the audio tower's attention_chunk_size is not attention_context_left - 1: not supported")
        channels = c["subsampling_conv_channels"]
        if not isinstance(channels, list | tuple) or len(channels) != 2 or channels[0] != MEL_BINS:
            raise ConfigError(f"subsampling_conv_channels is {channels!r}, expected [{MEL_BINS}, n]")
        checked_size(_PART, "subsampling_conv_channels", channels[1], 1 << 12)
        fields: dict[str, Any] = {**sizes, **{key: checked_positive(_PART, key, c[key]) for key in _NUMBERS}}
        return cls(
            **fields,
            subsampling_conv_channels=(channels[0], channels[1]),
            use_clipped_linears=bool(c["use_clipped_linears"]),
        )

    def tensor_shapes(self, text_hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the tower and its projection: name (the checkpoint's, without `model.`) -> shape."""
        h, (first, second) = self.hidden_size, self.subsampling_conv_channels
        convs = "audio_tower.subsample_conv_projection"
        shapes: dict[str, tuple[int, ...]] = {
            f"{convs}.layer0.conv.weight": (first, 1, 3, 3),
            f"{convs}.layer0.norm.weight": (first,),
            f"{convs}.layer1.conv.weight": (second, first, 3, 3),
            f"{convs}.layer1.norm.weight": (second,),
            f"{convs}.input_proj_linear.weight": (h, MEL_BINS // 4 * second),
        }
        for i in range(self.num_hidden_layers):
            shapes |= {f"audio_tower.layers.{i}.{name}": shape for name, shape in self._layer_shapes().items()}
        return shapes | {
            "audio_tower.output_proj.weight": (self.output_proj_dims, h),
            "audio_tower.output_proj.bias": (self.output_proj_dims,),
            "embed_audio.embedding_projection.weight": (text_hidden_size, self.output_proj_dims),
        }

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        h = self.hidden_size
        linears = {
            **{f"feed_forward{i}.ffw_layer_1": (4 * h, h) for i in (1, 2)},
            **{f"feed_forward{i}.ffw_layer_2": (h, 4 * h) for i in (1, 2)},
            **{f"self_attn.{name}": (h, h) for name in ("q_proj", "k_proj", "v_proj", "post")},
            "lconv1d.linear_start": (2 * h, h),
            "lconv1d.linear_end": (h, h),
        }
        norms = (
            "feed_forward1.pre_layer_norm", "feed_forward1.post_layer_norm", "feed_forward2.pre_layer_norm",
            "feed_forward2.post_layer_norm", "norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm",
            "lconv1d.conv_norm",
        )  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (h,) for name in norms}
        for name, shape in linears.items():
            shapes[f"{name}.linear.weight"] = shape
            if self.use_clipped_linears:
                shapes |= {f"{name}.{clip}": () for clip in CLIPS}
        return shapes | {
            "self_attn.per_dim_scale": (self.head_dim,),
            "self_attn.relative_k_proj.weight": (h, h),
            "lconv1d.depthwise_conv1d.weight": (h, 1, self.conv_kernel_size),
        }


# Keys of a multimodal config.json, and the special tokens they name in the release.
TOKEN_IDS = {
    "audio_token_id": ("audio_token_id", 258881),
    "boa_token_id": ("boa_token_id", 256000),
    "eoa_token_id": ("eoa_token_index", 258883),
}


AudioTower = Tower[AudioConfig]


def bind_audio_tower(source: TowerSource) -> AudioTower | None:
    """The audio tower of a multimodal checkpoint, None where it has none. Raises ConfigError, CheckpointError."""
    if (words := source.words("audio_config")) is None:
        return None
    config = AudioConfig.from_audio_config(words, source.ignored)
    without = "--no-audio leaves the audio tower out"
    return source.bind(config, words, TOKEN_IDS, ("audio_tower.", "embed_audio."), without)
