"""The look-up of n-grams against a naive scan of the whole text, and texts that are copied with changes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_gemma.generation.lookup import LONGEST, MOST_PLACES, Lookup, Match

LETTERS = st.lists(st.integers(0, 3), max_size=80)


def naive(text):
    """(index of the next token, length) by looking at every place: None if the last two tokens are nowhere else."""
    found = []
    for end in range(2, len(text)):  # a place ends before `end`
        length = 0
        while length < min(end, LONGEST) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length >= 2:
            found.append((length, end))
    return max(found[-MOST_PLACES:], default=None)


def repeated(text, start, most):
    """Text from `start` on, which begins anew at its end."""
    period = len(text) - start
    return [text[start + i % period] for i in range(most)]


@given(LETTERS, LETTERS, st.integers(1, 40))
@example([0] * 60, [0] * 40, 15)  # more places than are looked at
@example([], [1, 1, 1], 4)
@example([2, 2], [], 4)
def test_it_finds_what_a_naive_scan_finds(prompt, reply, most):
    lookup = Lookup(prompt)
    for i, token in enumerate(reply):
        lookup.push(token)
        text = prompt + reply[: i + 1]
        best = naive(text)
        if best is None:
            continue  # what was copied from before is resumed
        match = Lookup(text).find()
        assert match == Match(best[1], best[0])  # however the index came to be
        assert lookup._n_gram() == match
        assert lookup.follow(match, most) == repeated(text, match.at, most)


@given(LETTERS, LETTERS, st.data())
def test_finding_in_between_changes_nothing(prompt, reply, data):
    """`find` moves the place that is copied from, and nothing else."""
    asked, silent = Lookup(prompt), Lookup(prompt)
    for token in reply:
        asked.push(token)
        silent.push(token)
        if data.draw(st.booleans()) and (match := asked.find()):
            assert 0 <= match.at < len(asked._text)
            assert len(asked.follow(match, 15)) == 15
    assert asked._n_gram() == silent._n_gram()


@given(LETTERS, LETTERS, LETTERS)
def test_what_is_expected_is_looked_up_as_well_and_ends_where_it_ends(expected, prompt, reply):
    lookup = Lookup(prompt, expected)
    for token in reply:
        lookup.push(token)
        if (match := lookup.find()) and match.at < len(expected):
            draft = lookup.follow(match, 15)
            assert draft == expected[match.at : match.at + 15]
            if match.length >= 2 and lookup._n_gram() == match:
                assert expected[match.at - 2 : match.at] == lookup._text[-2:]


def test_an_expected_text_is_the_first_draft_and_is_resumed_after_a_difference():
    expected = list(range(100, 120))
    lookup = Lookup([1, 2, 3], expected)
    lookup.push(100)
    match = lookup.find()
    assert match == Match(1, LONGEST)
    assert lookup.follow(match, 4) == [101, 102, 103, 104]
    lookup.push(101)
    lookup.push(7)  # in the place of 102
    match = lookup.find()
    assert match == Match(3, 0)
    assert lookup.follow(match, 2) == [103, 104]
    lookup.push(103)
    assert lookup.find() == Match(4, 1)
    lookup.push(104)
    assert lookup.find() == Match(5, 2)
    for token in (8, 9):  # something was left out, something else was put in
        lookup.push(token)
    lookup.push(110)
    lookup.push(111)
    assert lookup.find() == Match(12, 2)


def test_a_text_that_is_left_is_forgotten():
    lookup = Lookup([1, 2, 3], [100, 101, 102, 103, 104, 105])
    for token in (7, 8, 9):
        lookup.push(token)
    assert lookup.find() is None


def test_the_end_of_what_is_expected_is_no_token():
    lookup = Lookup([1, 2, 3], [100, 101])
    lookup.push(100)
    lookup.push(101)
    assert lookup.find() is None
    lookup.push(5)
    assert lookup.find() is None


@pytest.mark.parametrize("text", [[], [5], [5, 5]])
def test_there_is_nothing_in_a_short_text(text):
    assert Lookup(text).find() is None


def test_a_long_text_costs_no_more_than_a_short_one():
    """Counted, not timed: a search looks at MOST_PLACES places."""
    looked = 0

    class Counted(list):
        def __getitem__(self, at):
            nonlocal looked
            looked += 1
            return super().__getitem__(at)

    lookup = Lookup([token for i in range(2, 5_000) for token in (0, 1, i)])  # no three tokens come twice
    lookup._before = Counted(lookup._before)
    lookup.push(0)
    lookup.push(1)
    looked = 0
    assert lookup.find() is not None
    assert looked <= MOST_PLACES + 1
