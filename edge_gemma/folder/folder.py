"""The on-disk contract: what a model folder holds and how it is opened.

Owns: `manifest.json` (format version, configuration, tensor table, digests, recipe, source), the safetensors
containers beside it, and the checks made before a byte of them is used. Does not know: what a tensor means to the
decoder, how values were quantised, or how tokens are made.

A folder holds
    manifest.json             this module's `Manifest`, with a digest over itself
    weights.safetensors       tensors in the order the decoder reads them, each part aligned to 64 bytes
    embed_tokens_per_layer.safetensors   the per-layer-embedding table, row-major: a row is one read; with it the token
                                         embeddings of a model whose head has its own weights
    tokenizer.model           a SentencePiece model
    chat_template.jinja       optional
    generation_config.json
    audio_encoder.onnx, audio_encoder_stream.onnx, audio_encoder.onnx_data    in models that listen
    vision_encoder.safetensors   in models that see, tensors as above; the manifest's section `vision` has their table

Layouts of a tensor's parts (layouts.py draws them):
    dense   values: F32 or BF16, row-major; U32 in a drafter's ordering
    panels  packed: U8 [panels, chunks, 8, 4]; scales: F16 [panels, groups, 8] or F32 [panels, 1, 8]; with a minimum,
            scales: U8, U16 or U32 [panels, groups, 8]; factors: F16 [panels, blocks, 2, 8]
    rows    records: U8 [rows, record bytes]

Two tensors may name the same bytes: token embeddings and a head that are stored apart in the source but are equal.

Version 2 added minima. A folder without any says version 1, so older programs can read it.

Tensors trained with static activation scales have them in the manifest, as numbers that are float32 values:
`input_scale` and `output_scale` of a matrix, `cache_scale` of the K or V it makes (Tensor has their meaning).
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_gemma.config import GemmaConfig
from edge_gemma.drafter_config import ORDERING
from edge_gemma.errors import ConfigError, ModelFolderError
from edge_gemma.folder import layouts
from edge_gemma.folder.file_names import (  # noqa: F401 (those that only others use belong to the contract too)
    AUDIO_BATCH,
    AUDIO_DATA,
    AUDIO_STREAM,
    DRAFTER_FORMAT,
    GENERATION,
    MANIFEST,
    PER_LAYER,
    REPLACEABLE,
    TEMPLATE,
    TOKENIZER,
    VISION,
    VISION_DATA,
    VISION_GRAPH,
    WEIGHTS,
)
from edge_gemma.host import system
from edge_gemma.vision_config import VisionConfig

FORMAT, VERSION = "edge_gemma model folder", 2  # the newest; older ones are read too
ONNX_FORMAT, ONNX_VERSION = "edge_gemma ONNX folder", 1  # backends/onnx.py
DRAFTER_VERSION = 1  # folder/drafter_folder.py
_HOW_TO_RUN = {
    DRAFTER_FORMAT: " but of a drafter, which guesses for another model: give that model with -m, this one as --draft",
    FORMAT: " but of a model folder: run it without --backend onnx, or export it with --onnx first",
    ONNX_FORMAT: " but of an ONNX folder: run it with --backend onnx",
}
ALIGNMENT = 64  # bytes: a cache line
_MANIFEST_LIMIT = 64 << 20
_DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "F32": np.float32,
}  # 16-bit floats stay as their bits

_SCALES = ("input_scale", "output_scale", "cache_scale")

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, what)


@dataclass(frozen=True)
class Part:
    """One array in a container. `offset` counts bytes from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    sha256: str = ""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """16-bit floats are uint16."""
        return np.dtype(_DTYPES[self.dtype])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model: logical shape, how it is laid out, and its parts."""

    shape: tuple[int, ...]
    layout: str  # "dense" | "panels" | "rows"
    parts: dict[str, Part]
    bits: int = 0  # 2, 4, 8; 0 in dense tensors
    group: int = 0  # weights that share a scale; 0: one scale a row
    minimum: int = 0  # bits of a group's minimum (layouts.py); 0: none
    origin: str = ""  # where the bits came from, in words for `edge-gemma info`
    # Static int8 activation scales of weights trained with them, float32 values; 0: none. See linear.PanelMatrix.
    input_scale: float = 0.0
    output_scale: float = 0.0
    cache_scale: float = 0.0  # of the K or V this projection makes; kept, not applied (as in transformers)
    same_as: str = ""  # in an exporter's plan: the tensor whose bytes are this one's too, stored once


def plan_tensor(
    name: str,
    shape: tuple[int, ...],
    layout: str,
    *,
    bits: int = 0,
    group: int = 0,
    minimum: int = 0,
    dtype: str = "F32",
) -> Tensor:
    """The parts of a tensor with this shape and layout. Their offsets are not set yet."""
    file = PER_LAYER if layout == "rows" or name.startswith("embed_tokens_per_layer.") else WEIGHTS
    file = VISION if name.startswith(("vision_tower.", "embed_vision.")) else file
    if layout == "dense":
        parts = {"values": Part(file, dtype, shape)}
    elif layout == "panels":
        rows, columns = shape
        scalar = f"U{2 * minimum}" if minimum else "F16" if group else "F32"
        parts = {
            "packed": Part(file, "U8", layouts.packed_shape(rows, columns, bits, group)),
            "scales": Part(file, scalar, layouts.scales_shape(rows, columns, bits, group)),
        }
        if 0 < minimum < 16:
            parts["factors"] = Part(file, "F16", layouts.factors_shape(rows, columns, minimum))
    elif layout == "rows":
        parts = {"records": Part(file, "U8", (shape[0], layouts.record_bytes(shape[1], bits, group)))}
    else:
        raise ModelFolderError(f"tensor {name}: layout is {layout!r}, expected dense, panels or rows")
    return Tensor(shape, layout, parts, bits, group, minimum)


def version_of(tensors: Iterable[Tensor]) -> int:
    """The oldest version of the format that can hold these tensors."""
    return 2 if any(tensor.minimum for tensor in tensors) else 1


@dataclass(frozen=True)
class AudioSection:
    """What the manifest says of the audio encoder. The sizes are those of its graphs."""

    audio_config: dict[str, Any]  # the checkpoint's own words
    band: int  # keys an encoder query sees, itself included: 12 as in transformers, 13 as in DeepMind's code
    bits: int  # of the linear layers' weights; 0: float32
    audio_token_id: int  # the placeholder `<|audio|>`
    boa_token_id: int  # `<|audio>`, before the soft tokens
    eoa_token_id: int  # `<audio|>`, after them


@dataclass(frozen=True)
class VisionSection:
    """What the manifest says of the vision encoder, and its tensors (VisionConfig.stored_shapes)."""

    config: VisionConfig
    tensors: dict[str, Tensor]
    image_token_id: int  # the placeholder `<|image|>`
    boi_token_id: int  # `<|image>`, before the soft tokens
    eoi_token_id: int  # `<image|>`, after them
    video_token_id: int  # `<|video|>`, the placeholder in frames of a video


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder: checked sizes, nothing read yet but the manifest."""

    path: Path
    config: GemmaConfig
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]
    audio: AudioSection | None = None  # None: the model does not listen
    vision: VisionSection | None = None  # None: the model does not see
    graphs_in: ClassVar[str] = ""  # where below `path` the encoders' graphs lie
    needs: ClassVar[tuple[str, ...]] = (TOKENIZER,)  # files without which there is no such folder

    @classmethod
    def open(cls, path: Path | str) -> "ModelFolder":
        """Check version, configuration, tensor table and file sizes. Raises ModelFolderError, one line."""
        path = Path(path)
        manifest, config = read_manifest(path, FORMAT, VERSION)
        tensors = read_tensors(manifest, config.tensor_shapes(), path)
        folder = cls(path, config, tensors, manifest, read_audio(manifest, config), read_vision(manifest, config, path))
        folder._check_files()
        return folder

    def _check_files(self) -> None:
        sizes = _field(self.manifest, "files", dict)
        for name, entry in sizes.items():
            if not self._may_hold(name) or not isinstance(entry, dict):
                raise ModelFolderError(f"{self.path}: the manifest names the file {name!r}, expected a plain name")
            expected = _field(entry, "bytes", int)
            try:
                actual = (self.path / name).stat().st_size
            except OSError as error:
                raise ModelFolderError(f"{self.path / name}: {error.strerror}; export the model again") from None
            if actual != expected:
                raise ModelFolderError(
                    f"{self.path / name} has {actual} bytes, expected {expected}: copy or export it again"
                )
        if missing := [name for name in self.needs if name not in sizes]:
            raise ModelFolderError(f"{self.path}: the manifest lacks {missing[0]}")
        for name, part in self.parts():
            end = part.offset + part.nbytes
            if part.file not in sizes or part.offset < 0 or part.offset % ALIGNMENT or end > sizes[part.file]["bytes"]:
                raise ModelFolderError(f"{self.path}: {name} lies at bytes {part.offset} to {end}, outside {part.file}")

    def _may_hold(self, name: str) -> bool:
        return name == os.path.basename(name)

    @property
    def soft_ids(self) -> tuple[int, ...]:
        """The placeholders of soft tokens: of sound, of pictures, of a video's frames."""
        sound = (self.audio.audio_token_id,) if self.audio else ()
        return sound + ((self.vision.image_token_id, self.vision.video_token_id) if self.vision else ())

    def parts(self) -> Iterator[tuple[str, Part]]:
        """All parts, those of the encoder too."""
        for name, tensor in [*self.tensors.items(), *(self.vision.tensors.items() if self.vision else ())]:
            for key, part in tensor.parts.items():
                yield f"{name}.{key}", part

    def map(self) -> "MappedFiles":
        return MappedFiles(self.path)

    def read_text(self, name: str) -> str | None:
        """A small text file of the folder, None where it has none."""
        if name not in self.manifest["files"]:
            return None
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFolderError(f"{self.path / name}: {error}") from None

    def verify(self, progress: Progress | None = None) -> int:
        """Compare every digest. Returns the bytes checked; raises ModelFolderError naming the first that differs."""
        files = self.manifest["files"]
        total = sum(entry["bytes"] for entry in files.values())
        done = 0
        by_file: dict[str, list[tuple[str, Part]]] = {name: [] for name in files}
        for name, part in self.parts():
            by_file[part.file].append((name, part))
        for file, parts in by_file.items():
            whole = [(file, 0, files[file]["bytes"], files[file].get("sha256"))]
            once = {(p.offset, p.nbytes, p.sha256): n for n, p in parts}  # tensors may share their bytes
            spans = [(n, *span) for span, n in once.items()] if parts else whole
            with (self.path / file).open("rb") as handle:
                for name, offset, nbytes, expected in spans:
                    digest = hashlib.sha256()
                    handle.seek(offset)
                    left = nbytes
                    while left and (block := handle.read(min(left, 1 << 22))):
                        digest.update(block)
                        left -= len(block)
                        done += len(block)
                        if progress:
                            progress(done, total, name)
                    if digest.hexdigest() != expected:
                        raise ModelFolderError(
                            f"{self.path / file}: {name} differs from the digest of the manifest: export it again"
                        )
        return done


class MappedFiles:
    """The containers of a folder, mapped read-only; arrays are views, nothing is copied."""

    def __init__(self, path: Path, *, at_once: bool = True) -> None:
        """at_once: a file is read into memory as a whole when the first of its arrays is asked for."""
        self._path, self._at_once = path, at_once
        self._maps: dict[str, mmap.mmap] = {}

    def array(self, part: Part) -> np.ndarray:
        """The part as a read-only array of its shape; 16-bit floats as uint16 bit patterns."""
        if part.file not in self._maps:
            try:
                mapped = system.map_file(self._path / part.file)
            except OSError as error:
                raise ModelFolderError(
                    f"{self._path / part.file} cannot be mapped ({error.strerror}): copy the model to another disk"
                ) from None
            if self._at_once:
                system.read_in_order(mapped)
            self._maps[part.file] = mapped
        flat = np.frombuffer(self._maps[part.file], part.numpy_dtype, count=math.prod(part.shape), offset=part.offset)
        return flat.reshape(part.shape)

    def drop_pages(self) -> None:
        """Let go of the memory of all files. Arrays stay as they are: what is read again is mapped again."""
        for mapped in self._maps.values():
            system.drop_pages(mapped)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest with sorted keys and without its own digest. Opening a folder checks it, so a flipped bit
    is noticed.
    """
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_entry(tensor: Tensor) -> dict[str, Any]:
    """The tensor as the manifest writes it."""
    entry: dict[str, Any] = {"shape": list(tensor.shape), "layout": tensor.layout}
    if tensor.layout != "dense":
        entry |= {"bits": tensor.bits, "group": tensor.group}
    entry |= {key: getattr(tensor, key) for key in ("minimum", *_SCALES, "origin") if getattr(tensor, key)}
    return entry | {"parts": {key: asdict(part) | {"bytes": part.nbytes} for key, part in tensor.parts.items()}}


def read_manifest(path: Path, kind: str, newest: int) -> tuple[dict[str, Any], GemmaConfig]:
    """The manifest of a folder of this kind and of a version up to `newest`, and its configuration. Raises
    ModelFolderError.
    """
    manifest = checked_manifest(path, kind, newest)
    try:
        return manifest, GemmaConfig.from_text_config(_field(manifest, "config", dict))
    except ConfigError as error:
        raise ModelFolderError(f"{path / MANIFEST}: {error}") from None


def checked_manifest(path: Path, kind: str, newest: int) -> dict[str, Any]:
    """The manifest, whatever its configuration says. Raises ModelFolderError as `read_manifest`."""
    names = {FORMAT: "a model folder", ONNX_FORMAT: "an ONNX folder", DRAFTER_FORMAT: "a drafter"}
    file, name = path / MANIFEST, names[kind]
    try:
        if file.stat().st_size > _MANIFEST_LIMIT:
            raise ModelFolderError(f"{file} has {file.stat().st_size} bytes, expected at most {_MANIFEST_LIMIT}")
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelFolderError(f"{file}: {error.strerror}; {path} is not {name}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{file} is not JSON ({error}): copy or export the model again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        advice = _HOW_TO_RUN.get(found, "") if isinstance(found, str) else ""
        if advice and kind == DRAFTER_FORMAT:
            advice = " but of a model: give it with -m, and as --draft the drafter of that model"
        raise ModelFolderError(f"{file} is not the manifest of {name}{advice}")
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= newest:
        expected = "1" if newest == 1 else f"1 to {newest}"
        raise ModelFolderError(f"{file} has format version {version!r}, expected {expected}: export the model again")
    if manifest.get("digest") != manifest_digest(manifest):
        raise ModelFolderError(f"{file} was altered (its digest differs): copy or export the model again")
    return manifest


def _field(entry: dict[str, Any], key: str, kind: type, of: str = "the manifest") -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ModelFolderError(f"{of}: {key} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _shape(name: str, entry: dict[str, Any]) -> tuple[int, ...]:
    shape = _field(entry, "shape", list, f"tensor {name}")
    if not 1 <= len(shape) <= 4 or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
        raise ModelFolderError(f"tensor {name}: shape is {shape!r}, expected one to four positive integers")
    return tuple(shape)


def read_tensors(holder: dict[str, Any], expected: dict[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """The table of tensors in a part of the manifest, which has to hold those expected."""
    tensors = {name: _read_tensor(name, entry) for name, entry in _field(holder, "tensors", dict).items()}
    for what, names in (("lacks", expected.keys() - tensors), ("has unknown", tensors.keys() - expected)):
        if names:
            raise ModelFolderError(f"{path}: the manifest {what} {len(names)} tensors, first {min(names)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelFolderError(f"{path}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    return tensors


def _read_tensor(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict):
        raise ModelFolderError(f"tensor {name}: the manifest's entry is not an object")
    of, shape = f"tensor {name}", _shape(name, entry)
    layout, parts = _field(entry, "layout", str, of), _field(entry, "parts", dict, of)
    bits, group, minimum, dtype = 0, 0, 0, "F32"
    if layout == "dense":
        dtype = _field(_field(parts, "values", dict, of), "dtype", str, of)
        if dtype not in (expected := ("U32",) if name == ORDERING else ("F32", "BF16")):
            raise ModelFolderError(f"tensor {name}: dtype is {dtype!r}, expected {' or '.join(expected)}")
    else:
        bits, group = _field(entry, "bits", int, of), _field(entry, "group", int, of)
        minimum = _field(entry, "minimum", int, of) if "minimum" in entry else 0
        if bits not in layouts.BITS or group not in layouts.RECORD_GROUPS or len(shape) != 2:
            raise ModelFolderError(
                f"tensor {name}: {bits} bits in groups of {group} is not a format of version {VERSION}"
            )
        if minimum not in layouts.MINIMA or (minimum and (layout != "panels" or group not in (16, 32))):
            raise ModelFolderError(
                f"tensor {name}: minima of {minimum} bits in {layout}, groups of {group}, expected none or panels with "
                "4, 8 or 16 bits in groups of 16 or 32"
            )
    plan = plan_tensor(name, shape, layout, bits=bits, group=group, minimum=minimum, dtype=dtype)
    if parts.keys() != plan.parts.keys():
        raise ModelFolderError(f"tensor {name}: has parts {sorted(parts)}, expected {sorted(plan.parts)}")
    found = {key: _read_part(name, key, parts[key], planned) for key, planned in plan.parts.items()}
    origin = _field(entry, "origin", str, of) if "origin" in entry else ""
    input_scale, output_scale, cache_scale = _static_scales(name, entry, layout, group)
    return Tensor(shape, layout, found, bits, group, minimum, origin, input_scale, output_scale, cache_scale)


def _static_scales(name: str, entry: dict[str, Any], layout: str, group: int) -> list[float]:
    scales = [entry.get(key, 0.0) for key in _SCALES]
    if not all(type(s) is float and 0 <= s < math.inf for s in scales) or (
        any(scales) and (layout, group) != ("panels", 0)
    ):
        raise ModelFolderError(
            f"tensor {name}: {', '.join(_SCALES)} are {scales}, expected numbers, in panels with one scale a row"
        )
    return scales


def read_audio(manifest: dict[str, Any], config: GemmaConfig, graphs_in: str = "") -> AudioSection | None:
    """What a manifest says of the audio encoder, None if nothing. Raises ModelFolderError."""
    if "audio" not in manifest:
        return None
    of, entry = "the manifest's audio section", _field(manifest, "audio", dict)
    kinds = {field.name: dict if field.name == "audio_config" else int for field in fields(AudioSection)}
    section = AudioSection(**{name: _field(entry, name, kind, of) for name, kind in kinds.items()})
    for name in ("audio_token_id", "boa_token_id", "eoa_token_id"):
        _token(entry, name, of, config)
    graphs = {os.path.join(graphs_in, name) for name in (AUDIO_BATCH, AUDIO_STREAM, AUDIO_DATA)}
    if missing := graphs - _field(manifest, "files", dict).keys():
        raise ModelFolderError(f"the manifest has an audio section and lacks {min(missing)}: export the model again")
    return section


def read_vision(manifest: dict[str, Any], config: GemmaConfig, path: Path, graphs_in: str = "") -> VisionSection | None:
    """What a manifest says of the vision encoder, None if nothing. graphs_in: the folder of its graph; "" for tensors.
    Raises ModelFolderError.
    """
    if "vision" not in manifest:
        return None
    of, entry = "the manifest's vision section", _field(manifest, "vision", dict)
    try:
        vision = VisionConfig.from_vision_config(_field(entry, "vision_config", dict, of))
    except ConfigError as error:
        raise ModelFolderError(f"{of}: {error}") from None
    tensors: dict[str, Tensor] = {}
    if not graphs_in:
        tensors = read_tensors(entry, vision.stored_shapes(config.hidden_size), path)
    elif missing := {f"{graphs_in}/{name}" for name in (VISION_GRAPH, VISION_DATA)} - manifest["files"].keys():
        raise ModelFolderError(f"the manifest has a vision section and lacks {min(missing)}: export the model again")
    ids = {field.name: _token(entry, field.name, of, config) for field in fields(VisionSection)[2:]}
    return VisionSection(vision, tensors, **ids)


def _token(entry: dict[str, Any], name: str, of: str, config: GemmaConfig) -> int:
    index: int = _field(entry, name, int, of)
    if not 0 <= index < config.vocab_size:
        raise ModelFolderError(f"{of}: {name} is {index}, outside the vocabulary")
    return index


def _read_part(name: str, key: str, entry: Any, planned: Part) -> Part:
    if not isinstance(entry, dict):
        raise ModelFolderError(f"tensor {name}: part {key} is not an object")
    of = f"tensor {name}"
    part = Part(
        file=_field(entry, "file", str, of),
        dtype=_field(entry, "dtype", str, of),
        shape=_shape(name, entry),
        offset=_field(entry, "offset", int, of),
        sha256=_field(entry, "sha256", str, of),
    )
    if (part.file, part.dtype, part.shape) != (planned.file, planned.dtype, planned.shape):
        raise ModelFolderError(
            f"tensor {name}: part {key} is {part.dtype} {list(part.shape)} in {part.file}, "
            f"expected {planned.dtype} {list(planned.shape)} in {planned.file}"
        )
    return part
