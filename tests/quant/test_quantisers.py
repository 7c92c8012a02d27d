"""Rounding weights: searched scales, error feedback, and the calibration pass, each against what it claims."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_gemma import kernels
from edge_gemma.config import GemmaConfig
from edge_gemma.engine import Engine
from edge_gemma.errors import UsageError
from edge_gemma.export.convert import export_checkpoint
from edge_gemma.export.synth import TEXT_CONFIGS
from edge_gemma.folder import layouts
from edge_gemma.host.pool import Pool
from edge_gemma.quant import calibrate, feedback
from edge_gemma.quant.calibrate import bundled_text, calibration_ids, most_tokens, round_segments
from edge_gemma.quant.feedback import Curvature, round_with_feedback
from edge_gemma.quant.rtn import round_to_nearest
from edge_gemma.quant.search import Rounded, levels, lines_of, search_scales
from tests.tiny import KINDS, write_checkpoint

WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 80)), elements=st.floats(-9, 9, width=32))
FORMATS = [(bits, group) for bits in (2, 4) for group in (0, 16, 32)]
MINIMA = [(2, 16, 4), (4, 32, 8)]  # bits, group, bits of a minimum


def loss(weights: np.ndarray, rounded: Rounded, group: int, hessian: np.ndarray, bits: int = 0) -> float:
    """tr(E H E^T). bits: needed where there are minima."""
    errors = (weights - layouts.dequantize_rounded(*rounded, bits=bits, group=group)).astype(np.float64)
    return float(np.einsum("rk,kj,rj->", errors, hessian.astype(np.float64), errors))


def inputs(columns: int, seed: int = 0, rows: int = 512) -> np.ndarray:
    """Inputs as layers have them: columns that go together, a few of them large."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns // 2, columns)) * np.exp(rng.standard_normal(columns))
    return (rng.standard_normal((rows, columns // 2)) @ mixing + rng.standard_normal((rows, columns))).astype(
        np.float32
    )


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.sampled_from(FORMATS))
def test_searched_scales_lose_no_more_than_the_largest_weights(weights: np.ndarray, fmt: tuple[int, int]) -> None:
    bits, group = fmt
    identity = np.eye(weights.shape[1])
    values, scales = search_scales(weights, bits, group)
    assert values.dtype == np.int8
    assert (values >= -(1 << (bits - 1))).all()
    assert (values < 1 << (bits - 1)).all()
    assert np.isfinite(scales).all()
    plain = loss(weights, round_to_nearest(weights, bits, group), group, identity)
    # a scale is stored in 11 bits: off by 2^-12 of itself, and by 2^-25 at least
    slack = 2.0**-10 * float((weights.astype(np.float64) ** 2).sum()) * 2.0**-10 + weights.size * 2.0**-44
    assert loss(weights, (values, scales), group, identity) <= plain * 1.01 + slack


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_searched_scales_are_as_good_as_a_fine_grid(bits: int, group: int) -> None:
    weights = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    importance = np.exp(np.random.default_rng(2).standard_normal(64)).astype(np.float32)
    values, scales = search_scales(weights, bits, group, importance)
    low, high, width = -(1 << (bits - 1)), (1 << (bits - 1)) - 1, group or 64
    best = 0.0
    for row in weights:
        for start in range(0, 64, width):
            w, m = row[start : start + width].astype(np.float64), importance[start : start + width]
            tries = np.concatenate([np.linspace(0.02, 2, 4000), -np.linspace(0.02, 2, 4000)])[:, None]
            errors = (m * (w - tries * np.clip(np.rint(w / tries), low, high)) ** 2).sum(axis=1)
            best += errors.min()
    found = loss(weights, (values, scales), group, np.diag(importance))
    print(f"{bits} bits, groups of {group}: {found:.4f}, a grid of 8,000 scales {best:.4f}")
    assert best * 0.999 <= found <= best * 1.06


def test_rows_of_zeros_and_of_one_weight() -> None:
    weights = np.zeros((3, 32), np.float32)
    weights[1, 5], weights[2, 5] = 0.25, -0.25
    for bits, group, minimum in [(*fmt, 0) for fmt in FORMATS] + MINIMA:
        rounded = search_scales(weights, bits, group, minimum=minimum)
        values = layouts.dequantize_rounded(*rounded, bits=bits, group=group)
        np.testing.assert_allclose(values, weights, rtol=1e-3, atol=2.5e-4 if minimum else 0)  # no exact zero


def groups_with_minima(rounded: Rounded, bits: int, group: int) -> np.ndarray:
    """The float values of integers, scales, minima and factors, one weight at a time."""
    values, pairs, factors = rounded
    result = np.empty(values.shape, np.float64)
    for row, column in np.ndindex(*values.shape):
        (s, m), (d, e) = pairs[row, column // group].tolist(), factors[row, column // 256].tolist()
        result[row, column] = d * s * (int(values[row, column]) + (1 << (bits - 1))) - e * m
    return result


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.sampled_from(MINIMA))
def test_searched_minima_fit_their_format(weights: np.ndarray, fmt: tuple[int, int, int]) -> None:
    bits, group, minimum = fmt
    values, pairs, factors = rounded = search_scales(weights, bits, group, minimum=minimum)
    assert (values.dtype, pairs.dtype, factors.dtype) == (np.int8, np.uint8, np.float32)
    assert pairs.shape == (len(weights), -(-weights.shape[1] // group), 2)
    assert np.array_equal(factors, factors.astype(np.float16).astype(np.float32))
    packed = layouts.pack_panels(values, bits), layouts.pack_words(pairs, group, minimum), layouts.pack_factors(factors)
    back = layouts.unpack_words(*packed[1:], group, len(weights))
    assert np.array_equal(back[0][:, : pairs.shape[1]], pairs)
    assert np.array_equal(back[1], factors)
    restored = layouts.dequantize_panels(
        packed[0], packed[1], bits, group, np.arange(len(weights)), weights.shape[1], packed[2]
    )
    np.testing.assert_allclose(restored, groups_with_minima(rounded, bits, group), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "group", "minimum"), MINIMA)
@pytest.mark.parametrize("columns", [256, 320])
def test_searched_minima_are_as_good_as_a_fine_grid(bits: int, group: int, minimum: int, columns: int) -> None:
    """Of steps and lowest levels in float64, for each group; integers of 4 bits for those cost more than of 8."""
    weights = np.random.default_rng(1).standard_normal((2, columns)).astype(np.float32)
    importance = np.exp(np.random.default_rng(2).standard_normal(columns)).astype(np.float32)
    rounded = search_scales(weights, bits, group, importance, minimum)
    top, best = (1 << bits) - 1, 0.0
    for row in weights:
        for start in range(0, columns, group):
            w, m = row[start : start + group].astype(np.float64), importance[start : start + group]
            span = w.max() - w.min()
            steps, lowest = np.meshgrid(
                span / top * np.linspace(0.4, 1.05, 60), w.min() + span * np.linspace(-0.1, 0.6, 80)
            )
            steps, lowest = steps.reshape(-1, 1), np.minimum(lowest, 0).reshape(-1, 1)
            errors = m * (w - lowest - steps * np.clip(np.rint((w - lowest) / steps), 0, top)) ** 2
            best += errors.sum(axis=1).min()
    found = loss(weights, rounded, group, np.diag(importance), bits)
    print(f"{bits} bits, minima of {minimum}: {found:.4f}, a grid of 4,800 pairs {best:.4f}")
    assert best * 0.97 <= found <= best * (1.1 if minimum == 4 else 1.05)


def test_groups_all_above_or_below_zero() -> None:
    """A minimum has no sign: weights all above zero are rounded from zero up."""
    weights = np.random.default_rng(3).uniform(2, 3, (2, 64)).astype(np.float32)
    weights[1] *= -1
    for bits, group, minimum in MINIMA:
        values, pairs, factors = search_scales(weights, bits, group, minimum=minimum)
        assert not pairs[0, :, 1].any()
        assert pairs[1, :, 1].all()
        errors = weights - groups_with_minima((values, pairs, factors), bits, group)
        assert np.abs(errors[0]).max() < 0.6
        assert np.abs(errors[1]).max() < 0.3


def test_eight_bits_are_rounded_to_nearest() -> None:
    weights = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    for mine, plain in zip(search_scales(weights, 8, 32), round_to_nearest(weights, 8, 32), strict=True):
        assert np.array_equal(mine, plain)


def feedback_one_by_one(weights: np.ndarray, hessian: np.ndarray, lines: np.ndarray, ends: tuple[int, int], group: int):
    """Columns in order; each time the rest of the quadratic is solved exactly for what the column should be.

    With E fixed for the columns before i and free after, the loss is least in column i at
    E_i = -(S_i,<i E_<i) / S_ii, S the Schur complement of H that eliminates the columns after i.
    """
    columns = len(hessian)
    errors, values = np.zeros(weights.shape), np.zeros(weights.shape, np.int8)
    for i in range(columns):
        rest = slice(i + 1, columns)
        s = hessian[: i + 1, : i + 1].copy()
        if i + 1 < columns:
            s -= hessian[: i + 1, rest] @ np.linalg.solve(hessian[rest, rest], hessian[rest, : i + 1])
        wanted = weights[:, i] + errors[:, :i] @ s[:i, i] / s[i, i]
        scale, minimum = lines[:, i // group, 0], lines[:, i // group, 1]
        q = np.clip(np.rint((wanted + minimum) / scale), *ends)
        values[:, i], errors[:, i] = q, weights[:, i] - q * scale + minimum
    return values


@pytest.mark.parametrize(("bits", "minimum"), [(2, 0), (4, 0), (2, 4)])
@pytest.mark.parametrize("columns", [64, 80])
def test_feedback_is_the_exact_greedy_choice(bits: int, minimum: int, columns: int) -> None:
    x, rng = inputs(columns), np.random.default_rng(3)
    weights = rng.standard_normal((8, columns)).astype(np.float32)
    curvature = Curvature.of(x.T @ x)
    values, *scales = round_with_feedback(weights, curvature, bits, 16, sweeps=0, minimum=minimum)
    lines, ends = lines_of(scales, 16).astype(np.float64), levels(bits, minimum)
    expected = feedback_one_by_one(weights, curvature.hessian.astype(np.float64), lines, ends, 16)
    same = (values + (2 if minimum else 0) == expected).mean(axis=1)
    print(f"{bits} bits: rows that agree {np.count_nonzero(same == 1)} of 8")
    assert np.count_nonzero(same == 1) >= 7  # float32 may tip a tie, and all of the row after it


@pytest.mark.parametrize(("bits", "group", "minimum"), [(*fmt, 0) for fmt in FORMATS] + MINIMA)
def test_feedback_loses_less_and_sweeps_never_more(bits: int, group: int, minimum: int) -> None:
    x = inputs(96)
    hessian = x.T @ x
    weights = np.random.default_rng(4).standard_normal((16, 96)).astype(np.float32)
    curvature = Curvature.of(hessian)

    def lost(rounded: Rounded) -> float:
        return loss(weights, rounded, group, curvature.hessian, bits)

    plain = lost(search_scales(weights, bits, group, minimum=minimum))
    losses = [lost(round_with_feedback(weights, curvature, bits, group, sweeps, minimum)) for sweeps in (0, 1, 2, 5)]
    print(f"{bits} bits, groups of {group}: searched {plain:.3f}, feedback and sweeps {np.round(losses, 3)}")
    assert losses[0] < 0.8 * plain
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(losses))
    assert losses[2] < 0.95 * losses[0]


def test_the_shift_brings_products_back_to_what_they_were() -> None:
    """Half way to the ridge regression of the float model's products on the inputs that are there."""
    x, rng = inputs(48), np.random.default_rng(7)
    z = x @ (np.eye(48) + 0.1 * rng.standard_normal((48, 48))).astype(np.float32)
    weights = rng.standard_normal((5, 48)).astype(np.float32)
    curvature = Curvature.of(x.T @ x, (z - x).T @ x)
    assert curvature.shift is not None
    mean = float((x**2).sum()) / 48
    penalty = np.sqrt((feedback._DAMPING + feedback._RIDGE) * mean) * np.eye(48)
    target = np.concatenate([z @ weights.T, penalty @ weights.T])
    best = np.linalg.lstsq(np.concatenate([x, penalty]).astype(np.float64), target.astype(np.float64))[0].T
    found = weights + weights @ curvature.shift / np.float32(feedback._UNDO)
    np.testing.assert_allclose(found, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "group", "minimum"), [(4, 32, 0), (2, 16, 4)])
def test_inputs_beyond_a_segment_are_rounded_by_themselves(bits: int, group: int, minimum: int) -> None:
    x, weights = inputs(352), np.random.default_rng(5).standard_normal((8, 352)).astype(np.float32)
    segments = slice(256), slice(256, 352)
    curvatures = [Curvature.of(x[:, columns].T @ x[:, columns]) for columns in segments]
    rounded = round_segments(weights, curvatures, bits, group, minimum)
    alone = [
        round_with_feedback(weights[:, columns], curvature, bits, group, minimum=minimum)
        for columns, curvature in zip(segments, curvatures, strict=True)
    ]
    for whole, *parts in zip(rounded, *alone, strict=True):
        assert np.array_equal(whole, np.concatenate(parts, axis=1))
    both = [layouts.dequantize_rounded(*part, bits=bits, group=group) for part in alone]
    assert np.array_equal(layouts.dequantize_rounded(*rounded, bits=bits, group=group), np.concatenate(both, axis=1))


def test_inputs_that_were_never_seen_round_as_without_a_text() -> None:
    weights = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    curvature = Curvature.of(np.zeros((64, 64), np.float32))
    rounded = round_with_feedback(weights, curvature, 4, 32)
    assert (
        loss(weights, rounded, 32, np.eye(64)) <= loss(weights, search_scales(weights, 4, 32), 32, np.eye(64)) * 1.001
    )


TEXT = bundled_text()


def hidden_error(folder: Path, reference: Path) -> float:
    """Relative error of what enters the head, on another text than the one calibrated with."""
    rows = []
    for path in (folder, reference):
        with Engine.load(path) as engine:
            ids = engine.tokenizer.encode(TEXT[-2000:])[-200:]
            rows.append(engine.session(256).hidden([engine.tokenizer.bos_id, *ids]))
    return float(np.linalg.norm(rows[0] - rows[1]) / np.linalg.norm(rows[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_model_is_nearer_to_the_float_one(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path / "in", kind)
    reference = export_checkpoint(tmp_path / "in", tmp_path / "float", "float")
    searched = hidden_error(export_checkpoint(tmp_path / "in", tmp_path / "searched", "q4"), reference)
    folder = export_checkpoint(tmp_path / "in", tmp_path / "calibrated", "q4", calibration=TEXT)
    calibrated = hidden_error(folder, reference)
    print(f"{kind}: searched {searched:.4f}, calibrated {calibrated:.4f}")
    assert calibrated < searched


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_does_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in", "e2b")
    folders = []
    try:
        for threads in (1, 2):
            kernels.set_threads(threads)
            monkeypatch.setattr("edge_gemma.export.convert.Pool", partial(Pool, threads))
            dest = tmp_path / str(threads)
            folders.append(contents(export_checkpoint(tmp_path / "in", dest, "q2mix", calibration=TEXT)))
    finally:
        kernels.set_threads(None)
    assert folders[0] == folders[1]


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gemma3")
    for text in ("", "too short"):
        with pytest.raises(UsageError, match=r"the calibration text has .* tokens, expected 256 or more"):
            export_checkpoint(tmp_path / "in", tmp_path / "out", "q4", calibration=text)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_text_that_comes_along_is_small_and_long_enough(tmp_path: Path) -> None:
    assert len(bundled_text().encode()) < 50_000
    write_checkpoint(tmp_path / "in", "gemma3")
    with Engine.load(export_checkpoint(tmp_path / "in", tmp_path / "out", "q8")) as engine:
        ids = calibration_ids(engine.tokenizer, bundled_text(), engine.config)
    assert ids[0] == engine.tokenizer.bos_id
    assert len(ids) == engine.config.max_position_embeddings == 1024


def test_as_many_tokens_as_memory_allows() -> None:
    most = {size: most_tokens(GemmaConfig.from_text_config(TEXT_CONFIGS[size])) for size in ("e2b", "e4b", "tiny")}
    assert most == {"e2b": 3833, "e4b": 3597, "tiny": calibrate.TOKENS}
