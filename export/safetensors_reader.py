"""Hugging Face checkpoints: a folder of config.json, safetensors files and a tokenizer.

Owns: the safetensors container, the shard index, config.json's two layouts (text only, multimodal) and the tensor
names of both. Does not know: GGUF, what is written at export, or what a tower's tensors mean.

Formats: safetensors 0.x (u64 header length, JSON header, data), `model.safetensors.index.json` as transformers 5.23
writes it. Gemma 3 keeps RMS-norm weights as w - 1; `rows` adds the 1 back.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export import gemma_quant
from edge_gemma.export.audio_tower import AudioTower, bind_audio_tower
from edge_gemma.export.gguf_types import BY_NAME
from edge_gemma.export.packed import PackedMatrix
from edge_gemma.export.source_file import (
    SourceFile,
    SourceFolder,
    StoredTensor,
    TensorInfo,
    bind_tensors,
    few,
    read_rows,
    resolve_config,
    show,
)

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_READABLE = ("F32", "F16", "BF16")
_MAX_HEADER = 8 << 20  # E2B has 0.3 MB; parsing costs several times the size
_MAX_JSON = 8 << 20
_MAX_TOKENIZER = 128 << 20

# Where the text decoder's tensors are, by the model_type of config.json.
_PREFIX = {"gemma4": "model.language_model.", "gemma4_text": "model.", "gemma3_text": "model."}
_TOWERS = ("audio_tower.", "vision_tower.", "embed_audio.", "embed_vision.", "multi_modal_projector.")
_KV_TENSOR = re.compile(rf"layers\.(\d+)\.self_attn\.(k_norm\.weight|[kv]_proj\.(weight|{gemma_quant.SIDE_TENSORS}))")

# What every transformers configuration may carry and no decoder asks for.
_GENERIC_KEYS = {
    "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip
# Keys of a multimodal config.json beside text_config: the towers' and the glue's, none the decoder's.
_TOP_KEYS = _GENERIC_KEYS | {
    "_attn_implementation", "_name_or_path", "architectures", "audio_config", "dtype", "eos_token_id",
    "initializer_range", "model_type", "text_config", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "vision_config",
}  # fmt: skip
_GLUE_KEY = re.compile(r"\w+_token_(id|index)|\w+_per_(image|video|frame|audio|second)|\w+_token_ids")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted file. Raises CheckpointError; duplicate keys and NaN are refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is too large")
        return number

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{what} is not valid JSON: {show(e)}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_header(file: SourceFile) -> tuple[dict[str, StoredTensor], bytes]:
    """The tensors of one safetensors file under their own names, and the header's bytes.

    Checked: the header's length against the file, every shape against its byte range, and that the ranges cover the
    data without gaps or overlaps.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.name} has {file.size} bytes, too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.name} is not a whole safetensors file: it claims a header of {length} bytes in {file.size}"
        )
    raw = file.read(0, 8 + length)
    header = parse_json(raw[8:], f"the header of {file.name}")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise CheckpointError(f"{file.name}: {show(name)} begins at byte {tensor.offset}, expected {end}")
        end += math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
    if end != file.size:
        raise CheckpointError(f"{file.name} has {file.size} bytes, its header describes {end}; fetch the file again")
    return tensors, raw


def _stored(file: SourceFile, base: int, name: str, entry: Any) -> StoredTensor:
    """One header entry {"dtype", "shape", "data_offsets"}; `base` is where the data begins."""
    where = f"{file.name}: {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {show(repr(dtype))}")
    if not _integers(shape) or len(shape) > 8 or not all(0 < n < 1 << 48 for n in shape):
        raise CheckpointError(f"{where} has the shape {show(shape)}, expected up to 8 positive sizes")
    if not _integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= file.size - base:
        raise CheckpointError(f"{where} has data_offsets {show(offsets)}, outside the {file.size - base} bytes of data")
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where} has {offsets[1] - offsets[0]} bytes, {dtype} of shape {tuple(shape)} needs {needed}"
        )
    kind = BY_NAME[dtype] if dtype in _READABLE else None
    return StoredTensor(file, base + offsets[0], tuple(shape), dtype, kind, needed)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value)


class SafetensorsCheckpoint:
    """A Hugging Face folder as a `Checkpoint`: model_type gemma4, gemma4_text or gemma3_text; F32, F16 and BF16."""

    def __init__(self, folder: SourceFolder) -> None:
        self._folder = folder
        self._name = folder.name
        self._files: list[SourceFile] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        config_bytes = self._folder.read("config.json", _MAX_JSON)
        top = parse_json(config_bytes, f"{self._name}/config.json")
        self.text_config = _text_config(top)
        self._config = resolve_config(self._name, self.text_config)
        stored, headers = self._open_files()
        prefix = _PREFIX[top["model_type"]]
        canonical = {_canonical(name, prefix): tensor for name, tensor in stored.items()}
        original = partial(_original, prefix=prefix)
        shapes = self._config.tensor_shapes()
        quantization = self._quantization = gemma_quant.parse(_quantization_config(top))
        self.packed: dict[str, PackedMatrix] = {}
        self.trained_recipe = None
        if quantization is not None:
            self.trained_recipe = "mobile"
            self._prefetch_scalars(stored)
            self.packed = gemma_quant.packed_matrices(quantization, shapes, canonical, original)
        self._stored = bind_tensors(
            self._name,
            {name: shape for name, shape in shapes.items() if name not in self.packed},
            canonical,
            partial(self._unused, multimodal=top["model_type"] == "gemma4"),
            original,
        )
        self._top, self._towers = top, {name: t for name, t in stored.items() if name.startswith("model.")}
        infos = [TensorInfo(name, t.shape, t.dtype) for name, t in self._stored.items()]
        infos += [TensorInfo(name, p.shape, f"I{p.bits}") for name, p in self.packed.items()]
        self.tensors = {info.name: info for info in infos}
        digest = hashlib.sha256(config_bytes)
        for file, header in zip(self._files, headers, strict=True):
            digest.update(file.size.to_bytes(8, "little") + header)
        self._digest = digest.hexdigest()
        self.license = self._read_license()
        self.chat_template = self._read_chat_template()
        self.generation_config = self._read_generation_config(top)

    def _open_files(self) -> tuple[dict[str, StoredTensor], list[bytes]]:
        """The tensors of model.safetensors, or of all shards, under the names the files give them."""
        index = "model.safetensors.index.json"
        if self._folder.has("model.safetensors"):
            names, weight_map = ["model.safetensors"], None
        elif self._folder.has(index):
            weight_map = _weight_map(parse_json(self._folder.read(index, _MAX_JSON), f"{self._name}'s shard index"))
            names = sorted(set(weight_map.values()))
        else:
            raise CheckpointError(f"{self._name} has neither model.safetensors nor model.safetensors.index.json")
        stored: dict[str, StoredTensor] = {}
        headers = []
        for name in names:
            file = self._folder.open(name)
            self._files.append(file)
            tensors, header = read_header(file)
            headers.append(header)
            if weight_map is not None and (stray := [t for t in tensors if weight_map.get(t) != name]):
                raise CheckpointError(f"{file.name} holds tensors the shard index places elsewhere: {few(stray)}")
            stored |= tensors
        if weight_map is not None and (lost := [t for t in weight_map if t not in stored]):
            raise CheckpointError(f"{self._name}: the shard index names tensors that no shard holds: {few(lost)}")
        return stored, headers

    def _prefetch_scalars(self, stored: Mapping[str, StoredTensor]) -> None:
        """Activation and cache scales, which are read one by one, between larger tensors."""
        for file in self._files:
            here = [t for t in stored.values() if t.file is file and math.prod(t.shape) == 1]
            file.prefetch((t.offset, t.nbytes) for t in here)

    def _unused(self, name: str, multimodal: bool) -> bool:
        """Tensors that may be present and are not the decoder's: a tied head, towers, K and V of KV-shared layers."""
        if name == "lm_head.weight":
            return self._config.tie_word_embeddings
        if multimodal and name.startswith(tuple(f"/model.{tower}" for tower in _TOWERS)):
            return True
        if gemma_quant.CACHE_SCALE.fullmatch(name):
            return self.trained_recipe is not None
        match = _KV_TENSOR.fullmatch(name)
        layers = self._config.layers
        return bool(match and int(match[1]) < len(layers) and not layers[int(match[1])].owns_kv)

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Where the values of a tensor lie."""
        return self.packed[name].stored if name in self.packed else (self._stored[name],)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis, float32, C-contiguous and fresh: effective values."""
        if name in self.packed:
            return self.packed[name].rows(start, stop)
        if name not in self._stored:
            raise CheckpointError(f"{self._name} has no tensor {show(name)}")
        values = read_rows(self._stored[name], start, stop)
        if name.endswith("norm.weight") and self._config.norm_weight_offset:
            values += np.float32(self._config.norm_weight_offset)
        return values

    def tokenizer_model(self) -> bytes:
        """The SentencePiece model: tokenizer.model, or rebuilt from tokenizer.json."""
        if self._folder.has("tokenizer.model"):
            return self._folder.read("tokenizer.model", _MAX_TOKENIZER)
        if not self._folder.has("tokenizer.json"):
            raise CheckpointError(f"{self._name} has neither tokenizer.model nor tokenizer.json")
        from edge_gemma.export.sentencepiece_model import from_tokenizer_json

        data = self._folder.read("tokenizer.json", _MAX_TOKENIZER)
        return from_tokenizer_json(data, self._config.vocab_size)

    def audio_tower(self) -> AudioTower | None:
        """The audio tower, None in models that do not listen."""
        towers = {name.removeprefix("model."): tensor for name, tensor in self._towers.items()}
        config = self._config
        top = self._top if self._top["model_type"] == "gemma4" else {}
        return bind_audio_tower(
            self._name, top, config.hidden_size, config.vocab_size, towers, quantization=self._quantization
        )

    def digest(self) -> str:
        """sha256 over config.json, and every file's size and header."""
        return self._digest

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _side_file(self, name: str) -> bytes | None:
        return self._folder.read(name, _MAX_JSON) if self._folder.has(name) else None

    def _side_json(self, name: str) -> dict[str, Any]:
        data = self._side_file(name)
        return {} if data is None else parse_json(data, f"{self._name}/{name}")

    def _read_chat_template(self) -> str | None:
        if (data := self._side_file("chat_template.jinja")) is not None:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{self._name}/chat_template.jinja is not UTF-8") from e
        template = self._side_json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several named templates
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template is None:
            return None
        if not isinstance(template, str) or any("\ud800" <= c <= "\udfff" for c in template):
            raise CheckpointError(f"{self._name}: chat_template is not text")
        return template

    def _read_generation_config(self, top: Mapping[str, Any]) -> dict[str, Any]:
        given = self._side_json("generation_config.json")
        eos: list[int] = []
        for source in (given, top, self.text_config):
            ids = source.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(i) is int and 0 <= i < self._config.vocab_size for i in ids):
                raise CheckpointError(f"{self._name}: eos_token_id is {show(ids)}, expected ids of the vocabulary")
            eos += [i for i in ids if i not in eos]
        return {"eos_token_id": eos} | sampling(given, self._name)

    def _read_license(self) -> str | None:
        """The `license:` line of the model card's front matter."""
        data = self._side_file("README.md")
        front = re.match(r"---\r?\n(.*?)\r?\n---", (data or b"")[:65536].decode("utf-8", "replace"), re.DOTALL)
        line = front and re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front[1], re.MULTILINE)
        return line[1] if line else None


_NUMBER = (int, float)
_SAMPLING: dict[str, tuple[type, ...]] = {
    "temperature": _NUMBER, "top_k": _NUMBER, "top_p": _NUMBER, "min_p": _NUMBER, "repetition_penalty": _NUMBER,
    "do_sample": (bool,), "num_beams": (int,),
}  # fmt: skip


def sampling(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The sampler settings of a generation configuration that we know, checked to be numbers."""
    result = {}
    for key, kinds in _SAMPLING.items():
        value = given.get(key)
        if value is None:
            continue
        if type(value) not in kinds or not value >= 0:
            raise CheckpointError(f"{source}: {key} is {show(repr(value))}, expected a number of at least 0")
        result[key] = value
    return result


def _text_config(top: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own configuration from either layout of config.json, without what says nothing about it."""
    model_type = top.get("model_type")
    if not isinstance(model_type, str) or model_type not in _PREFIX:
        raise ConfigError(f"model_type is {show(repr(model_type))}, expected one of {', '.join(sorted(_PREFIX))}")
    text: Any = top
    if model_type == "gemma4":
        glue = [k for k in top if k not in _TOP_KEYS and k != "quantization_config" and not _GLUE_KEY.fullmatch(k)]
        if glue:
            raise ConfigError(f"unknown configuration keys for gemma4: {few(glue)}")
        text = top.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"text_config is {type(text).__name__}, expected an object")
        if text.get("model_type", "gemma4_text") != "gemma4_text":
            raise ConfigError(f"text_config's model_type is {show(repr(text['model_type']))}, expected 'gemma4_text'")
    tied = {bool(c["tie_word_embeddings"]) for c in (top, text) if c.get("tie_word_embeddings") is not None}
    if len(tied) > 1:
        raise ConfigError("tie_word_embeddings differs between config.json and its text_config")
    result = {k: v for k, v in text.items() if k not in _GENERIC_KEYS and k != "quantization_config"}
    result |= {"model_type": model_type if model_type != "gemma4" else "gemma4_text"}
    return result | ({"tie_word_embeddings": tied.pop()} if tied else {})


def _quantization_config(top: Mapping[str, Any]) -> Any:
    """quantization_config, at the top of config.json or in its text_config; None where there is none."""
    text = top.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    return inner if top.get("quantization_config") is None else top["quantization_config"]


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name -> file name of a shard index; only plain file names beside it are accepted."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the shard index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(
                f"the shard index places {show(name)} in {show(repr(file))}, expected a file beside it"
            )
    return weight_map


def _canonical(name: str, prefix: str) -> str:
    """The file's name -> the canonical one. Names outside `prefix` get a leading slash, so that none passes for one."""
    if name.startswith("lm_head."):
        return name
    rest = name.removeprefix(prefix)
    return rest if name.startswith(prefix) and not rest.startswith("lm_head.") else f"/{name}"


def _original(name: str, prefix: str) -> str:
    """The inverse of `_canonical`."""
    if name.startswith("lm_head."):
        return name
    return name[1:] if name.startswith("/") else prefix + name
