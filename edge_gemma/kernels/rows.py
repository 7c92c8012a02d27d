"""Single rows of packed matrices as float32: what tokens and per-layer embeddings are made of.

Owns: unpacking row records and rows of panels (edge_gemma/folder/layouts.py). Does not know: where the bytes come from.
"""

import functools

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.folder import layouts
from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import array, compiled, launch
from edge_gemma.kernels.convert import as_float, float_of_bits
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["dequantize_records", "gather_panels"]


@numba.njit(error_model="numpy")
def _little_endian(data, first, count):
    value = np.int32(0)
    for i in range(count):
        value |= np.int32(data[first + i]) << np.int32(8 * i)
    return value


_AT_ONCE = 16  # fields


def _make_scaled(bits):
    """scaled(record, first, scale, out, begin): out[begin : begin + 16] = scale * the fields from byte `first` on."""
    count, size = 8 // bits, _AT_ONCE * bits // 8

    def codegen(context, builder, signature, args):
        b = builder
        record, out = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 3))
        raw = isa.load(b, isa.at(b, record.data, isa.I8, args[1]), isa.vector(isa.I8, size))
        parts = [b.lshr(raw, isa.splat_constant(isa.I8, size, bits * j)) for j in range(count)]
        fields = isa.join(b, parts)  # all j = 0, then all j = 1, ...
        fields = isa.shuffle(b, fields, fields, [i % count * size + i // count for i in range(_AT_ONCE)])
        wide = b.zext(fields, isa.vector(isa.I32, _AT_ONCE))
        wide = b.and_(wide, isa.splat_constant(isa.I32, _AT_ONCE, (1 << bits) - 1))
        wide = b.sub(wide, isa.splat_constant(isa.I32, _AT_ONCE, 1 << (bits - 1)))
        values = b.fmul(b.sitofp(wide, isa.vector(isa.F32, _AT_ONCE)), isa.splat(b, args[2], _AT_ONCE))
        isa.store(b, values, isa.at(b, out.data, isa.F32, args[4]))
        return context.get_dummy_value()

    @intrinsic
    def scaled(typingctx, record, first, scale, out, begin):
        return types.none(record, types.int64, types.float32, out, types.int64), codegen

    return scaled


_scaled_4, _scaled_2 = _make_scaled(4), _make_scaled(2)


@numba.njit(error_model="numpy")
def _record(record, bits, group, out):
    """One row record: its scales, then its fields."""
    columns, per_byte = out.shape[0], 8 // bits
    body = (columns * bits + 7) // 8
    head = record.shape[0] - body
    groups = (columns + group - 1) // group if group else 1
    width, size = group or columns, head // groups  # columns and bytes of a scale
    mask, zero = np.uint8((1 << bits) - 1), np.int32(0 if bits == 8 else 1 << (bits - 1))
    for g in range(groups):
        raw = _little_endian(record, g * size, size)
        scale = as_float(np.uint16(raw)) if size == 2 else float_of_bits(raw)
        begin, end = g * width, min(columns, (g + 1) * width)
        first = head + begin // per_byte
        if bits == 8:
            for i in range(end - begin):
                out[begin + i] = np.float32(np.int8(record[first + i])) * scale
            continue
        whole = (end - begin) // _AT_ONCE * _AT_ONCE
        for i in range(0, whole, _AT_ONCE):
            if bits == 4:
                _scaled_4(record, first + i // 2, scale, out, begin + i)
            else:
                _scaled_2(record, first + i // 4, scale, out, begin + i)
        for i in range(begin + whole, end):
            field = (record[head + i // per_byte] >> np.uint8(bits * (i % per_byte))) & mask
            out[i] = np.float32(np.int32(field) - zero) * scale


@compiled(array("u1", 2), types.int64, types.int64, array("f4", 2, True), parallel=True)
def _dequantize_records(records, bits, group, out):
    n, columns = out.shape
    groups = (columns + group - 1) // group if group else 1
    head = records.shape[1] - (columns * bits + 7) // 8
    if records.shape[0] != n or (head != 2 * groups and head != 4 * groups) or 8 % bits:
        return False
    if n == 1:
        _record(records[0], bits, group, out[0])
    else:
        for i in numba.prange(n):
            _record(records[i], bits, group, out[i])
    return True


@kernel(_dequantize_records, "records uint8 [n, record_bytes]; out float32 [n, columns]; 2, 4 or 8 bits")
def dequantize_records(records: Array, bits: int, group: int, out: Array) -> None:
    """float32 rows out of row records (folder/layouts.py). group: 0 (one scale a row), 16, 32 or 256."""
    out[...] = layouts.dequantize_rows(records, out.shape[1], bits, group)


@functools.cache
def _make_gather_panels(half):
    """The kernel that takes rows out of panels, with float16 bits or float32 as scales."""

    def gather_panels(packed, scales, ids, bits, group, out):
        chunks, per_byte = packed.shape[1], 8 // bits
        mask, zero = np.uint8((1 << bits) - 1), np.int32(0 if bits == 8 else 1 << (bits - 1))
        n, columns = out.shape
        kpad = (columns + 31) // 32 * 32
        if packed.shape[1:] != (kpad * bits // 32, 8, 4) or ids.shape[0] != n:
            return False
        if scales.shape != (packed.shape[0], kpad // group if group else 1, 8):
            return False
        for i in range(n):
            if not 0 <= ids[i] < 8 * packed.shape[0]:
                return False
        for i in range(n):
            panel, row = ids[i] // 8, ids[i] % 8
            for chunk in range(chunks):
                for j in range(per_byte):
                    first = (chunk * per_byte + j) * 4
                    scale = as_float(scales[panel, first // group if group else 0, row])
                    for k in range(min(4, columns - first)):
                        byte = packed[panel, chunk, row, k]
                        field = np.int32(np.int8(byte)) if bits == 8 else np.int32((byte >> np.uint8(bits * j)) & mask)
                        out[i, first + k] = np.float32(field - zero) * scale
        return True

    gather_panels.__name__ = f"gather_panels_{'half' if half else 'float'}"
    scales = array("u2" if half else "f4", 3)
    signature = array("u1", 4), scales, array("i8", 1), types.int64, types.int64, array("f4", 2, True)
    return compiled(*signature, key=gather_panels.__name__)(gather_panels)


def _launch_gather_panels(packed, w_scale, ids, bits, group, out):
    return launch(_make_gather_panels(w_scale.dtype == np.uint16), packed, w_scale, ids, bits, group, out)


@kernel(_launch_gather_panels, "a packed matrix (see matmul); ids int64 [n], rows it has; out float32 [n, columns]")
def gather_panels(packed: Array, w_scale: Array, ids: Array, bits: int, group: int, out: Array) -> None:
    """float32 rows `ids` of a panel-packed matrix; packed, w_scale as in `matmul`."""
    out[...] = layouts.dequantize_panels(packed, w_scale, bits, group, ids, out.shape[1])
