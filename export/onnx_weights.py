"""A model folder's tensors as ONNX initializers, each with the node that uses it: product, table look-up, vector.

Owns: repacking (the folder's integers and scales are carried over, nothing is rounded again), which operator a stored
format needs, reading in blocks of rows. Does not know: where a tensor stands in the model.

    stored              product                                        look-up
    2, 4 or 8 bits      com.microsoft MatMulNBits                      com.microsoft GatherBlockQuantized
    float               Gemm with transB (float16: Cast first)         Gather (float16: Cast after)

Both quantised operators hold a row's fields low bits first, k ascending, unsigned with 2^(bits-1) for zero, and a
float32 scale for each block of columns. One scale a row is repeated over blocks. Some 2-bit matrices are multiplied
from fields of 4 bits (`_Rows.product_bits`). Neither operator has minima: with w the field less 2^(bits-1), a value is
scale * w - rest, rest = minimum - 2^(bits-1) scale, and what `rest` takes from a product is the sums of x over blocks
of columns, times rest: a second, small product in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.errors import CheckpointError, ModelFolderError
from edge_gemma.export.onnx_graph import FLOAT, MICROSOFT, Graph
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import ModelFolder, Part, Progress, Tensor
from edge_gemma.model.linear import widen

# What MatMulNBits computes with: 4 is int8, its input quantised with one scale a block, as our own decoder does.
INT8_PRODUCTS, FLOAT_PRODUCTS = 4, 0
ACCURACY_LEVEL = INT8_PRODUCTS
_BLOCK_WEIGHTS = 1 << 22  # weights repacked at a time
_ROW_SCALE_BLOCKS = (128, 64)  # columns for which a row's one scale is repeated; 32 where rows are not multiples


@dataclass(frozen=True)
class _Rows:
    """Rows start to stop - 1 of a tensor."""

    name: str
    tensor: Tensor
    start: int
    stop: int

    @property
    def initializer(self) -> str:
        whole = (self.start, self.stop) == (0, self.tensor.shape[0])
        return self.name if whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.tensor.shape[1]

    @property
    def block(self) -> int:
        """Columns that share a scale in the ONNX operators."""
        columns = self.tensor.shape[1]
        return self.tensor.group or next((b for b in _ROW_SCALE_BLOCKS if columns % b == 0), 32)

    @property
    def product_bits(self) -> int:
        """Bits of a field in MatMulNBits.

        onnxruntime 1.31 has no fast way through for 2 bits in blocks below 32, nor in float32: 12,288 x 1,536 times one
        token takes 245 and 210 ms there, from fields of 4 bits 1.7 and 3.9 ms.
        """
        slow = self.tensor.bits == 2 and (self.block < 32 or self.accuracy_level == FLOAT_PRODUCTS)
        return 4 if slow else self.tensor.bits

    @property
    def accuracy_level(self) -> int:
        """Of MatMulNBits: inputs in static steps are int8 already, and would not survive other steps."""
        return FLOAT_PRODUCTS if self.tensor.input_scale else ACCURACY_LEVEL

    @property
    def grouped(self) -> tuple[int, int]:
        """Blocks of columns, and columns of a block. Raises ModelFolderError where a row has parts of one."""
        columns = self.tensor.shape[1]
        if columns % self.block:
            raise ModelFolderError(
                f"{self.name} has rows of {columns} columns, no multiple of its groups of {self.block}"
            )
        return columns // self.block, self.block

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole panels of 8 rows."""
        step = max(8, _BLOCK_WEIGHTS // self.tensor.shape[1] // 8 * 8)
        for start in range(self.start, self.stop, step):
            yield start, min(start + step, self.stop)


class OnnxWeights:
    """Reads an opened model folder, a few megabytes at a time."""

    def __init__(self, folder: ModelFolder, float_type: str, progress: Progress | None = None) -> None:
        """float_type: "float32" or "float16", what float matrices become."""
        self._folder = folder
        self._float = float_type
        self._progress = progress
        self._done = 0
        tensors = [*folder.tensors.values()]
        if folder.config.tie_word_embeddings:  # the one table stands in both graphs
            tensors.append(folder.tensors["embed_tokens.weight"])
        reads = [(part.nbytes, _reads(tensor, key)) for tensor in tensors for key, part in tensor.parts.items()]
        self._total = sum(nbytes * times for nbytes, times in reads)
        self.nbytes = sum(_onnx_bytes(tensor, float_type) for tensor in tensors)  # of both data files, about

    def vector(self, g: Graph, name: str) -> str:
        """A norm's weights or a scalar, float32."""
        part = self._folder.tensors[name].parts["values"]
        return g.weight(name, lambda: widen(self._read(name, part, 0, part.shape[0])))

    def product(self, g: Graph, x: str, name: str, rows: tuple[int, int] | None = None) -> str:
        """x W[start:stop]^T: float32 [n, stop - start]; x: float32 [n, columns]; `rows` start at a multiple of 8."""
        r = self._rows(name, rows)
        if r.tensor.layout == "dense":
            w = g.stream(r.initializer, self._float, r.shape, self._dense(r))
            if self._float != "float32":
                w = g.node("Cast", w, to=FLOAT)
            return g.node("Gemm", x, w, transB=1)
        (n, k), bits = r.shape, r.product_bits
        packed = (n, -(-k // r.block), r.block * bits // 8)
        w = g.stream(r.initializer, np.uint8, packed, self._fields(r, bits, packed[1] * packed[2]))
        scales = g.stream(f"{r.initializer}.scales", np.float32, packed[:2], self._scales(r))
        y = g.node("MatMulNBits", g.in_steps(x, r.tensor.input_scale), w, scales, domain=MICROSOFT, K=k, N=n,
                 bits=bits, block_size=r.block, accuracy_level=r.accuracy_level)  # fmt: skip
        if r.tensor.minimum:
            sums = g.node("ReduceSum", g.reshape(x, 0, *r.grouped), g.constant([2], np.int64), keepdims=0)
            y = g.node("Sub", y, g.node("Gemm", sums, self._rest(g, r), transB=1))
        return g.in_steps(y, r.tensor.output_scale)

    def look_up(self, g: Graph, ids: str, name: str) -> str:
        """Rows ids of a table: float32 [*ids, columns]."""
        r = self._rows(name)
        if r.tensor.layout == "dense":
            w = g.stream(r.initializer, self._float, r.shape, self._dense(r))
            rows = g.node("Gather", w, ids)
            return rows if self._float == "float32" else g.node("Cast", rows, to=FLOAT)
        n, k = r.shape
        row_bytes = -(-k * r.tensor.bits // 8)
        if row_bytes * 8 != k * r.tensor.bits:
            raise ModelFolderError(f"{name} has rows of {k} columns, which do not fill bytes at {r.tensor.bits} bits")
        w = g.stream(r.initializer, np.uint8, (n, row_bytes), self._fields(r, r.tensor.bits, row_bytes))
        scales = g.stream(f"{r.initializer}.scales", np.float32, (n, -(-k // r.block)), self._scales(r))
        values = g.node("GatherBlockQuantized", w, ids, scales, domain=MICROSOFT, bits=r.tensor.bits,
                    block_size=r.block, gather_axis=0, quantize_axis=1)  # fmt: skip
        if not r.tensor.minimum:
            return values
        rest = g.node("Unsqueeze", g.node("Gather", self._rest(g, r), ids), g.constant([-1], np.int64))
        return g.reshape(g.node("Sub", g.reshape(values, 0, 0, *r.grouped), rest), 0, 0, k)

    def _rest(self, g: Graph, r: _Rows) -> str:
        """float32 [rows, blocks]: what the operators' values exceed the tensor's by."""
        blocks = r.grouped[0]
        return g.stream(f"{r.initializer}.rest", np.float32, (r.shape[0], blocks), self._scales(r, rest=True))

    def _rows(self, name: str, rows: tuple[int, int] | None = None) -> _Rows:
        tensor = self._folder.tensors[f"{name}.weight"]
        return _Rows(f"{name}.weight", tensor, *(rows or (0, tensor.shape[0])))

    def _dense(self, r: _Rows) -> Iterator[np.ndarray]:
        """Float rows in the type asked for. Raises CheckpointError where float16 cannot hold a value."""
        for start, stop in r.blocks():
            values = widen(self._read(r.name, r.tensor.parts["values"], start, stop))
            if self._float == "float16":
                with np.errstate(over="ignore"):
                    values = values.astype(np.float16)
                if not np.isfinite(values).all():
                    raise CheckpointError(f"{r.name} has a value beyond float16's range: use --recipe float")
            yield values

    def _fields(self, r: _Rows, field_bits: int, row_bytes: int) -> Iterator[np.ndarray]:
        """uint8 [n, row_bytes] of a block of rows; columns past the last hold zero."""
        bits, columns = r.tensor.bits, r.tensor.shape[1]
        for start, stop in r.blocks():
            if r.tensor.layout == "rows":
                records = self._read(r.name, r.tensor.parts["records"], start, stop)
                w, _ = layouts.unpack_rows(records, columns, bits, r.tensor.group)
            else:
                packed = self._read(r.name, r.tensor.parts["packed"], start // 8, -(-stop // 8))
                w = layouts.unpack_panels(packed, bits, stop - start, columns)
            yield pack_fields(w, field_bits, row_bytes)

    def _scales(self, r: _Rows, rest: bool = False) -> Iterator[np.ndarray]:
        """float32 [n, blocks] of a block of rows: scales, or the rest that minima leave."""
        bits, group, columns = r.tensor.bits, r.tensor.group, r.tensor.shape[1]
        dtype, count = layouts.scales_dtype(group), -(-columns // r.block)
        for start, stop in r.blocks():
            if r.tensor.minimum:
                scales, minima = np.moveaxis(self._scales_and_minima(r, start, stop), 2, 0)
                scales = minima - np.float32(layouts.zero_point(bits)) * scales if rest else scales
            elif r.tensor.layout == "rows":
                records = self._read(r.name, r.tensor.parts["records"], start, stop)
                _, scales = layouts.unpack_rows(records, columns, bits, group)
            else:
                packed = self._read(r.name, r.tensor.parts["scales"], start // 8, -(-stop // 8))
                scales = layouts.unpack_scales(packed.view(dtype), stop - start)
            yield scales[:, :count] if group else np.repeat(scales, count, axis=1)

    def _scales_and_minima(self, r: _Rows, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, groups, 2]."""
        first, last, parts = start // 8, -(-stop // 8), r.tensor.parts
        words = self._read(r.name, parts["scales"], first, last)
        factors = np.empty((last - first, 0, 2, 8), np.float16)
        if "factors" in parts:
            factors = self._read(r.name, parts["factors"], first, last).view(np.float16)
        return layouts.scales_and_minima(
            *layouts.unpack_words(words, factors, r.tensor.group, stop - start), r.tensor.group
        )

    def _read(self, name: str, part: Part, start: int, stop: int) -> np.ndarray:
        """Rows (or panels) start to stop - 1 of a part, as stored."""
        row = part.nbytes // part.shape[0]
        values = np.fromfile(
            self._folder.path / part.file, np.uint8, (stop - start) * row, offset=part.offset + start * row
        )
        if values.size != (stop - start) * row:
            raise ModelFolderError(f"{self._folder.path / part.file} ended early: it was cut while in use")
        self._done += values.size
        if self._progress:
            self._progress(self._done, self._total, name)
        return values.view(part.numpy_dtype).reshape(stop - start, *part.shape[1:])


def _onnx_bytes(tensor: Tensor, float_type: str) -> int:
    count = math.prod(tensor.shape)
    if tensor.layout == "dense":
        return count * (2 if float_type == "float16" and len(tensor.shape) == 2 else 4)
    scales = count // (tensor.group or _ROW_SCALE_BLOCKS[0]) * (8 if tensor.minimum else 4)
    return count * _Rows("", tensor, 0, 0).product_bits // 8 + scales


def _reads(tensor: Tensor, part: str) -> int:
    """How often a part is read: records for fields, then for scales; words for scales, then for minima."""
    return 2 if part == "records" or (tensor.minimum and part != "packed") else 1


def pack_fields(w: np.ndarray, bits: int, row_bytes: int) -> np.ndarray:
    """int8 [rows, k] -> uint8 [rows, row_bytes]: w + 2^(bits-1), low bits first; columns past k hold zero."""
    zero = 1 << (bits - 1)
    fields = np.full((len(w), row_bytes * 8 // bits), zero, np.uint8)
    fields[:, : w.shape[1]] = w.view(np.uint8) + np.uint8(zero)
    grouped = fields.reshape(len(w), row_bytes, 8 // bits)
    packed = grouped[:, :, 0].copy()
    for j in range(1, 8 // bits):
        packed |= grouped[:, :, j] << np.uint8(bits * j)
    return packed
