"""How a clippable linear layer stores its weights and is computed: float32, or 8-bit integers.

A layer of a QAT checkpoint rounds its input to trained steps. In 8 bits that is the form itself, with the checkpoint's
own integers and scales. In float32 extra nodes round the input in the same way.

Owns: both forms as ONNX nodes. Does not know: where in the conformer a layer stands (audio_graph.py).

Source of the layer: transformers 5.23 `Gemma4ClippableLinear`: clamp(W clamp(x, input bounds), output bounds).
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from edge_gemma.export.audio_tower import AudioTower
from edge_gemma.export.onnx_graph import MICROSOFT, Graph
from edge_gemma.quant.grid import find_grid
from edge_gemma.quant.rtn import round_to_nearest

# (graph, x, names of layers side by side, input bounds, trained step of the input or 0) -> W clamp(x), the layers'
# outputs in a row
Linear = Callable[[Graph, str, list[str], tuple[float, float], float], str]


def clip(g: Graph, x: str, low: float, high: float) -> str:
    """Limit x to the bounds. An infinite bound is left out."""
    if math.isinf(low) and math.isinf(high):
        return x
    bounds = ["" if math.isinf(bound) else g.constant(bound) for bound in (low, high)]
    return g.node("Clip", x, *bounds)


def float_linear(tower: AudioTower) -> Linear:
    """Weights in float32."""

    def linear(g: Graph, x: str, names: list[str], bounds: tuple[float, float], step: float) -> str:
        w = g.weight("+".join(f"{name}.weight" for name in names), lambda: _rows(tower, names).T)
        return g.node("MatMul", g.in_steps(clip(g, x, *bounds), step), w)

    return linear


def int8_linear(tower: AudioTower) -> Linear:
    """Weights and inputs in 8 bits, one scale a row of weights.

    Weights that are integers already, or floats on a grid of up to 8 bits (training for few bits leaves them there),
    keep their integers and lose nothing; others are rounded to nearest.

    Finite bounds are the range that inputs are quantised over: the scale is fixed, a stream's steps are rounded as the
    whole clip is, and the quantiser's saturation is the clamp. (The release's bounds stand at -128 to 127 of a step:
    they are what its training quantised to.) A trained step is such a scale. Without either the range is each step's
    own.
    """

    def linear(g: Graph, x: str, names: list[str], bounds: tuple[float, float], step: float) -> str:
        @cache
        def quantised() -> tuple[np.ndarray, np.ndarray]:
            if (given := tower.integers(names)) is not None:
                return given
            weights = _rows(tower, names)
            grid = find_grid(weights, tower.float_type(weights))
            return (grid.integers, grid.scales) if grid else round_to_nearest(weights, 8, 0)

        together = "+".join(names)
        w = g.weight(f"{together}.weight_int8", lambda: quantised()[0].T)
        scales = g.weight(f"{together}.weight_scale", lambda: quantised()[1].reshape(-1))
        low, high = bounds
        bounded = not (math.isinf(low) or math.isinf(high))
        if step or bounded:
            scale = g.constant(step or max(abs(low) / 128, abs(high) / 127, 1e-30))
            zero = g.constant(128, np.uint8)
            q = g.node("QuantizeLinear", clip(g, x, low, high) if step else x, scale, zero)
        else:
            q, scale, zero = g.nodes("DynamicQuantizeLinear", clip(g, x, low, high), outputs=3)
        # Left out, onnxruntime 1.20 to 1.29 ends the process under session.x64quantprecision; shared, it is refused.
        w_zero = g.weight(f"{together}.weight_zero_point", lambda: np.zeros((), np.int8))
        return g.node("MatMulIntegerToFloat", q, w, scale, scales, zero, w_zero, domain=MICROSOFT)

    return linear


def _rows(tower: AudioTower, names: list[str]) -> np.ndarray:
    return np.concatenate([tower.tensor(f"{name}.weight") for name in names])
