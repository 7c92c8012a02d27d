"""What numba compiles of attention where every query sees every key (kernels/attend/full.py).

Owns: tiles, the running softmax. Does not know: when they are called.

A task takes a group of query rows of a head and lets blocks of BLOCK keys pass by:

    scores    T rows times the keys of a block, which lie transposed in panels of W = R registers: a step is R loads,
              T broadcasts and R x T products
    softmax   a row's highest score so far; what was summed under a lower one is scaled down
    values    T rows of weights times W columns of the values at a time, added to what blocks before gave
"""

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.attend.full import sizes
from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.attend.ir import exp
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import copy
from edge_gemma.kernels.compiled.gates import exp32
from edge_gemma.kernels.compiled.isa import F32, I64, at, load, loop, multiply_add, splat, store, vector
from edge_gemma.kernels.compiled.operands import floats, operands

BLOCK = 128
"""Keys that pass by together: with their values they stay in a core's second cache."""


def _make_tile(variant):
    """(tile, rows T, columns W) of an instruction set.

    tile(a, row, b, place, column, count, out, to_row, to_column): out[to_row + t, to_column + j] += the sum over i <
    count of a[row + t, i] * b[place + i, column + j], all float32 of two axes, t < T, j < W.
    """
    chosen = isa.SETS[variant]
    lanes, (rows, registers) = chosen.float_lanes, chosen.float_tile

    def codegen(context, builder, signature, args):
        b = builder
        a, right, out = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 2, 6))
        row, place, column, count, to_row, to_column = (args[i] for i in (1, 3, 4, 5, 7, 8))
        length, width, apart = (b.extract_value(m.shape, 1) for m in (a, right, out))
        starts = [at(b, a.data, F32, b.mul(b.add(row, I64(t)), length)) for t in range(rows)]
        first = at(b, right.data, F32, b.add(b.mul(place, width), column))
        targets = [
            at(b, out.data, F32, b.add(b.mul(b.add(to_row, I64(t)), apart), b.add(to_column, I64(lanes * r))))
            for t in range(rows)
            for r in range(registers)
        ]

        def step(index, sums):
            here, result = at(b, first, F32, b.mul(index, width)), []
            columns = [load(b, at(b, here, F32, I64(lanes * r)), vector(F32, lanes)) for r in range(registers)]
            for start in starts:
                value = splat(b, b.load(at(b, start, F32, index), align=4), lanes)
                result += [multiply_add(b, value, c, sums[len(result) + r]) for r, c in enumerate(columns)]
            return result

        sums = loop(b, count, [load(b, target, vector(F32, lanes)) for target in targets], step)
        for value, target in zip(sums, targets, strict=True):
            store(b, value, target)
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, a, row, b, place, column, count, out, to_row, to_column):
        return types.none(a, types.int64, b, *[types.int64] * 3, out, *[types.int64] * 2), codegen

    return tile, rows, lanes * registers


def _make_softmax(variant):
    """(highest, weigh) of an instruction set; scores float32 [rows, keys], `count` a multiple of its float_lanes.

    highest(scores, row, count, top): the largest of top and of scores[row, :count]. weigh(scores, row, count, top):
    scores[row, :count] become exp(score - top), top the highest; their sum.
    """
    lanes = isa.SETS[variant].float_lanes
    kind = vector(F32, lanes)

    def over_row(context, builder, signature, args, start, step):
        """Folds step(state, pointer to a vector of the row) over the row; state is one vector."""
        scores = context.make_array(signature.args[0])(context, builder, args[0])
        row = at(builder, scores.data, F32, builder.mul(args[1], builder.extract_value(scores.shape, 1)))

        def body(index, state):
            return [step(state[0], at(builder, row, F32, builder.mul(index, I64(lanes))))]

        return loop(builder, builder.udiv(args[2], I64(lanes)), [start], body)[0]

    def folded(builder, v, combine):
        while v.type.count > 1:
            v = combine(*isa.halves(builder, v, 2))
        return builder.extract_element(v, isa.I32(0))

    def codegen_highest(context, b, signature, args):
        def larger(a, c):
            return b.select(b.fcmp_ordered(">", a, c), a, c)

        start = splat(b, args[3], lanes)
        best = over_row(context, b, signature, args, start, lambda best, p: larger(best, load(b, p, kind)))
        return folded(b, best, larger)

    def codegen_weigh(context, b, signature, args):
        top = splat(b, args[3], lanes)

        def step(total, place):
            weight = exp(b, b.fsub(load(b, place, kind), top))
            store(b, weight, place)
            return b.fadd(total, weight)

        total = over_row(context, b, signature, args, isa.splat_constant(F32, lanes, 0.0), step)
        return folded(b, total, b.fadd)

    @intrinsic
    def highest(typingctx, scores, row, count, top):
        return types.float32(scores, types.int64, types.int64, types.float32), codegen_highest

    @intrinsic
    def weigh(typingctx, scores, row, count, top):
        return types.float32(scores, types.int64, types.int64, types.float32), codegen_weigh

    return highest, weigh


@inner()
def _lay_out(k, v, head, keys, values):
    """A head's keys, transposed, in panels; its values, row by row. What is beyond them is 0."""
    (count, _, hd), width = k.shape, keys.shape[1]
    for i in range(keys.shape[0] // hd * width):
        for d in range(hd):
            keys[i // width * hd + d, i % width] = k[i, head, d] if i < count else np.float32(0)
    for i in range(count):
        for d in range(values.shape[1]):
            values[i, d] = v[i, head, d] if d < hd else np.float32(0)


def lay_out(row, chunk):
    """k, v, keys, values, count, H, hd, panels, W, hd padded: a head."""
    w, _ = operands(row)
    given = w[4], w[5], w[6]
    keys, values = floats(w[2], (w[5], w[7] * w[6], w[8])), floats(w[3], (w[5], w[4], w[9]))
    _lay_out(floats(w[0], given), floats(w[1], given), chunk, keys[chunk], values[chunk])


def _make_attend(variant):
    """attend of an instruction set."""
    tile, rows, width = _make_tile(variant)
    highest, weigh = _make_softmax(variant)
    lanes = isa.SETS[variant].float_lanes

    @inner()
    def attend(q, keys, values, count, out):
        """out [group, hd padded]: the group's rows of q [group, hd] attend to `count` keys."""
        scores = np.empty((rows, BLOCK), np.float32)
        top, total = np.full(q.shape[0], -np.inf, np.float32), np.zeros(q.shape[0], np.float32)
        for begin in range(0, count, BLOCK):
            size = min(BLOCK, count - begin)
            padded = (size + lanes - 1) // lanes * lanes
            for first in range(0, q.shape[0], rows):
                scores[:] = 0
                for column in range(0, size, width):
                    place = (begin + column) // width * q.shape[1]
                    tile(q, first, keys, place, 0, q.shape[1], scores, 0, column)
                for t in range(rows):
                    r = first + t
                    scores[t, size:padded] = -np.inf
                    best = highest(scores, t, padded, top[r])
                    if best > top[r]:
                        shrink = exp32(top[r] - best)
                        total[r] *= shrink
                        for d in range(out.shape[1]):
                            out[r, d] *= shrink
                        top[r] = best
                    total[r] += weigh(scores, t, padded, best)
                for column in range(0, out.shape[1], width):
                    tile(scores, 0, values, begin, column, size, out, first, column)
        for r in range(q.shape[0]):
            inverse = np.float32(1) / total[r]
            for d in range(out.shape[1]):
                out[r, d] *= inverse

    return attend


def full_attention(variant):
    """q, keys, values, out, n, count, H, hd, panels, hd padded: a group of queries of a head."""
    attend, (group, width) = _make_attend(variant), sizes(variant)

    def full_attention(row, chunk):
        w, _ = operands(row)
        n, count, heads, hd, padded = w[4], w[5], w[6], w[7], w[9]
        groups = (n + group - 1) // group
        head, first = chunk // groups, chunk % groups * group
        q, out = floats(w[0], (n, heads, hd)), floats(w[3], (n, heads, hd))
        keys, values = floats(w[1], (heads, w[8] * hd, width)), floats(w[2], (heads, count, padded))
        mine, result = np.zeros((group, hd), np.float32), np.zeros((group, padded), np.float32)
        last = min(n - first, group)
        for i in range(last):
            copy(q[first + i, head], mine[i])
        attend(mine, keys[head], values[head], count, result)
        for i in range(last):
            copy(result[i, :hd], out[first + i, head])

    return full_attention
