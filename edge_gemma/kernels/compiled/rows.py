"""What numba compiles of single rows of packed matrices (kernels/rows.py).

Owns: unpacking row records and rows of panels (edge_gemma/folder/layouts.py). Does not know: where the bytes come from.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import as_float, float_of_bits
from edge_gemma.kernels.compiled.operands import floats, operands, part, pointer


@inner()
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


@inner()
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


def dequantize_records(row, chunk):
    """records, out, n, bytes a record, columns, bits, group, rows a chunk."""
    w, _ = operands(row)
    records, out = numba.carray(pointer(w[0]), (w[2], w[3]), np.uint8), floats(w[1], (w[2], w[4]))
    for n in range(*part(chunk, w[7], w[2])):
        _record(records[n], w[5], w[6], out[n])


def gather_panels(half):
    """packed, scales, ids, out, n, columns, panels, bits, group, rows a chunk. half: scales are float16 bits."""
    scale_type = np.uint16 if half else np.float32

    def gather_panels(row, chunk):
        w, _ = operands(row)
        columns, panels, bits, group = w[5], w[6], w[7], w[8]
        per_byte, kpad = 8 // bits, (columns + 31) // 32 * 32
        mask, zero = np.uint8((1 << bits) - 1), np.int32(0 if bits == 8 else 1 << (bits - 1))
        packed = numba.carray(pointer(w[0]), (panels, kpad * bits // 32, 8, 4), np.uint8)
        scales = numba.carray(pointer(w[1]), (panels, kpad // group if group else 1, 8), scale_type)
        ids, out = numba.carray(pointer(w[2]), w[4], np.int64), floats(w[3], (w[4], columns))
        for i in range(*part(chunk, w[9], w[4])):
            panel, row_of_panel = ids[i] // 8, ids[i] % 8
            for word in range(packed.shape[1]):
                for j in range(per_byte):
                    first = (word * per_byte + j) * 4
                    scale = as_float(scales[panel, first // group if group else 0, row_of_panel])
                    for k in range(min(4, columns - first)):
                        byte = packed[panel, word, row_of_panel, k]
                        field = np.int32(np.int8(byte)) if bits == 8 else np.int32((byte >> np.uint8(bits * j)) & mask)
                        out[i, first + k] = np.float32(field - zero) * scale

    return gather_panels
