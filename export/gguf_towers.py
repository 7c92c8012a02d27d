"""The towers in a GGUF file: an mmproj of llama.cpp, or Ollama's single file, which holds the decoder too.

Owns: both spellings of names and keys, the order in which values are stored, whether a file's towers belong to a
decoder. Does not know: the container (gguf_container.py), what becomes of a tower (tower.py), which file is meant
(folder/mmproj.py).

Sources: llama.cpp's conversion/gemma.py, gguf-py/gguf/tensor_mapping.py and tools/mtmd/clip.cpp as shipped in
llama-cpp-python 0.3.36; Ollama's convert/convert_gemma4.go. What both do alike: the patch embedder is stored as a
convolution (channel, y, x), `per_dim_scale` behind its softplus, a layer's bounds as vectors of one value, and
`conv_norm` is the norm before the convolution module, `norm_conv` the one inside it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edge_gemma.config_keys import known_keys
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.audio_tower import MEL_BINS
from edge_gemma.export.gguf_container import GgufFile, Metadata, shortest
from edge_gemma.export.source_file import SourceFile, StoredTensor, show
from edge_gemma.export.tower import TowerSource
from edge_gemma.vision_config import CLIPS

# Names behind `v.blk.N.` and `a.blk.N.` -> those behind the layer of the checkpoint. A linear layer has bounds too.
_VISION_LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_VISION_OTHERS = {
    "ln1": "input_layernorm", "attn_post_norm": "post_attention_layernorm", "ln2": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_AUDIO_LINEARS = {
    "ffn_up": "feed_forward1.ffw_layer_1", "ffn_down": "feed_forward1.ffw_layer_2",
    "ffn_up_1": "feed_forward2.ffw_layer_1", "ffn_down_1": "feed_forward2.ffw_layer_2", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.post",
    "conv_pw1": "lconv1d.linear_start", "conv_pw2": "lconv1d.linear_end",
}  # fmt: skip
_AUDIO_OTHERS = {
    "ffn_norm": "feed_forward1.pre_layer_norm", "ffn_post_norm": "feed_forward1.post_layer_norm",
    "ffn_norm_1": "feed_forward2.pre_layer_norm", "ffn_post_norm_1": "feed_forward2.post_layer_norm",
    "conv_norm": "lconv1d.pre_layer_norm", "norm_conv": "lconv1d.conv_norm", "conv_dw": "lconv1d.depthwise_conv1d",
}  # fmt: skip
_LLAMA_OTHERS = {
    "attn_pre_norm": "norm_pre_attn", "attn_post_norm": "norm_post_attn", "ln2": "norm_out",
    "attn_k_rel": "self_attn.relative_k_proj",
}  # fmt: skip
_OLLAMA_OTHERS = {
    "ln1": "norm_pre_attn", "ln2": "norm_post_attn", "layer_pre_norm": "norm_out",
    "linear_pos": "self_attn.relative_k_proj",
}  # fmt: skip
_SUBSAMPLE = "audio_tower.subsample_conv_projection"
_SINGLE = {
    "v.patch_embd.weight": "vision_tower.patch_embedder.input_proj.weight",
    "v.position_embd.weight": "vision_tower.patch_embedder.position_embedding_table",
    "v.std_bias": "vision_tower.std_bias",
    "v.std_scale": "vision_tower.std_scale",
    "mm.input_projection.weight": "embed_vision.embedding_projection.weight",
    "a.conv1d.0.weight": f"{_SUBSAMPLE}.layer0.conv.weight",
    "a.conv1d.0.norm.weight": f"{_SUBSAMPLE}.layer0.norm.weight",
    "a.conv1d.1.weight": f"{_SUBSAMPLE}.layer1.conv.weight",
    "a.conv1d.1.norm.weight": f"{_SUBSAMPLE}.layer1.norm.weight",
    "mm.a.input_projection.weight": "embed_audio.embedding_projection.weight",
}
_LLAMA_SINGLE = {
    "a.input_projection.weight": f"{_SUBSAMPLE}.input_proj_linear.weight",
    "a.pre_encode.out.weight": "audio_tower.output_proj.weight",
    "a.pre_encode.out.bias": "audio_tower.output_proj.bias",
}
_OLLAMA_SINGLE = {
    "a.pre_encode.out.weight": f"{_SUBSAMPLE}.input_proj_linear.weight",
    "mm.a.fc.weight": "audio_tower.output_proj.weight",
    "mm.a.fc.bias": "audio_tower.output_proj.bias",
}
_ONLY_OLLAMA = "mm.a.fc.weight"
_PATCHES = "vision_tower.patch_embedder.input_proj.weight"
_SCALE = ".self_attn.per_dim_scale"
_LAYER = re.compile(r"([av]\.blk\.|(?:audio_tower|vision_tower\.encoder)\.layers\.)(0|[1-9]\d{0,5})(\..+)", re.DOTALL)
_PARTS = ("v.", "a.", "mm.")

# Keys behind `clip.` (mmproj) and behind `gemma4.` (Ollama) that are read, or that say how a picture is prepared.
_KEYS = {
    "projector_type", "has_vision_encoder", "has_audio_encoder", "use_gelu", "use_silu", "vision.projector_type",
    "vision.projection_dim", "vision.image_size", "vision.image_min_pixels", "vision.image_max_pixels",
    "vision.patch_size", "vision.embedding_length", "vision.feed_forward_length", "vision.block_count",
    "vision.attention.head_count", "vision.attention.layer_norm_epsilon", "vision.image_mean", "vision.image_std",
    "vision.projector.scale_factor", "vision.num_channels", "audio.projector_type", "audio.projection_dim",
    "audio.num_mel_bins", "audio.embedding_length", "audio.feed_forward_length", "audio.block_count",
    "audio.attention.head_count", "audio.attention.layer_norm_epsilon", "audio.conv_kernel_size",
}  # fmt: skip
_PROJECTORS = {"vision": "gemma4v", "audio": "gemma4a"}
_PROJECTIONS = {"vision": "mm.input_projection.weight", "audio": "mm.a.input_projection.weight"}
# How the tokenizer spells the tokens that keys of config.json name.
_SPECIALS = {
    "<|image|>": "image_token_id", "<|image>": "boi_token_id", "<image|>": "eoi_token_id",
    "<|video|>": "video_token_id", "<|audio|>": "audio_token_id", "<|audio>": "boa_token_id",
    "<audio|>": "eoa_token_index",
}  # fmt: skip


def has_towers(file: GgufFile) -> bool:
    """Whether any tensor of the file is a tower's."""
    return any(name.startswith(("v.", "a.")) for name in file.tensors)


class GgufTowers:
    """The towers in one file, which stays open as long as the file does."""

    def __init__(self, file: GgufFile) -> None:
        """Raises ConfigError for a file without towers, and for towers of another family."""
        self.file, self.name = file, file.name
        self._arch = file.metadata.scalar("general.architecture")
        if self._arch not in ("clip", "gemma4"):
            raise ConfigError(f"{self.name} is no mmproj: general.architecture is {show(repr(self._arch))}")
        if not has_towers(file):
            raise ConfigError(
                f"{self.name} is no mmproj: it holds no tower of sound or pictures; expected the file whose name has "
                "mmproj in it, of the same model"
            )
        self._prefix = f"{self._arch}."
        self._parts = [part for part in ("vision", "audio") if self._has(part)]
        for part in self._parts if self._arch == "clip" else []:
            given = [self._get(f"{part}.projector_type"), self._get("projector_type")]
            kind = next((kind for kind in given if kind is not None), None)
            if kind != _PROJECTORS[part]:
                raise ConfigError(
                    f"{self.name} is an mmproj of another family: its {part} projector is {show(repr(kind))}, "
                    f"expected {_PROJECTORS[part]!r}"
                )
        self._names = _names(ollama=_ONLY_OLLAMA in file.tensors)

    @property
    def keys(self) -> tuple[Mapping[str, Any], Collection[str]]:
        """The keys that are about towers, and which of them are known."""
        starts = self._prefix if self._arch == "clip" else tuple(f"{self._prefix}{p}." for p in _PROJECTORS)
        given = {key: self.file.metadata.summary(key) for key in self.file.metadata if key.startswith(starts)}
        return given, {self._prefix + key for key in _KEYS}

    def stranger(self, hidden_size: int) -> str | None:
        """Why the towers are not those of a decoder of this width; None where they may be."""
        for part in self._parts:
            tensor = self.file.tensors.get(_PROJECTIONS[part])
            for width in (self._get(f"{part}.projection_dim"), tensor and tensor.shape[0]):
                if width is not None and width != hidden_size:
                    return (
                        f"{self.name} belongs to another model: its {part} tower makes vectors of {show(width)}, "
                        f"this model's are of {hidden_size}"
                    )
        return None

    def source(
        self, hidden_size: int, vocab_size: int, wanted: Collection[str], decoder: Metadata, ignored: Collection[str]
    ) -> TowerSource:
        """The towers for `bind_audio_tower` and `bind_vision_tower`.

        wanted: of "audio" and "vision". decoder: the metadata that the tokenizer is in. Raises ConfigError,
        CheckpointError.
        """
        config, known = self.keys
        others = tuple(f"{self._prefix}{part}." for part in _PROJECTORS if part not in wanted)
        known_keys({k: v for k, v in config.items() if not k.startswith(others)}, known, self.name, ignored=ignored)
        words = {"vision": self._vision_words, "audio": self._audio_words}
        top: dict[str, Any] = {f"{part}_config": words[part]() for part in self._parts if part in wanted}
        top |= {_SPECIALS[p]: i for i, p in enumerate(decoder.get("tokenizer.ggml.tokens", ())) if p in _SPECIALS}
        stored = {}
        for name, tensor in self.file.tensors.items():
            if name.startswith(_PARTS):
                canonical = self._canonical(name)
                stored[canonical] = _shaped(canonical, tensor)
        back = {ours: theirs for theirs, ours in self._names.items()}

        def original(name: str) -> str:
            return _renamed(name, back) or name.partition("./")[2] or name

        return TowerSource(self.name, top, hidden_size, vocab_size, stored, original=original, restored=_restored)

    def close(self) -> None:
        self.file.close()

    def digest(self) -> str:
        """As `GgufFile.digest`."""
        return self.file.digest()

    def _get(self, key: str) -> Any:
        return self.file.metadata.scalar(self._prefix + key)

    def _has(self, part: str) -> bool:
        starts = f"{part[0]}."
        named = any(name.startswith(starts) for name in self.file.tensors)
        return named or (self._arch == "clip" and self._get(f"has_{part}_encoder") is True)

    def _needed(self, part: str, keys: Mapping[str, str]) -> dict[str, Any]:
        """{word of config.json: value of `part`.key}. Raises ConfigError for one that is missing."""
        words = {word: self._get(f"{part}.{key}") for word, key in keys.items()}
        if missing := [keys[word] for word, value in words.items() if value is None]:
            raise ConfigError(f"{self.name} lacks the key {self._prefix}{part}.{missing[0]}")
        return words

    def _only(self, part: str, key: str, *allowed: Any) -> None:
        """Raises ConfigError for a key that changes the arithmetic, with a value that is not supported."""
        full = f"{self._prefix}{part}.{key}"
        few = (self.file.metadata.length(full) or 0) <= 16
        value = self.file.metadata.get(full) if few else self.file.metadata.summary(full)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise ConfigError(f"{self.name}: {full} is {show(value)}, which is not supported ({allowed[0]} is)")

    def _sizes(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that a size is taken from. Raises CheckpointError."""
        tensor = self.file.tensors.get(name)
        if tensor is None or len(tensor.shape) != dimensions:
            got = "missing" if tensor is None else f"of the shape {tensor.shape}"
            raise CheckpointError(f"{self.name}: {name} is {got}, expected a tensor of {dimensions} dimensions")
        return tensor.shape

    def _clipped(self, part: str) -> bool:
        bounds = tuple(f".{clip}" for clip in CLIPS)
        return any(name.startswith(f"{part}.blk.") and name.endswith(bounds) for name in self.file.tensors)

    def _vision_words(self) -> dict[str, Any]:
        words = self._needed("vision", {
            "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "patch_size": "patch_size", "rms_norm_eps": "attention.layer_norm_epsilon",
        })  # fmt: skip
        self._only("vision", "num_channels", 3)
        self._only("vision", "image_mean", [0.0, 0.0, 0.0])
        self._only("vision", "image_std", [1.0, 1.0, 1.0])
        if self._get("use_silu"):
            raise ConfigError(f"{self.name}: {self._prefix}use_silu is true, which is not supported for gemma4v")
        patches = self._sizes("v.patch_embd.weight", 4)
        if patches[1:] != (3, words["patch_size"], words["patch_size"]):
            raise CheckpointError(
                f"{self.name}: v.patch_embd.weight is {patches}, expected (..., 3, {show(words['patch_size'])}, "
                f"{show(words['patch_size'])})"
            )
        scale = self._get("vision.projector.scale_factor")
        return words | {
            "model_type": "gemma4_vision",
            "num_key_value_heads": words["num_attention_heads"],
            "head_dim": self._sizes("v.blk.0.attn_q_norm.weight", 1)[0],
            "pooling_kernel_size": 3 if scale is None else scale,
            "position_embedding_size": self._sizes("v.position_embd.weight", 3)[1],
            "rms_norm_eps": _decimal(words["rms_norm_eps"]),
            "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},  # not stored
            "standardize": any(name.startswith("v.std_") for name in self.file.tensors),
            "use_clipped_linears": self._clipped("v"),
        }

    def _audio_words(self) -> dict[str, Any]:
        """Without layer_norm_epsilon: early files say it wrongly, and llama.cpp takes 1e-6 whatever they say."""
        words = self._needed("audio", {
            "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
        })  # fmt: skip
        self._only("audio", "num_mel_bins", MEL_BINS)
        (taps,) = self._sizes("a.blk.0.conv_dw.weight", 2)[1:]
        self._only("audio", "conv_kernel_size", taps)
        if type(words["hidden_size"]) is int:
            self._only("audio", "feed_forward_length", 4 * words["hidden_size"])
        channels = [self._sizes(f"a.conv1d.{i}.weight", 4)[0] for i in (0, 1)]
        return words | {
            "model_type": "gemma4_audio",
            "conv_kernel_size": taps,
            "output_proj_dims": self._sizes("mm.a.input_projection.weight", 2)[1],
            "subsampling_conv_channels": channels,
            "use_clipped_linears": self._clipped("a"),
        }

    def _canonical(self, name: str) -> str:
        """The checkpoint's name. A name that is unknown gets one that the tower it is about refuses."""
        tower = "audio_tower" if name.startswith(("a.", "mm.a.")) else "vision_tower"
        return _renamed(name, self._names) or f"{tower}./{name}"


def open_towers(
    model: GgufFile, mmproj: Callable[[], SourceFile] | None, found: bool, notes: list[str]
) -> GgufTowers | None:
    """The towers in a model's file itself, or in the one that `mmproj` opens; None where there are none.

    found: that file was found by its name, so it is noted and passed over where it holds no towers that are read.
    Raises ConfigError, CheckpointError.
    """
    arch, inside = model.metadata.scalar("general.architecture"), has_towers(model)
    if mmproj is None or (found and (inside or arch != "gemma4")):
        return GgufTowers(model) if inside and arch == "gemma4" else None
    if arch == "gemma3":
        raise ConfigError(f"{model.name} is a Gemma 3, whose towers are not read: leave --mmproj out")
    file = GgufFile(mmproj())
    try:
        return GgufTowers(file)
    except BaseException as error:
        file.close()
        if not found or not isinstance(error, ConfigError):
            raise
        notes.append(f"{error}; it is left out")
        return None


def fitting(towers: GgufTowers, hidden_size: int, found: bool, notes: list[str]) -> GgufTowers | None:
    """The towers if they are of a decoder of this width. found: as for `open_towers`. Raises ConfigError."""
    why = towers.stranger(hidden_size)
    if found:
        notes.append(f"{why}; it is left out" if why else f"its towers are taken from {towers.name}")
    if why is None:
        return towers
    towers.close()
    if not found:
        raise ConfigError(why)
    return None


def _names(*, ollama: bool) -> dict[str, str]:
    """File's name -> checkpoint's, with `{}` for the number of a layer in both."""
    names = _SINGLE | (_OLLAMA_SINGLE if ollama else _LLAMA_SINGLE)
    audio = _AUDIO_OTHERS | (_OLLAMA_OTHERS if ollama else _LLAMA_OTHERS)
    for theirs, ours, linears, others in (
        ("v.blk.{}", "vision_tower.encoder.layers.{}", _VISION_LINEARS, _VISION_OTHERS),
        ("a.blk.{}", "audio_tower.layers.{}", _AUDIO_LINEARS, audio),
    ):
        names |= {f"{theirs}.{name}.weight": f"{ours}.{norm}.weight" for name, norm in others.items()}
        for name, linear in linears.items():
            names[f"{theirs}.{name}.weight"] = f"{ours}.{linear}.linear.weight"
            names |= {f"{theirs}.{name}.{clip}": f"{ours}.{linear}.{clip}" for clip in CLIPS}
    return names | {"a.blk.{}.per_dim_scale.weight": "audio_tower.layers.{}" + _SCALE}


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """A name in the other spelling, None where it has none."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return names.get(name)
    found = names.get(f"{match[1]}{{}}{match[3]}")
    return found and found.replace("{}", match[2])


def _decimal(value: Any) -> Any:
    return shortest(value) if isinstance(value, float) else value


def _shaped(name: str, tensor: StoredTensor) -> StoredTensor:
    """A tensor in the checkpoint's shape, where the file's is that of the same values; otherwise as it is."""
    shape = tensor.shape
    if name.endswith(tuple(f".{clip}" for clip in CLIPS)) and shape == (1,):
        return replace(tensor, shape=())
    if name.endswith(".depthwise_conv1d.weight") and len(shape) == 2:
        return replace(tensor, shape=(shape[0], 1, shape[1]))
    if name == _PATCHES and len(shape) == 4:
        return replace(tensor, shape=(shape[0], shape[1] * shape[2] * shape[3]))
    return tensor


def _restored(name: str, values: np.ndarray) -> np.ndarray:
    """Values as the checkpoint has them."""
    if name == _PATCHES:
        side = round((values.shape[1] / 3) ** 0.5)
        turned = values.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(turned).reshape(values.shape)
    return before_softplus(name, values) if name.endswith(_SCALE) else values


def before_softplus(name: str, values: np.ndarray) -> np.ndarray:
    """x where `values` is ln(1 + e^x), float32. Raises CheckpointError where it is not.

    The checkpoints are bfloat16: if such numbers have the same softplus (but for a last bit or two), they are meant.
    """
    wide = values.astype(np.float64)
    if not ((wide > 0) & (wide < 1e30)).all():
        raise CheckpointError(f"{name}: a value is not the softplus of a number: the file is damaged")
    x = (wide + np.log(-np.expm1(-wide))).astype(np.float32)  # ln(e^y - 1), which overflows
    bits = x.view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    near = np.abs(np.logaddexp(0, halves.astype(np.float64)) - wide) <= 2 * np.spacing(values)
    return halves if near.all() else x
