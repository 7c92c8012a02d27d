"""The LLVM IR of one tile: a few tokens times one or two panels of packed weights, over all of k.

Owns: the order of loads, unpacking, dot-product steps and scaling. Does not know: threads, which tiles make a matrix.
One emitter serves every width, layout and instruction set (kernels/isa.py).

For token t and row r:  out = a_scale * sum_g w_scale[g, r] * (correction[g] + sum_{k in g} q[t, k] * field[r, k]) with
correction = -zero_point * sums, the start of the integer accumulator. The float sum runs over g upwards with one fused
multiply-add each, in a lane of its own: no tile shape changes a result. With one scale a row there is one g, all of k.
"""

from dataclasses import dataclass

from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import isa
from edge_gemma.kernels.convert import widen_half
from edge_gemma.kernels.isa import (
    F32,
    I8,
    I16,
    I32,
    I64,
    at,
    join,
    load,
    loop,
    multiply_add,
    prefetch,
    splat,
    splat_constant,
    store,
    vector,
)

PREFETCH = 4096
"""Bytes ahead of a single token's walk through the weights."""


@dataclass(frozen=True)
class TileSpec:
    """A tile's compile-time choices."""

    variant: str  # a key of isa.SETS
    bits: int  # 2, 4, 8
    group: int  # 32 or 16 columns a scale; 0: one scale a row
    scale_groups: bool  # activations have a scale a group too
    tokens: int
    panels: int  # 1, or 2 side by side


class Tile:
    """Emits one tile; pointers are to the tile's first token and to each panel's first byte."""

    def __init__(self, context, builder, spec, pointers):
        self.context, self.builder, self.spec = context, builder, spec
        self.isa = isa.SETS[spec.variant]
        self.lanes = 8 * spec.panels
        self.step_k = spec.group or 32
        self.p = pointers
        # One token's arithmetic is all unpacking: leave fields where they are in the byte, a factor 2^(bits j) that the
        # sum of field j loses at the end.
        self.in_place = spec.tokens == 1 and not spec.group and self.isa.unsigned_bytes

    def fields(self, packed):
        """The unpacked weight chunks of one step, in order of k; packed are the panels' pointers."""
        b, bits, result = self.builder, self.spec.bits, []
        for chunk in range(self.step_k * bits // 32):
            here = I64(32 * chunk)
            raw = join(b, [load(b, at(b, p, I8, here), vector(I8, 32)) for p in packed])
            for j in range(8 // bits):
                if self.in_place:
                    mask = ((1 << bits) - 1) << (bits * j)
                    result.append(b.and_(raw, splat_constant(I8, 4 * self.lanes, mask)) if bits < 8 else raw)
                    continue
                field = b.lshr(raw, splat_constant(I8, 4 * self.lanes, bits * j)) if j else raw
                last = j == 8 // bits - 1
                result.append(field if last else b.and_(field, splat_constant(I8, 4 * self.lanes, (1 << bits) - 1)))
        return result

    def step(self, index, totals):
        """totals + the dot products of the step's columns; totals[t] is a list of independent sums."""
        b, spec = self.builder, self.spec
        offset = b.mul(index, I64(self.step_k * spec.bits))
        packed = [at(b, p, I8, offset) for p in self.p["packed"]]
        if spec.tokens == 1:
            for line in range(0, self.step_k * spec.bits, 64):
                prefetch(b, at(b, packed[0], I8, I64(PREFETCH + line)))
        column = b.mul(index, I64(self.step_k))
        rows = [at(b, q, I8, column) for q in self.p["q"]]
        activations = [self.isa.activations(b, q, self.step_k // 4, spec.panels) for q in rows]
        return self.isa.dots(b, totals, self.fields(packed), activations, spec.bits)

    def fresh(self):
        count = max(1, self.isa.accumulators // self.spec.tokens)
        return [[self.isa.start(self.spec.panels)] * count for _ in range(self.spec.tokens)]

    def to_float(self, totals, token, group):
        """float32 of the integer sum of a token, correction included."""
        b = self.builder
        if self.in_place:  # sum i holds steps i, i + 8, ...: always the same field
            shifts = [self.spec.bits * (i % (8 // self.spec.bits)) for i in range(len(totals))]
            totals = [b.ashr(v, splat_constant(I32, self.lanes, s)) for v, s in zip(totals, shifts, strict=True)]
        total = totals[0]
        for more in totals[1:]:
            total = b.add(total, more)
        correction = b.load(at(b, self.p["correction"][token], I32, group), align=4)
        total = b.add(self.isa.finish(b, total), splat(b, correction, self.lanes))
        return b.sitofp(total, vector(F32, self.lanes))

    def weight_scales(self, group):
        b, offset = self.builder, self.builder.mul(group, I64(8))
        scalar = I16 if self.spec.group else F32
        s = join(b, [load(b, at(b, p, scalar, offset), vector(scalar, 8)) for p in self.p["w_scale"]])
        return widen_half(self.context, b, s) if self.spec.group else s

    def a_scale(self, token, group):
        b = self.builder
        return splat(b, b.load(at(b, self.p["a_scale"][token], F32, group), align=4), self.lanes)

    def grouped(self, index, sums):
        """One group: float sums + scale * integer dot."""
        b = self.builder
        totals = self.step(index, self.fresh())
        scales = self.weight_scales(index)
        result = []
        for t, total in enumerate(totals):
            s = b.fmul(scales, self.a_scale(t, index)) if self.spec.scale_groups else scales
            result.append(multiply_add(b, self.to_float(total, t, index), s, sums[t]))
        return result

    def emit(self, steps):
        """float32 vectors of the tile's tokens."""
        b, first = self.builder, I64(0)
        if self.spec.group:
            sums = [splat_constant(F32, self.lanes, 0.0)] * self.spec.tokens
            sums = loop(b, steps, sums, self.grouped)
            if self.spec.scale_groups:
                return sums
        else:
            start = self.fresh()
            width = len(start[0])

            def body(index, flat):
                totals = self.step(index, [flat[i : i + width] for i in range(0, len(flat), width)])
                return [v for row in totals for v in row]

            flat = loop(b, steps, [v for row in start for v in row], body)
            scales = self.weight_scales(first)
            rows = [flat[i : i + width] for i in range(0, len(flat), width)]
            sums = [b.fmul(self.to_float(row, t, first), scales) for t, row in enumerate(rows)]
        return [b.fmul(s, self.a_scale(t, first)) for t, s in enumerate(sums)]


def make_tile(spec: TileSpec):
    """The numba intrinsic of a tile.

    tile(q, a_scale, correction, packed, w_scale, out, token, first, second, out_first, out_second, out_stride): arrays
    as in kernels.matmul with correction int32 [n, groups]; `token` is the tile's first, `first` and `second` its
    panels; float32 rows of 8 go to out's elements out_first + t * out_stride, and out_second + t * out_stride for the
    second panel.
    """

    def codegen(context, builder, signature, args):
        arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:6], args[:6], strict=True)]
        data = dict(zip(("q", "a_scale", "correction", "packed", "w_scale", "out"), arrays, strict=True))
        token, first, second, out_first, out_second, out_stride = args[6:]
        scalars = {"q": I8, "a_scale": F32, "correction": I32}
        pointers = {}
        for name, scalar in scalars.items():
            stride = builder.extract_value(data[name].shape, 1)
            rows = [builder.add(token, I64(t)) for t in range(spec.tokens)]
            pointers[name] = [at(builder, data[name].data, scalar, builder.mul(row, stride)) for row in rows]
        panels = [first, second][: spec.panels]
        for name, size_axes, scalar in (
            ("packed", (1, 2, 3), I8),
            ("w_scale", (1, 2), I16 if spec.group else F32),
        ):
            size = I64(1)
            for axis in size_axes:
                size = builder.mul(size, builder.extract_value(data[name].shape, axis))
            pointers[name] = [at(builder, data[name].data, scalar, builder.mul(p, size)) for p in panels]
        k = builder.extract_value(data["q"].shape, 1)
        steps = builder.udiv(k, I64(spec.group or 32))
        for t, value in enumerate(Tile(context, builder, spec, pointers).emit(steps)):
            shift = builder.mul(out_stride, I64(t))
            places = [out_first, out_second][: spec.panels]
            for place, part in zip(places, isa.halves(builder, value, spec.panels), strict=True):
                store(builder, part, at(builder, data["out"].data, F32, builder.add(place, shift)))
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, q, a_scale, correction, packed, w_scale, out, token, first, second, o1, o2, stride):
        return types.none(q, a_scale, correction, packed, w_scale, out, *[types.int64] * 6), codegen

    return tile
