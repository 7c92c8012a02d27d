"""Products with packed matrices against the NumPy oracle: every layout and instruction set this CPU has, odd sizes."""

import re

import numpy as np
import pytest

from edge_gemma import kernels
from edge_gemma.folder import layouts
from edge_gemma.kernels import isa
from edge_gemma.kernels.compiled.matrix.assembly import ARM_LINUX, assembly
from edge_gemma.kernels.compiled.matrix.ir import TileSpec
from edge_gemma.kernels.matrix.packed import PREFILL_FROM
from edge_gemma.model.linear import Activations, PanelMatrix
from tests.kernels.definitions import definitions
from tests.tolerance import assert_rounding

# bits, group, bits of a minimum; with one, those of GGUF's Q2_K, Q3_K, Q4_K, Q4_1 and Q5_K
SCALES = 4  # roundings of a product beside its sums: activation scale, weight scale and minimum, the result
MINIMA = [(2, 16, 4), (4, 16, 8), (4, 32, 8), (4, 32, 16), (8, 32, 8)]
LAYOUTS = [*((bits, group, 0) for bits in layouts.BITS for group in layouts.GROUPS), *MINIMA]


@pytest.fixture(scope="module", autouse=True)
def _restore():
    yield
    kernels.set_threads(None)
    kernels.set_variant(None)


@pytest.fixture(params=kernels.available_variants())
def variant(request):
    kernels.set_variant(request.param)
    bits, group, minimum, per_group = map(request.node.callspec.params.get, ("bits", "group", "minimum", "per_group"))
    if request.param != kernels.available_variants()[0]:
        if bits != 4 and not minimum and (group == 16 or per_group):
            pytest.skip("groups of 16 and scales of a group are the same code for every width: 4 bits stand for all")
        if minimum and (per_group is False or minimum == 16 or (bits, group) == (4, 16)):
            pytest.skip("minima are the same code for every set: some stand for all")
    return request.param


def ends(bits, minimum):
    """The least and the largest integer: with a minimum bytes have no sign."""
    return (0, 127) if minimum and bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def scales_of(pairs, factors, group, minimum):
    """w_scale and factors as the kernels take them."""
    if minimum:
        return layouts.pack_words(pairs, group, minimum), layouts.pack_factors(factors).view(np.uint16)
    scales = layouts.pack_scales(pairs[..., 0], group)
    return scales.view(np.uint16) if group else scales, None


class Case:
    """A random matrix product in one layout; x [n, k], w [rows, k]."""

    def __init__(self, n, rows, k, bits, group, minimum=0, per_group=False, seed=0):
        rng = np.random.default_rng(seed)
        self.bits, self.group, self.minimum, self.rows = bits, group, minimum, rows
        w = rng.integers(*ends(bits, minimum), (rows, k), endpoint=True).astype(np.int8)
        groups = layouts.group_count(k, group)
        self.packed = layouts.pack_panels(w, bits)
        pairs = rng.uniform(0.5, 1.5, (rows, groups, 2)) / 100
        if minimum in (4, 8):
            pairs = rng.integers(0, 1 << minimum, pairs.shape).astype(np.uint8)
        factors = rng.uniform(0.5, 1.5, (rows, layouts.factors_shape(rows, k, minimum)[1], 2)) / 100
        self.scales, self.factors = scales_of(pairs, factors, group, minimum)
        self.packed.flags.writeable = self.scales.flags.writeable = False
        self.x = rng.standard_normal((n, k)).astype(np.float32)
        self.q = np.empty((n, layouts.padded_k(k)), np.int8)
        self.a_scale = np.empty((n, groups if per_group else 1), np.float32)
        self.sums = np.empty((n, groups), np.int32)
        definitions.quantize_activations(self.x, group, self.q, self.a_scale, self.sums)
        self.terms = groups * (2 if minimum else 1)  # float32 terms of a product; integers are summed exactly

    def run(self, module=kernels, rows=slice(None)):
        """float32 [n, rows]; what the padding rows of the last panel come to is nobody's business."""
        out = np.full((len(self.q[rows]), 8 * len(self.packed)), np.nan, np.float32)
        args = self.q[rows], self.a_scale[rows], self.sums[rows], self.packed, self.scales
        module.matmul(*args, self.bits, self.group, out, self.factors)
        return out[:, : self.rows]


@pytest.mark.parametrize(("bits", "group", "minimum"), LAYOUTS)
@pytest.mark.parametrize("per_group", [False, True])
def test_matmul_is_the_oracle(variant, bits, group, minimum, per_group):
    small = [(8, 32, 1), (13, 100, 3), (40, 96, 4), (67, 224, 5), (24, 544, 17), (9, 1056, 1), (1, 7, 2)]
    many = [(8, 32, 24), (67, 1056, 29), (187, 96, 26), (13, 544, 300)]  # through kernels/matrix/prefill.py
    for rows, k, n in [*small, (136, 64, 1), (187, 96, 2), *many]:
        case = Case(n, rows, k, bits, group, minimum, per_group)
        assert_rounding(case.run(), case.run(definitions), [case.terms + SCALES], f"{variant} {rows}x{k} n={n}")


@pytest.mark.parametrize(("bits", "group", "minimum"), LAYOUTS)
def test_matmul_integers_are_exact_at_the_extremes(variant, bits, group, minimum):
    """All activations at +-127 and all weights at their ends: int16 intermediate sums must not overflow."""
    k, groups = 2048, layouts.group_count(2048, group)
    w = np.repeat(np.array([[v] for v in ends(bits, minimum)], np.int8), k, 1).repeat(5, 0)
    one, factor = np.ones((10, groups, 2), np.uint8), np.ones((10, layouts.factors_shape(10, k, minimum)[1], 2))
    scales, factors = scales_of(one, factor, group, minimum)
    packed = layouts.pack_panels(w, bits)
    value = w[:, 0].astype(np.float64) + (layouts.zero_point(bits) - 1 if minimum else 0)
    for a in (127, -127) if group else (127, -127, -128):
        for n in (5, PREFILL_FROM):
            q = np.full((n, k), a, np.int8)
            sums = q.reshape(n, groups, -1).sum(2, dtype=np.int32)
            out = np.empty((n, 16), np.float32)
            a_scale = np.ones((n, groups if minimum else 1), np.float32)
            kernels.matmul(q, a_scale, sums, packed, scales, bits, group, out, factors)
            assert np.array_equal(out[:, :10], np.broadcast_to(a * value * k, (n, 10)))


def test_sums_that_wrap_on_the_way_are_exact(variant):
    """32768 columns of the largest values: products of sums of two columns (prefill.py) go beyond 2^31, their rest not.

    Neighbours differ, so that even and odd columns cannot be exchanged unnoticed.
    """
    n, k = PREFILL_FROM, 32768
    w, x = np.full((9, k), 127, np.int8), np.full((n, k), 127, np.int8)
    w[3, ::4], w[5, 1::4], w[7] = -128, 17, -128
    x[2, 1::2], x[4, 2::4], x[6] = 96, -3, -128
    packed, scales = layouts.pack_panels(w, 8), layouts.pack_scales(np.ones((9, 1)), 0)
    out, sums = np.empty((n, 16), np.float32), x.sum(1, dtype=np.int32, keepdims=True)
    kernels.matmul(x, np.ones((n, 1), np.float32), sums, packed, scales, 8, 0, out)
    assert np.array_equal(out[:, :9], (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32))


@pytest.mark.parametrize(("bits", "group", "minimum"), LAYOUTS)
def test_a_row_is_the_same_in_every_tile_and_for_every_thread_count(variant, bits, group, minimum):
    case = Case(61, 67, 1056, bits, group, minimum, per_group=minimum != 0)
    whole = case.run()
    for rows in (slice(0, 1), slice(3, 7), slice(5, 11), slice(12, 17), slice(44, 61), slice(7, 58)):
        assert np.array_equal(case.run(rows=rows), whole[rows]), f"{variant} {rows}"
    kernels.set_threads(1)
    try:
        assert np.array_equal(case.run(), whole)
    finally:
        kernels.set_threads(None)


def test_a_slice_of_panels_is_a_matrix(variant):
    for minimum in (0, 8):
        case = Case(3, 80, 288, 4, 32, minimum, per_group=True)
        out = np.empty((3, 24), np.float32)
        factors = None if case.factors is None else case.factors[2:5]
        kernels.matmul(case.q, case.a_scale, case.sums, case.packed[2:5], case.scales[2:5], 4, 32, out, factors)
        assert np.array_equal(out, case.run()[:, 16:40])


@pytest.mark.parametrize(("bits", "group", "minimum"), MINIMA)
def test_a_matrix_with_minima_is_its_float_values(bits, group, minimum):
    """Through PanelMatrix: products of whole numbers, a run of rows, and rows by number."""
    case = Case(3, 40, 352, bits, group, minimum)
    matrix = PanelMatrix(case.packed, case.scales, (40, 352), bits, group, factors=case.factors)
    w = matrix.gather(np.arange(40))
    x = np.random.default_rng(1).integers(-127, 128, (3, 352)).astype(np.float32)
    x[:, ::16] = 127  # so that int8 holds them as they are
    assert_rounding(matrix(Activations(x)), x.astype(np.float64) @ w.T.astype(np.float64), [case.terms + SCALES])
    assert np.array_equal(matrix(Activations(x), start=8, stop=29), matrix(Activations(x))[:, 8:29])
    pairs = layouts.unpack_words(case.scales, case.factors.view(np.float16), group, 40)
    fields = layouts.unpack_panels(case.packed, bits, 40, 352).astype(np.float32) + layouts.zero_point(bits)
    scale, lowest = np.moveaxis(layouts.scales_and_minima(*pairs, group), 2, 0).repeat(group, axis=2)[:, :, :352]
    assert np.array_equal(w, scale * fields - lowest)
    assert len(np.unique(w)) > 300


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("group", layouts.GROUPS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 33), (5, 100), (1, 1536), (70, 520)])
def test_quantize_activations_is_the_oracle_bit_for_bit(n, k, group, per_group):
    x = np.random.default_rng(k).standard_normal((n, k)).astype(np.float32) * 3
    x[0, : k // 2] = 0
    x[-1] *= np.float32(1e-33)
    groups = layouts.group_count(k, group)

    def run(module):
        q = np.full((n, layouts.padded_k(k)), 99, np.int8)
        scale, sums = np.empty((n, groups if per_group else 1), np.float32), np.empty((n, groups), np.int32)
        module.quantize_activations(x, group, q, scale, sums)
        return q, scale, sums

    for name, got, expected in zip(("q", "scale", "sums"), run(kernels), run(definitions), strict=True):
        assert np.array_equal(got, expected), name


def test_quantize_rounds_half_to_even_and_survives_anything():
    x = np.zeros((4, 32), np.float32)
    x[0, :5] = 127, 0.5, 1.5, -2.5, -127
    x[1, 3], x[2, 3] = np.nan, -np.inf
    q, scale, sums = np.empty((4, 32), np.int8), np.empty((4, 1), np.float32), np.empty((4, 1), np.int32)
    kernels.quantize_activations(x, 0, q, scale, sums)
    assert q[0, :5].tolist() == [127, 0, 2, -2, -127]
    assert not q[1:].any()
    assert not sums[1:].any()
    assert np.isnan(scale[1:3]).all()
    assert scale[3] == 0


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 33), (5, 100), (70, 520)])
def test_static_scales_are_the_oracle_bit_for_bit(n, k):
    """Halves of a step, both ends, infinities, and a row with a NaN."""
    rng = np.random.default_rng(k)
    step = np.float32(0.037)
    x = (rng.integers(-300, 300, (n, k)) * np.float32(0.5) * step).astype(np.float32)
    x[0, 0] = np.inf
    x[-1, -1] = -np.inf if n == 1 else np.nan

    def run(module):
        q = np.full((n, layouts.padded_k(k)), 99, np.int8)
        scale, sums = np.empty((n, 1), np.float32), np.empty((n, 1), np.int32)
        module.quantize_static(x, float(step), q, scale, sums)
        return q, scale, sums

    for name, got, expected in zip(("q", "scale", "sums"), run(kernels), run(definitions), strict=True):
        assert np.array_equal(got, expected, equal_nan=True), name


@pytest.mark.parametrize("bits", layouts.BITS)
def test_matrices_with_static_scales(variant, bits):
    """All of x at the lower end and beyond: -128 steps, which bytes take in two parts."""
    rng = np.random.default_rng(bits)
    n, rows, k, step, out_step = 3, 19, 300, 0.05, 0.25
    w = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, rows).astype(np.float32) / 8
    x = rng.standard_normal((n, k)).astype(np.float32) * 4
    x[1, ::2] = -6.4
    x[2] = -100
    packed = layouts.pack_panels(w, bits), layouts.pack_scales(scales, 0)
    y = np.clip(np.rint(x / np.float32(step)), -128, 127) * step @ (w * scales[:, None]).astype(np.float64).T
    exact = PanelMatrix(*packed, w.shape, bits, 0, step)(Activations(x))
    assert_rounding(exact, y, [SCALES], variant)
    some = PanelMatrix(*packed, w.shape, bits, 0, step)(Activations(x), start=8, stop=17)
    assert_rounding(some, y[:, 8:17], [SCALES], variant)
    rounded = PanelMatrix(*packed, w.shape, bits, 0, step, out_step)(Activations(x))
    assert np.array_equal(rounded, np.clip(np.rint(exact / np.float32(out_step)), -128, 127) * np.float32(out_step))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, PREFILL_FROM, 29, 300])
@pytest.mark.parametrize("bits", layouts.BITS)
def test_results_in_steps_are_the_results_rounded(variant, bits, n):
    """Of panels and rows that two tiles write too; halves of a step, both ends, NaN."""
    rng = np.random.default_rng(n)
    rows, k, step = 187, 96, 0.125
    w = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k)).astype(np.int8)
    scales = (2.0 ** -rng.integers(3, 9, rows)).astype(np.float32)
    matrix = layouts.pack_panels(w, bits), layouts.pack_scales(scales, 0), w.shape, bits, 0, 0.25
    x = rng.integers(-40, 40, (n, k)).astype(np.float32) / 4
    x[n // 2, 5] = np.nan
    plain, rounded = (PanelMatrix(*matrix, out)(Activations(x)) for out in (0.0, step))
    expected = np.clip(np.rint(plain / np.float32(step)), -128, 127) * np.float32(step)
    assert np.array_equal(rounded, expected, equal_nan=True)
    assert np.isnan(rounded[n // 2]).all()
    ends = np.abs(plain[np.isfinite(plain)]) / step
    assert n == 1 or (ends > 128).any()
    assert n == 1 or (ends % 1 == 0.5).any()


def test_wrong_arguments_never_reach_native_code():
    case = Case(2, 16, 64, 4, 32, 8)
    good = [case.q, case.a_scale, case.sums, case.packed, case.scales, 4, 32, np.empty((2, 16), np.float32)]
    good.append(case.factors)
    replacements = [
        (0, case.q[:1]),
        (0, case.q[:, ::2]),
        (1, case.a_scale.astype(np.float64)),
        (3, case.packed[:1]),
        (4, case.scales.view(np.float16)),
        (4, case.scales.astype(np.uint32)),
        (5, 2),
        (6, 16),
        (8, case.factors[1:]),
        (8, case.factors[:, :, :1]),
        (8, case.factors.view(np.float16)),
        (7, np.empty((2, 15), np.float32)),
        (7, np.empty((16, 2), np.float32).T),
    ]
    for index, wrong in replacements:
        with pytest.raises(ValueError, match="arguments do not fit"):
            kernels.matmul(*good[:index], wrong, *good[index + 1 :])


@pytest.mark.parametrize(("cpu", "name"), [("cortex-a76", "neon-dotprod"), ("cortex-a72", "neon")])
@pytest.mark.parametrize(("bits", "group", "minimum"), LAYOUTS)
def test_arm_tiles_use_their_instructions(cpu, name, bits, group, minimum):
    """A Pi 5's tile is made of sdot by element, a Pi 4's of smull and smlal; they hardly spill."""
    spec = TileSpec(name, bits, group, minimum != 0, isa.SETS[name].tokens(group != 0), 1, minimum)
    text = assembly(spec, ARM_LINUX, cpu)
    by_element = re.findall(r"\tsdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", text)
    assert len(by_element) == (spec.tokens * (group or 32) // 2 if name == "neon-dotprod" else 0)
    pairs = bits < 8 or group  # bytes times -128 leave no room for a second product in 16 bits
    assert ("smlal" in text) == (name == "neon" and bool(pairs))
    assert ("smull" in text) == (name == "neon")
    assert "\n\tbl\t" not in text  # no library calls
    if bits < 8 or name == "neon-dotprod":
        inner = max(re.split(r"\n(?=\.LBB\S+:)", text), key=len)
        assert len(re.findall(r"\tst[rp]\tq\d+.*\[sp", inner)) <= (4 if minimum else 2)
