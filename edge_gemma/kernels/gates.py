"""Gates, scalings, the cap of logits and a change of order: kernels that take their arrays element by element, in
float32.

Owns: definition and operation of these kernels. Does not know: their loops (compiled/gates.py), which layer calls them.
"""

import numpy as np

from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation, element_chunks
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["add_scaled", "gelu_tanh_mul", "layers_first", "scale", "softcap"]


# --- scale ------------------------------------------------------------------------------------------------------------

_scale_chunk = chunk_function("kernels.compiled.gates", "scale")


def _scale(_, x, factor):
    return [Operation(_scale_chunk, (x, x.size, float(factor)), (x,), (x,), element_chunks(x.size))]


@kernel("x float32 [n, d]", _scale)
def scale(x: Array, factor: float) -> None:
    """x *= factor, in place."""
    x *= np.float32(factor)


# --- add_scaled -------------------------------------------------------------------------------------------------------

_add_scaled_chunk = chunk_function("kernels.compiled.gates", "add_scaled")


def _add_scaled(_, x, y, factor, scale):
    operand = x, y, x.size, float(factor), float(scale)
    return [Operation(_add_scaled_chunk, operand, (x, y), (x,), element_chunks(x.size))]


@kernel("x, y float32 [n, d]", _add_scaled)
def add_scaled(x: Array, y: Array, factor: float, scale: float) -> None:
    """x = (x + y * factor) * scale, in place; each step rounded, as the reference does."""
    x[...] = (x + y * np.float32(factor)) * np.float32(scale)


# --- gelu_tanh_mul ----------------------------------------------------------------------------------------------------

_gelu_tanh_mul_chunk = chunk_function("kernels.compiled.gates", "gelu_tanh_mul")


def _gelu_tanh_mul(_, gate, up, out):
    return [Operation(_gelu_tanh_mul_chunk, (gate, up, out, out.size), (gate, up), (out,), element_chunks(out.size))]


@kernel("gate, up, out float32 [n, d]", _gelu_tanh_mul)
def gelu_tanh_mul(gate: Array, up: Array, out: Array) -> None:
    """out = 0.5 gate (1 + tanh(sqrt(2/pi) (gate + 0.044715 gate^3))) * up; out may be gate or up."""
    x = gate.astype(np.float64)
    out[...] = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * up


# --- layers_first -----------------------------------------------------------------------------------------------------

_layers_first_chunk = chunk_function("kernels.compiled.gates", "layers_first")


def _layers_first(_, x, out):
    return [Operation(_layers_first_chunk, (x, out, *x.shape), (x,), (out,), len(x))]


@kernel("x float32 [n, layers, d]; out float32 [layers, n, d]", _layers_first)
def layers_first(x: Array, out: Array) -> None:
    """out[l, i] = x[i, l]."""
    out[...] = x.transpose(1, 0, 2)


# --- softcap ----------------------------------------------------------------------------------------------------------

_softcap_chunk = chunk_function("kernels.compiled.gates", "softcap")


def _softcap(_, x, cap):
    return [Operation(_softcap_chunk, (x, x.size, float(cap)), (x,), (x,), element_chunks(x.size))]


@kernel("x float32 [...]", _softcap)
def softcap(x: Array, cap: float) -> None:
    """x = cap * tanh(x / cap), in place."""
    x[...] = cap * np.tanh(x.astype(np.float64) / cap)
