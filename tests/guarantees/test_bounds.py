"""Bounds: against slow readable formulas and scipy, and against what they promise (few false
alarms).
"""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from offramp.errors import BadData, InvalidArgument, UnknownName
from offramp.guarantees.bounds import (
    betting,
    binomial,
    find_bound,
    hoeffding_bentkus,
    interval,
    rows_needed,
    smallest_level,
)
from offramp.guarantees.risks import Risk, find_risk

GAP = {"low": -1.0, "high": 1.0}
UNIT = {"low": 0.0, "high": 1.0}


def keywords(n, low, high, delta=0.05):
    return {"low": low, "high": high, "delta": delta, "order": np.arange(n)}


def counted(counts, n):
    """One plan per count, its 1s in front."""
    return (np.arange(n) < np.asarray(counts)[:, None]).astype(np.int8)


def slow_betting(losses, level, low, high, delta):
    x = [(loss - low) / (high - low) for loss in losses]
    m = (level - low) / (high - low)
    n = len(losses)
    wealth = best = 1.0
    total = 0.0
    squares = 0.0
    variance = 0.25
    for t, x_t in enumerate(x, start=1):
        stake = min(0.75 / (1 - m), math.sqrt(2 * math.log(1 / delta) / (n * variance)))
        wealth *= 1 - stake * (x_t - m)
        best = max(best, wealth)
        total += x_t
        squares += (x_t - (0.5 + total) / (t + 1)) ** 2
        variance = (0.25 + squares) / (t + 1)
    return 1 / best


def slow_hoeffding_bentkus(losses, level, low, high):
    n = len(losses)
    m = (level - low) / (high - low)
    r = np.mean([(loss - low) / (high - low) for loss in losses])
    a = min(r, m)
    entropy = (a * math.log(a / m) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - m))
    return min(math.exp(-n * entropy), math.e * stats.binom.cdf(math.ceil(n * r - 1e-9), n, m), 1.0)


@pytest.mark.parametrize("level", [0.004, 0.05, 0.3])
def test_binomial_is_scipys(level):
    counts = [0, 1, 7, 60, 100]
    expected = stats.binom.cdf(counts, 100, level)
    np.testing.assert_allclose(binomial(counted(counts, 100), level), expected, rtol=1e-9)


@pytest.mark.parametrize("bound", [binomial, hoeffding_bentkus])
def test_many_plans_have_the_p_values_of_each_alone(bound):
    """More plans than counts: the p-value of a count is looked up."""
    counts = np.random.default_rng(6).integers(0, 21, 200)
    losses = counted(counts, 20)
    together = bound(losses, 0.3, low=0, high=1)
    for plan in range(200):
        alone = bound(losses[[plan]], 0.3, low=0, high=1)
        assert together[plan] == alone[0]
    assert together.min() < 0.01


@pytest.mark.parametrize("level", [-0.2, 0.01, 0.3])
def test_betting_and_hoeffding_bentkus_follow_their_formulas(level):
    rng = np.random.default_rng(3)
    losses = np.concatenate(
        [
            rng.choice([-1.0, 0, 1], p=[0.3, 0.6, 0.1], size=(9, 80)),
            rng.uniform(-1, 0.5, (9, 80)),
            np.zeros((1, 80)),
        ]
    )
    order = rng.permutation(80)
    p = betting(losses, level, **GAP, delta=0.1, order=order)
    np.testing.assert_allclose(
        p, [slow_betting(row[order], level, -1, 1, 0.1) for row in losses], rtol=1e-9
    )
    p = hoeffding_bentkus(losses, level, **GAP)
    np.testing.assert_allclose(
        p, [slow_hoeffding_bentkus(row, level, -1, 1) for row in losses], rtol=1e-9
    )
    assert p.min() < 0.5 or level < 0  # the comparison saw more than p = 1


def test_betting_cuts_many_plans_into_pieces():
    losses = np.random.default_rng(4).choice(
        np.array([-1, 0, 1], np.int8), p=[0.05, 0.9, 0.05], size=(1000, 4000)
    )
    order = np.random.default_rng(5).permutation(4000)
    tracemalloc.start()
    p = betting(losses, 0.05, **GAP, delta=0.05, order=order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    for plan in (0, 49, 50, 51, 999):
        one = betting(losses[[plan]], 0.05, **GAP, delta=0.05, order=order)
        assert p[plan] == pytest.approx(one[0], rel=1e-12)


def test_largest_tolerated_counts():
    """The table in facts C4: level 1 %, delta 5 %."""
    for n, exact, bentkus in [
        (500, 1, 0),
        (1000, 4, 3),
        (2000, 12, 10),
        (5000, 38, 35),
        (10_000, 83, 79),
    ]:
        losses = counted(np.arange(100), n)
        assert (binomial(losses, 0.01) <= 0.05).sum() - 1 == exact
        assert (hoeffding_bentkus(losses, 0.01, **UNIT) <= 0.05).sum() - 1 == bentkus


@pytest.mark.parametrize(("n", "least", "most"), [(1000, 0.24, 0.44), (5000, 0.86, 0.98)])
def test_betting_certifies_a_small_signed_gap(n, least, most):
    """Facts C4: 1.2 % worse and 1.0 % better pass at 1 % with 34 % (n=1000) and 93 % (n=5000)."""
    rng = np.random.default_rng(6)
    losses = rng.choice(np.array([-1, 0, 1], np.int8), p=[0.010, 0.978, 0.012], size=(400, n))
    assert least <= (betting(losses, 0.01, **keywords(n, -1, 1)) <= 0.05).mean() <= most
    assert not (hoeffding_bentkus(losses, 0.01, **GAP) <= 0.05).any()


def draw_binary(rng, size):
    return (rng.random(size) < 0.05).astype(np.int8), 0.05, 0.0, 1.0


def draw_gap(rng, size):
    return (
        rng.choice(np.array([-1, 0, 1], np.int8), p=[0.02, 0.91, 0.07], size=size),
        0.05,
        -1.0,
        1.0,
    )


def draw_skewed(rng, size):
    return 2 * rng.beta(0.1, 0.9, size=size), 0.2, 0.0, 2.0


@pytest.mark.parametrize(
    ("bound", "draw"),
    [(binomial, draw_binary)]
    + [
        (bound, draw)
        for bound in (hoeffding_bentkus, betting)
        for draw in (draw_binary, draw_gap, draw_skewed)
    ],
)
def test_p_values_are_valid_at_the_boundary(bound, draw):
    """Mean loss exactly at the level: p <= u in at most a share u of the draws."""
    draws = 4000
    losses, level, low, high = draw(np.random.default_rng(7), (draws, 200))
    p = bound(losses, level, **keywords(200, low, high))
    for u in (0.01, 0.05, 0.1, 0.3):
        assert (p <= u).sum() <= stats.binom.ppf(0.9999, draws, u), u
    safe = bound(losses, level + 0.15 * (high - low), **keywords(200, low, high))
    assert (safe <= 0.05).mean() > 0.95  # and they do see a safe plan


some_losses = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(0, 1)
)
some_gaps = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(-1, 1)
)
some_levels = st.tuples(st.floats(-1.2, 1.2), st.floats(-1.2, 1.2)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(losses=some_gaps, levels=some_levels)
@pytest.mark.parametrize("bound", [hoeffding_bentkus, betting])
def test_p_falls_in_the_level(bound, losses, levels):
    more = keywords(losses.shape[1], -1, 1)
    low, high = (bound(losses, level, **more) for level in levels)
    assert ((low >= high - 1e-12) & (low <= 1) & (high >= 0)).all()


@settings(max_examples=60, deadline=None)
@given(losses=some_losses, levels=some_levels, data=st.data())
def test_plans_do_not_see_each_other(losses, levels, data):
    plans, n = losses.shape
    shuffled = data.draw(st.permutations(range(plans)))
    for bound in (binomial, hoeffding_bentkus, betting):
        p = bound(losses, levels[0], **keywords(n, 0, 1))
        np.testing.assert_array_equal(
            bound(losses[shuffled], levels[0], **keywords(n, 0, 1)), p[shuffled]
        )
    low, high = (binomial(losses, level) for level in levels)
    assert (low >= high - 1e-12).all()


@given(st.integers(1, 3000), st.floats(0.0005, 0.9))
def test_no_losses_at_all(n, level):
    assert binomial(np.zeros((1, n)), level)[0] == pytest.approx((1 - level) ** n, rel=1e-9)
    assert hoeffding_bentkus(np.zeros((1, n)), level, **UNIT)[0] == pytest.approx(
        (1 - level) ** n, rel=1e-9
    )


def test_levels_outside_the_range():
    losses = counted([0, 3], 9)
    for bound in (binomial, hoeffding_bentkus, betting):
        for level in (-0.5, 0.0):
            np.testing.assert_array_equal(bound(losses, level, **keywords(9, 0, 1)), 1.0)
        np.testing.assert_array_equal(bound(losses, 1.0, **keywords(9, 0, 1)), 0.0)
        assert bound(losses[:0], 0.1, **keywords(9, 0, 1)).shape == (0,)
        with pytest.raises(InvalidArgument, match="finite"):
            bound(losses, math.nan, **keywords(9, 0, 1))


def test_counts_survive_float_noise():
    """30 losses of 0.1 sum to a hair above or below 3; whole losses never do."""
    losses = np.full((1, 300), 1.0)
    losses[0, 3:] = 0.0
    assert hoeffding_bentkus(losses, 0.02, **UNIT) == hoeffding_bentkus(
        losses.astype(np.int8), 0.02, **UNIT
    )
    thirds = np.where(losses == 1, 2 / 3, 0.0)  # 3 losses of 2/3 are 2, in units of 1
    assert hoeffding_bentkus(thirds, 0.02, **UNIT)[0] == pytest.approx(
        slow_hoeffding_bentkus(thirds[0], 0.02, 0, 1), rel=1e-9
    )


@pytest.mark.parametrize("bound", [binomial, hoeffding_bentkus, betting])
@pytest.mark.parametrize("bad", [math.nan, 1.5, -0.5, math.inf])
def test_bad_losses_are_refused(bound, bad):
    losses = np.zeros((3, 5))
    losses[1, 4] = bad
    with pytest.raises(BadData, match=r"plan 1, row 4"):
        bound(losses, 0.1, **keywords(5, 0, 1))
    for shape in [(3, 0), (5,)]:
        with pytest.raises(BadData, match="losses must be"):
            bound(np.zeros(shape), 0.1, **keywords(shape[-1], 0, 1))


def test_betting_refuses_what_is_no_order_and_no_delta():
    for order in (None, np.arange(4), np.zeros(5, int), np.arange(1, 6)):
        with pytest.raises(InvalidArgument, match="order_from"):
            betting(np.zeros((1, 5)), 0.1, **UNIT, delta=0.05, order=order)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidArgument, match="1 - confidence"):
            betting(np.zeros((1, 5)), 0.1, **UNIT, delta=delta, order=np.arange(5))


def test_find_bound():
    gap = find_risk("accuracy_gap")
    error = find_risk("error")
    assert find_bound(None, error) is binomial
    assert find_bound(None, gap) is betting
    assert find_bound("hoeffding_bentkus", gap) is hoeffding_bentkus
    assert find_bound("betting", error) is betting
    own = Risk("own", 0.0, 1.0, False, False, lambda *_: None)
    assert find_bound(None, own) is betting
    with pytest.raises(
        InvalidArgument,
        match=r"'binomial' must .* the risk 'accuracy_gap'.*'betting', 'hoeffding_bentkus'",
    ):
        find_bound("binomial", gap)
    with pytest.raises(UnknownName, match="did you mean 'binomial'"):
        find_bound("binom", error)
    for losses, low in [
        (np.array([[0.0, 0.5]]), 0.0),
        (np.array([[-1, 1]]), -1.0),
        (np.array([[0, 1]]), -1.0),
    ]:
        with pytest.raises(InvalidArgument, match=r"0 and 1 only, got .*; use 'betting'"):
            binomial(losses, 0.1, low=low, high=1.0)


@pytest.mark.parametrize("bound", [binomial, hoeffding_bentkus, betting])
def test_smallest_level_is_where_the_losses_start_to_pass(bound):
    order = np.random.default_rng(8).permutation(400)
    for count in (0, 5, 120, 400):
        losses = counted([count], 400)
        level = smallest_level(losses[0], bound, 0.05, **UNIT, order=order)
        assert count / 400 < level or level == 1.0
        assert bound(losses, level, **UNIT, delta=0.05, order=order)[0] <= 0.05
        assert bound(losses, level - 2e-6, **UNIT, delta=0.05, order=order)[0] > 0.05


def test_smallest_level_of_binomial_is_exact():
    exact = stats.beta.ppf(0.95, 6, 395)
    assert smallest_level(counted([5], 400)[0], binomial, 0.05, **UNIT) == pytest.approx(
        exact, rel=1e-10
    )
    with pytest.raises(InvalidArgument, match="0 and 1 only"):
        smallest_level(np.array([0.5]), binomial, 0.05, **UNIT)


def test_interval_of_binary_losses_is_clopper_pearson():
    for count in (0, 3, 57, 60):
        exact = stats.binomtest(count, 60).proportion_ci(0.9, method="exact")
        shown = interval(counted([count], 60)[0], **UNIT, confidence=0.9)
        assert shown == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize(
    ("draw", "binary"), [(draw_binary, True), (draw_gap, None), (draw_skewed, None)]
)
def test_interval_covers_the_mean_and_is_of_use(draw, binary):
    rows, mean, low, high = draw(np.random.default_rng(9), (300, 250))
    ends = np.array(
        [interval(row, low=low, high=high, confidence=0.8, binary=binary) for row in rows]
    )
    missed = ((ends[:, 0] > mean) | (ends[:, 1] < mean)).sum()
    assert missed <= stats.binom.ppf(0.9999, 300, 0.2)
    assert ((ends[:, 0] <= rows.mean(1)) & (rows.mean(1) <= ends[:, 1])).all()
    assert np.median(ends[:, 1] - ends[:, 0]) < 7 * rows.std() / math.sqrt(250)
    with pytest.raises(InvalidArgument, match=r"confidence must be .* got 95"):
        interval(rows[0], low=low, high=high, confidence=95)


def test_interval_is_not_fooled_by_sorted_rows():
    losses = np.repeat([-1, 0, 1], [100, 800, 100])
    lo, hi = interval(losses, **GAP, confidence=0.95)
    assert -0.1 < lo < 0 < hi < 0.1


def test_interval_takes_rows_at_their_word():
    # no row seen was made better, but a gap may: not the binary interval
    losses = counted([3], 60)[0]
    assert (
        interval(losses, **GAP, confidence=0.9)[0] < 0 < interval(losses, **UNIT, confidence=0.9)[0]
    )
    with pytest.raises(InvalidArgument, match="0 and 1 only"):
        interval(losses * 0.5, **UNIT, confidence=0.9, binary=True)


@pytest.mark.parametrize(
    ("level", "observed", "table"),
    [
        (0.01, 0, 299),
        (0.01, 0.0025, 628),
        (0.01, 0.005, 1312),
        (0.02, 0.01, 655),
        (0.05, 0.025, 286),
    ],
)
def test_rows_needed_is_near_the_table_and_exact_by_brute_force(level, observed, table):
    """Facts C4; its entries are points of a saw with teeth of about 130 rows, ours is where the saw
    ends.
    """
    n = np.arange(1, 4000)
    passes = stats.binom.cdf(np.ceil(np.round(n * observed, 9)), n, level) <= 1 - 0.95
    needed = rows_needed(level, 0.95, observed=observed)
    assert needed == n[~passes].max() + 1
    assert table <= needed <= table + 130


@pytest.mark.parametrize("level", [1e-8, 1e-9, 1e-15, 1e-290])
def test_rows_needed_for_levels_beyond_any_data(level):
    """Without a loss it takes log(0.05) / log(1 - level) rows, also where C has no such integer."""
    assert rows_needed(level, 0.95) == pytest.approx(-math.log(0.05) / level, rel=1e-6)
    assert rows_needed(level, 0.95, observed=level / 2) > rows_needed(level, 0.95)
    assert rows_needed(1e-320, 0.95, observed=5e-321) == rows_needed(1e-300, 0.95)
    assert rows_needed(0.01, 0.95, observed=1e-320) == rows_needed(0.01, 0.95)


def test_rows_needed_near_the_level_and_beyond():
    assert 27_000 < rows_needed(0.01, 0.95, observed=0.009) < 30_000
    assert rows_needed(0.01, 0.95, observed=0.00999) > 10**8
    for level, confidence, observed, says in [
        (0.01, 0.95, 0.01, "observed must be .* below 0.01, got 0.01"),
        (0.0, 0.95, 0.0, "level must be"),
        (0.01, 1.0, 0.0, "confidence must be"),
        (0.01, 0.95, -1, "observed must be at least 0"),
    ]:
        with pytest.raises(InvalidArgument, match=says):
            rows_needed(level, confidence, observed=observed)
