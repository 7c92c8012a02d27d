"""The official QAT checkpoints' schema, `quant_method` "gemma": which module has how many bits, its packed tensors.

Owns: `quantization_config` and its module patterns, packed weights and their scales, static activation scales. Does not
know: files, the towers, what becomes of the integers.

Schema, from transformers 5.23 (`integrations/gemma_quant.py`, `GemmaQuantizationConfig`), B = 2^(bits - 1):
    MODULE.weight                  U8 [out, ceil(in * bits / 8)], low bits first, stored as w + B; 8 bits: I8 [out, in]
    MODULE.weight_scale            F32 [out, 1]
    MODULE.input_activation_scale, MODULE.output_activation_scale    F32 scalars; 0 or absent: not rounded
    MODULE.embedding_quantized     as weight, for embeddings
    MODULE.embedding_scale         F32 [rows, 1], or a scale for each of a row's equal blocks
    layers.N.self_attn.{k,v}_cache_scale   F32 scalars of a cache in 8 bits; transformers does not apply them
The patterns of `module_quant_configs` are searched as one alternation: the match that begins first in a module's name
wins, the earlier pattern among those that begin together. Modules of `modules_to_not_convert` stay as they are.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.packed import Integers, PackedMatrix, Scales
from edge_gemma.export.source_file import StoredTensor, few, read_rows, show
from edge_gemma.folder import layouts

ORIGIN = "carried from the QAT checkpoint"
_KEYS = {"quant_method", "num_bits", "quantize_embeddings", "module_quant_configs", "modules_to_not_convert"}
_MAX_PATTERNS, _MAX_PATTERN = 64, 200
SIDE_TENSORS = "weight_scale|input_activation_scale|output_activation_scale"  # beside a linear module's weight
CACHE_SCALE = re.compile(r"layers\.(\d+)\.self_attn\.[kv]_cache_scale")


@dataclass(frozen=True)
class GemmaQuantization:
    """A checked `quantization_config`."""

    num_bits: int
    quantize_embeddings: bool
    patterns: tuple[tuple[re.Pattern[str], int], ...]
    skipped: tuple[re.Pattern[str], ...]

    def bits(self, module: str, embedding: bool) -> int:
        """Bits of a module's weights; 0 where they stay as they are. ConfigError where patterns disagree."""
        if (embedding and not self.quantize_embeddings) or any(p.match(module) for p in self.skipped):
            return 0
        found = [(match.start(), p.pattern, bits) for p, bits in self.patterns if (match := p.search(module))]
        if not found:
            return self.num_bits
        _, pattern, bits = min(found, key=lambda f: f[0])  # the first of those that begin together
        if bits != found[0][2]:
            raise ConfigError(
                f"quantization_config: {show(pattern)} gives {module} {bits} bits and {show(found[0][1])}, "
                f"listed before it, {found[0][2]}: expected patterns that agree"
            )
        return bits


def parse(config: Any) -> GemmaQuantization | None:
    """The checked `quantization_config` of a config.json; None where there is none. Raises ConfigError."""
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method != "gemma":
        raise ConfigError(
            f"the checkpoint is quantised (quant_method {show(repr(method))}), expected bf16, f16 or f32 weights, "
            "or the method 'gemma'"
        )
    if unknown := [key for key in config if key not in _KEYS]:
        raise ConfigError(f"unknown keys in quantization_config: {few(unknown)}")
    embeddings, configs = config.get("quantize_embeddings", False), config.get("module_quant_configs") or {}
    skipped = config.get("modules_to_not_convert")
    if not isinstance(embeddings, bool):
        raise ConfigError(f"quantization_config: quantize_embeddings is {show(repr(embeddings))}, expected a boolean")
    if not isinstance(configs, dict) or not all(
        isinstance(o, dict) and set(o) <= {"num_bits"} for o in configs.values()
    ):
        raise ConfigError("quantization_config: module_quant_configs is not an object of patterns with num_bits")
    # Without a list transformers leaves the head alone.
    skipped = ["lm_head"] if skipped is None else skipped
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ConfigError("quantization_config: modules_to_not_convert is not a list of names")
    if len(configs) > _MAX_PATTERNS or len(skipped) > _MAX_PATTERNS:
        raise ConfigError(f"quantization_config has more than {_MAX_PATTERNS} patterns")
    default = _bits(config.get("num_bits", 4))
    return GemmaQuantization(
        default,
        embeddings,
        tuple((_pattern(p), _bits(options.get("num_bits", default))) for p, options in configs.items()),
        # As transformers' should_convert_module: a pattern up to a boundary between names, or the end of the name.
        tuple(_pattern(p, rf"(?:{p})(?:(?<=\.)|(?=\.|$))|(?s:.*){re.escape(p)}$") for p in skipped),
    )


def _bits(value: Any) -> int:
    if type(value) is not int or value not in layouts.BITS:
        raise ConfigError(f"quantization_config: num_bits is {show(repr(value))}, expected one of {layouts.BITS}")
    return value


def _pattern(given: str, whole: str | None = None) -> re.Pattern[str]:
    """A compiled pattern that cannot keep the matcher busy: it comes from a file.

    Repeating what is no single character, or many repetitions and alternatives, is refused: without them the matcher's
    work on a module's name (60 characters) is below a million steps.
    """
    repeats, choices = len(re.findall(r"(?<![(\\])[*+?{]", given)), given.count("|")
    if len(given) > _MAX_PATTERN or re.search(r"\)[*+?{]", given) or repeats > 3 or choices > 8:
        raise ConfigError(
            f"quantization_config: the pattern {show(given)} is too involved: expected at most 3 repetitions, of "
            f"single characters, and 8 alternatives in {_MAX_PATTERN} characters"
        )
    try:
        with warnings.catch_warnings(action="error"):
            return re.compile(whole or given)
    except (re.error, RecursionError, OverflowError, Warning) as e:
        raise ConfigError(f"quantization_config: {show(given)} is not a regular expression: {show(e)}") from None


def packed_matrices(
    quantization: GemmaQuantization,
    expected: Mapping[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
    original: Callable[[str], str],
) -> dict[str, PackedMatrix]:
    """The packed matrices among `expected`; their tensors are taken out of `stored`. Names are canonical.

    Raises CheckpointError for tensors that are missing or do not fit the configuration, ConfigError for the latter.
    """
    packed = {}
    for name, shape in expected.items():
        module, embedding = name.removesuffix(".weight"), name.startswith("embed_tokens")
        bits = quantization.bits(original(name).removesuffix(".weight"), embedding) if len(shape) == 2 else 0
        if bits:
            rows, columns = shape
            take = _Taker(stored, module, original)
            packed[name] = take.embedding(rows, columns, bits) if embedding else take.linear(rows, columns, bits)
    for name in [n for n in stored if CACHE_SCALE.fullmatch(n)]:
        projection = f"{name.removesuffix('_cache_scale')}_proj.weight"
        if projection in packed:
            scale = _Taker(stored, name, original).scalar("")
            packed[projection] = PackedMatrix(**(vars(packed[projection]) | {"cache_scale": scale}))
    return packed


class _Taker:
    """Takes one module's tensors out of a table, checked."""

    def __init__(self, stored: dict[str, StoredTensor], module: str, original: Callable[[str], str]) -> None:
        self._stored, self._module, self._original = stored, module, original

    def linear(self, rows: int, columns: int, bits: int) -> PackedMatrix:
        integers = self._integers(".weight", rows, columns, bits)
        scales = self._scales(".weight_scale", rows, (1,))
        read = partial(_read, integers, scales, bits, columns)
        inputs, outputs = self.scalar(".input_activation_scale"), self.scalar(".output_activation_scale")
        return PackedMatrix((rows, columns), bits, 0, ORIGIN, read, inputs, outputs, stored=(integers, scales))

    def embedding(self, rows: int, columns: int, bits: int) -> PackedMatrix:
        """One scale a row; the table of per-layer embeddings may have one for each block of 256."""
        integers = self._integers(".embedding_quantized", rows, columns, bits)
        blocks = (1, columns // 256) if self._module == "embed_tokens_per_layer" and columns % 256 == 0 else (1,)
        scales = self._scales(".embedding_scale", rows, blocks)
        group = 0 if scales.shape[1] == 1 else 256
        read = partial(_read, integers, scales, bits, columns)
        return PackedMatrix((rows, columns), bits, group, ORIGIN, read, stored=(integers, scales))

    def scalar(self, suffix: str) -> float:
        """A scale for all tokens; 0 where there is none."""
        tensor = self._stored.pop(self._module + suffix, None)
        if tensor is None:
            return 0.0
        if math.prod(tensor.shape) != 1 or tensor.kind is None:
            raise self._misfit(suffix, tensor, "one F32")
        value = float(read_rows(replace(tensor, shape=(1,)), 0, 1)[0])
        if not 0 <= value < math.inf:
            raise CheckpointError(f"{self._name(suffix)} is {value}, expected a positive number, or 0 for none")
        return value

    def _integers(self, suffix: str, rows: int, columns: int, bits: int) -> StoredTensor:
        tensor, width = self._take(suffix), -(-columns * bits // 8)
        dtype = "I8" if bits == 8 else "U8"
        if (tensor.dtype, tensor.shape) != (dtype, (rows, width)):
            raise self._misfit(suffix, tensor, f"{dtype} {(rows, width)}, {bits} bits as quantization_config says")
        return tensor

    def _scales(self, suffix: str, rows: int, blocks: tuple[int, ...]) -> StoredTensor:
        tensor = self._take(suffix)
        if tensor.dtype != "F32" or tensor.shape not in [(rows, n) for n in blocks]:
            raise self._misfit(suffix, tensor, " or ".join(f"F32 {(rows, n)}" for n in blocks))
        return tensor

    def _take(self, suffix: str) -> StoredTensor:
        if self._module + suffix not in self._stored:
            raise CheckpointError(f"{self._name(suffix)} is missing, which quantization_config asks for")
        return self._stored.pop(self._module + suffix)

    def _name(self, suffix: str) -> str:
        return show(self._original(self._module + suffix), 160)

    def _misfit(self, suffix: str, tensor: StoredTensor, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._name(suffix)} is {tensor.dtype} {tensor.shape}, expected {expected}")


def _read(
    integers: StoredTensor, scales: StoredTensor, bits: int, columns: int, start: int, stop: int
) -> tuple[Integers, Scales]:
    """Rows [start, stop) of a packed matrix."""
    width = integers.shape[1]
    fields = np.empty((stop - start, width), np.uint8)
    integers.file.read_into(integers.offset + start * width, fields.reshape(-1).data)
    values = read_rows(scales, start, stop)
    if not ((values > 0) & (values < np.inf)).all():
        bad = values[~((values > 0) & (values < np.inf))][0]
        raise CheckpointError(f"a scale is {bad}, expected positive numbers: the checkpoint is damaged")
    return layouts.unpack_fields(fields, bits, columns), values
