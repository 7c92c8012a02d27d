"""A model folder's vision encoder as ONNX initializers, each with the nodes that use it.

Owns: repacking (integers, scales and steps of the folder are carried over, nothing is rounded again), how a layer's
input is rounded and clamped. Does not know: where in the encoder a layer stands (onnx_vision.py).

A layer in 8 bits is com.microsoft MatMulIntegerToFloat: uint8 inputs with 128 for zero, int8 weights, one scale a row.
The step of its inputs is a trained one, or each patch has its own, as in vision/encoder.py: what else is in a batch
changes nothing.
"""

import math
from dataclasses import dataclass

import numpy as np

from edge_gemma.errors import ModelFolderError
from edge_gemma.export.audio_linear import clip
from edge_gemma.export.onnx_graph import MICROSOFT, Graph
from edge_gemma.folder import layouts
from edge_gemma.folder.folder import MappedFiles, ModelFolder, Tensor
from edge_gemma.model.linear import widen

_UNBOUND = (-math.inf, math.inf, -math.inf, math.inf)
_LEAST = 1e-30  # a step; rows of zeros stay zeros


@dataclass(frozen=True)
class _Layer:
    """A linear layer as the folder stores it."""

    name: str
    tensor: Tensor
    bounds: tuple[float, ...]  # of its input, of its output: low, high

    @property
    def rounds_input(self) -> tuple[bool, tuple[float, ...], float]:
        """(in 8 bits, the input's bounds, its step or 0). Layers that have this in common share a product."""
        return bool(self.tensor.bits), self.bounds[:2], self.tensor.input_scale


class VisionWeights:
    """Reads the encoder of an opened model folder, a tensor at a time."""

    def __init__(self, folder: ModelFolder) -> None:
        """Raises ModelFolderError if the folder has none."""
        if folder.vision is None:
            raise ModelFolderError(f"{folder.path} has no vision encoder")
        self._files = MappedFiles(folder.path, at_once=False)
        self._tensors = folder.vision.tensors
        counts = [(tensor, math.prod(tensor.shape)) for tensor in self._tensors.values()]
        self.nbytes = sum(count if tensor.bits else 4 * count for tensor, count in counts)  # of the data file, about

    def vector(self, g: Graph, name: str) -> str:
        """Weights of a norm and the like, float32."""
        return g.weight(name, lambda: self._values(name))

    def rows(self, g: Graph, ids: str, name: str, index: int) -> str:
        """Rows ids of table `index` of several: float32 [*ids, columns]."""
        return g.node("Gather", g.weight(f"{name}.{index}", lambda: self._values(name, index)), ids)

    def dense(self, g: Graph, x: str, name: str) -> str:
        """x W^T in float32."""
        return g.node("MatMul", x, g.weight(f"{name}.weight", lambda: self._values(f"{name}.weight").T))

    def product(self, g: Graph, x: str, names: list[str]) -> list[str]:
        """Linear layers of one input, each with its bounds and steps. Returns their outputs.

        One product where all round their input alike.
        """
        layers = [self._layer(name) for name in names]
        if len(layers) > 1 and len({layer.rounds_input for layer in layers}) == 1:
            sizes = g.constant([layer.tensor.shape[0] for layer in layers], np.int64)
            outputs = g.nodes("Split", self._together(g, x, layers), sizes, outputs=len(layers), axis=-1)
        else:
            outputs = [self._together(g, x, [layer]) for layer in layers]
        pairs = zip(layers, outputs, strict=True)
        return [clip(g, g.in_steps(y, layer.tensor.output_scale), *layer.bounds[2:]) for layer, y in pairs]

    def _together(self, g: Graph, x: str, layers: list[_Layer]) -> str:
        """Layers that round their input alike: their outputs in a row, not yet rounded or clamped."""
        name = "+".join(layer.name for layer in layers)
        in_bits, bounds, step = layers[0].rounds_input
        x = clip(g, x, *bounds)
        if not in_bits:
            w = g.weight(
                f"{name}.weight", lambda: np.concatenate([self._values(f"{layer.name}.weight") for layer in layers]).T
            )
            return g.node("MatMul", x, w)
        w = g.weight(f"{name}.weight_int8", lambda: np.concatenate([self._integers(layer) for layer in layers]).T)
        scales = g.weight(f"{name}.weight_scale", lambda: np.concatenate([self._scales(layer) for layer in layers]))
        zero, own = g.constant(128, np.uint8), ""
        if not step:
            largest = g.node("ReduceMax", g.node("Abs", x), g.constant([-1], np.int64), keepdims=1)
            own = g.node("Max", g.node("Div", largest, g.constant(127)), g.constant(_LEAST))
            x = g.node("Div", x, own)
        scale = g.constant(step or 1)
        q = g.node("QuantizeLinear", x, scale, zero)
        # Left out, onnxruntime 1.20 to 1.29 ends the process under session.x64quantprecision; shared, it is refused.
        w_zero = g.weight(f"{name}.weight_zero_point", lambda: np.zeros((), np.int8))
        y = g.node("MatMulIntegerToFloat", q, w, scale, scales, zero, w_zero, domain=MICROSOFT)
        return g.node("Mul", y, own) if own else y

    def _layer(self, name: str) -> _Layer:
        bounds = f"{name}.bounds"
        values = tuple(map(float, self._values(bounds))) if bounds in self._tensors else _UNBOUND
        return _Layer(f"{name}.linear", self._tensors[f"{name}.linear.weight"], values)

    def _values(self, name: str, index: int | None = None) -> np.ndarray:
        """A float tensor, or one of the tables in it: float32."""
        values = self._files.array(self._tensors[name].parts["values"])
        return widen(values if index is None else values[index])

    def _integers(self, layer: _Layer) -> np.ndarray:
        packed = self._files.array(layer.tensor.parts["packed"])
        return layouts.unpack_panels(packed, layer.tensor.bits, *layer.tensor.shape)

    def _scales(self, layer: _Layer) -> np.ndarray:
        packed = self._files.array(layer.tensor.parts["scales"])
        return layouts.unpack_scales(packed, layer.tensor.shape[0]).reshape(-1)
