"""The LLVM IR of one tile: a few tokens times one or two panels of packed weights, over all of k.

Owns: the order of loads, unpacking, dot-product steps and scaling. Does not know: threads, which tiles make a matrix.
One emitter serves every width, layout and instruction set (compiled/isa.py).

For token t and row r:  out = a_scale * sum_g w_scale[g, r] * (correction[g] + sum_{k in g} q[t, k] * field[r, k]) with
correction = -zero_point * sums, the start of the integer accumulator. The float sum runs over g upwards with one fused
multiply-add each, in a lane of its own: no tile shape changes a result. With one scale a row there is one g, all of k.

Weights with a minimum are w_scale * field - minimum, fields unsigned: nothing corrects the integers, and the sum over g
also takes minimum[g, r] * correction[g] with the float correction = -sums (times the group's activation scale).
"""

from dataclasses import dataclass

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.folder.layouts import FACTOR_COLUMNS
from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.convert import widen_half
from edge_gemma.kernels.compiled.isa import (
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

PREFETCH, PREFETCH_FEW = 4096, 16384
"""Bytes ahead of a tile's walk through the weights, all its streams together: of one token into the first cache, of
several into the second, where more may be on their way (EPYC, Zen 4, one core, 4 bits, 2 tokens: 17 to 24 GB/s)."""


@dataclass(frozen=True)
class TileSpec:
    """A tile's compile-time choices."""

    variant: str  # a key of isa.SETS
    bits: int  # 2, 4, 8
    group: int  # 32 or 16 columns a scale; 0: one scale a row
    scale_groups: bool  # activations have a scale a group too
    tokens: int
    panels: int  # part of what a register holds (isa's panels), all of it, or several registers' worth
    minimum: int = 0  # bits of a group's minimum, as in layouts.py; 0: none

    @property
    def w_scale(self) -> ir.Type:
        """An element of w_scale: float16, a word with a minimum, or float32."""
        return ir.IntType(2 * self.minimum or 16) if self.group else F32

    @property
    def correction(self) -> ir.Type:
        return F32 if self.minimum else I32


def field_bits(bits, minimum):
    """What isa's methods are told: bytes with a minimum are 0 to 127, 7 bits, which no set needs to change."""
    return 7 if minimum and bits == 8 else bits


class Tile:
    """Emits one tile; pointers are to the tile's first token and to each panel's first byte.

    A register holds sums of 8 or 16 rows: one or two panels side by side. Sums are ordered by register,
    then token.
    """

    def __init__(self, context, builder, spec, pointers):
        self.context, self.builder, self.spec = context, builder, spec
        self.isa = isa.SETS[spec.variant]
        self.width = min(spec.panels, self.isa.panels)  # panels a register
        self.lanes = 8 * self.width
        self.registers = spec.panels // self.width
        self.step_k = spec.group or 32
        self.p = pointers
        # The arithmetic of a token or two is all unpacking: leave fields where they are in the byte, a factor
        # 2^(bits j) that the sum of field j loses at the end. Every place in the byte has sums of its own.
        sums = spec.tokens * self.registers * (8 // spec.bits)
        fit = spec.tokens == 1 or sums <= self.isa.sums
        self.in_place = not spec.group and self.isa.unsigned_bytes and fit

    def fields(self, packed):
        """Yields the unpacked weight chunks of one step, in order of k; packed are the panels' pointers."""
        b, bits = self.builder, self.spec.bits
        for chunk in range(self.step_k * bits // 32):
            here = I64(32 * chunk)
            raw = join(b, [load(b, at(b, p, I8, here), vector(I8, 32)) for p in packed])
            for j in range(8 // bits):
                if self.in_place:
                    mask = ((1 << bits) - 1) << (bits * j)
                    yield b.and_(raw, splat_constant(I8, 4 * self.lanes, mask)) if bits < 8 else raw
                    continue
                field = b.lshr(raw, splat_constant(I8, 4 * self.lanes, bits * j)) if j else raw
                last = j == 8 // bits - 1
                yield field if last else b.and_(field, splat_constant(I8, 4 * self.lanes, (1 << bits) - 1))

    def step(self, index, totals):
        """totals + the dot products of the step's columns; totals[register][token] is a list of independent sums."""
        b, spec = self.builder, self.spec
        offset = b.mul(index, I64(self.step_k * spec.bits))
        packed = [at(b, p, I8, offset) for p in self.p["packed"]]
        for panel in packed:
            for line in range(0, self.step_k * spec.bits, 64):
                ahead, cache = (PREFETCH, 1) if spec.tokens == 1 else (PREFETCH_FEW, 2)
                prefetch(b, at(b, panel, I8, I64(ahead // spec.panels + line)), cache)
        column = b.mul(index, I64(self.step_k))
        rows = [at(b, q, I8, column) for q in self.p["q"]]
        registers = [packed[i : i + self.width] for i in range(0, len(packed), self.width)]
        fields = [self.fields(pointers) for pointers in registers]
        return self.isa.dots(b, totals, fields, rows, field_bits(spec.bits, spec.minimum), spec.group)

    def fresh(self):
        count = max(1, self.isa.accumulators // (self.spec.tokens * self.registers))
        if self.in_place:
            count = max(count, 8 // self.spec.bits)
        row = [[self.isa.start(self.width)] * count for _ in range(self.spec.tokens)]
        return [row] * self.registers

    def to_float(self, totals, token, group):
        """float32 of the integer sum of a token, correction included."""
        b = self.builder
        if self.in_place:  # sum i holds steps i, i + 8, ...: always the same field
            shifts = [self.spec.bits * (i % (8 // self.spec.bits)) for i in range(len(totals))]
            totals = [b.ashr(v, splat_constant(I32, self.lanes, s)) for v, s in zip(totals, shifts, strict=True)]
        total = totals[0]
        for more in totals[1:]:
            total = b.add(total, more)
        total = self.isa.finish(b, total)
        if not self.spec.minimum:
            total = b.add(total, self.correction(token, group))
        return b.sitofp(total, vector(F32, self.lanes))

    def correction(self, token, group):
        b, scalar = self.builder, self.spec.correction
        return splat(b, b.load(at(b, self.p["correction"][token], scalar, group), align=4), self.lanes)

    def of_rows(self, name, scalar, offset):
        """A vector for each register: what an array has for its rows, 8 a panel."""
        b = self.builder
        panels = [load(b, at(b, p, scalar, offset), vector(scalar, 8)) for p in self.p[name]]
        return [join(b, panels[i : i + self.width]) for i in range(0, len(panels), self.width)]

    def weight_scales(self, group):
        """A vector of scales for each register."""
        scales = self.of_rows("w_scale", self.spec.w_scale, self.builder.mul(group, I64(8)))
        return [widen_half(self.context, self.builder, s) if self.spec.group else s for s in scales]

    def scales_and_minima(self, group):
        """The two halves of the words of each register's rows, as float32 vectors."""
        b, bits = self.builder, self.spec.minimum
        words = self.of_rows("w_scale", self.spec.w_scale, b.mul(group, I64(8)))
        halves = [(w, b.lshr(w, ir.Constant(w.type, [bits] * self.lanes))) for w in words]
        if bits == 16:
            return [[widen_half(self.context, b, b.trunc(h, vector(I16, self.lanes))) for h in pair] for pair in halves]
        block = b.mul(b.udiv(group, I64(FACTOR_COLUMNS // self.spec.group)), I64(16))
        factors = [self.of_rows("factors", I16, b.add(block, I64(8 * i))) for i in range(2)]
        mask = splat_constant(I32, self.lanes, (1 << bits) - 1)

        def value(half, factor):
            integer = b.and_(b.zext(half, vector(I32, self.lanes)), mask)
            return b.fmul(b.uitofp(integer, vector(F32, self.lanes)), widen_half(self.context, b, factor))

        return [[value(h, f[r]) for h, f in zip(pair, factors, strict=True)] for r, pair in enumerate(halves)]

    def a_scale(self, token, group):
        b = self.builder
        return splat(b, b.load(at(b, self.p["a_scale"][token], F32, group), align=4), self.lanes)

    def grouped(self, index, sums):
        """One group: float sums + scale * integer dot, + minimum * correction."""
        b, minimum = self.builder, self.spec.minimum
        totals = self.step(index, self.fresh())
        result = []
        pairs = self.scales_and_minima(index) if minimum else [(s, None) for s in self.weight_scales(index)]
        for r, (scales, minima) in enumerate(pairs):
            for t, total in enumerate(totals[r]):
                s = b.fmul(scales, self.a_scale(t, index)) if self.spec.scale_groups else scales
                y = multiply_add(b, self.to_float(total, t, index), s, sums[len(result)])
                result.append(multiply_add(b, minima, self.correction(t, index), y) if minimum else y)
        return result

    def ungrouped(self, steps):
        """One scale a row: integer sums over all of k."""
        shape = self.fresh()
        count = len(shape[0][0])

        def nested(flat):
            rows = [flat[i : i + count] for i in range(0, len(flat), count)]
            return [rows[i : i + self.spec.tokens] for i in range(0, len(rows), self.spec.tokens)]

        def flat(totals):
            return [v for register in totals for row in register for v in row]

        totals = loop(self.builder, steps, flat(shape), lambda index, state: flat(self.step(index, nested(state))))
        scales = self.weight_scales(I64(0))
        return [
            self.builder.fmul(self.to_float(total, t, I64(0)), s)
            for register, s in zip(nested(totals), scales, strict=True)
            for t, total in enumerate(register)
        ]

    def emit(self, steps):
        """float32 vectors, [register][token] in a row."""
        b, count = self.builder, self.registers * self.spec.tokens
        if not self.spec.group:
            sums = self.ungrouped(steps)
        else:
            sums = loop(b, steps, [splat_constant(F32, self.lanes, 0.0)] * count, self.grouped)
            if self.spec.scale_groups:
                return sums
        return [b.fmul(s, self.a_scale(i % self.spec.tokens, I64(0))) for i, s in enumerate(sums)]

    def rows(self, steps):
        """(token, panel, float32 vector of 8) of the whole tile."""
        for i, value in enumerate(self.emit(steps)):
            register, token = divmod(i, self.spec.tokens)
            for part, eight in enumerate(isa.halves(self.builder, value, self.width)):
                yield token, register * self.width + part, eight


def make_tile(spec: TileSpec):
    """The numba intrinsic of a tile.

    tile(q, a_scale, correction, packed, w_scale, factors, out, token, first, apart): arrays as in kernels.matmul with
    correction int32 or float32 [n, groups] (decode.make_correction); `token` is the tile's first; its panels are first,
    first + apart, ..., the matrix's last one in place of any beyond it.
    """

    def codegen(context, builder, signature, args):
        arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args[:7], args[:7], strict=True)]
        data = dict(zip(("q", "a_scale", "correction", "packed", "w_scale", "factors", "out"), arrays, strict=True))
        token, first, apart = args[7:]
        pointers = {}
        for name, scalar in {"q": I8, "a_scale": F32, "correction": spec.correction}.items():
            width = builder.extract_value(data[name].shape, 1)
            rows = [builder.add(token, I64(t)) for t in range(spec.tokens)]
            pointers[name] = [at(builder, data[name].data, scalar, builder.mul(row, width)) for row in rows]
        panels = [builder.add(first, builder.mul(apart, I64(i))) for i in range(spec.panels)]
        last = builder.sub(builder.extract_value(data["packed"].shape, 0), I64(1))
        panels = [builder.select(builder.icmp_signed("<", p, last), p, last) for p in panels]
        for name, size_axes, scalar in (
            ("packed", (1, 2, 3), I8),
            ("w_scale", (1, 2), spec.w_scale),
            ("factors", (1, 2, 3), I16),
        ):
            size = I64(1)
            for axis in size_axes:
                size = builder.mul(size, builder.extract_value(data[name].shape, axis))
            pointers[name] = [at(builder, data[name].data, scalar, builder.mul(p, size)) for p in panels]
        k = builder.extract_value(data["q"].shape, 1)
        steps = builder.udiv(k, I64(spec.group or 32))
        for t, i, eight in Tile(context, builder, spec, pointers).rows(steps):
            row = builder.mul(builder.add(token, I64(t)), builder.extract_value(data["out"].shape, 1))
            column = builder.mul(panels[i], I64(8))
            store(builder, eight, at(builder, data["out"].data, F32, builder.add(row, column)))
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, q, a_scale, correction, packed, w_scale, factors, out, token, first, apart):
        return types.none(q, a_scale, correction, packed, w_scale, factors, out, *[types.int64] * 3), codegen

    return tile
