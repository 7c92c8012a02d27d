"""GGUF checkpoints of the architectures gemma4 and gemma3.

Owns: building a Hugging Face style `text_config` from GGUF metadata, the mapping of the decoder's tensor names. Does
not know: the container's bytes (gguf_container.py), block layouts (gguf_types.py), towers (gguf_towers.py).

Sources: llama.cpp's conversion of both architectures and its loader (as shipped in llama-cpp-python 0.3.36). GGUF
norm weights are the factor itself for Gemma 3 too, and q and k rows are not permuted.
"""

import hashlib
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.config import FULL, SLIDING
from edge_gemma.config_keys import check_ignored, known_keys
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.audio_tower import bind_audio_tower
from edge_gemma.export.gguf_container import GgufFile, Metadata, shortest
from edge_gemma.export.gguf_towers import GgufTowers, fitting, open_towers
from edge_gemma.export.gguf_types import PACKED_TYPES
from edge_gemma.export.packed import Packed, PackedMatrix
from edge_gemma.export.source_file import (
    SourceFile,
    StoredTensor,
    TensorInfo,
    bind_tensors,
    read_rows,
    resolve_config,
    same_bytes,
    show,
)
from edge_gemma.export.towers import Towers
from edge_gemma.export.vision_tower import BOTH_WAYS, bind_vision_tower
from edge_gemma.generation.sampler import usable_settings

_GLOBAL_NAMES = {
    "token_embd": "embed_tokens.weight",
    "per_layer_token_embd": "embed_tokens_per_layer.weight",
    "per_layer_model_proj": "per_layer_model_projection.weight",
    "per_layer_proj_norm": "per_layer_projection_norm.weight",
    "output_norm": "norm.weight",
    "output": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight",
    "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffw_norm": "post_feedforward_layernorm.weight",
    "ffn_gate": "mlp.gate_proj.weight",
    "ffn_up": "mlp.up_proj.weight",
    "ffn_down": "mlp.down_proj.weight",
    "inp_gate": "per_layer_input_gate.weight",
    "proj": "per_layer_projection.weight",
    "post_norm": "post_per_layer_input_norm.weight",
    "layer_output_scale": "layer_scalar",
}
_TO_GGUF = {v: k for k, v in (_GLOBAL_NAMES | _LAYER_NAMES).items()}
_KV = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")

# Keys below `gemma3.` and `gemma4.` that are read or that cannot change a dense decoder's arithmetic.
_KEYS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.key_length_swa",
    "attention.layer_norm_rms_epsilon", "attention.shared_kv_layers", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.value_length", "attention.value_length_swa", "block_count",
    "context_length", "embedding_length", "embedding_length_per_layer_input", "expert_count",
    "expert_feed_forward_length", "expert_used_count", "feed_forward_length", "final_logit_softcapping",
    "rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa", "rope.global.freq_base",
    "rope.local.freq_base", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "vocab_size",
}  # fmt: skip
_DEFAULTS = {"attention.causal": True}  # what llama.cpp assumes of keys that are not read
_TOWER_KEYS, _TOWER_TENSORS = ("audio.", "vision.", "mm."), ("/a.", "/v.", "/mm.")  # Ollama's files hold towers too
_MAX_LAYERS = 512
_MAX_STOPS = 64
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class _Values:
    """One architecture's metadata with the types checked; messages name the key."""

    def __init__(
        self, metadata: Metadata, source: str, ignored: Collection[str], towers: GgufTowers | None = None
    ) -> None:
        """towers: their keys may be ignored too."""
        self._metadata, self.source = metadata, source
        self.arch = metadata.scalar("general.architecture")
        if self.arch == "clip":
            raise ConfigError(
                f"{source} is an mmproj, which holds towers only: give the model's own GGUF file, and this one with "
                "--mmproj"
            )
        if self.arch not in ("gemma3", "gemma4"):
            raise ConfigError(f"{source}: general.architecture is {show(repr(self.arch))}, expected gemma3 or gemma4")
        prefix = f"{self.arch}."
        others = tuple(prefix + part for part in _TOWER_KEYS)
        config = {k: metadata.summary(k) for k in metadata if k.startswith(prefix) and not k.startswith(others)}
        known = {prefix + key for key in _KEYS}
        check_ignored(ignored, [(config, known), *([towers.keys] if towers else [])])
        defaults = {prefix + key: value for key, value in _DEFAULTS.items()}
        known_keys(config, known, source, defaults=defaults, ignored=ignored)

    def fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self.arch}.{key} is {show(repr(self.get(key)))}, expected {expected}")

    def get(self, key: str) -> Any:
        """The value as Python's own types; None where it is missing."""
        key = f"{self.arch}.{key}"
        if (count := self._metadata.length(key) or 0) > _MAX_LAYERS:
            raise ConfigError(f"{self.source}: {key} is an array of {count}, expected at most {_MAX_LAYERS}")
        value = self._metadata.get(key)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.fail(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        return shortest(value)

    def per_layer(self, key: str, depth: int) -> list[int]:
        """An integer for every layer: stored as one for all, or as an array."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * depth
        if len(values) != depth or not all(type(v) is int and 0 < v < 1 << 31 for v in values):
            raise self.fail(key, f"a positive integer or {depth} of them")
        return values


def _layer_types(v: _Values, depth: int) -> list[str]:
    """From the boolean array (True: sliding), or a period n whose last layer is full; Gemma 3's default period is 6."""
    key = "attention.sliding_window_pattern"
    pattern = v.get(key)
    if v.arch == "gemma3" and not v.integer("attention.sliding_window", 0):
        return [FULL] * depth
    if pattern is None and v.arch == "gemma3":
        pattern = 6
    if type(pattern) is int and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(depth)]
    if not isinstance(pattern, list) or len(pattern) != depth or not all(type(p) is bool for p in pattern):
        raise v.fail(key, f"{depth} booleans")
    return [SLIDING if p else FULL for p in pattern]


def _common(v: _Values, file: GgufFile, depth: int) -> dict[str, Any]:
    """What both architectures spell alike."""
    if v.integer("expert_count", 0):
        raise ConfigError(f"{v.source} is a mixture of experts, which is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{v.source} has no tensor token_embd.weight: a vocabulary or projector, not a model")
    tokens = file.metadata.length("tokenizer.ggml.tokens")
    vocab = embedding.shape[0]
    if not tokens or tokens > vocab or v.integer("vocab_size", vocab) != vocab:
        raise CheckpointError(f"{v.source}: the tokenizer has {tokens} tokens, token_embd.weight {vocab} rows")
    heads = v.per_layer("attention.head_count", depth)
    if len(set(heads)) > 1:
        raise v.fail("attention.head_count", "one number for all layers")
    for suffix in ("", "_swa"):
        if v.get(f"attention.value_length{suffix}") not in (None, v.get(f"attention.key_length{suffix}")):
            raise v.fail(f"attention.value_length{suffix}", "the key length")
    softcap, head = v.number("final_logit_softcapping", 0), file.tensors.get("output.weight")
    return {
        "final_logit_softcapping": softcap or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": v.integer("embedding_length"),
        "max_position_embeddings": v.integer("context_length"),
        "num_attention_heads": heads[0],
        "num_hidden_layers": depth,
        "rms_norm_eps": v.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": head is None or same_bytes(head, embedding),
        "vocab_size": vocab,
    }


def _rope_scaling(v: _Values) -> dict[str, Any]:
    kind = v.get("rope.scaling.type")
    if kind in (None, "none"):
        return {"rope_type": "default"}
    if kind != "linear":
        raise v.fail("rope.scaling.type", "'linear' or 'none'")
    return {"rope_type": "linear", "factor": v.number("rope.scaling.factor")}


def _gemma3_config(v: _Values, file: GgufFile, depth: int) -> dict[str, Any]:
    """Not stored: the local rope base (1e4) and query_pre_attn_scalar (head_dim, but hidden/heads in the 27B)."""
    common = _common(v, file, depth)
    head_dim = v.integer("attention.key_length", 256)
    kv_heads = v.per_layer("attention.head_count_kv", depth)
    ff = v.per_layer("feed_forward_length", depth)
    for key, values in (("attention.head_count_kv", kv_heads), ("feed_forward_length", ff)):
        if len(set(values)) > 1:
            raise v.fail(key, "one number for all layers")
    layer_types = _layer_types(v, depth)
    theta, local = v.number("rope.global.freq_base", 1e6), v.number("rope.local.freq_base", 1e4)  # Ollama's spelling
    if v.integer("rope.dimension_count", head_dim) != head_dim:
        raise v.fail("rope.dimension_count", str(head_dim))
    return common | {
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "intermediate_size": ff[0],
        "layer_types": layer_types,
        "num_key_value_heads": kv_heads[0],
        "query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"] if depth == 62 else head_dim,
        "rope_parameters": {
            FULL: {"rope_theta": v.number("rope.freq_base", theta), **_rope_scaling(v)},
            SLIDING: {"rope_theta": v.number("rope.freq_base_swa", local), "rope_type": "default"},
        },
        "sliding_window": v.integer("attention.sliding_window", 0) or None,
    }


def _gemma4_config(v: _Values, file: GgufFile, depth: int) -> dict[str, Any]:
    common = _common(v, file, depth)
    layer_types, shared = _layer_types(v, depth), v.integer("attention.shared_kv_layers", 0)
    full = [i for i, t in enumerate(layer_types) if t == FULL]
    global_head_dim, head_dim = v.integer("attention.key_length"), v.integer("attention.key_length_swa")
    for key, expected in (("rope.dimension_count", global_head_dim), ("rope.dimension_count_swa", head_dim)):
        if v.integer(key, expected) != expected:
            raise v.fail(key, str(expected))
    if _rope_scaling(v)["rope_type"] != "default":
        raise v.fail("rope.scaling.type", "'none'")
    ff = v.per_layer("feed_forward_length", depth)
    wide = len(set(ff)) > 1
    if wide and ff != [ff[0] * (1 if i < depth - shared else 2) for i in range(depth)]:
        raise v.fail("feed_forward_length", f"one number, doubled in the last {shared} layers")
    kv_heads, kv_full = _gemma4_kv_heads(v, layer_types)
    k_eq_v = bool(full) and not any(f"blk.{i}.attn_v.weight" in file.tensors for i in full if i < depth - shared)
    global_kv: dict[str, Any] = {}
    if kv_full != kv_heads and k_eq_v:
        global_kv = {"num_global_key_value_heads": kv_full}
    elif kv_full != kv_heads:
        global_kv = {"per_layer_config": {str(i): {"num_key_value_heads": kv_full} for i in full}}
    ple = v.integer("embedding_length_per_layer_input", 0)
    return common | global_kv | {
        "model_type": "gemma4_text",
        "attention_k_eq_v": k_eq_v,
        "global_head_dim": global_head_dim,
        "head_dim": head_dim,
        "hidden_size_per_layer_input": ple,
        "intermediate_size": ff[0],
        "layer_types": layer_types,
        "num_key_value_heads": kv_heads,
        "num_kv_shared_layers": shared,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": _partial_rotary_factor(file, global_head_dim),
                "rope_theta": v.number("rope.freq_base", 1e6),
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": v.number("rope.freq_base_swa", 1e4), "rope_type": "default"},
        },
        "sliding_window": v.integer("attention.sliding_window"),
        "use_double_wide_mlp": wide,
        "vocab_size_per_layer_input": common["vocab_size"],
    }  # fmt: skip


def _gemma4_kv_heads(v: _Values, layer_types: list[str]) -> tuple[int, int]:
    """(KV heads of sliding layers, of full layers)."""
    by_type: dict[str, set[int]] = {SLIDING: set(), FULL: set()}
    for layer_type, heads in zip(layer_types, v.per_layer("attention.head_count_kv", len(layer_types)), strict=True):
        by_type[layer_type].add(heads)
    if any(len(heads) > 1 for heads in by_type.values()):
        raise v.fail("attention.head_count_kv", "one number for each layer type")
    sliding = next(iter(by_type[SLIDING] or by_type[FULL]))
    return sliding, next(iter(by_type[FULL] or by_type[SLIDING]))


def _partial_rotary_factor(file: GgufFile, head_dim: int) -> float:
    """Full layers' rotating share of a head, from rope_freqs: divisors 1 for pairs that turn, then 1e30."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return 0.25
    if tensor.shape != (head_dim // 2,) or tensor.dtype != "F32":
        raise CheckpointError(
            f"{file.name}: rope_freqs.weight is {tensor.dtype} {tensor.shape}, expected F32 {(head_dim // 2,)}"
        )
    freqs = read_rows(tensor, 0, head_dim // 2)
    turning = int(np.count_nonzero(freqs == 1))
    if not turning or not (freqs[:turning] == 1).all() or not (freqs[turning:] >= 1e29).all():
        raise CheckpointError(
            f"{file.name}: rope_freqs.weight is not ones followed by 1e30: frequency scaling is not supported"
        )
    return 2 * turning / head_dim


def _canonical(name: str) -> str:
    """GGUF name -> canonical; others get a leading slash, so that none can pass for a canonical name."""
    if match := re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.weight", name):
        if match[2] in _LAYER_NAMES:
            return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    elif name.endswith(".weight") and name.removesuffix(".weight") in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name.removesuffix(".weight")]
    return f"/{name}"


def _original(name: str) -> str:
    """The inverse of `_canonical`."""
    if name.startswith("/"):
        return name[1:]
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"blk.{match[1]}.{_TO_GGUF[match[2]]}.weight"
    return f"{_TO_GGUF[name]}.weight"


def _read_packed(tensor: StoredTensor, start: int, stop: int) -> Packed:
    """Rows [start, stop) of a matrix of a packed type, as PackedMatrix.read gives them."""
    assert tensor.kind is not None
    columns = tensor.shape[1] // tensor.kind.block_elements  # blocks a row
    blocks = np.empty(((stop - start) * columns, tensor.kind.block_bytes), np.uint8)
    tensor.file.read_into(tensor.offset + start * columns * tensor.kind.block_bytes, blocks.reshape(-1).data)
    packed = PACKED_TYPES[tensor.dtype].read(blocks)
    if not all(np.isfinite(values).all() for values in packed):
        raise CheckpointError("a scale is not finite: the file is damaged")
    return tuple(values.reshape(stop - start, columns * values.shape[1], *values.shape[2:]) for values in packed)


def _packed_matrix(tensor: StoredTensor) -> PackedMatrix:
    kind, read = PACKED_TYPES[tensor.dtype], partial(_read_packed, tensor)
    origin = f"carried from GGUF {tensor.dtype}"
    rows, columns = tensor.shape
    return PackedMatrix((rows, columns), kind.bits, kind.group, origin, read, minimum=kind.minimum)


class GgufCheckpoint:
    """A GGUF file as a `Checkpoint`: architectures gemma4 (dense) and gemma3, the types of gguf_types.GGUF_TYPES."""

    trained_recipe: str | None = None

    def __init__(
        self,
        file: SourceFile | Path,
        ignored: Collection[str] = (),
        mmproj: Callable[[], SourceFile] | None = None,
        *,
        found: bool = False,
    ) -> None:
        """ignored: unknown configuration keys to pass over, as the file spells them. mmproj: opens the file that holds
        the towers. found: it was found by its name, so that it is passed over where it belongs to another model.
        """
        self._file = GgufFile(file)
        self._towers: GgufTowers | None = None
        self.ignored = tuple(ignored)
        self.notes: list[str] = []
        self.stop_pieces: list[str] = []
        try:
            self._open(mmproj, found)
        except BaseException:
            self.close()
            raise

    def _open(self, mmproj: Callable[[], SourceFile] | None, found: bool) -> None:
        file, self._name = self._file, self._file.name
        self.metadata = file.metadata
        splits = file.metadata.scalar("split.count", 1)
        if splits not in (0, 1):
            raise CheckpointError(f"{self._name} is one of {show(splits)} parts; merge them first (llama-gguf-split)")
        self._towers = open_towers(file, mmproj, found, self.notes)
        values = _Values(file.metadata, self._name, self.ignored, self._towers)
        depth = values.integer("block_count")
        if not 1 <= depth <= _MAX_LAYERS:
            raise values.fail("block_count", f"1 to {_MAX_LAYERS}")
        build = _gemma4_config if values.arch == "gemma4" else _gemma3_config
        self._config = resolve_config(self._name, build(values, file, depth))
        self.text_config = dict(self._config.text_config)
        if self._towers is not None and self._towers.file is not file:
            self._towers = fitting(self._towers, self._config.hidden_size, found, self.notes)
        canonical: dict[str, StoredTensor] = {_canonical(name): tensor for name, tensor in file.tensors.items()}
        self._stored = bind_tensors(self._name, self._config.tensor_shapes(), canonical, self._unused, _original)
        self.tensors = {name: TensorInfo(name, t.shape, t.dtype) for name, t in self._stored.items()}
        self.packed = {
            name: _packed_matrix(tensor)
            for name, tensor in self._stored.items()
            if tensor.dtype in PACKED_TYPES and len(tensor.shape) == 2
        }
        self.license = self._text("general.license")
        self.chat_template = self._text("tokenizer.chat_template")
        self.generation_config = self._generation_config()

    def _unused(self, name: str) -> bool:
        """Towers, the frequency table (computed here), a tied head, and K, V of KV-shared layers."""
        if name == "/rope_freqs.weight" or name.startswith(_TOWER_TENSORS):
            return True
        if name == "lm_head.weight":
            return self._config.tie_word_embeddings
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        layers = self._config.layers
        return bool(match and match[2] in _KV and int(match[1]) < len(layers) and not layers[int(match[1])].owns_kv)

    def _text(self, key: str) -> str | None:
        value = self.metadata.scalar(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self._name}: {key} is {type(value).__name__}, expected text")
        return value

    def _generation_config(self) -> dict[str, Any]:
        eos: dict[int, None] = {}
        for key in ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id"):
            value = self.metadata.get(f"tokenizer.ggml.{key}")
            value = value.tolist() if isinstance(value, np.ndarray) else [] if value is None else value
            ids = value if isinstance(value, list) else [value]
            if len(ids) > _MAX_STOPS or not all(type(i) is int and 0 <= i < self._config.vocab_size for i in ids):
                raise CheckpointError(f"{self._name}: {key} is {show(value)}, expected ids of the vocabulary")
            eos |= dict.fromkeys(ids)
        given = {name: self.metadata.scalar(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
        settings, notes = usable_settings(
            {name: shortest(value) if isinstance(value, float) else value for name, value in given.items()}
        )
        self.notes += notes
        return {"eos_token_id": list(eos)} | settings

    @property
    def lacks_towers(self) -> bool:
        """Whether it is a model that has towers elsewhere."""
        return self._towers is None and self.text_config["model_type"] == "gemma4_text"

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Where the values of a tensor lie."""
        return (self._stored[name],)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis, float32, C-contiguous and fresh: effective values."""
        if name not in self._stored:
            raise CheckpointError(f"{self._name} has no tensor {show(name)}")
        return read_rows(self._stored[name], start, stop)

    def tokenizer_model(self) -> bytes:
        """The SentencePiece model, rebuilt from the tokenizer.ggml.* metadata."""
        from edge_gemma.export.sentencepiece_model import from_gguf_metadata

        return from_gguf_metadata(self.metadata)

    def towers(self, *, audio: bool = True, vision: bool = True) -> Towers:
        """The towers that there are, of those that are asked for: of an mmproj, or of Ollama's single file."""
        if self._towers is None or not (audio or vision):
            return Towers()
        wanted = [name for name, asked in (("audio", audio), ("vision", vision)) if asked]
        source = self._towers.source(
            self._config.hidden_size, self._config.vocab_size, wanted, self.metadata, self.ignored
        )
        if vision and source.words("vision_config") is not None and not self._config.hidden_size_per_layer_input:
            # Not stored: the models without per-layer embeddings attend so, E2B and E4B do not.
            self.notes.append(BOTH_WAYS)
            vision = False
        return Towers(bind_audio_tower(source) if audio else None, bind_vision_tower(source) if vision else None)

    def digest(self) -> str:
        """sha256 over the file's size and everything before the tensor data, and the same of its mmproj."""
        if self._towers is None or self._towers.file is self._file:
            return self._file.digest()
        return hashlib.sha256((self._file.digest() + self._towers.digest()).encode()).hexdigest()

    def close(self) -> None:
        self._file.close()
        if self._towers is not None:
            self._towers.close()
