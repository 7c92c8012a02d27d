"""The LLVM IR of attention over one block of keys: scores, softmax and weighted values of a few query heads.

Owns: register tiles for a group of query heads that share a KV head. Does not know: masks, merging of blocks, threads.

Let R be the tile's query rows, T keys and D vectors of a head, T = D = float_sums / R (kernels/isa.py):

    scores   for T keys at a time: R x T vectors of sums over the head, a cache line of the head at a time; 4 rows' sums
             are then folded together into 4 scores; the next keys, and the values of these, are prefetched
    softmax  R heads in a vector: maximum over the keys, exp(score - maximum), their sum
    values   for D vectors of the head at a time: R x D sums over the keys

Keys lie in slots slot, slot + 1, ... of a ring of `capacity` rows.
"""

from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.convert import widen_half
from edge_gemma.kernels.compiled.isa import (
    F32,
    I16,
    I32,
    I64,
    at,
    call,
    load,
    loop,
    multiply_add,
    prefetch,
    shuffle,
    splat,
    splat_constant,
    store,
    vector,
)


def exp(builder, x):
    """exp of a float32 vector with x <= 0, as gates.exp32 but for x below -87: that is exp(-87), 1.6e-38. NaN stays."""
    count = x.type.count

    def c(value):
        return splat_constant(F32, count, value)

    x = builder.select(builder.fcmp_ordered("<", x, c(-87.0)), c(-87.0), x)
    # The sum rounds x / ln 2 to a whole number n, and its last bits are n + 127: the exponent of 2^n.
    shift = 1.5 * 2**23 + 127
    shifted = multiply_add(builder, x, c(1.4426950408889634), c(shift))
    n = builder.fsub(shifted, c(shift))
    r = multiply_add(builder, n, c(-0.693359375), x)
    r = multiply_add(builder, n, c(2.12194440e-4), r)
    p = c(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = multiply_add(builder, p, r, c(coefficient))
    y = multiply_add(builder, builder.fmul(p, r), r, builder.fadd(r, c(1.0)))
    power = builder.shl(builder.bitcast(shifted, vector(I32, count)), splat_constant(I32, count, 23))
    return builder.fmul(y, builder.bitcast(power, x.type))


def fold(builder, four):
    """float32 [4]: the lane sums of four vectors."""
    lanes = four[0].type.count

    def pairs(a, b):
        """Sums of neighbours, a's then b's within every 128 bits."""
        even = [4 * q + i for q in range(lanes // 4) for i in (0, 2, lanes, lanes + 2)]
        return builder.fadd(shuffle(builder, a, b, even), shuffle(builder, a, b, [i + 1 for i in even]))

    v = pairs(pairs(four[0], four[1]), pairs(four[2], four[3]))
    while v.type.count > 4:
        v = builder.fadd(*isa.halves(builder, v, 2))
    return v


class Block:
    """Emits one block; pointers are to the first element, strides in elements."""

    def __init__(self, context, builder, variant, half, rows, pointers, sizes):
        self.context, self.builder, self.half = context, builder, half
        self.lanes = isa.SETS[variant].float_lanes
        self.rows, self.across = rows, isa.SETS[variant].float_sums // rows
        self.p, self.head, self.row, self.slot, self.capacity, self.count = pointers, *sizes

    def key(self, pointer, index):
        """Pointer to a key's or value's row: slot + index, around the ring."""
        b = self.builder
        slot = b.add(self.slot, index)
        slot = b.select(b.icmp_unsigned(">=", slot, self.capacity), b.sub(slot, self.capacity), slot)
        return at(b, pointer, I16 if self.half else F32, b.mul(slot, self.row))

    def cached(self, row, offset):
        """A float32 vector of a cache row."""
        b, scalar = self.builder, I16 if self.half else F32
        v = load(b, at(b, row, scalar, offset), vector(scalar, self.lanes))
        return widen_half(self.context, b, v) if self.half else v

    def ceil_div(self, value, by):
        return self.builder.udiv(self.builder.add(value, I64(by - 1)), I64(by))

    def scores(self):
        b, rows, keys = self.builder, self.rows, self.across
        scalar = I16 if self.half else F32
        vectors = max(1, (32 if self.half else 16) // self.lanes)  # of a 64-byte line
        last = b.sub(self.count, I64(1))

        def some_keys(index, _):
            first = b.mul(index, I64(keys))
            wanted = [b.add(first, I64(j)) for j in range(keys)]
            wanted = [b.select(b.icmp_unsigned("<", w, last), w, last) for w in wanted]
            starts = [self.key(self.p["k"], w) for w in wanted]
            soon = [self.key(self.p["v"], w) for w in wanted]
            soon += [at(b, s, scalar, b.mul(self.row, I64(keys))) for s in starts]

            def line(d, sums):
                sums, start = list(sums), b.mul(d, I64(self.lanes * vectors))
                for row in soon:
                    prefetch(b, at(b, row, scalar, start))
                for v in range(vectors):
                    offset = b.add(start, I64(self.lanes * v))
                    k = [self.cached(s, offset) for s in starts]
                    for r in range(rows):
                        here = b.add(offset, b.mul(self.head, I64(r)))
                        q = load(b, at(b, self.p["q"], F32, here), vector(F32, self.lanes))
                        mine = slice(r * keys, (r + 1) * keys)
                        sums[mine] = [multiply_add(b, q, key, total) for key, total in zip(k, sums[mine], strict=True)]
                return sums

            zero = splat_constant(F32, self.lanes, 0.0)
            sums = loop(b, b.udiv(self.head, I64(self.lanes * vectors)), [zero] * (rows * keys), line)
            for j in range(keys):
                for r in range(0, rows, 4):
                    place = b.add(b.mul(wanted[j], I64(rows)), I64(r))
                    four = fold(b, [sums[(r + i) * keys + j] for i in range(4)])
                    store(b, four, at(b, self.p["scores"], F32, place))
            return []

        loop(b, self.ceil_div(self.count, keys), [], some_keys)

    def softmax(self):
        b, heads = self.builder, vector(F32, self.rows)

        def score(i):
            return at(b, self.p["scores"], F32, b.mul(i, I64(self.rows)))

        def highest(i, state):
            return [call(b, f"llvm.maxnum.v{self.rows}f32", heads, state[0], load(b, score(i), heads))]

        (top,) = loop(b, self.count, [splat_constant(F32, self.rows, float("-inf"))], highest)

        def weigh(i, state):
            e = exp(b, b.fsub(load(b, score(i), heads), top))
            store(b, e, score(i))
            return [b.fadd(state[0], e)]

        (total,) = loop(b, self.count, [splat_constant(F32, self.rows, 0.0)], weigh)
        store(b, top, self.p["top"])
        store(b, total, self.p["total"])

    def values(self):
        b, rows, across = self.builder, self.rows, self.across
        width = self.lanes * across

        def some_columns(index, _):
            column = b.mul(index, I64(width))

            def step(i, sums):
                row = self.key(self.p["v"], i)
                v = [self.cached(row, b.add(column, I64(self.lanes * j))) for j in range(across)]
                result = []
                for r in range(rows):
                    place = b.add(b.mul(i, I64(rows)), I64(r))
                    w = splat(b, b.load(at(b, self.p["scores"], F32, place), align=4), self.lanes)
                    result += [multiply_add(b, w, v[j], sums[r * across + j]) for j in range(across)]
                return result

            zero = splat_constant(F32, self.lanes, 0.0)
            sums = loop(b, self.count, [zero] * (rows * across), step)
            for r in range(rows):
                for j in range(across):
                    place = b.add(b.add(b.mul(self.head, I64(r)), column), I64(self.lanes * j))
                    store(b, sums[r * across + j], at(b, self.p["values"], F32, place))
            return []

        loop(b, b.udiv(self.head, I64(width)), [], some_columns)


def make_block(variant: str, half: bool, rows: int):
    """block(q, k_cache, v_cache, kv, slot, count, first, scores, top, total, values), a numba intrinsic.

    q and values float32 [heads, hd], scores [keys, rows], top and total [heads]: rows first, ..., first + rows - 1 of
    the heads attend to `count` keys from `slot` on of KV head `kv`. hd is a multiple of 64.
    """

    def codegen(context, builder, signature, args):
        names = ("q", "k", "v", "kv", "slot", "count", "first", "scores", "top", "total", "values")
        given = dict(zip(names, zip(signature.args, args, strict=True), strict=True))
        arrays = {
            name: context.make_array(kind)(context, builder, value)
            for name, (kind, value) in given.items()
            if isinstance(kind, types.Array)
        }
        kv, slot, count, first = (given[name][1] for name in ("kv", "slot", "count", "first"))
        capacity, kv_heads, head = (builder.extract_value(arrays["k"].shape, axis) for axis in range(3))
        offsets = {"scores": I64(0), "top": first, "total": first}
        offsets |= dict.fromkeys(("k", "v"), builder.mul(kv, head))
        offsets |= dict.fromkeys(("q", "values"), builder.mul(first, head))
        scalar = {"k": I16 if half else F32, "v": I16 if half else F32}
        pointers = {n: at(builder, arrays[n].data, scalar.get(n, F32), offsets[n]) for n in arrays}
        sizes = head, builder.mul(head, kv_heads), slot, capacity, count
        block = Block(context, builder, variant, half, rows, pointers, sizes)
        block.scores()
        block.softmax()
        block.values()
        return context.get_dummy_value()

    @intrinsic
    def attend_block(typingctx, q, k_cache, v_cache, kv, slot, count, first, scores, top, total, values):
        whole = [types.int64] * 4
        return types.none(q, k_cache, v_cache, *whole, scores, top, total, values), codegen

    return attend_block
