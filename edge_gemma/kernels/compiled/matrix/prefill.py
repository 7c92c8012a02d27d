"""What numba compiles of a product with packed weights for many tokens: the way through the matrix for a prompt.

Owns: unpacking, tiles over unpacked weights, activations side by side. Does not know: a single token's way (decode.py),
the operations (kernels/matrix/prefill.py).

A core is fastest when all it multiplies lies in its smallest cache, in order. So a thread takes a few panels at a time
(a unit: R registers of rows), unpacks BLOCK_BYTES of them to one byte a field, and lets the tokens pass by, T at a time
(a tile), before it unpacks the columns that follow:

    fields       uint8 [words of the block, panels of the unit, 32]    weights, unsigned: 8 words of 32 bits a panel
    activations  int32 [tiles, words, T]                               a word of each of a tile's tokens
    running      int32 or float32 [tiles, T, R, lanes]                 the tiles' sums so far

A word is 4 columns of 8 bits or 2 of 16 bits (isa's `columns`). A step is R loads of weights, T broadcasts of
activations and R x T products. The sums are those of ir.py, rounded in the same order, minima included: which of the
two computed a product cannot be seen in the result.

With words of 16 bits half the multiplications do (Winograd, A new algorithm for inner product, 1968): for weights w and
activations x of two columns

    w0 x0 + w1 x1 = (w0 + x1) (w1 + x0) - w0 w1 - x0 x1

Of 4 columns the even ones are a word and the odd ones the next. The sums of the two last terms belong to a row and to a
token alone (`alone`); they are made once and subtracted at the end. w is within 0 and 255, x within -128 and 127: w + x
fits 16 bits. 32-bit sums may wrap on the way: what is left at the end is exact, because it fits 32 bits.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.folder.layouts import FACTOR_COLUMNS
from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import as_float, bits_of_float
from edge_gemma.kernels.compiled.isa import (
    F32,
    I8,
    I32,
    I64,
    at,
    join,
    load,
    loop,
    multiply_add,
    splat,
    splat_constant,
    vector,
)
from edge_gemma.kernels.compiled.matrix.decode import factor_blocks
from edge_gemma.kernels.compiled.matrix.ir import field_bits
from edge_gemma.kernels.compiled.operands import floats, operands, part, pointer
from edge_gemma.kernels.compiled.quantize import round_to_steps
from edge_gemma.kernels.matrix.decode import scale_type
from edge_gemma.kernels.matrix.prefill import BLOCK_BYTES, TILES

_UNROLL = 4  # words


def _place(context, builder, kind, value, *indices):
    """Pointer to array[*indices, 0, 0, ...], C-contiguous."""
    made = context.make_array(kind)(context, builder, value)
    offset = I64(0)
    for axis in range(kind.ndim):
        offset = builder.mul(offset, builder.extract_value(made.shape, axis))
        offset = builder.add(offset, indices[axis]) if axis < len(indices) else offset
    return builder.gep(made.data, [offset])


def _length(context, builder, kind, value, axis):
    return builder.extract_value(context.make_array(kind)(context, builder, value).shape, axis)


def _make_unpack(variant, bits, panels, minimum):
    """unpack(packed, first, chunk, fields, alone): from `chunk` on, of panels first, first + 1, ..., as much as fields
    hold. With words of 16 bits their products w0 w1 are added to `alone`, int32 [R, lanes].

    Panels beyond the matrix's last are the last.
    """
    chosen = isa.SETS[variant]
    side, per_byte = chosen.panels, 8 // bits
    words = per_byte * 4 // chosen.columns  # of a chunk
    pairs = chosen.columns == 2

    def codegen(context, builder, signature, args):
        b, (packed, fields, alone) = builder, ((signature.args[i], args[i]) for i in (0, 3, 4))
        last = b.sub(_length(context, b, *packed, 0), I64(1))
        sources = []
        for i in range(panels):
            panel = b.add(args[1], I64(i))
            panel = b.select(b.icmp_signed("<", panel, last), panel, last)
            sources.append(_place(context, b, *packed, panel, args[2]))

        def chunk(index, terms):
            terms = list(terms)
            here, target = b.mul(index, I64(32)), _place(context, b, *fields, b.mul(index, I64(words)))
            for p in range(0, panels, side):
                raw = join(b, [load(b, at(b, source, I8, here), vector(I8, 32)) for source in sources[p : p + side]])
                for j in range(per_byte):
                    field = b.lshr(raw, splat_constant(I8, 32 * side, bits * j)) if j else raw
                    field = b.and_(field, splat_constant(I8, 32 * side, (1 << bits) - 1))
                    unpacked = chosen.unpacked(b, field, field_bits(bits, minimum))
                    if pairs:
                        terms[p] = chosen.dot(b, terms[p], *unpacked)
                    for i, word in enumerate(unpacked):
                        place = panels * (words // per_byte * j + i) + p
                        isa.store(b, word, at(b, target, I8, I64(32 * place)))
            return terms

        places = [_place(context, b, *alone, I64(p)) for p in range(panels if pairs else 0)]
        terms = [load(b, place, vector(I32, 8)) for place in places]
        terms = loop(b, b.udiv(_length(context, b, *fields, 0), I64(words)), terms, chunk)
        for place, term in zip(places, terms, strict=True):
            isa.store(b, term, place)
        return context.get_dummy_value()

    @intrinsic
    def unpack(typingctx, packed, first, chunk, fields, alone):
        return types.none(packed, types.int64, types.int64, fields, alone), codegen

    return unpack


class _Tile:
    """Emits a tile's steps; p: pointers to what the block and the tile begin with."""

    def __init__(self, builder, variant, group, scale_groups, minimum, tokens, registers, pointers):
        self.builder, self.isa = builder, isa.SETS[variant]
        self.lanes = 8 * self.isa.panels
        self.group, self.scale_groups, self.minimum = group, scale_groups, minimum
        self.tokens, self.registers, self.p = tokens, registers, pointers

    def repeated(self, name, scalar, index, token):
        """One value of a token in all lanes."""
        b = self.builder
        offset = b.add(b.mul(index, I64(self.tokens)), I64(token))
        return splat(b, b.load(at(b, self.p[name], scalar, offset), align=4), self.lanes)

    def scales(self, index, name="scales"):
        b = self.builder
        first = b.mul(index, I64(self.lanes * self.registers))
        places = [at(b, self.p[name], F32, b.add(first, I64(self.lanes * r))) for r in range(self.registers)]
        return [load(b, place, vector(F32, self.lanes)) for place in places]

    def dots(self, first, count, sums):
        """sums [T x R] + the products of `count` words from `first` on."""
        b, size, sums = self.builder, 4 * self.lanes, list(sums)
        fields = at(b, self.p["fields"], I8, b.mul(first, I64(size * self.registers)))

        def weight(word, r):
            return load(b, at(b, fields, I8, I64(size * (self.registers * word + r))), vector(I8, size))

        together = 4 // self.isa.columns
        for d in range(0, count, together):
            weights = [[weight(d + i, r) for i in range(together)] for r in range(self.registers)]
            for t in range(self.tokens):
                here = [self.repeated("activations", I32, b.add(first, I64(d + i)), t) for i in range(together)]
                for r, words in enumerate(weights):
                    i = t * self.registers + r
                    sums[i] = self.isa.step(b, sums[i], words, here)
        return sums

    def group_step(self, index, sums):
        """One group: float sums + scale * integer dot, corrected from its start; or + minimum * correction."""
        b, words = self.builder, self.group // self.isa.columns
        kind = F32 if self.minimum else I32
        corrections = [self.repeated("correction", kind, index, t) for t in range(self.tokens)]
        starts = [splat_constant(I32, self.lanes, 0)] * self.tokens if self.minimum else corrections
        totals = self.dots(b.mul(index, I64(words)), words, [s for s in starts for _ in range(self.registers)])
        scales, result = self.scales(index), []
        minima = self.scales(index, "minima") if self.minimum else scales
        for t in range(self.tokens):
            factor = self.repeated("a_scale", F32, index, t) if self.scale_groups else None
            for scale, lowest in zip(scales, minima, strict=True):
                s = b.fmul(scale, factor) if self.scale_groups else scale
                value = b.sitofp(totals[len(result)], vector(F32, self.lanes))
                y = multiply_add(b, value, s, sums[len(result)])
                result.append(multiply_add(b, lowest, corrections[t], y) if self.minimum else y)
        return result

    def add(self, words):
        """Add a block of `words` to the running sums."""
        b, count = self.builder, self.tokens * self.registers
        kind = vector(F32 if self.group else I32, self.lanes)
        places = [at(b, self.p["running"], kind.element, I64(self.lanes * i)) for i in range(count)]
        sums = [load(b, place, kind) for place in places]
        if self.group:
            sums = loop(b, b.udiv(words, I64(self.group // self.isa.columns)), sums, self.group_step)
        else:
            steps = b.udiv(words, I64(_UNROLL))
            sums = loop(b, steps, sums, lambda i, state: self.dots(b.mul(i, I64(_UNROLL)), _UNROLL, state))
        for value, place in zip(sums, places, strict=True):
            isa.store(b, value, place)

    def results(self):
        """(token, panel of the unit, float32 vector of 8) of finished running sums."""
        b, scales = self.builder, None if self.group else self.scales(I64(0))
        for t in range(self.tokens):
            for r in range(self.registers):
                place = at(b, self.p["running"], F32, I64(self.lanes * (t * self.registers + r)))
                value = load(b, place, vector(F32 if self.group else I32, self.lanes))
                if not self.group:
                    value = b.sub(value, load(b, at(b, self.p["alone"], I32, I64(self.lanes * r)), value.type))
                    value = b.add(value, self.repeated("correction", I32, I64(0), t))
                    value = b.fmul(b.sitofp(value, vector(F32, self.lanes)), scales[r])
                if not self.scale_groups:
                    value = b.fmul(value, self.repeated("a_scale", F32, I64(0), t))
                for i, eight in enumerate(isa.halves(b, value, self.isa.panels)):
                    yield t, r * self.isa.panels + i, eight


def _make_tile(*spec):
    """(tile, finish) of (variant, group, scale_groups, minimum, tokens, registers).

    tile(activations, correction, a_scale, fields, scales, minima, running, index, first, last) adds the products of
    words first to last - 1, which `fields` hold, to the running sums of tile `index`; finish(correction, a_scale,
    scales, alone, running, out, index, token, panel) writes them to the rows of `out` from `token` on and the columns
    from `panel` on. Panels beyond the last are the last, as in unpack.
    """
    group, scale_groups = spec[1:3]

    def codegen_tile(context, builder, signature, args):
        b, given = builder, list(zip(signature.args[:7], args[:7], strict=True))
        index, first, last = args[7:]
        g = b.udiv(first, I64(group // isa.SETS[spec[0]].columns)) if group else I64(0)
        starts = [(index, first), (index, g), (index, g if scale_groups else I64(0)), (), (g,), (g,), (index,)]
        names = "activations", "correction", "a_scale", "fields", "scales", "minima", "running"
        pointers = {n: _place(context, b, *a, *s) for n, a, s in zip(names, given, starts, strict=True)}
        _Tile(b, *spec, pointers).add(b.sub(last, first))
        return context.get_dummy_value()

    def codegen_finish(context, builder, signature, args):
        b, given = builder, list(zip(signature.args[:6], args[:6], strict=True))
        index, token, first = args[6:]
        names = "correction", "a_scale", "scales", "alone", "running"
        starts = (index,), (index,), (), (), (index,)
        pointers = {n: _place(context, b, *a, *s) for n, a, s in zip(names, given, starts, strict=False)}
        last = b.sub(b.udiv(_length(context, b, *given[5], 1), I64(8)), I64(1))
        for t, p, eight in _Tile(b, *spec, pointers).results():
            panel = b.add(first, I64(p))
            panel = b.select(b.icmp_signed("<", panel, last), panel, last)
            isa.store(b, eight, _place(context, b, *given[5], b.add(token, I64(t)), b.mul(panel, I64(8))))
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, activations, correction, a_scale, fields, scales, minima, running, index, first, last):
        arrays = activations, correction, a_scale, fields, scales, minima, running
        return types.none(*arrays, *[types.int64] * 3), codegen_tile

    @intrinsic
    def finish(typingctx, correction, a_scale, scales, alone, running, out, index, token, panel):
        return types.none(correction, a_scale, scales, alone, running, out, *[types.int64] * 3), codegen_finish

    return tile, finish


def _make_read_scales(group, minimum):
    """read(w_scale, factors, scales, minima) of a panel: w_scale [groups, 8], factors [1, blocks, 2, 8] ->
    float32 [groups, 8] both.
    """

    @inner()
    def plain(w_scale, factors, scales, minima):
        for g in range(scales.shape[0]):
            for j in range(8):
                scales[g, j] = as_float(w_scale[g, j])

    @inner()
    def halves(w_scale, factors, scales, minima):
        for g in range(scales.shape[0]):
            for j in range(8):
                scales[g, j] = as_float(np.uint16(w_scale[g, j] & 0xFFFF))
                minima[g, j] = as_float(np.uint16(w_scale[g, j] >> 16))

    @inner()
    def words(w_scale, factors, scales, minima):
        for g in range(scales.shape[0]):
            block = g * group // FACTOR_COLUMNS
            for j in range(8):
                word = np.int32(w_scale[g, j])
                scales[g, j] = np.float32(word & ((1 << minimum) - 1)) * as_float(factors[0, block, 0, j])
                minima[g, j] = np.float32(word >> minimum) * as_float(factors[0, block, 1, j])

    return {0: plain, 16: halves}.get(minimum, words)


def _make_unit(variant, bits, group, scale_groups, minimum):
    """unit(activations, correction, a_scale, packed, w_scale, factors, out, n0, n1, first): panels from `first` on
    times tokens n0 to n1 - 1, whose tiles the first three hold; the last tile ends with the last token.
    """
    chosen = isa.SETS[variant]
    tokens, registers = chosen.block(bits, group)
    side, lanes, panels = chosen.panels, 8 * chosen.panels, chosen.panels * registers
    columns = chosen.columns
    block = BLOCK_BYTES // (32 * panels) // 8 * 8  # words: whole groups
    sum_type = np.float32 if group else np.int32
    unpack = _make_unpack(variant, bits, panels, minimum)
    tile, finish = _make_tile(variant, group, scale_groups, minimum, tokens, registers)
    read_scales = _make_read_scales(group, minimum)

    @inner()
    def unit(activations, correction, a_scale, packed, w_scale, factors, out, n0, n1, first):
        tiles, words = activations.shape[:2]
        running = np.zeros((tiles, tokens, registers, lanes), sum_type)
        scales = np.empty((correction.shape[1], registers, lanes), np.float32)
        minima = np.empty((scales.shape[0] if minimum else 0, registers, lanes), np.float32)
        alone = np.zeros((registers, lanes), np.int32)
        for p in range(panels):
            panel = min(first + p, w_scale.shape[0] - 1)
            here = p // side, slice(p % side * 8, p % side * 8 + 8)
            read_scales(
                w_scale[panel], factors[panel : panel + 1], scales[:, here[0], here[1]], minima[:, here[0], here[1]]
            )
        for d0 in range(0, words, block):
            d1 = min(words, d0 + block)
            fields = np.empty((d1 - d0, panels, 32), np.uint8)
            unpack(packed, first, d0 * columns * bits // 32, fields, alone)
            for i in range(tiles):
                tile(activations, correction, a_scale, fields, scales, minima, running, i, d0, d1)
                if d1 == words:  # here, so that memory takes a tile's results during the next one's products
                    token = min(n0 + i * tokens, n1 - tokens)
                    finish(correction, a_scale, scales, alone, running, out, i, token, first)

    return unit, panels


@inner()
def _words(q, columns, words):
    """A token's activations as a set multiplies them: 4 bytes a word, or the even and the odd of them as 16 bits.

    Returns the sum of the products x0 x1 of 16 bits, else 0.
    """
    dwords, alone = q.view(np.int32), np.int32(0)
    if columns == 4:
        for d in range(len(dwords)):
            words[d] = dwords[d]
        return alone
    for d in range(len(dwords)):
        for odd in range(2):
            words[2 * d + odd] = (q[4 * d + odd] & 0xFFFF) | (np.int32(q[4 * d + odd + 2]) << 16)
            alone += np.int32(q[4 * d + 2 * odd]) * np.int32(q[4 * d + 2 * odd + 1])
    return alone


def interleave(columns, tokens, scale_groups, minimum):
    """q, a_scale, sums, activations, correction, scale, n, kpad, groups, zero: a tile's tokens side by side.

    Into int32 [tiles, words, T], int32 [tiles, groups, T] (times minus the zero point; with a minimum the bits of
    decode.make_correction's floats), float32 [tiles, groups or 1, T]. The last tile ends with the last token.
    """

    def interleave(row, chunk):
        w, _ = operands(row)
        n, kpad, groups = w[6], w[7], w[8]
        scales, words, tiles = groups if scale_groups else 1, kpad // columns, (n + tokens - 1) // tokens
        q, a_scale = numba.carray(pointer(w[0]), (n, kpad), np.int8), floats(w[1], (n, scales))
        sums = numba.carray(pointer(w[2]), (n, groups), np.int32)
        activations = numba.carray(pointer(w[3]), (tiles, words, tokens), np.int32)[chunk]
        correction = numba.carray(pointer(w[4]), (tiles, groups, tokens), np.int32)[chunk]
        scale = floats(w[5], (tiles, scales, tokens))[chunk]
        first = min(chunk * tokens, n - tokens)
        for t in range(tokens):
            alone = _words(q[first + t], columns, activations[:, t])
            for g in range(groups):
                if minimum:
                    factor = a_scale[first + t, g] if scale_groups else np.float32(1)
                    correction[g, t] = bits_of_float(np.float32(-sums[first + t, g]) * factor)
                else:
                    correction[g, t] = -np.int32(w[9]) * sums[first + t, g] - alone
            for g in range(scales):
                scale[g, t] = a_scale[first + t, g]

    return interleave


def matmul_blocked(variant, bits, group, scale_groups, minimum):
    """activations, correction, a_scale, packed, w_scale, factors, out, n, kpad, panels, units, step: TILES tiles of
    tokens times a unit of panels.
    """
    tokens, _ = isa.SETS[variant].block(bits, group)
    columns = isa.SETS[variant].columns
    unit, panels_a_unit = _make_unit(variant, bits, group, scale_groups, minimum)
    w_scale_type = scale_type(group, minimum)

    def matmul(row, chunk):
        w, f = operands(row)
        n, kpad, panels, units, step = w[7], w[8], w[9], w[10], np.float32(f[11])
        groups, tiles = kpad // group if group else 1, (n + tokens - 1) // tokens
        activations = numba.carray(pointer(w[0]), (tiles, kpad // columns, tokens), np.int32)
        correction = numba.carray(pointer(w[1]), (tiles, groups, tokens), np.int32)
        a_scale = floats(w[2], (tiles, groups if scale_groups else 1, tokens))
        packed = numba.carray(pointer(w[3]), (panels, kpad * bits // 32, 8, 4), np.uint8)
        w_scale = numba.carray(pointer(w[4]), (panels, groups, 8), w_scale_type)
        factors = numba.carray(pointer(w[5]), (panels, factor_blocks(kpad, minimum), 2, 8), np.uint16)
        t0, t1 = part(chunk // units, TILES, tiles)
        out = floats(w[6], (n, 8 * panels))
        n0, n1, first = t0 * tokens, min(n, t1 * tokens), chunk % units * panels_a_unit
        unit(activations[t0:t1], correction[t0:t1], a_scale[t0:t1], packed, w_scale, factors, out, n0, n1, first)
        if step:  # rows that another chunk's tile writes too are the same in the end
            for token in range(min(n0, n1 - tokens), n1):
                round_to_steps(out[token, 8 * first : 8 * (first + panels_a_unit)], step)

    return matmul
