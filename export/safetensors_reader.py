"""Hugging Face checkpoints: a folder of config.json, safetensors files and a tokenizer.

Owns: the safetensors container, the shard index, the side files. Does not know: GGUF, whose keys and tensors stand
where (hub_config.py, tensor_names.py), what is written at export, where the files lie (source_file.Files).

Formats: safetensors 0.x (u64 header length, JSON header, data), `model.safetensors.index.json` as transformers 5.23
writes it. Gemma 3 keeps RMS-norm weights as w - 1; `rows` adds the 1 back.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.errors import CheckpointError
from edge_gemma.export import gemma_quant, hub_config
from edge_gemma.export.audio_tower import bind_audio_tower
from edge_gemma.export.element_types import FLOATS
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
    same_bytes,
    show,
)
from edge_gemma.export.tensor_names import TensorNames, is_tower
from edge_gemma.export.tower import TowerSource
from edge_gemma.export.towers import Towers
from edge_gemma.export.vision_tower import BOTH_WAYS, bind_vision_tower
from edge_gemma.generation.sampler import usable_settings

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 8 << 20  # E2B has 0.3 MB; parsing costs several times the size
_MAX_JSON = 8 << 20
_MAX_TOKENIZER = 128 << 20

_KV_TENSOR = re.compile(rf"layers\.(\d+)\.self_attn\.(k_norm\.weight|[kv]_proj\.(weight|{gemma_quant.SIDE_TENSORS}))")


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
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=constant, parse_float=finite
        )
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
    kind = FLOATS.get(dtype)
    return StoredTensor(file, base + offsets[0], tuple(shape), dtype, kind, needed)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value)


class SafetensorsCheckpoint:
    """A Hugging Face checkpoint as a `Checkpoint`: Gemma 3 and 4, text only or multimodal; F32, F16 and BF16."""

    def __init__(self, folder: SourceFolder, ignored: Collection[str] = ()) -> None:
        """ignored: unknown configuration keys to pass over."""
        self._folder = folder
        self.ignored = tuple(ignored)
        self._name = folder.name
        self._files: list[SourceFile] = []
        self.notes: list[str] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self._folder.has("adapter_model.safetensors") and not self._folder.has("model.safetensors"):
            raise CheckpointError(f"{self._name} is an adapter: merge it into its model first, then save the whole")
        config_bytes = self._folder.read("config.json", _MAX_JSON)
        self._top = top = parse_json(config_bytes, f"{self._name}/config.json")
        text = hub_config.text_config(top, self.ignored)
        self._config = resolve_config(self._name, text, self.ignored)
        quantization = self._quantization = gemma_quant.parse(hub_config.quantization_config(top))
        stored, headers = self._open_files()
        names = self._names = TensorNames(self._name, stored)
        canonical = {names.canonical(name): tensor for name, tensor in stored.items()}
        if self._config.tie_word_embeddings and self._head_differs(canonical):
            self._config = resolve_config(self._name, text | {"tie_word_embeddings": False}, self.ignored)
        self.text_config = dict(self._config.text_config)
        shapes = self._config.tensor_shapes()
        self.packed: dict[str, PackedMatrix] = {}
        self.trained_recipe = None
        if quantization is not None:
            self.trained_recipe = "mobile"
            self._prefetch_scalars(stored)
            self.packed = gemma_quant.packed_matrices(quantization, shapes, canonical, names.original)
        floats = {name: shape for name, shape in shapes.items() if name not in self.packed}
        self._stored = bind_tensors(self._name, floats, canonical, self._unused, names.original)
        self._towers = {name: tensor for name, tensor in canonical.items() if is_tower(name)}
        infos = [TensorInfo(name, t.shape, t.dtype) for name, t in self._stored.items()]
        infos += [TensorInfo(name, p.shape, f"I{p.bits}") for name, p in self.packed.items()]
        self.tensors = {info.name: info for info in infos}
        digest = hashlib.sha256(config_bytes)
        for file, header in zip(self._files, headers, strict=True):
            digest.update(file.size.to_bytes(8, "little") + header)
        self._digest = digest.hexdigest()
        self.license = license_of(self._side_file("README.md"))
        self.chat_template = self._read_chat_template()
        self.generation_config = self._read_generation_config(top)
        self.stop_pieces = hub_config.stop_pieces(self._side_json("tokenizer_config.json"))

    def _head_differs(self, canonical: Mapping[str, StoredTensor]) -> bool:
        """Whether a head is stored that is not the token embeddings, although the configuration says that it is.

        The file is believed, as in GGUF: a head that equals the embeddings byte for byte is left out, any other is
        used.
        """
        if not any(name.startswith("lm_head.") for name in canonical):
            return False
        head, embeddings = canonical.get("lm_head.weight"), canonical.get("embed_tokens.weight")
        if head and embeddings and same_bytes(head, embeddings):
            return False
        self.notes.append(
            "tie_word_embeddings is true, but the checkpoint stores another lm_head.weight: that one is used"
        )
        return True

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

    def _unused(self, name: str) -> bool:
        """Tensors that may be present and are not the decoder's: a tied head, towers, K and V of KV-shared layers."""
        if name == "lm_head.weight":
            return self._config.tie_word_embeddings
        if is_tower(name):
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

    def towers(self, *, audio: bool = True, vision: bool = True) -> Towers:
        """The towers that there are, of those that are asked for."""
        source = TowerSource(
            self._name,
            self._top if self._top["model_type"] == "gemma4" else {},
            self._config.hidden_size,
            self._config.vocab_size,
            {name[1:]: tensor for name, tensor in self._towers.items()},
            original=lambda name: self._names.original(f"/{name}"),
            quantization=self._quantization,
            ignored=self.ignored,
        )
        both_ways = self.text_config.get("use_bidirectional_attention") == "vision"
        if vision and both_ways and source.words("vision_config") is not None:
            self.notes.append(BOTH_WAYS)
            vision = False
        return Towers(bind_audio_tower(source) if audio else None, bind_vision_tower(source) if vision else None)

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
                return data.decode("utf-8-sig")
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
        text = top.get("text_config") or {}
        eos = hub_config.stop_ids(self._name, (given, top, text), self._config.vocab_size)
        settings, notes = usable_settings(given)
        self.notes += notes
        return {"eos_token_id": eos} | settings


def license_of(card: bytes | None) -> str | None:
    """The `license:` line of the front matter of a model card (README.md)."""
    front = re.match(r"---\r?\n(.*?)\r?\n---", (card or b"")[:65536].decode("utf-8", "replace"), re.DOTALL)
    line = front and re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front[1], re.MULTILINE)
    return line[1] if line else None


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
