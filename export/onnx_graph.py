"""Builds ONNX graphs node by node, their weights in one external file that several graphs share.

Owns: names, constants, the external file's layout. Does not know: what a graph computes. Needs the onnx package, which
running a model does not.

Source: ONNX specification, "External Data" (location, offset, length of each tensor).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from edge_gemma.errors import UsageError

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise UsageError(
        "writing ONNX graphs needs the onnx package: pip install 'edge-gemma[onnx]' (audio can be left out: --no-audio)"
    ) from None

# What onnxruntime 1.20 runs.
OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL  # what Cast casts to
_PAGE, _CACHE_LINE = 4096, 64  # bytes: a runtime maps each tensor on its own, large ones best from a page's start on
_LARGE = 1 << 16  # bytes
_INT64_MAX = (1 << 63) - 1


class Writable(Protocol):
    def write(self, data: bytes | memoryview) -> object: ...


class ExternalData:
    """The weight file beside the graphs. A name is written once, whichever graphs use it."""

    def __init__(self, file: Writable, location: str) -> None:
        self._file = file
        self._location = location
        self._end = 0
        self._tensors: dict[str, TensorProto] = {}

    def tensor(self, name: str, make: Callable[[], np.ndarray]) -> TensorProto:
        """The tensor called `name`; `make` gives its values when it is first asked for."""
        if name not in self._tensors:
            values = np.ascontiguousarray(make())
            self.stream(name, values.dtype, values.shape, [values])
        return self._tensors[name]

    def stream(self, name: str, dtype: Any, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> TensorProto:
        """A tensor written as its blocks come, one after another; for what should not be in memory whole."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._write(bytes(-self._end % (_PAGE if nbytes >= _LARGE else _CACHE_LINE)))
        start = self._end
        for block in blocks:
            self._write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        proto = TensorProto(name=name, data_location=TensorProto.EXTERNAL, dims=shape)
        proto.data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        for key, value in (("location", self._location), ("offset", start), ("length", self._end - start)):
            proto.external_data.add(key=key, value=str(value))
        self._tensors[name] = proto
        return proto

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._end += len(data)


class Graph:
    """A graph under construction; values are known by their names."""

    def __init__(self, data: ExternalData) -> None:
        self._data = data
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._domains: set[str] = set()

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> str:
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: Any, shape: Sequence[int | str]) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(_value(name, dtype, shape))

    def nodes(self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Appends a node. Returns the names of its outputs."""
        names = [f"{op}_{len(self._nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        self._domains.add(domain)
        return names

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Appends a node of one output. Returns the output's name."""
        return self.nodes(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant, kept in the graph; equal ones are one."""
        array = np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, make: Callable[[], np.ndarray]) -> str:
        """A tensor in the external file."""
        self._initializers[name] = self._data.tensor(name, make)
        return name

    def stream(self, name: str, dtype: Any, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> str:
        """A tensor in the external file, written as its blocks come."""
        self._initializers[name] = self._data.stream(name, dtype, shape, blocks)
        return name

    def slice(self, value: str, start: int | str, stop: int | str | None, axis: int, step: int = 1) -> str:
        """value[start:stop:step] along an axis; bounds are numbers or names of int64 [1] values."""
        bounds = [_INT64_MAX if bound is None else bound for bound in (start, stop)]
        names = [bound if isinstance(bound, str) else self.constant([bound], np.int64) for bound in bounds]
        return self.node("Slice", value, *names, self.constant([axis], np.int64), self.constant([step], np.int64))

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps a dimension, one -1 is what is left."""
        return self.node("Reshape", value, self.constant(shape, np.int64))

    def in_steps(self, value: str, step: Any) -> str:
        """A value rounded to steps of a trained activation scale, -128 to 127 of them; itself where there is none (0).

        step: a number, or one for each column, all of them or none 0.
        """
        if not np.any(step):
            return value
        steps = self.node("Round", self.node("Div", value, self.constant(step)))
        steps = self.node("Clip", steps, self.constant(-128), self.constant(127))
        return self.node("Mul", steps, self.constant(step))

    def concat(self, *values: str, axis: int) -> str:
        return self.node("Concat", *values, axis=axis)

    def model(self, name: str) -> bytes:
        """The model as bytes, checked."""
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edge_gemma")
        return model.SerializeToString()


def _value(name: str, dtype: Any, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
