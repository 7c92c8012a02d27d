"""Patches: transformers' own, recorded; sizes derived a second time; budgets."""

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.errors import PictureError, UsageError
from edge_gemma.vision.patches import BUDGETS, DETAIL, auto_budget, cut, size_for
from tests.make_vision_goldens import BUDGETS as RECORDED_BUDGETS
from tests.make_vision_goldens import CHOSEN, GOLDEN, digest, official_patches, pixels, sizes

PIL = pytest.importorskip("PIL", reason="the vision extra is not installed")

PILLOW = tuple(map(int, PIL.__version__.split(".")[:2]))
# Pillow 12.2 changed how it resizes some pictures, one in forty here, by up to 26 of 255: the reference's patches too.
as_recorded = pytest.mark.skipif(PILLOW < (12, 2), reason="Pillow 12.2 or later resizes as recorded")
SIDES = st.integers(1, 65_535) | st.integers(1, 300)


def recorded() -> dict[tuple[int, int, int], int]:
    """Digests by height, width and budget."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {
            (*size, budget): int(found)
            for size, row in zip(file["sizes"].tolist(), file["digests"], strict=True)
            for budget, found in zip(RECORDED_BUDGETS, row, strict=True)
        }


def differing(cases) -> list[tuple[int, int, int]]:
    """Which of (height, width, budget) do not give the recorded patches and positions."""
    expected, found = recorded(), []
    for height, width, budget in cases:
        patches = cut(pixels(height, width), budget)
        assert patches.values.dtype == np.uint8
        if digest(patches.values, patches.positions) != expected[height, width, budget]:
            found.append((height, width, budget))
    return found


def test_what_is_recorded() -> None:
    assert BUDGETS == RECORDED_BUDGETS
    assert set(recorded()) == {(*size, budget) for size in sizes() for budget in BUDGETS}
    assert len(sizes()) == 200


@as_recorded
def test_patches_are_the_reference_s() -> None:
    """The chosen sizes and some others, at the smallest budget; a few at the usual one."""
    assert not differing((*size, 70) for size in [*CHOSEN, *sizes()[::5]])
    assert not differing((*size, 280) for size in sizes()[::20])


@as_recorded
@pytest.mark.slow
def test_patches_are_the_reference_s_at_every_budget() -> None:
    assert not differing(recorded())


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_are_what_transformers_makes_now(budget: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for size in sizes():
        values, positions = official_patches(pixels(*size), budget)
        patches = cut(pixels(*size), budget)
        np.testing.assert_array_equal(patches.values, values, err_msg=str(size))
        np.testing.assert_array_equal(patches.positions, positions, err_msg=str(size))
        assert patches.tokens * 9 == len(values)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_sizes_are_what_transformers_computes() -> None:
    """All small sizes, all of one height, and random ones."""
    pytest.importorskip("torch")
    official = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    rng = random.Random(5)
    drawn = [(round(65_535 ** rng.random()), round(65_535 ** rng.random())) for _ in range(20_000)]
    drawn += [(height, width) for height in range(1, 200) for width in range(1, 200)]
    drawn += [(13, width) for width in range(1, 15_000)]  # to 1120 times as wide and beyond
    for budget in BUDGETS:
        for height, width in drawn:
            expected = official.get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
            assert size_for(height, width, budget) == expected, (height, width, budget)


@pytest.mark.parametrize(
    ("height", "width", "budget", "expected"),
    [
        (768, 1024, 280, (672, 912)),
        (896, 896, 280, (768, 768)),
        (896, 896, 70, (384, 384)),
        (896, 896, 1120, (1584, 1584)),
        (10, 10_000, 280, (48, 13_440)),
        (10_000, 10, 280, (13_440, 48)),
        (30, 12_000, 280, (48, 13_440)),
        (10, 2005, 280, (48, 11_328)),
        (1, 1, 70, (384, 384)),
        (205, 287, 560, (912, 1344)),  # 20 x 28 cells, but for the rounding of floats
    ],
)
def test_sizes_that_are_known(height: int, width: int, budget: int, expected: tuple[int, int]) -> None:
    assert size_for(height, width, budget) == expected


@settings(deadline=None, max_examples=500)
@given(SIDES, SIDES, st.sampled_from(BUDGETS))
@example(65_535, 1, 70)
@example(1, 65_535, 1120)
def test_sizes_fit_the_budget_and_keep_the_shape(height: int, width: int, budget: int) -> None:
    """Derived in whole numbers: f * height / 48 = sqrt(budget * height / width), so rows is its integer square root."""
    rows, columns = (side / 48 for side in size_for(height, width, budget))
    assert rows == int(rows) >= 1
    assert columns == int(columns) >= 1
    assert rows * columns <= budget
    assert size_for(width, height, budget) == (columns * 48, rows * 48)
    if budget * width >= height and budget * height >= width:
        assert is_root(rows, budget * height, width)
        assert is_root(columns, budget * width, height)
        assert abs(rows * width - columns * height) <= max(height, width)  # a cell off the picture's shape, at most
    else:
        assert min(rows, columns) == 1
        assert max(rows, columns) == min(max(height, width) // min(height, width), budget) == budget


def is_root(cells: float, number: int, divisor: int) -> bool:
    """Whether cells is the square root of number / divisor, rounded down. The reference gets one less at some squares,
    by the rounding of floats."""
    below, above = cells**2 * divisor, (cells + 1) ** 2 * divisor
    return below <= number < above or number == above


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0), (10**200, 10**200)])
def test_pictures_of_which_nothing_is_left(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="pixels"):
        size_for(*size, 280)


@pytest.mark.parametrize("budget", [0, 1, 281, -70, "280", None, 2240])
def test_budgets_that_are_none(budget) -> None:
    for call in (lambda: size_for(9, 9, budget), lambda: auto_budget(9, 9, budget), lambda: cut(pixels(9, 9), budget)):
        with pytest.raises(UsageError, match="expected 70, 140, 280, 560, 1120"):
            call()


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from(BUDGETS))
def test_the_automatic_budget_is_the_smallest_that_holds_the_picture(height: int, width: int, most: int) -> None:
    budget = auto_budget(height, width, most)
    assert budget in BUDGETS
    assert budget <= most
    assert budget == most or budget * 48 * 48 >= height * width
    assert all(smaller * 48 * 48 < height * width for smaller in BUDGETS if smaller < budget)


def test_the_automatic_budget_at_its_edges() -> None:
    assert auto_budget(480, 336) == 70  # 161,280 pixels: exactly 70 cells
    assert auto_budget(480, 337) == 140
    assert auto_budget(3000, 4000) == 280
    assert auto_budget(3000, 4000, 1120) == 1120
    assert auto_budget(1, 1, 70) == 70


def test_words_for_detail() -> None:
    assert DETAIL == {"low": 70, "auto": "auto", "high": 1120}


def test_the_order_of_patches_and_of_their_values() -> None:
    """By four loops, of a picture that is not resized."""
    picture = pixels(48, 3360)
    patches = cut(picture, 70)
    assert patches.values.shape == (630, 768)
    assert patches.tokens == 70
    assert patches.positions.dtype == np.int64
    for number, (values, (x, y)) in enumerate(zip(patches.values, patches.positions, strict=True)):
        assert number == y * 210 + x
        expected = [
            picture[16 * y + row, 16 * x + column, c] for row in range(16) for column in range(16) for c in (0, 1, 2)
        ]
        assert values.tolist() == expected


def test_the_picture_is_left_as_it_is() -> None:
    picture = pixels(48, 3360)
    before = picture.copy()
    cut(picture, 70).values[:] = 0
    assert np.array_equal(picture, before)
