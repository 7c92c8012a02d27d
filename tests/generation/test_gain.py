"""The estimate of what drafts are worth, on simulated texts and machines: no clock, no model."""

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.generation.gain import DRAFTED, LONGEST_DRAFT, ROWS, Acceptance, Gain, Prices, padded

GOOD = {1: 1.0, 2: 1.1, 4: 1.2, 8: 2.0, 16: 4.0}  # steps for passes of some rows
POOR = {1: 1.0, 2: 1.54, 4: 2.34, 8: 3.04, 16: 5.5}
FLAT = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}  # no row costs less than the first
MACHINES = pytest.mark.parametrize("machine", [GOOD, POOR, FLAT], ids=["good", "poor", "flat"])
STEP_S = 0.02


def prose(chance, length=4):
    """A text with matches of this length, after which each guessed token comes with this chance: yields both."""
    return lambda rng: ((rng.random() < chance, length) for _ in itertools.count())


def by_turns(length, *kinds):
    """`length` tokens of one kind of text, then of the next."""
    return lambda rng: (next(kind) for kind in itertools.cycle([kind(rng) for kind in kinds]) for _ in range(length))


def length_of(gain, length, most, tokens=1):
    """The length of the draft, where one guess is offered."""
    at, drafted = gain.choose([(length, most)], tokens)
    assert at == 0
    return drafted


def simulate(machine, text, tokens, *, seed=0, prices=None, noise=0.03, matched=1.0):
    """Steps that so many tokens of a text take, and the draft of each pass. matched: share of tokens with a match."""
    rng = random.Random(seed)
    gain, comes = Gain(prices or Prices()), text(rng)
    steps, seen, draft, used = 0.0, set(), 0, []
    for _ in range(tokens):
        same, length = next(comes)
        gain.came(int(same))
        if draft and same:
            draft -= 1
            gain.accepted(1)
            continue
        draft = 0
        if rng.random() < matched:
            gain.guess(length, [1] * LONGEST_DRAFT)
            draft = length_of(gain, length, LONGEST_DRAFT)
        rows = padded(1 + draft)
        price = machine[rows] * rng.lognormvariate(0, noise) * (1.5 if rows not in seen else 1)
        gain.ran(1, draft, price * STEP_S, first=rows not in seen)
        seen.add(rows)
        steps += price
        used.append(draft)
    return steps, used


def best_speed(machine, chance):
    """Tokens a step of the best fixed length, where every token has a match."""
    return max((1 + sum(chance**i for i in range(1, n))) / machine[n] for n in ROWS)


def test_rows_are_padded():
    assert [padded(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 300)] == [1, 2, 4, 4, 8, 8, 16, 16, 17, 300]


# --- prices -----------------------------------------------------------------------------------------------------------


def test_prices_are_medians_in_steps():
    prices = Prices()
    assert not prices.ready
    for seconds in (0.02, 0.021, 5.0, 0.019, 0.02):  # one of them was disturbed
        prices.add(1, seconds)
    for seconds in (0.03, 0.03, 9.0):
        prices.add(4, seconds)
    assert prices.ready
    assert prices.steps(1) == 1
    assert prices.steps(4) == pytest.approx(1.5)


def test_a_price_is_never_below_a_step_nor_below_that_of_fewer_rows_until_measured():
    prices = Prices()
    prices.add(1, 0.02)
    prices.add(2, 0.01)
    assert prices.steps(2) == 1
    prices.add(8, 0.2)
    assert prices.steps(16) >= prices.steps(8) == pytest.approx(10)


def test_a_price_that_is_not_used_is_forgotten_later_and_later_while_it_stays_the_same():
    prices, gaps, last = Prices(), [], 0
    prices.add(1, 0.02)
    prices.add(2, 0.04)
    for passes in range(20_000):
        if prices.steps(2) < 2:  # the guess
            gaps.append(passes - last)
            last = passes
            prices.add(2, 0.04)
        prices.add(1, 0.02)
    assert len(gaps) < 10
    assert gaps[0] < 150
    assert all(1.8 < b / a < 2.2 for a, b in itertools.pairwise(gaps[:6]))


def test_a_better_price_is_believed_at_once():
    prices = Prices()
    prices.add(1, 0.02)
    for _ in range(9):
        prices.add(2, 0.06)
    for _ in range(200):
        prices.add(1, 0.02)
    prices.add(2, 0.022)
    assert prices.steps(2) == pytest.approx(1.1)


def test_an_old_time_of_a_step_is_measured_again():
    prices = Prices()
    prices.add(1, 0.02)
    for _ in range(100):
        prices.add(8, 0.03)
    assert not prices.ready
    prices.add(1, 0.02)
    assert prices.ready


# --- acceptance -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.booleans(), min_size=1, max_size=15)), max_size=60),
    st.integers(0, 20),
)
def test_what_is_expected_grows_with_the_length_by_less_and_less(guesses, length):
    acceptance = Acceptance()
    for at, came in guesses:
        acceptance.guess(at, [1] * len(came))
        for token in came:
            acceptance.came(int(token))
    sums = acceptance.expected(length)
    gains = [b - a for a, b in itertools.pairwise(sums)]
    assert len(sums) == LONGEST_DRAFT + 1
    assert sums[0] == 0
    assert all(0 <= later <= earlier <= 1 for earlier, later in itertools.pairwise([1, *gains]))


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.6, 0.95])
def test_it_learns_the_chance_without_running_a_draft(chance):
    rng, acceptance, learnt = random.Random(1), Acceptance(), []
    for i in range(3000):
        acceptance.guess(5, [1] * LONGEST_DRAFT)
        acceptance.came(int(rng.random() < chance))
        if i > 500:
            learnt.append(acceptance.expected(5))
    expected = [sum(chance**i for i in range(1, n + 1)) for n in range(LONGEST_DRAFT + 1)]
    for n in (1, 3, 7, 15):
        assert statistics.mean(sums[n] for sums in learnt) == pytest.approx(expected[n], rel=0.15, abs=0.1)


def test_a_token_after_a_wrong_one_is_no_token_of_the_draft():
    acceptance = Acceptance()
    for came in ((1, 0), (0, 1)) * 100:
        acceptance.guess(5, [1, 1])
        for token in came:
            acceptance.came(token)
    sums = acceptance.expected(5)
    assert sums[1] == pytest.approx(0.5, abs=0.05)
    assert sums[2] - sums[1] < 0.03


def test_matches_of_different_lengths_are_told_apart():
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.guess(2, [1])
        acceptance.came(0)
        acceptance.guess(12, [1])
        acceptance.came(1)
    assert acceptance.expected(2)[1] < 0.1
    assert acceptance.expected(12)[1] > 0.9


# --- gain -------------------------------------------------------------------------------------------------------------


@MACHINES
@pytest.mark.parametrize("chance", [0.0, 0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("matched", [0.2, 1.0])
@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_drafts_that_fail_cost_less_than_two_percent(machine, chance, matched, noise):
    """In expectation, of replies of 300 tokens on a machine whose prices are known only from these replies."""
    ratios, prices = [], Prices()
    for seed in range(40):
        steps, _ = simulate(machine, prose(chance), 300, seed=seed, prices=prices, matched=matched, noise=noise)
        plain, _ = simulate(machine, prose(chance), 300, seed=seed, matched=0.0, noise=noise)
        ratios.append(steps / plain)
    assert statistics.mean(ratios) < 1.02


@pytest.mark.parametrize("machine", [GOOD, POOR], ids=["good", "poor"])
@pytest.mark.parametrize("chance", [0.8, 0.9, 0.97, 1.0])
def test_drafts_that_come_reach_the_best_fixed_length(machine, chance):
    tokens = 1500
    speeds = [tokens / simulate(machine, prose(chance, 9), tokens, seed=seed)[0] for seed in range(10)]
    assert statistics.mean(speeds) > 0.88 * best_speed(machine, chance)


@pytest.mark.parametrize("machine", [GOOD, POOR], ids=["good", "poor"])
def test_a_text_that_is_copied_now_and_then_gains_while_it_is(machine):
    text = by_turns(60, prose(0.05, 2), prose(0.97, 12))
    ratios = [simulate(machine, text, 1200, seed=seed)[0] / 1200 for seed in range(20)]
    best = statistics.mean([1, 1 / best_speed(machine, 0.97)])
    assert statistics.mean(ratios) < 1.08 * best


def test_little_is_drafted_where_no_row_is_cheaper_than_the_first():
    steps, used = simulate(FLAT, prose(0.9, 12), 4000)
    assert sum(map(bool, used)) < 40
    assert steps < 1.03 * 4000  # texts that tempt to try prices, on a machine that there is not


@given(st.lists(st.tuples(st.sampled_from([0, 2, 5, 12]), st.integers(0, 15), st.floats(0.5, 30)), max_size=80))
@settings(deadline=None)
def test_a_draft_fits_whatever_was_measured(passes):
    gain = Gain(Prices())
    for length, most, price in passes:
        gain.guess(length, [1] * LONGEST_DRAFT)
        for tokens in (1, 3, 15, 16, 200):
            assert 0 <= length_of(gain, length, most, tokens) <= most
            assert tokens + length_of(gain, length, most, tokens) <= max(16, tokens)
        drafted = length_of(gain, length, most)
        gain.ran(1, drafted, price * STEP_S)
        gain.came(int(price < 5))
        gain.accepted(drafted if price < 5 else 0)


def test_tokens_that_are_certain_leave_room_for_a_draft():
    gain = Gain(Prices())
    for rows, steps in GOOD.items():
        for _ in range(3):
            gain.prices.add(rows, steps * STEP_S)
    gain.prices.add(1, STEP_S)
    for _ in range(40):
        gain.guess(6, [1] * LONGEST_DRAFT)
        gain.came(1)
    assert length_of(gain, 6, LONGEST_DRAFT, tokens=3) in (1, 5, 13)  # 4, 8 or 16 rows
    assert length_of(gain, 6, 2, tokens=3) in (1, 2)
    assert length_of(gain, 6, LONGEST_DRAFT, tokens=16) == 0


def test_a_loss_ends_drafting_and_the_rest_grows():
    """Chances that change as soon as they are known: the account ends it."""
    gain, prices = Gain(Prices()), GOOD
    drafts = []
    for rows, steps in prices.items():
        gain.prices.add(rows, steps * STEP_S)
    for i in range(6000):
        gain.prices.add(1, STEP_S)
        for _ in range(2):  # guesses that are not run come, those that are do not
            gain.guess(12, [1])
            gain.came(1)
        drafted = length_of(gain, 12, LONGEST_DRAFT)
        if drafted:
            drafts.append(i)
            gain.ran(1, drafted, prices[padded(1 + drafted)] * STEP_S)
    rests = [b - a for a, b in itertools.pairwise(drafts) if b - a > 30]
    assert len(drafts) < 60
    assert rests == sorted(rests)
    assert rests[-1] > 8 * rests[0]


# --- drafters ---------------------------------------------------------------------------------------------------------


def drafted_text(machine, comes, tokens, cost, *, seed=0, prices=None, drafter=True):
    """Steps that a text takes beside a drafter, and the draft of each pass.

    comes: the chance that the drafter is right, a function of the place. cost: steps of a drafter's token. Each time is
    off by a tenth; first ones take half as long again.
    """
    rng = random.Random(seed)
    gain, steps, draft, used, seen = Gain(prices or Prices()), 0.0, 0, [], set()

    def took(what, usual):
        first = what not in seen
        seen.add(what)
        return usual * rng.lognormvariate(0, 0.1) * (1.5 if first else 1), first

    for place in range(tokens):
        same = rng.random() < comes(place)
        gain.came(int(same))
        if draft and same:
            draft -= 1
            gain.accepted(1)
            continue
        draft = gain.choose([(DRAFTED, LONGEST_DRAFT)])[1] if drafter else 0
        if asked := draft or (drafter and gain.asks()):
            made, first = took("drafter", asked * cost)
            gain.guess(DRAFTED, [1] * asked, made * STEP_S, first=first)
            steps += made
        price, first = took(padded(1 + draft), machine[padded(1 + draft)])
        gain.ran(1, draft, price * STEP_S, first=first)
        steps += price
        used.append(draft)
    return steps, used


def against_plain(machine, comes, tokens, cost, seeds=40):
    """The mean time of texts with a drafter, in that of the same texts without; prices are known from these texts."""
    prices, ratios = Prices(), []
    for seed in range(seeds):
        steps, _ = drafted_text(machine, comes, tokens, cost, seed=seed, prices=prices)
        ratios.append(steps / drafted_text(machine, comes, tokens, cost, seed=seed, drafter=False)[0])
    return statistics.mean(ratios)


def best_drafting(machine, chance, cost):
    """Steps a token of the best fixed length."""
    speeds = [sum(chance**i for i in range(n + 1)) / (machine[padded(1 + n)] + n * cost) for n in range(16)]
    return 1 / max(speeds)


@MACHINES
@pytest.mark.parametrize("cost", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_a_drafter_costs_less_than_two_percent(machine, cost, chance):
    assert against_plain(machine, lambda place: chance, 300, cost) < 1.02


@pytest.mark.parametrize("cost", [0.02, 0.05])
@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
def test_a_drafter_that_is_right_nearly_reaches_the_best_fixed_length(cost, chance):
    assert against_plain(GOOD, lambda place: chance, 300, cost) < 1.12 * best_drafting(GOOD, chance, cost)


def test_a_drafter_that_was_wrong_for_long_is_taken_once_it_is_right():
    ratio = against_plain(GOOD, lambda place: 0.8 if place > 400 else 0.0, 1200, 0.03, seeds=10)
    assert ratio < 1.1 * (400 + 800 * best_drafting(GOOD, 0.8, 0.03)) / 1200


def experienced(price):
    """A gain that knows the prices of a good machine, a drafter's price, and that it is right half of the time."""
    gain = Gain(Prices())
    for rows, steps in GOOD.items():
        for _ in range(3):
            gain.prices.add(rows, steps * STEP_S)
    gain.prices.add(1, STEP_S)
    for i in range(40):
        gain.guess(DRAFTED, [1], price * STEP_S)
        gain.came(i % 2)
    return gain


@pytest.mark.parametrize(("price", "drafted"), [(0.01, 3), (0.2, 1), (0.45, 0)])
def test_the_price_of_a_drafters_tokens_counts(price, drafted):
    """Tokens that come in the time of a step: of one draft 1.5 / (1.1 + price), of three 1.875 / (1.2 + 3 prices)."""
    assert experienced(price).choose([(DRAFTED, LONGEST_DRAFT)])[1] == drafted


def test_what_a_drafter_took_is_on_the_account():
    """Nothing it says comes, and a pass of two rows costs next to nothing more: it is its own time that ends it."""
    gain, drafts = experienced(0.3), 0
    for _ in range(100):
        gain.prices.add(1, STEP_S)
        gain.guess(DRAFTED, [1], 0.3 * STEP_S)
        gain.ran(1, 1, 1.01 * STEP_S)
        drafts += 1
        if gain._resting:
            break
    assert 10 <= drafts <= 15


def test_of_two_guesses_the_one_that_promises_more_is_drafted():
    gain = experienced(0.02)
    for _ in range(40):
        gain.guess(12, [1] * LONGEST_DRAFT)
        gain.came(1)
        gain.guess(2, [1] * LONGEST_DRAFT)
        gain.came(0)
    assert gain.choose([(12, LONGEST_DRAFT), (DRAFTED, LONGEST_DRAFT)])[0] == 0
    assert gain.choose([(2, LONGEST_DRAFT), (DRAFTED, LONGEST_DRAFT)])[0] == 1
    assert gain.choose([]) == (0, 0)
    assert gain.choose([(12, 0), (DRAFTED, 0)]) == (0, 0)
