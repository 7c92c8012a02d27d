"""The audio tower as its checkpoint describes it: configuration, names and shapes of its tensors, clip bounds.

Owns: reading `audio_config` in the checkpoint's own words (which keys count: config_keys.py); which tensors the tower
has. Does not know: how tensors are stored (the readers), how graphs are built (audio_graph.py).

Source: transformers 5.23 `configuration_gemma4.py` (Gemma4AudioConfig) and `modeling_gemma4.py` (Gemma4AudioModel).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edge_gemma.config_keys import known_keys, with_defaults
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.gemma_quant import GemmaQuantization, packed_matrices
from edge_gemma.export.packed import Integers, PackedMatrix, Scales
from edge_gemma.export.source_file import StoredTensor, bind_tensors, read_rows

MEL_BINS = 128
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
CLIPS = ("input_min", "input_max", "output_min", "output_max")


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
        c = with_defaults(known_keys(audio_config, KNOWN, "the audio tower", ignored=ignored), DEFAULTS)
        for key in _FIXED:
            if c[key] != DEFAULTS[key]:
                raise ConfigError(
                    f"the audio tower's {key} is {c[key]!r}, which is not supported ({DEFAULTS[key]!r} is)"
                )
        sizes = {key: _size(key, c[key], most) for key, most in _SIZES.items()}
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
        _size("subsampling_conv_channels", channels[1], 1 << 12)
        fields: dict[str, Any] = {**sizes, **{key: _positive(key, c[key]) for key in _NUMBERS}}
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


@dataclass(frozen=True)
class AudioTower:
    """A tower ready to be exported. `read(name)` gives a tensor of `config.tensor_shapes` as float32."""

    config: AudioConfig
    audio_config: Mapping[str, Any]  # the checkpoint's own words
    text_hidden_size: int
    token_ids: Mapping[str, int]  # audio_token_id, boa_token_id, eoa_token_id
    read: Callable[[str], np.ndarray]
    dtype: str = "F32"  # the float type that linear weights are stored in
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)  # integers already; not in `read`
    stored: tuple[StoredTensor, ...] = ()  # where its values lie

    @property
    def weights(self) -> int:
        """How many the tower and its projection have."""
        return sum(math.prod(shape) for shape in self.config.tensor_shapes(self.text_hidden_size).values())

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32, finite. Raises CheckpointError."""
        packed = self.packed.get(name)
        values = packed.rows(0, packed.shape[0]) if packed else self.read(name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name}: a weight is not finite: the checkpoint is damaged")
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        return self.config.tensor_shapes(self.text_hidden_size)[name]

    def integers(self, linears: list[str]) -> tuple[Integers, Scales] | None:
        """Integers and scales [rows, 1] of linear layers, one under the other; None where the source has floats."""
        packed = [self.packed.get(f"{name}.weight") for name in linears]
        read = [matrix.read(0, matrix.shape[0]) for matrix in packed if matrix]
        if len(read) < len(linears):
            return None
        values, scales = zip(*read, strict=True)
        return np.concatenate(values), np.concatenate(scales)

    def steps(self, linear: str) -> tuple[float, float]:
        """The trained activation scales of a linear layer's input and output; 0: not rounded."""
        packed = self.packed.get(f"{linear}.weight")
        return (packed.input_scale, packed.output_scale) if packed else (0.0, 0.0)

    def clip(self, linear: str) -> tuple[float, float, float, float]:
        """A clippable linear's bounds (input_min, input_max, output_min, output_max); infinite where it has none."""
        if not self.config.use_clipped_linears:
            return -math.inf, math.inf, -math.inf, math.inf
        low, high, out_low, out_high = (float(self.read(f"{linear}.{clip}").reshape(())) for clip in CLIPS)
        if not all(a <= b and a < math.inf and b > -math.inf for a, b in ((low, high), (out_low, out_high))):
            raise CheckpointError(f"{linear}: clip bounds {low}, {high}, {out_low}, {out_high} are no ranges")
        return low, high, out_low, out_high


def bind_audio_tower(
    source: str,
    top: Mapping[str, Any],
    hidden_size: int,
    vocab_size: int,
    stored: Mapping[str, StoredTensor],
    *,
    original: Callable[[str], str] = str,
    quantization: GemmaQuantization | None = None,
    ignored: Collection[str] = (),
) -> AudioTower | None:
    """The tower of a multimodal checkpoint, None where its config.json has none.

    top: config.json; stored: the towers' tensors, names as in `AudioConfig.tensor_shapes`; original: spells such a name
    as the file does; quantization: of a QAT checkpoint, whose packed matrices stay integers; ignored: unknown keys to
    pass over. Raises ConfigError, CheckpointError.
    """
    words = top.get("audio_config")
    if words is None:
        return None
    if not isinstance(words, Mapping):
        raise ConfigError(f"{source}: audio_config is {type(words).__name__}, expected an object")
    config = AudioConfig.from_audio_config(words, ignored)
    ids = {name: default if top.get(key) is None else top[key] for name, (key, default) in TOKEN_IDS.items()}
    if wrong := {name: i for name, i in ids.items() if type(i) is not int or not 0 <= i < vocab_size}:
        raise ConfigError(f"{source}: {min(wrong)} is {wrong[min(wrong)]!r}, expected a token of the vocabulary")
    present = {name: t for name, t in stored.items() if name.startswith(("audio_tower.", "embed_audio."))}
    shapes = config.tensor_shapes(hidden_size)
    packed: Mapping[str, PackedMatrix] = {}
    try:
        if quantization is not None:
            packed = packed_matrices(quantization, shapes, present, original)
        floats = {name: shape for name, shape in shapes.items() if name not in packed}
        bound = bind_tensors(source, floats, present, lambda name: False, original)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --no-audio leaves the audio tower out") from None

    def read(name: str) -> np.ndarray:
        tensor = bound[name]
        if tensor.shape:
            return read_rows(tensor, 0, tensor.shape[0])
        return read_rows(replace(tensor, shape=(1,)), 0, 1).reshape(())

    dtypes = {tensor.dtype for name, tensor in bound.items() if name.endswith(".linear.weight")}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    parts = (*bound.values(), *(part for matrix in packed.values() for part in matrix.stored))
    return AudioTower(config, words, hidden_size, ids, read, dtype, packed, parts)


def _size(key: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"the audio tower's {key} is {value!r}, expected an integer from 1 to {most}")
    return value


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"the audio tower's {key} is {value!r}, expected a positive number")
    return float(value)
