"""Every kernel against its definition, at odd sizes, called and repeated as a program.

The arguments are made from what a kernel says it expects ("x, out float32 [n, d]; weight float32 [d]"), so that a new
kernel whose arrays are float32 is tested as soon as it is written. The others are tested by name elsewhere.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from edge_gemma import kernels
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.registry import Expected, Kernel, registered
from tests.tolerance import assert_rounding

# Kernels with other arrays than float32, and the file that tests them.
ELSEWHERE = {
    "attention": "test_kernels", "block_maxima": "test_kernels", "dequantize_records": "../model/test_rows",
    "exp_sums": "test_kernels", "full_attention": "test_kernels", "gather_panels": "../model/test_rows",
    "matmul": "test_matmul", "matmul_bfloat16": "test_kernels", "quantize_activations": "test_matmul",
    "quantize_static": "test_matmul", "store_kv": "test_kernels",
}  # fmt: skip
SIZES = [
    {"n": 1, "d": 1, "k": 1, "rows": 1, "heads": 1, "hd": 2, "layers": 1},
    {"n": 1, "d": 9001, "k": 1536, "rows": 131, "heads": 8, "hd": 256, "layers": 3},
    {"n": 3, "d": 67, "k": 33, "rows": 7, "heads": 5, "hd": 12, "layers": 5},
    {"n": 41, "d": 1536, "k": 256, "rows": 66, "heads": 3, "hd": 64, "layers": 2},
]
SCALAR = 0.75  # eps, a factor, a cap, a step
FLOATS = [name for name in registered if name not in ELSEWHERE]


def arguments_of(made: Kernel[Any], size: dict[str, int]) -> list[Any]:
    """Arrays of the shapes that it expects, and SCALAR for what is no array."""
    rng, arrays = np.random.default_rng(7), {}
    for part in made.expected.split("; "):
        names, shape = re.fullmatch(r"([\w, ]+) float32 \[(.*)\](?: or None)?", part).groups()
        dimensions = [d.partition(" / ") for d in shape.replace("...", "n, d").split(", ")]
        lengths = [size[name] // int(divisor or 1) for name, _, divisor in dimensions]
        for name in names.split(", "):
            arrays[name] = (rng.standard_normal(lengths) * 3).astype(np.float32)
    return [arrays.get(name, SCALAR) for name in inspect.signature(made.definition).parameters]


def copies(arguments: list[Any]) -> list[Any]:
    return [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n']}x{size['d']}")
@pytest.mark.parametrize("name", FLOATS)
def test_a_kernel_is_its_definition(name: str, size: dict[str, int]) -> None:
    made = registered[name]
    got = arguments_of(made, size)
    before, expected = copies(got), copies(got)
    made(*got)
    made.definition(*expected)
    changed = False
    for mine, theirs, old in zip(got, expected, before, strict=True):
        if isinstance(mine, np.ndarray):
            assert_rounding(mine, theirs, [max(size.values())], name)
            changed |= not np.array_equal(mine, old)
    assert changed  # a kernel that does nothing is not tested


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n']}x{size['d']}")
@pytest.mark.parametrize("name", FLOATS)
def test_a_recorded_call_is_the_call_bit_for_bit(name: str, size: dict[str, int]) -> None:
    made = registered[name]
    arguments = arguments_of(made, size)
    before = copies(arguments)
    made(*arguments)
    called = copies(arguments)
    for now, old in zip(arguments, before, strict=True):
        if isinstance(now, np.ndarray):
            now[...] = old
    with program.record() as recorder:
        made(*arguments)
    for now, old in zip(arguments, before, strict=True):
        assert np.array_equal(now, old)  # nothing was done yet
    recorder.program().run()
    for now, direct in zip(arguments, called, strict=True):
        assert np.array_equal(now, direct)


@pytest.mark.parametrize("name", FLOATS)
def test_arrays_that_do_not_fit_are_refused_untouched(name: str) -> None:
    """Another dtype, another memory order, a column too many: each array in turn."""
    made = registered[name]
    spoil: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a.astype(np.float64),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.zeros((*a.shape[:-1], a.shape[-1] + 1), np.float32),
    ]
    whole = arguments_of(made, SIZES[2])
    arrays = [i for i, a in enumerate(whole) if isinstance(a, np.ndarray)]
    for at in arrays:
        for wrong in spoil[: 3 if len(arrays) > 1 else 2]:  # one array alone fits itself
            given = copies(whole)
            given[at] = wrong(given[at])
            old = copies(given)
            with pytest.raises(ValueError, match="arguments do not fit") as refused:
                made(*given)
            assert made.expected in str(refused.value)
            assert all(np.array_equal(a, b) for a, b in zip(given, old, strict=True))


def test_a_kernel_is_what_its_definition_says_and_editors_see() -> None:
    assert inspect.signature(kernels.add_rms_norm) == inspect.signature(kernels.add_rms_norm.definition)
    assert "rms_norm" in str(kernels.add_rms_norm.__doc__)
    assert set(ELSEWHERE) < set(registered)
    assert all(getattr(kernels, name) is made for name, made in registered.items())


def test_what_is_read_only_is_not_written() -> None:
    x = np.ones((2, 8), np.float32)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="arguments do not fit"):
        kernels.scale(x, 2.0)
    cache = np.zeros((4, 1, 8), np.float32)
    cache.flags.writeable = False
    with pytest.raises(ValueError, match="arguments do not fit"):
        kernels.store_kv(x[:, None], x[:, None], cache, cache, np.zeros(1, np.int64))
    out = np.empty_like(x)
    kernels.gelu_tanh_mul(x, x, out)
    assert out.all()


@given(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(["f4", "f8", "i4"]))
def test_what_is_expected_is_read_off_its_text(shape: list[int], dtype: str) -> None:
    expected = Expected("a thing: x, y float32 [n, 2]; w int32 [n or 1] or None; 3 bits", ["x", "w", "y", "bits"])
    array, fits = np.zeros(shape, dtype), (dtype, len(shape)) == ("f4", 2) and shape[1] == 2
    y = np.zeros((shape[0] if fits else 1, 2), np.float32)
    assert expected.are((array, None, y, 3)) == fits
    assert expected.are((y, np.zeros(7, np.int32), y))
    assert not expected.are((y, np.zeros(7, np.int64), y))
    assert not expected.are((np.zeros((len(y) + 1, 2), np.float32), None, y))
