"""Gates, scalings, the cap of logits and a change of order: kernels that take their arrays element by element, in
float32.

Owns: everything about these kernels: compiled code, definition, operation; exp() for other kernels. Does not know:
which layer calls them. The loops are plain, LLVM vectorises them.
"""

import numpy as np

from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.convert import copy, float_of_bits
from edge_gemma.kernels.recording.operation import Operation, element_chunks, elements, floats, operands
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["add_scaled", "gelu_tanh_mul", "layers_first", "scale", "softcap"]

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@inner(fastmath={"contract", "nsz"})
def exp32(x):
    """exp(x) in float32: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf); relative error below 2e-7, and 0
    below -87.
    """
    n = np.rint(x * _LOG2E)
    n = min(max(n, np.float32(-127)), np.float32(127))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    r = min(max(r, np.float32(-1)), np.float32(1))
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1)
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


# --- scale ------------------------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _scale_row(x, factor):
    for i in range(x.shape[0]):
        x[i] *= factor


@chunk_function("scale")
def _scale_chunk(row, chunk):
    """x, d, factor."""
    w, f = operands(row)
    begin, end = elements(chunk, w[1])
    _scale_row(floats(w[0], w[1])[begin:end], np.float32(f[2]))


def _scale(_, x, factor):
    return [Operation(_scale_chunk, (x, x.size, float(factor)), (x,), (x,), element_chunks(x.size))]


@kernel("x float32 [n, d]", _scale)
def scale(x: Array, factor: float) -> None:
    """x *= factor, in place."""
    x *= np.float32(factor)


# --- add_scaled -------------------------------------------------------------------------------------------------------


@inner()  # not contracted: the reference rounds the product
def _add_scaled_row(x, y, factor, scale):
    for i in range(x.shape[0]):
        x[i] = (x[i] + y[i] * factor) * scale


@chunk_function("add_scaled")
def _add_scaled_chunk(row, chunk):
    """x, y, d, factor, scale."""
    w, f = operands(row)
    begin, end = elements(chunk, w[2])
    x, y = floats(w[0], w[2]), floats(w[1], w[2])
    _add_scaled_row(x[begin:end], y[begin:end], np.float32(f[3]), np.float32(f[4]))


def _add_scaled(_, x, y, factor, scale):
    operand = x, y, x.size, float(factor), float(scale)
    return [Operation(_add_scaled_chunk, operand, (x, y), (x,), element_chunks(x.size))]


@kernel("x, y float32 [n, d]", _add_scaled)
def add_scaled(x: Array, y: Array, factor: float, scale: float) -> None:
    """x = (x + y * factor) * scale, in place; each step rounded, as the reference does."""
    x[...] = (x + y * np.float32(factor)) * np.float32(scale)


# --- gelu_tanh_mul ----------------------------------------------------------------------------------------------------


@inner(fastmath={"contract", "nsz"})
def _gelu(x):
    """x * sigmoid(2 u): the tanh form without its cancellation for negative x."""
    u = np.float32(1.5957691216057308) * x * (np.float32(1) + np.float32(0.044715) * x * x)
    return x / (np.float32(1) + exp32(-u))


@inner(fastmath={"contract", "nsz"})
def _gelu_row(gate, up, out):
    if gate.ctypes.data == out.ctypes.data:  # a loop of its own: LLVM does not vectorise one whose arrays may overlap
        for i in range(out.shape[0]):
            out[i] = _gelu(out[i]) * up[i]
    else:
        for i in range(out.shape[0]):
            out[i] = _gelu(gate[i]) * up[i]


@chunk_function("gelu_tanh_mul")
def _gelu_tanh_mul_chunk(row, chunk):
    """gate, up, out, d."""
    w, _ = operands(row)
    begin, end = elements(chunk, w[3])
    gate, up, out = floats(w[0], w[3]), floats(w[1], w[3]), floats(w[2], w[3])
    _gelu_row(gate[begin:end], up[begin:end], out[begin:end])


def _gelu_tanh_mul(_, gate, up, out):
    return [Operation(_gelu_tanh_mul_chunk, (gate, up, out, out.size), (gate, up), (out,), element_chunks(out.size))]


@kernel("gate, up, out float32 [n, d]", _gelu_tanh_mul)
def gelu_tanh_mul(gate: Array, up: Array, out: Array) -> None:
    """out = 0.5 gate (1 + tanh(sqrt(2/pi) (gate + 0.044715 gate^3))) * up; out may be gate or up."""
    x = gate.astype(np.float64)
    out[...] = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * up


# --- layers_first -----------------------------------------------------------------------------------------------------


@chunk_function("layers_first")
def _layers_first_chunk(row, chunk):
    """x, out, n, layers, d: the rows of a token."""
    w, _ = operands(row)
    x, out = floats(w[0], (w[2], w[3], w[4])), floats(w[1], (w[3], w[2], w[4]))
    for j in range(w[3]):
        copy(x[chunk, j], out[j, chunk])


def _layers_first(_, x, out):
    return [Operation(_layers_first_chunk, (x, out, *x.shape), (x,), (out,), len(x))]


@kernel("x float32 [n, layers, d]; out float32 [layers, n, d]", _layers_first)
def layers_first(x: Array, out: Array) -> None:
    """out[l, i] = x[i, l]."""
    out[...] = x.transpose(1, 0, 2)


# --- softcap ----------------------------------------------------------------------------------------------------------


@inner(fastmath={"contract", "nsz"})
def _softcap_row(x, cap):
    inverse = np.float32(1) / np.float32(cap)
    for i in range(x.shape[0]):
        y = x[i] * inverse
        z = y * y
        near = np.float32(-5.37397155531e-2) + z * (np.float32(2.06390887954e-2) + z * np.float32(-5.70498872745e-3))
        near = y + y * z * (np.float32(-3.33332819422e-1) + z * (np.float32(1.33314422036e-1) + z * near))
        e = exp32(np.float32(-2) * abs(y))
        far = (np.float32(1) - e) / (np.float32(1) + e)
        far = far if y > np.float32(0) else -far
        x[i] = np.float32(cap) * (near if abs(y) < np.float32(0.625) else far)


@chunk_function("softcap")
def _softcap_chunk(row, chunk):
    """x, d, cap."""
    w, f = operands(row)
    begin, end = elements(chunk, w[1])
    _softcap_row(floats(w[0], w[1])[begin:end], f[2])


def _softcap(_, x, cap):
    return [Operation(_softcap_chunk, (x, x.size, float(cap)), (x,), (x,), element_chunks(x.size))]


@kernel("x float32 [...]", _softcap)
def softcap(x: Array, cap: float) -> None:
    """x = cap * tanh(x / cap), in place."""
    x[...] = cap * np.tanh(x.astype(np.float64) / cap)
