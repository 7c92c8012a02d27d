"""A tower of a multimodal checkpoint: its configuration, its tensors, the tokens that stand around what it encodes.

Owns: finding a tower's tensors in a checkpoint, reading them, the bounds of clipped layers. Does not know: which
tensors a tower has (audio_tower.py, vision_tower.py), how a container stores them, what becomes of them.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.element_types import FLOATS
from edge_gemma.export.gemma_quant import GemmaQuantization, packed_matrices
from edge_gemma.export.packed import Integers, PackedMatrix, Scales
from edge_gemma.export.source_file import StoredTensor, bind_tensors, read_rows
from edge_gemma.vision_config import CLIPS


class TowerConfig(Protocol):
    """What every tower's configuration says."""

    @property
    def use_clipped_linears(self) -> bool: ...
    def tensor_shapes(self, text_hidden_size: int) -> dict[str, tuple[int, ...]]: ...


C = TypeVar("C", bound=TowerConfig)


@dataclass(frozen=True)
class Tower(Generic[C]):
    """A tower ready to be exported. `read(name)` gives a tensor of `config.tensor_shapes` as float32."""

    config: C
    words: Mapping[str, Any]  # the checkpoint's own words of the configuration
    text_hidden_size: int
    token_ids: Mapping[str, int]
    read: Callable[[str], np.ndarray]
    dtype: str = "F32"  # the float type that linear weights are stored in
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)  # integers already; not in `read`
    stored: tuple[StoredTensor, ...] = ()  # where its values lie
    bfloat16: frozenset[str] = frozenset()  # tensors of `read` that lose nothing in this type

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

    def float_type(self, weights: np.ndarray) -> str:
        """The narrowest type that these values of a linear layer lose nothing in: what they were rounded to.

        Wider types often hold values that were bfloat16 before, as the releases are.
        """
        return "BF16" if is_bfloat16(weights) else self.dtype

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


def is_bfloat16(values: np.ndarray) -> bool:
    """Whether float32 values lose nothing in bfloat16."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


@dataclass(frozen=True)
class TowerSource:
    """A multimodal checkpoint, as far as towers are read from it.

    top: config.json. stored: the towers' tensors by the names of `tensor_shapes`; original: spells such a name as the
    file does; restored(name, values): the checkpoint's values, where the file stores others. quantization: of a QAT
    checkpoint, whose packed matrices stay integers. ignored: unknown keys to pass over.
    """

    name: str
    top: Mapping[str, Any]
    hidden_size: int
    vocab_size: int
    stored: Mapping[str, StoredTensor]
    original: Callable[[str], str] = str
    restored: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values
    quantization: GemmaQuantization | None = None
    ignored: Collection[str] = ()

    def words(self, key: str) -> Mapping[str, Any] | None:
        """A tower's part of config.json, None where there is none. Raises ConfigError."""
        words = self.top.get(key)
        if words is not None and not isinstance(words, Mapping):
            raise ConfigError(f"{self.name}: {key} is {type(words).__name__}, expected an object")
        return words

    def bind(
        self, config: C, words: Mapping[str, Any], token_ids: Mapping[str, tuple[str, int]], parts: tuple[str, ...],
        without: str,
    ) -> Tower[C]:  # fmt: skip
        """The tower whose tensors' names begin with one of `parts`. token_ids: as TOKEN_IDS of audio_tower.py.

        without: how a user does without the tower. Raises ConfigError, CheckpointError.
        """
        ids = {n: default if self.top.get(key) is None else self.top[key] for n, (key, default) in token_ids.items()}
        if wrong := {n: i for n, i in ids.items() if type(i) is not int or not 0 <= i < self.vocab_size}:
            raise ConfigError(f"{self.name}: {min(wrong)} is {wrong[min(wrong)]!r}, expected a token of the vocabulary")
        present = {name: t for name, t in self.stored.items() if name.startswith(parts)}
        shapes = config.tensor_shapes(self.hidden_size)
        packed: Mapping[str, PackedMatrix] = {}
        try:
            if self.quantization is not None:
                packed = packed_matrices(self.quantization, shapes, present, self.original)
            floats = {name: shape for name, shape in shapes.items() if name not in packed}
            bound = bind_tensors(self.name, floats, present, lambda name: False, self.original)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {without}") from None

        def read(name: str) -> np.ndarray:
            tensor = bound[name]
            if tensor.shape:
                return self.restored(name, read_rows(tensor, 0, tensor.shape[0]))
            return read_rows(replace(tensor, shape=(1,)), 0, 1).reshape(())

        dtypes = {tensor.dtype for name, tensor in bound.items() if name.endswith(".linear.weight")}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= FLOATS.keys() else "F32"
        lies = (*bound.values(), *(part for matrix in packed.values() for part in matrix.stored))
        halves = frozenset(name for name, tensor in bound.items() if tensor.dtype == "BF16")
        return Tower(config, words, self.hidden_size, ids, read, dtype, packed, lies, halves)
