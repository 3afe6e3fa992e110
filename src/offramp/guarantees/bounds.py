"""Bounds: p-values for "the mean loss is above the level", and what follows from them.

A p-value is valid when P(p <= u) <= u for every u whenever E[loss] >= level, for independent rows.
Shapes: P plans, N rows. Every bound takes the same keywords; only betting uses `delta` and `order`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from offramp._support.arguments import require
from offramp.errors import BadData, InvalidArgument, UnknownName
from offramp.guarantees.risks import Risk
from offramp.guarantees.testing import order_from

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.intp]
LossArray = npt.NDArray[Any]  # bool, integer or float

CAP = 0.75  # the largest share of its wealth that a bet may lose on one row
CELLS = 200_000  # losses per pass: about the size of a core's cache
LARGEST_INT = 2**31  # of C
SMALLEST_LEVEL = 1e-300  # for the number of rows, which a float must hold
MOST_BETS = 32_768  # with more rows than this, one bet is on the mean of several


class Bound(Protocol):
    """The signature of `binomial`, `hoeffding_bentkus` and `betting`."""

    __name__: str

    def __call__(
        self,
        losses_PN: LossArray,
        level: float,
        *,
        low: float,
        high: float,
        delta: float,
        order: IndexArray | None,
    ) -> FloatArray:
        """p-values for "the mean loss is above the level".

        Args:
            losses_PN: the losses of every plan on every row.
            level: the risk to be shown.
            low: no loss is below it.
            high: no loss is above it.
            delta: 1 - confidence.
            order: a permutation of the rows, fixed before they were seen.

        Returns:
            One p-value per plan [P].
        """


def binomial(
    losses_PN: LossArray,
    level: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    delta: float | None = None,
    order: IndexArray | None = None,
) -> FloatArray:
    """Exact for losses of 0 and 1: p = P(Bin(N, level) <= count). Clopper and Pearson, 1934.

    >>> binomial(np.zeros((1, 299)), 0.01).round(3)
    array([0.05])
    """
    losses_PN = _checked(losses_PN, low, high)
    others = losses_PN[(losses_PN != 0) & (losses_PN != 1)]
    if others.size or (low, high) != (0, 1):
        got = f"a loss of {others[0]}" if others.size else f"the range [{low}, {high}]"
        raise InvalidArgument(
            f"the losses for the bound 'binomial' must be 0 and 1 only, got {got}; use 'betting' "
            f"or 'hoeffding_bentkus'"
        )
    sums_P = losses_PN.sum(axis=1, dtype=np.float64)
    return from_sums(binomial, sums_P, losses_PN.shape[1], level, low=low, high=high)


def hoeffding_bentkus(
    losses_PN: LossArray,
    level: float,
    *,
    low: float,
    high: float,
    delta: float | None = None,
    order: IndexArray | None = None,
) -> FloatArray:
    """For losses in [low, high]. It does not depend on the order of the rows, and does not adapt to
    their variance.

    On [0, 1]: p = min(exp(-N h(min(r, m), m)), e P(Bin(N, m) <= ceil(N r))), r the mean, m the
    level, h the relative entropy. Bates et al., 2021, arXiv 2101.02703. We sum before rescaling, so
    that counts of whole losses stay whole and ceil does not see float noise.
    """
    losses_PN = _checked(losses_PN, low, high)
    sums_P = losses_PN.sum(axis=1, dtype=np.float64)
    return from_sums(hoeffding_bentkus, sums_P, losses_PN.shape[1], level, low=low, high=high)


def from_sums(
    bound: Bound, sums_P: FloatArray, n: int, level: float, *, low: float, high: float
) -> FloatArray:
    """p-values of the bounds that need only the sum of each plan's losses.

    Args:
        bound: `binomial` or `hoeffding_bentkus`.
        sums_P: the summed losses of every plan.
        n: how many rows were summed.
        level: the risk to be shown.
        low: no loss is below it. For `binomial` the losses must be 0 or 1; this is not checked
            here.
        high: no loss is above it.

    Returns:
        One p-value per plan, the same as the bound gives for the losses themselves.
    """
    unit = _unit_level(level, low, high)
    if not 0.0 < unit < 1.0:
        return _certain(unit, len(sums_P))
    from scipy import special

    if bound is binomial:
        return _binomial_tail(sums_P.round(), n, unit)
    # losses rescaled to [0, 1]: their sum and their mean
    counts_P = np.clip((sums_P - n * low) / (high - low), 0.0, n)
    means_P = np.minimum(counts_P / n, unit)
    entropy_P = special.rel_entr(means_P, unit) + special.rel_entr(1.0 - means_P, 1.0 - unit)
    bentkus_P = math.e * _binomial_tail(np.ceil(counts_P), n, unit)
    p_P: FloatArray = np.minimum(np.minimum(np.exp(-n * entropy_P), bentkus_P), 1.0)
    return p_P


def _binomial_tail(counts_P: FloatArray, n: int, unit: float) -> FloatArray:
    """P(Bin(n, unit) <= count) of whole counts from 0 to n."""
    from scipy import special

    if len(counts_P) <= n:
        tail_P: FloatArray = special.bdtr(counts_P, n, unit)
        return tail_P
    # more plans than counts: every count is computed once, and looked up
    tail_C: FloatArray = special.bdtr(np.arange(n + 1.0), n, unit)
    return tail_C[counts_P.astype(np.intp)]


def betting(
    losses_PN: LossArray,
    level: float,
    *,
    low: float,
    high: float,
    delta: float,
    order: IndexArray | None,
) -> FloatArray:
    """For losses in [low, high], adapting to their variance: p = 1 / the largest wealth reached.

    On [0, 1] a gambler starts with 1 and stakes nu_t against row x_t: K_t = prod (1 - nu_i (x_i -
    m)). If E[x] >= m, K is a non-negative supermartingale for any nu_t computed from the rows
    before t, and ever exceeds 1/u with probability <= u (Ville). Predictable plug-in, t = 1..N,
    s2_0 = 1/4: nu_t = min(0.75 / (1 - m), sqrt(2 ln(1/delta) / (N s2_{t-1}))).

    With more than 32,768 rows, each bet is on the mean x of several rows that follow each other in
    the order, so that there are at most 32,768 bets (`rows_per_bet`, which depends on N only). The
    proof does not change: the means are in [0, 1], are independent and have the expectation of a
    row. Little is lost: the best stake against a mean of b rows is b times the best one against a
    row, until the cap binds, and with so many rows stakes are small.

    Waudby-Smith and Ramdas, 2020, arXiv 2010.09686. We use only the bet against a large mean
    (one-sided).

    Args:
        losses_PN: the losses of every plan on every row.
        level: the risk to be shown.
        low: no loss is below it.
        high: no loss is above it.
        delta: 1 - confidence.
        order: a permutation of the rows, fixed before they were seen (`testing.order_from`).

    Returns:
        One p-value per plan [P].
    """
    losses_PN = _checked(losses_PN, low, high)
    plans, n = losses_PN.shape
    order = _permutation(order, n)
    if not 0.0 < delta < 1.0:
        raise InvalidArgument(
            f"delta must be above 0 and below 1, got {delta}. It is 1 - confidence."
        )
    unit = _unit_level(level, low, high)
    if not 0.0 < unit < 1.0:
        return _certain(unit, plans)
    p_P = np.empty(plans)
    step = max(1, CELLS // n)
    starts_B = np.arange(0, n, rows_per_bet(n))
    for start in range(0, plans, step):
        sums_PB = losses_PN[start : start + step].take(order, axis=1).astype(np.float64)
        if len(starts_B) < n:
            sums_PB = np.add.reduceat(sums_PB, starts_B, axis=1)
        p_P[start : start + step] = from_bets(sums_PB, n, level, low=low, high=high, delta=delta)
    return p_P


def rows_per_bet(n: int) -> int:
    """How many consecutive rows a bet of `betting` is on: 1 up to 32,768 rows, then more."""
    return max(1, -(-n // MOST_BETS))  # n / MOST_BETS, rounded up


def from_bets(
    sums_PB: FloatArray, n: int, level: float, *, low: float, high: float, delta: float
) -> FloatArray:
    """p-values of `betting` from the summed losses of the rows of each bet.

    Args:
        sums_PB: for every plan the summed losses of the first `rows_per_bet(n)` rows in the order,
            of the next ones, and so on. The last sum may be of fewer rows.
        n: how many rows there are in all.
        level: the risk to be shown.
        low: no loss is below it.
        high: no loss is above it.
        delta: 1 - confidence.

    Returns:
        One p-value per plan.
    """
    unit = _unit_level(level, low, high)
    if not 0.0 < unit < 1.0:
        return _certain(unit, len(sums_PB))
    size = rows_per_bet(n)
    rows_B = np.full(sums_PB.shape[1], float(size))
    rows_B[-1] = n - size * (sums_PB.shape[1] - 1)
    x_PB = sums_PB / rows_B  # the mean loss of each bet
    x_PB -= low
    x_PB /= high - low
    p_P: FloatArray = np.exp(-_largest_log_wealth(x_PB, unit, delta))
    return p_P


def _largest_log_wealth(x_PN: FloatArray, unit: float, delta: float) -> FloatArray:
    """max_t ln K_t >= 0 of losses in [0, 1]; reuses x_PN as working memory."""
    # First the running variances: mu_t from the rows up to t, then the squared distances to it.
    n = x_PN.shape[1]
    t_N = np.arange(1.0, n + 1.0)
    work_PN = np.cumsum(x_PN, axis=1)
    work_PN += 0.5
    work_PN /= t_N + 1.0  # mu_t
    np.subtract(x_PN, work_PN, out=work_PN)
    np.square(work_PN, out=work_PN)
    np.cumsum(work_PN, axis=1, out=work_PN)
    # The stakes nu_t, each from the rows before t.
    nu_PN = np.empty_like(x_PN)
    nu_PN[:, 0] = 0.25
    np.add(work_PN[:, :-1], 0.25, out=nu_PN[:, 1:])  # t s2_{t-1}
    np.divide(t_N * (2.0 * math.log(1.0 / delta) / n), nu_PN, out=nu_PN)
    np.sqrt(nu_PN, out=nu_PN)
    np.minimum(nu_PN, CAP / (1.0 - unit), out=nu_PN)
    # The logarithm of the wealth: the running sum of ln(1 - nu_t (x_t - m)).
    x_PN -= unit
    x_PN *= nu_PN
    np.negative(x_PN, out=x_PN)
    np.log1p(x_PN, out=x_PN)  # CAP < 1 keeps it finite
    np.cumsum(x_PN, axis=1, out=x_PN)
    largest_P: FloatArray = np.maximum(x_PN.max(axis=1), 0.0)
    return largest_P


def find_bound(name: str | None, risk: Risk) -> Bound:
    """The bound of a name.

    Args:
        name: of a bound, or None for the best one: exact for 0/1 losses, otherwise betting.
        risk: that the bound is for.

    Returns:
        The bound.

    Raises:
        InvalidArgument: the bound is not for this risk.
        UnknownName: there is no bound of this name.
    """
    valid: dict[str, Bound] = {"betting": betting, "hoeffding_bentkus": hoeffding_bentkus}
    if risk.binary:
        valid = {"binomial": binomial, **valid}
    if name is None:
        return next(iter(valid.values()))
    if name in valid:
        return valid[name]
    names = ", ".join(repr(key) for key in valid)
    if name == "binomial":
        raise InvalidArgument(
            f"a risk for the bound 'binomial' must have losses of 0 and 1 only, got the risk "
            f"{risk.name!r}; use one of {names}"
        )
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownName(f"bound must be one of {names}, got {name!r}{hint}")


def smallest_level(
    losses_N: LossArray,
    bound: Bound,
    delta: float,
    *,
    low: float,
    high: float,
    order: IndexArray | None = None,
) -> float:
    """The smallest level at which these losses pass (p <= delta), to 1e-6 from above.

    The p-value of every bound here falls with the level, so bisection finds it. For `binomial` it
    is the exact limit of Clopper and Pearson, 1934. The level comes from a look at the rows, so it
    is not a promise until it is certified on fresh ones.

    Args:
        losses_N: of one plan.
        bound: the test.
        delta: 1 - confidence.
        low: no loss is below it.
        high: no loss is above it.
        order: a permutation of the rows, for betting.

    Returns:
        The level.
    """
    losses_1N = np.asarray(losses_N)[None]
    if bound is binomial:
        bound(losses_1N, 0.5, low=low, high=high, delta=delta, order=order)  # checks the losses
        return _clopper_pearson(int(losses_1N.sum()), losses_1N.shape[1], delta)

    def p_at(level: float) -> float:
        return float(bound(losses_1N, level, low=low, high=high, delta=delta, order=order)[0])

    return level_of(p_at, low=low, high=high, delta=delta)


def smallest_level_of_sum(
    total: float, n: int, bound: Bound, delta: float, *, low: float, high: float
) -> float:
    """`smallest_level` for `binomial` and `hoeffding_bentkus`, from the sum of n losses."""
    if bound is binomial:
        return _clopper_pearson(round(total), n, delta)

    def p_at(level: float) -> float:
        return float(from_sums(bound, np.array([total]), n, level, low=low, high=high)[0])

    return level_of(p_at, low=low, high=high, delta=delta)


def level_of(p_at: Callable[[float], float], *, low: float, high: float, delta: float) -> float:
    """The smallest level in [low, high] with `p_at(level) <= delta`, to 1e-6 from above.

    Args:
        p_at: the p-value at a level; it must not rise with the level.
        low: the lower end.
        high: the upper end.
        delta: 1 - confidence.

    Returns:
        The level.
    """
    fails = low
    passes = high
    while passes - fails > 1e-6:
        middle = (fails + passes) / 2.0
        if p_at(middle) <= delta:
            passes = middle
        else:
            fails = middle
    return passes


def interval(
    losses_N: LossArray, *, low: float, high: float, confidence: float, binary: bool | None = None
) -> tuple[float, float]:
    """A two-sided interval for the mean loss. Each side misses with half of 1 - confidence.

    0/1 losses: Clopper and Pearson, 1934. Others: betting on either side, Waudby-Smith and Ramdas,
    2020, arXiv 2010.09686, in a fixed order that depends on N only. It is widened where needed to
    include the mean of the rows.

    Args:
        losses_N: of one plan.
        low: no loss is below it.
        high: no loss is above it.
        confidence: above 0 and below 1.
        binary: whether a loss can only be 0 or 1, see `Risk.binary`. None guesses: the range is [0,
            1] and all losses here are 0 or 1.

    Returns:
        The lower and the upper end.
    """
    confidence = require("confidence", confidence, above=0, below=1)
    losses_N = _checked(np.asarray(losses_N)[None], low, high)[0].astype(np.float64)
    n = len(losses_N)
    half = (1.0 - confidence) / 2.0  # for each side
    if binary is None:
        binary = (low, high) == (0, 1) and bool(np.isin(losses_N, (0, 1)).all())
    if binary:
        binomial(losses_N[None], 0.5, low=low, high=high)  # checks the losses
        count = int(losses_N.sum())
        return 1.0 - _clopper_pearson(n - count, n, half), _clopper_pearson(count, n, half)
    # The lower end is the upper end of the negative losses, negated.
    order = order_from(f"interval of {n} rows", n)
    mean = float(losses_N.mean())
    upper = smallest_level(losses_N, betting, half, low=low, high=high, order=order)
    lower = -smallest_level(-losses_N, betting, half, low=-high, high=-low, order=order)
    return min(lower, mean), max(upper, mean)


def rows_needed(level: float, confidence: float, *, observed: float = 0.0) -> int:
    """From this many rows on, 0/1 losses with a mean of `observed` always pass the exact test.

    N losses of mean r count as ceil(N r). Some smaller N pass too: whether N rows pass goes up and
    down like a saw, because the next loss is a whole one.

    Args:
        level: above 0 and below 1. One below 1e-300 counts as 1e-300.
        confidence: above 0 and below 1.
        observed: the mean loss, at least 0 and below the level. One below 1e-300 counts as 0.

    Returns:
        The number of rows.

    Raises:
        InvalidArgument: an argument is not within its limits.

    Example:
        >>> rows_needed(0.01, 0.95), rows_needed(0.01, 0.95, observed=0.0025)
        (299, 628)
    """
    level = require("level", level, above=0, below=1)
    confidence = require("confidence", confidence, above=0, below=1)
    observed = require("observed", observed, low=0, below=level)
    level = max(level, SMALLEST_LEVEL)
    if observed < SMALLEST_LEVEL:
        observed = 0.0

    # N rows count ceil(N observed) losses. For each number of losses there is a first N that counts
    # so many. If the fewest rows that pass with this number are at most that N, no N with this
    # number fails. So look for the last number of losses that fails at its first N.
    def passes(count: int) -> bool:
        if observed == 0.0:
            return True
        first_rows = math.floor((count - 1) / observed + 1e-9) + 1
        return _fewest_rows(count, level, confidence) <= first_rows

    return _fewest_rows(_last_that_fails(passes, 0, 1), level, confidence)


def _fewest_rows(count: int, level: float, confidence: float) -> int:
    """The fewest rows that pass with this many losses."""
    from scipy import special

    def passes(rows: int) -> bool:
        if rows < LARGEST_INT:
            return bool(special.bdtr(count, rows, level) <= 1.0 - confidence)
        # The same probability. bdtr gives NaN here, because it takes rows as a C int.
        return bool(special.betaincc(count + 1.0, float(rows - count), level) <= 1.0 - confidence)

    return _last_that_fails(passes, count, count + 1) + 1


def _last_that_fails(passes: Callable[[int], bool], fails: int, first: int) -> int:
    """The last number that fails, where all smaller ones fail and all larger ones pass.

    Doubles a number until it passes, then halves the interval between it and one that fails.

    Args:
        passes: the test of a number.
        fails: a number that is known to fail.
        first: the first number to test.
    """
    number = first
    while not passes(number):
        fails = number
        number = 2 * number
    while number - fails > 1:
        middle = (fails + number) // 2
        if passes(middle):
            number = middle
        else:
            fails = middle
    return fails


def rows_by_observed(level: float, confidence: float) -> dict[float, int]:
    """The rows that certify a level, by the observed risk: none, a quarter, a half and three
    quarters of the level.
    """
    observed = [level * part for part in (0.0, 0.25, 0.5, 0.75)]
    return {risk: rows_needed(level, confidence, observed=risk) for risk in observed}


def _clopper_pearson(count: int, n: int, delta: float) -> float:
    """The smallest level with P(Bin(n, level) <= count) <= delta, rounded to the safe side."""
    if count >= n:
        return 1.0
    from scipy import special

    exact = float(special.betaincinv(count + 1, n - count, 1.0 - delta))
    return min(exact * (1.0 + 1e-12), 1.0)


def _certain(unit: float, plans: int) -> FloatArray:
    """p-values for a level outside the range: 1 for a level below every loss, 0 for one above."""
    return np.full(plans, 1.0 if unit <= 0.0 else 0.0)


def _unit_level(level: float, low: float, high: float) -> float:
    """The level where the range of losses is rescaled to [0, 1]."""
    if not math.isfinite(level):
        raise InvalidArgument(
            f"level must be a finite number, the largest risk you accept, got {level}"
        )
    return (level - low) / (high - low)


def _checked(losses_PN: LossArray, low: float, high: float) -> LossArray:
    """Losses as an array. Raises BadData for another shape or type, and outside the range."""
    losses_PN = np.asarray(losses_PN)
    if losses_PN.ndim != 2 or losses_PN.shape[1] == 0 or losses_PN.dtype.kind not in "biuf":
        raise BadData(
            f"losses must be numbers [P, N] on at least one row, got {losses_PN.dtype} "
            f"{list(losses_PN.shape)}"
        )
    # NaN fails both comparisons
    if losses_PN.size and not (losses_PN.min() >= low and losses_PN.max() <= high):
        plan, row = np.argwhere(~((losses_PN >= low) & (losses_PN <= high)))[0]
        raise BadData(
            f"losses must be between {low} and {high}, got {losses_PN[plan, row]} (plan {plan}, "
            f"row {row}). Correct the risk function or its range."
        )
    return losses_PN


def _permutation(order: IndexArray | None, n: int) -> IndexArray:
    """The order of the rows. Raises InvalidArgument unless each row is in it once."""
    if order is None or order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        got = "None" if order is None else f"an array of shape {order.shape}"
        raise InvalidArgument(
            f"order must be a permutation of {n} rows, got {got}; use order_from(fingerprint, n)"
        )
    return order
