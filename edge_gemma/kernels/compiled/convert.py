"""float16 bits to float32 and back to bits, for CPUs with and without the instruction; rows filled and copied.

Owns: `as_float`, `to_half`, `fill` and `copy`, for use inside kernels. numba takes no float16 arrays, so kernels see
uint16.
"""

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled.compiler import inner, target


def _has_half(context, builder) -> bool:
    """Whether the target converts float16 in hardware; LLVM would call a library function that is not there
    otherwise.
    """
    triple, _, features = target(context)
    return triple.startswith("aarch64") or "+f16c" in features.split(",")


def widen_half(context, builder, bits):
    """IR: (vectors of) i16 float16 bits -> float32.

    Without hardware: shift exponent and mantissa into a float32's place and multiply by 2^112, which is exact and turns
    float16 subnormals into normals; the largest exponent (infinity, NaN) is then forced.
    """
    lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 0

    def of(scalar):
        return ir.VectorType(scalar, lanes) if lanes else scalar

    def const(scalar, value):
        return ir.Constant(of(scalar), [value] * lanes if lanes else value)

    if _has_half(context, builder):
        return builder.fpext(builder.bitcast(bits, of(ir.HalfType())), of(ir.FloatType()))
    i32 = ir.IntType(32)
    wide = builder.zext(bits, of(i32))
    magnitude = builder.shl(builder.and_(wide, const(i32, 0x7FFF)), const(i32, 13))
    sign = builder.shl(builder.and_(wide, const(i32, 0x8000)), const(i32, 16))
    scaled = builder.fmul(builder.bitcast(magnitude, of(ir.FloatType())), const(ir.FloatType(), 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, const(i32, 0x7C00 << 13))
    forced = builder.or_(magnitude, const(i32, 0x7F800000))
    result = builder.select(special, forced, builder.bitcast(scaled, of(i32)))
    return builder.bitcast(builder.or_(result, sign), of(ir.FloatType()))


@intrinsic
def as_float(typingctx, value):
    """float32 of a float32, or of a float16 given as uint16."""
    half = value == types.uint16

    def codegen(context, builder, signature, args):
        return widen_half(context, builder, args[0]) if half else args[0]

    return types.float32(types.uint16 if half else types.float32), codegen


@intrinsic
def float_of_bits(typingctx, bits):
    """The float32 whose bits are an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typingctx, value):
    """The bits of a float32, as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@inner()
def to_half(value):
    """float16 bits of a float32, rounded half to even; beyond +-65504 the largest finite value, NaN stays NaN."""
    magnitude = bits_of_float(value) & np.int32(0x7FFFFFFF)
    sign = (bits_of_float(value) >> np.int32(16)) & np.int32(0x8000)
    x = min(float_of_bits(magnitude), np.float32(65504))
    bits = bits_of_float(x)
    # Below 2^-14 the addition itself rounds to the subnormals' step of 2^-24.
    small = bits_of_float(x + np.float32(0.5)) - np.int32(0x3F000000)
    large = (bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1)) - np.int32(112 << 23)) >> np.int32(13)
    half = small if bits < np.int32(113 << 23) else large
    half = np.int32(0x7E00) if magnitude > np.int32(0x7F800000) else half
    return np.uint16(half | sign)


@inner()
def fill(x, value):
    """x[...] = value for one axis. NumPy's own assignment takes numba half a second to compile, wherever it stands."""
    for i in range(x.shape[0]):
        x[i] = value


@inner()
def copy(x, out):
    """out[...] = x for one axis."""
    for i in range(x.shape[0]):
        out[i] = x[i]
