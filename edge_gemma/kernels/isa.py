"""Instruction sets for the matrix kernels: which this CPU has, and what a kernel's loops must know about each.

Owns: feature tests, and the facts of every set: the sizes of its registers, how many running sums they hold, how it
reads stored weights. Does not know: the instructions themselves (compiled/isa.py), tiles, loops, scales.

A register of running sums has a 32-bit sum for each of 8 rows (a panel), or of 16: two panels side by side.
"""

from edge_gemma.kernels.targets import ARM


class Portable:
    """Plain vector operations, which every CPU has in some form."""

    name = "portable"
    panels = 1  # panels side by side in a register
    streams = 1  # panels that a single token's tile reads at the same time
    sums = 2  # registers of running sums (8 or 16 rows of a token each) that a tile of several tokens keeps
    unsigned_bytes = False  # a step takes any unsigned byte as a weight
    accumulators = 1  # independent sums that hide the latency of a step
    float_lanes = 4  # float32 in a register
    float_sums = 8  # registers of running sums that attention keeps
    float_tile = 4, 2  # rows, and registers of columns, of a float32 product of two matrices
    columns = 4  # columns in a 32-bit word of unpacked weights (compiled/matrix/prefill.py)

    @staticmethod
    def supported(features):
        return True

    @staticmethod
    def tokens(grouped):
        """Most tokens of a tile: as many as leave the accumulators in registers."""
        return 2

    def tile_panels(self, tokens, grouped):
        """Panels of a tile of so many tokens. Groups take a register more for each of running sums."""
        if tokens == 1:
            return self.streams
        registers = min(4 // self.panels, self.sums // (tokens * (1 + grouped)))
        return self.panels * max(1, registers)

    @staticmethod
    def block(bits, group) -> tuple[int, int] | None:
        """(tokens, registers of rows) of a tile over unpacked weights (matrix/prefill.py); None: not in this set."""

    def zero_point(self, bits, group):
        """What the stored field exceeds the weight by, as this set reads it."""
        return 0 if bits == 8 else 1 << (bits - 1)


class Avx2(Portable):
    name = "avx2"
    streams = 4
    sums = 8
    float_lanes = 8
    float_tile = 6, 2
    columns = 2

    @staticmethod
    def supported(features):
        return {"avx2", "fma", "f16c"} <= features

    @staticmethod
    def tokens(grouped):
        return 4

    @staticmethod
    def block(bits, group):
        return (4, 2) if bits == 8 and not group else None

    def zero_point(self, bits, group):
        return 128 if bits == 8 and not group else super().zero_point(bits, group)


class AvxVnni(Portable):
    name = "avx-vnni"
    streams = 4
    sums = 8
    unsigned_bytes = True
    accumulators = 8
    float_lanes = 8
    float_tile = 6, 2

    @staticmethod
    def supported(features):
        vnni = "avxvnni" in features or {"avx512vnni", "avx512vl"} <= features
        return vnni and {"avx2", "fma", "f16c"} <= features

    @staticmethod
    def tokens(grouped):
        return 4

    @staticmethod
    def block(bits, group):
        return (4, 1) if group else (4, 2)

    def zero_point(self, bits, group):
        return 1 << (bits - 1)


class Avx512Vnni(AvxVnni):
    name = "avx512-vnni"
    panels = 2
    streams = 4
    sums = 16
    float_lanes = 16
    float_sums = 16
    float_tile = 6, 4

    @staticmethod
    def supported(features):
        return {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"} <= features

    @staticmethod
    def tokens(grouped):
        return 8

    @staticmethod
    def block(bits, group):
        return (6, 2) if group else (8, 3)


class Neon(Portable):
    name = "neon"
    float_sums = 16
    float_tile = 6, 4

    @staticmethod
    def supported(features):
        return True  # every AArch64 CPU

    @staticmethod
    def tokens(grouped):
        return 2


class NeonDotprod(Portable):
    name = "neon-dotprod"
    accumulators = 4
    float_sums = 16
    float_tile = 6, 4

    @staticmethod
    def supported(features):
        return "dotprod" in features

    @staticmethod
    def tokens(grouped):
        return 4 if grouped else 8


SETS = {s.name: s for s in (Avx512Vnni(), AvxVnni(), Avx2(), NeonDotprod(), Neon(), Portable())}
"""Every instruction set, best first within an architecture."""


def available(features: frozenset[str]) -> tuple[str, ...]:
    """Names of the sets that a processor of this architecture with such features (targets.py) can run, best first."""
    return tuple(n for n, s in SETS.items() if s.supported(features) and (n == "portable" or ("neon" in n) == ARM))
