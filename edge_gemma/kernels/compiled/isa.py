"""Instruction sets for the matrix kernels: how each multiplies int8 by small integers, and LLVM IR in short words.

Owns: the LLVM IR of a dot-product step per instruction set; what all emitters say often (vector, load, loop ...). Does
not know: which sets this CPU has and the facts of a set (kernels/isa.py), tiles, loops, scales.

A step meets a chunk of weights, 8 rows x 4 k (32 bytes; two panels side by side make 64), with one dword of
activations that every row shares. Sets with a dot-product instruction add it to 32-bit sums at once. The others
multiply into 16-bit sums, as many as cannot overflow, and then widen. Activations are within +-127 where weights have
scales of groups, and within -128 and 127 where rows have one scale:

    avx512-vnni    vpdpbusd, 16 rows a register                   weights unsigned: bytes are stored + 128
    avx-vnni       vpdpbusd, 8 rows a register                    the same
    avx2           pmaddubsw, 8 sums of 4-bit products, pmaddwd   bytes: |w| times the activation with w's sign, or
                                                                  (rows with one scale) two fields of 4 bits, and for
                                                                  many tokens pmaddwd of sums of two (prefill.py)
    neon-dotprod   sdot, 4 rows a register
    neon           smull and smlal, sadalp
    portable       whatever LLVM makes of the same in plain vector operations
"""

from llvmlite import ir

from edge_gemma.kernels import isa as facts

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()


def vector(scalar, lanes):
    return ir.VectorType(scalar, lanes)


def splat_constant(scalar, lanes, value):
    return ir.Constant(vector(scalar, lanes), [value] * lanes)


def call(builder, name, result, *args):
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, function_type, name)
    return builder.call(function, args)


def shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), list(lanes)))


def splat(builder, value, lanes):
    """A vector of one scalar."""
    one = vector(value.type, lanes)
    first = builder.insert_element(ir.Constant(one, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, first, ir.Constant(one, ir.Undefined), [0] * lanes)


def at(builder, pointer, scalar, offset):
    """pointer + offset elements of a scalar type."""
    return builder.gep(builder.bitcast(pointer, scalar.as_pointer()), [offset])


def load(builder, pointer, of):
    """A value at any address: numba promises less alignment than vectors want."""
    return builder.load(builder.bitcast(pointer, of.as_pointer()), align=1)


def store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def prefetch(builder, pointer, cache=1):
    """Ask for the line at `pointer`, which need not exist, in the first or the second cache."""
    pointer = builder.bitcast(pointer, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(4 - cache), I32(1))


def multiply_add(builder, a, b, c):
    """a * b + c, in one rounding wherever the CPU can."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def loop(builder, count, state, body):
    """for i in range(count): state = body(i, state); count >= 1. Returns the last state."""
    before, block = builder.block, builder.append_basic_block("steps")
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(I64)
    phis = [builder.phi(v.type) for v in state]
    index.add_incoming(I64(0), before)
    for phi, value in zip(phis, state, strict=True):
        phi.add_incoming(value, before)
    state = body(index, phis)
    following = builder.add(index, I64(1))
    index.add_incoming(following, builder.block)
    for phi, value in zip(phis, state, strict=True):
        phi.add_incoming(value, builder.block)
    after = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_unsigned("<", following, count), block, after)
    builder.position_at_end(after)
    return state


def halves(builder, v, parts):
    """Cut a vector into equal parts."""
    size = v.type.count // parts
    return [shuffle(builder, v, v, range(i * size, (i + 1) * size)) for i in range(parts)]


def join(builder, parts):
    """The inverse of halves, for a power of two of parts."""
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        parts = [shuffle(builder, a, b, range(size)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class Portable(facts.Portable):
    """Products in 16 bits, pairs of them widened to 32: plain vector IR that any target can lower."""

    def chain(self, bits):
        """Steps whose sum fits 16 bits: |field| * 127 each."""
        return 32767 // ({2: 3, 4: 15, 7: 127, 8: 128}[bits] * 127)

    def activations(self, builder, pointer, count, panels):
        """`count` dwords of activations at `pointer`, each repeated for every row: int8 vectors."""
        lanes = 8 * panels
        dwords = []
        for d in range(count):
            at = builder.gep(builder.bitcast(pointer, I32.as_pointer()), [ir.Constant(I32, d)])
            dwords.append(builder.bitcast(splat(builder, builder.load(at, align=1), lanes), vector(I8, 4 * lanes)))
        return dwords

    def prepare(self, builder, field, bits):
        """What of a weight chunk does not depend on the token."""
        return builder.sext(field, vector(I16, field.type.count))

    def multiply(self, builder, prepared, activation, bits):
        """16-bit products (or sums of pairs) of a chunk and a dword."""
        return builder.mul(prepared, builder.sext(activation, vector(I16, activation.type.count)))

    def widen(self, builder, sums16, total):
        """total + the 16-bit sums, 32 bits, two a row."""
        count = sums16.type.count
        even, odd = (shuffle(builder, sums16, sums16, range(first, count, 2)) for first in (0, 1))
        wide = vector(I32, count // 2)
        return builder.add(total, builder.add(builder.sext(even, wide), builder.sext(odd, wide)))

    def start(self, panels):
        return splat_constant(I32, 16 * panels, 0)

    def finish(self, builder, total):
        """int32 [rows] of the running sums."""
        count = total.type.count
        return builder.add(*(shuffle(builder, total, total, range(first, count, 2)) for first in (0, 1)))

    def dots(self, builder, totals, fields, rows, bits, group):
        """totals[r][t] + sum over d of fields[r][d] . rows[t][d], for each register r and token t.

        totals[r][t]: a list of independent sums. fields[r]: an iterator of chunks, which emits each when it is asked
        for. rows[t]: a pointer to the token's activations. Where rows of weights have one scale (group 0) activations
        may be -128, as training with fixed steps leaves them.
        """
        result, activations = [], []
        for sums, chunks in zip(totals, map(list, fields), strict=True):
            width = chunks[0].type.count // 32
            activations = activations or [self.activations(builder, row, len(chunks), width) for row in rows]
            result.append(self.register_dots(builder, sums, chunks, activations, bits, group))
        return result

    def register_dots(self, builder, totals, fields, activations, bits, group):
        """The same for one register: totals[t] + sum of fields[d] . activations[t][d]."""
        chain = 1 if bits == 8 and not group else self.chain(bits)  # 2 * 128 * 128 is beyond 16 bits
        sums16, left = [None] * len(totals), chain
        for d, field in enumerate(fields):
            prepared = self.prepare(builder, field, bits)
            for t, row in enumerate(activations):
                product = self.multiply(builder, prepared, row[d], bits)
                sums16[t] = product if sums16[t] is None else builder.add(sums16[t], product)
            left -= 1
            if not left or d == len(fields) - 1:
                totals = [[self.widen(builder, s, total)] for s, (total,) in zip(sums16, totals, strict=True)]
                sums16, left = [None] * len(totals), chain
        return totals


class Avx2(facts.Avx2, Portable):
    def unpacked(self, builder, field, bits):
        """Bytes + 128 as 16 bits: the even columns of each four, then the odd ones."""
        words = builder.xor(field, splat_constant(I8, field.type.count, 0x80))
        words = builder.bitcast(words, vector(I16, field.type.count // 2))
        even = builder.and_(words, splat_constant(I16, words.type.count, 0xFF))
        return [even, builder.lshr(words, splat_constant(I16, words.type.count, 8))]

    def dot(self, builder, total, weights, activation):
        pairs = [builder.bitcast(v, vector(I16, 16)) for v in (weights, activation)]
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, *pairs))

    def step(self, builder, total, weights, activations):
        """total + (w0 + x1)(w1 + x0), 2 of them a lane: even columns w0, x0 are the first word, odd ones the second."""
        pairs = [builder.bitcast(v, vector(I16, 16)) for v in (*weights, *activations)]
        pairs = [builder.add(pairs[0], pairs[3]), builder.add(pairs[1], pairs[2])]
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, *pairs))

    def chain(self, bits):
        return super().chain(bits) // 2  # pmaddubsw adds pairs

    def prepare(self, builder, field, bits):
        if bits < 8:
            return field
        return call(builder, "llvm.abs.v32i8", field.type, field, ir.Constant(ir.IntType(1), 0)), field

    def multiply(self, builder, prepared, activation, bits):
        if bits == 8:
            prepared, field = prepared
            activation = call(builder, "llvm.x86.avx2.psign.b", field.type, activation, field)
        return call(builder, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), prepared, activation)

    def widen(self, builder, sums16, total, factor=1):
        factors = splat_constant(I16, 16, factor)
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), sums16, factors))

    def register_dots(self, builder, totals, fields, activations, bits, group):
        if bits < 8 or group:
            return super().register_dots(builder, totals, fields, activations, bits, group)
        # The sign of a weight cannot be moved to -128: the two halves of byte + 128 as fields of 4 bits each.
        biased = [builder.xor(field, splat_constant(I8, 32, 0x80)) for field in fields]
        fifteen = splat_constant(I8, 32, 15)
        halves = (
            [builder.and_(f, fifteen) for f in biased],
            [builder.lshr(f, splat_constant(I8, 32, 4)) for f in biased],
        )
        for part, factor in zip(halves, (1, 16), strict=True):
            for t, row in enumerate(activations):
                for first in range(0, len(part), self.chain(4)):
                    pairs = list(zip(part, row, strict=True))[first : first + self.chain(4)]
                    sums16 = self.multiply(builder, *pairs[0], 4)
                    for field, activation in pairs[1:]:
                        sums16 = builder.add(sums16, self.multiply(builder, field, activation, 4))
                    totals[t] = [self.widen(builder, sums16, totals[t][0], factor)]
        return totals

    def start(self, panels):
        return splat_constant(I32, 8, 0)

    def finish(self, builder, total):
        return total


class _DotProduct(Portable):
    """A set whose instruction adds 4 products to a 32-bit sum."""

    dwords = 1  # most dwords of activations that are loaded together

    def start(self, panels):
        return splat_constant(I32, 8 * panels, 0)

    def finish(self, builder, total):
        return total

    def step(self, builder, total, weights, activations):
        """As Avx2.step, but for one word each: the products themselves."""
        return self.dot(builder, total, weights[0], activations[0])

    def prepare(self, builder, field, bits):
        return field

    def unpacked(self, builder, field, bits):
        """32-bit words of a chunk, `columns` columns each, for `dot`."""
        return [self.prepare(builder, field, bits)]

    def dots(self, builder, totals, fields, rows, bits, group):
        """In the order that keeps the fewest values in registers: a dword of a token meets all chunks at once."""
        totals = [[list(sums) for sums in register] for register in totals]
        together = min(self.dwords, (group or 32) // 4)
        for d, chunks in enumerate(zip(*fields, strict=True)):
            weights = [self.prepare(builder, chunk, bits) for chunk in chunks]
            i, width = d % together, chunks[0].type.count // 32
            if i == 0:
                here = [at(builder, row, I32, I32(d)) for row in rows]
                activations = [self.activations(builder, pointer, together, width) for pointer in here]
            for t, row in enumerate(activations):
                for register, weight in zip(totals, weights, strict=True):
                    sums = register[t]
                    sums[d % len(sums)] = self.dot(builder, sums[d % len(sums)], weight, row[i])
        return totals


class AvxVnni(facts.AvxVnni, _DotProduct):
    def prepare(self, builder, field, bits):
        if bits < 8:
            return field
        return builder.xor(field, splat_constant(I8, field.type.count, 0x80))

    def dot(self, builder, total, weights, activation):
        lanes = total.type.count
        words = [builder.bitcast(v, total.type) for v in (weights, activation)]
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, *words)


class Avx512Vnni(facts.Avx512Vnni, AvxVnni):
    pass


class Neon(facts.Neon, Portable):
    def activations(self, builder, pointer, count, panels):
        """One 16-byte load for 4 dwords: the instructions take a lane of a register."""
        rows = []
        for block in range(count // 4):
            at = builder.gep(builder.bitcast(pointer, vector(I32, 4).as_pointer()), [ir.Constant(I32, block)])
            four = builder.load(at, align=1)
            rows += [builder.bitcast(shuffle(builder, four, four, [lane] * 4), vector(I8, 16)) for lane in range(4)]
        return rows

    def prepare(self, builder, field, bits):
        return halves(builder, field, 4)

    def multiply(self, builder, prepared, activation, bits):
        dword = halves(builder, activation, 2)[0]
        wide = vector(I16, 8)
        return join(builder, [call(builder, "llvm.aarch64.neon.smull.v8i16", wide, p, dword) for p in prepared])

    def widen(self, builder, sums16, total):
        pairs = [
            call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), part)
            for part in halves(builder, sums16, 4)
        ]
        return builder.add(total, join(builder, pairs))


class NeonDotprod(facts.NeonDotprod, _DotProduct):
    dwords = 8
    activations = Neon.activations

    def prepare(self, builder, field, bits):
        return halves(builder, field, 2)

    def dot(self, builder, total, weights, activation):
        four = vector(I32, 4)
        parts = [
            call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, t, w, activation)
            for t, w in zip(halves(builder, total, 2), weights, strict=True)
        ]
        return join(builder, parts)


SETS = {s.name: s for s in (Avx512Vnni(), AvxVnni(), Avx2(), NeonDotprod(), Neon(), Portable())}
"""Every instruction set, best first within an architecture."""
