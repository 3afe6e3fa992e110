"""Bounds: p-values for "the mean loss is above the level", and what follows from them.

A p-value is valid when P(p <= u) <= u for every u whenever E[loss] >= level, for independent rows.
Shapes: P plans, N rows. Every bound takes the same keywords; `delta` and `order` matter to betting
only.
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
CELLS = 200_000  # losses worked on at a time: about the size of a core's cache
MOST_BETS = 32_768  # beyond so many rows one bet is made on the mean of several


class Bound(Protocol):
    """What `binomial`, `hoeffding_bentkus` and `betting` have in common."""

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
        """One p-value per plan."""


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
    if ((losses_PN != 0) & (losses_PN != 1)).any() or (low, high) != (0, 1):
        other = losses_PN[(losses_PN != 0) & (losses_PN != 1)][:1]
        got = f"a loss of {other[0]}" if other.size else f"the range [{low}, {high}]"
        raise InvalidArgument(
            f"got {got}, but the bound 'binomial' is for losses of 0 and 1 only; take 'betting' "
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
    """For losses in [low, high]; does not depend on the order of the rows, nor adapts to their
    variance.

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
    """p-values of the bounds that need no more than the sum of each plan's losses.

    Args:
        bound: `binomial` or `hoeffding_bentkus`.
        sums_P: the summed losses of every plan.
        n: how many rows were summed.
        level: the risk to be shown.
        low, high: the range of a loss; for `binomial` the losses are 0 or 1, which is not checked
            here.

    Returns:
        One p-value per plan, those that the bound gives for the losses themselves.
    """
    unit = _unit_level(level, low, high)
    if not 0.0 < unit < 1.0:
        return _certain(unit, len(sums_P))
    from scipy import special

    if bound is binomial:
        exact_P: FloatArray = special.bdtr(sums_P.round(), n, unit)
        return exact_P
    counts_P = np.clip((sums_P - n * low) / (high - low), 0.0, n)
    means_P = np.minimum(counts_P / n, unit)
    entropy_P = special.rel_entr(means_P, unit) + special.rel_entr(1.0 - means_P, 1.0 - unit)
    bentkus_P = math.e * special.bdtr(np.ceil(counts_P), n, unit)
    p_P: FloatArray = np.minimum(np.minimum(np.exp(-n * entropy_P), bentkus_P), 1.0)
    return p_P


def betting(
    losses_PN: LossArray,
    level: float,
    *,
    low: float,
    high: float,
    delta: float,
    order: IndexArray | None,
) -> FloatArray:
    """For losses in [low, high], adapting to their variance: p = 1 / the largest wealth ever
    reached.

    On [0, 1] a gambler starts with 1 and stakes nu_t against row x_t: K_t = prod (1 - nu_i (x_i -
    m)). If E[x] >= m, K is a non-negative supermartingale, whatever nu_t makes of the rows before
    t, and exceeds 1/u ever with probability <= u (Ville). Predictable plug-in, t = 1..N, s2_0 =
    1/4: nu_t = min(0.75 / (1 - m), sqrt(2 ln(1/delta) / (N s2_{t-1}))).
    `order` is the order of the rows, fixed before they were seen (`testing.order_from`).

    Of more than 32,768 rows, so many follow each other in that order (`rows_per_bet`, by N alone)
    that at most 32,768 bets are made, each on the mean x of several rows. Nothing changes in the
    proof: such means lie in [0, 1], are independent and have the expectation of a row. Little is
    lost: the best stake against a mean of b rows is b times the best one against a row, until the
    cap binds, and with so many rows stakes are small.

    Waudby-Smith and Ramdas, 2020, arXiv 2010.09686. We keep only the bet against a large mean
    (one-sided).
    """
    losses_PN = _checked(losses_PN, low, high)
    plans, n = losses_PN.shape
    order = _permutation(order, n)
    if not 0.0 < delta < 1.0:
        raise InvalidArgument(
            f"got delta={delta}, expected a number between 0 and 1; give 1 - confidence"
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
    """How many rows in a row one bet of `betting` is about: 1 up to 32,768 rows, then as many as
    needed.
    """
    return max(1, -(-n // MOST_BETS))


def from_bets(
    sums_PB: FloatArray, n: int, level: float, *, low: float, high: float, delta: float
) -> FloatArray:
    """p-values of `betting` from the summed losses of the rows of each bet.

    Args:
        sums_PB: for every plan the summed losses of the first `rows_per_bet(n)` rows in the order,
            of the next ones, and so on; the last sum may be of fewer rows.
        n: how many rows there are in all.
        level: the risk to be shown.
        low, high: the range of a loss.
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
    n = x_PN.shape[1]
    t_N = np.arange(1.0, n + 1.0)
    work_PN = np.cumsum(x_PN, axis=1)
    work_PN += 0.5
    work_PN /= t_N + 1.0  # mu_t
    np.subtract(x_PN, work_PN, out=work_PN)
    np.square(work_PN, out=work_PN)
    np.cumsum(work_PN, axis=1, out=work_PN)
    nu_PN = np.empty_like(x_PN)
    nu_PN[:, 0] = 0.25
    np.add(work_PN[:, :-1], 0.25, out=nu_PN[:, 1:])  # t s2_{t-1}
    np.divide(t_N * (2.0 * math.log(1.0 / delta) / n), nu_PN, out=nu_PN)
    np.sqrt(nu_PN, out=nu_PN)
    np.minimum(nu_PN, CAP / (1.0 - unit), out=nu_PN)
    x_PN -= unit
    x_PN *= nu_PN
    np.negative(x_PN, out=x_PN)
    np.log1p(x_PN, out=x_PN)  # CAP < 1 keeps it finite
    np.cumsum(x_PN, axis=1, out=x_PN)
    largest_P: FloatArray = np.maximum(x_PN.max(axis=1), 0.0)
    return largest_P


def find_bound(name: str | None, risk: Risk) -> Bound:
    """The bound of that name, or the best one for the risk: exact for 0/1 losses, otherwise
    betting.
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
            f"got the bound 'binomial' for the risk {risk.name!r}, whose losses are not only 0 "
            f"and 1; "
            f"expected one of {names}, take one of those"
        )
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "take one of these"
    raise UnknownName(f"no bound is called {name!r}, expected one of {names}; {hint}")


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

    Every bound here falls in the level, so halving finds it; binomial's is the exact limit of
    Clopper and Pearson, 1934. Found by looking at the rows: no promise until it is certified on
    fresh ones.
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
    """The smallest level in [low, high] with `p_at(level) <= delta`, to 1e-6 from above; p_at must
    not rise.
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
    """A two-sided interval for the mean loss, each side missing with half of 1 - confidence.

    0/1 losses: Clopper and Pearson, 1934 (`binary=None`: when the range is [0, 1] and all losses
    seen are 0 or 1; better say it: `Risk.binary`). Others: betting on either side, Waudby-Smith and
    Ramdas, 2020, arXiv 2010.09686, in a fixed order that depends on N only, widened where needed to
    hold the mean seen.
    """
    confidence = require("confidence", confidence, above=0, below=1)
    losses_N = _checked(np.asarray(losses_N)[None], low, high)[0].astype(np.float64)
    n = len(losses_N)
    half = (1.0 - confidence) / 2.0
    if binary is None:
        binary = (low, high) == (0, 1) and bool(np.isin(losses_N, (0, 1)).all())
    if binary:
        binomial(losses_N[None], 0.5, low=low, high=high)  # checks the losses
        count = int(losses_N.sum())
        return 1.0 - _clopper_pearson(n - count, n, half), _clopper_pearson(count, n, half)
    order = order_from(f"interval of {n} rows", n)
    mean = float(losses_N.mean())
    upper = smallest_level(losses_N, betting, half, low=low, high=high, order=order)
    lower = -smallest_level(-losses_N, betting, half, low=-high, high=-low, order=order)
    return min(lower, mean), max(upper, mean)


def rows_needed(level: float, confidence: float, *, observed: float = 0.0) -> int:
    """From this many rows on, 0/1 losses with a mean of `observed` always pass the exact test.

    N losses of mean r count as ceil(N r). Some smaller N pass too: the smallest N that passes goes
    up and down like a saw, because the next loss comes in one piece.

    >>> rows_needed(0.01, 0.95), rows_needed(0.01, 0.95, observed=0.0025)
    (299, 628)
    """
    level = require("level", level, above=0, below=1)
    confidence = require("confidence", confidence, above=0, below=1)
    observed = require("observed", observed, low=0, below=level)

    from scipy import special

    def rows(count: int) -> int:  # the fewest rows that pass with this many losses
        fails = count
        passes = count + 1
        while special.bdtr(count, passes, level) > 1.0 - confidence:
            fails = passes
            passes = 2 * passes
        while passes - fails > 1:
            middle = (fails + passes) // 2
            ok = special.bdtr(count, middle, level) <= 1.0 - confidence
            fails, passes = (fails, middle) if ok else (middle, passes)
        return passes

    fails, passes = 0, 1  # in losses: the first N that counts as many does not pass, passes
    while observed > 0.0 and rows(passes) > math.floor((passes - 1) / observed + 1e-9) + 1:
        fails = passes
        passes = 2 * passes
    while passes - fails > 1:
        middle = (fails + passes) // 2
        ok = rows(middle) <= math.floor((middle - 1) / observed + 1e-9) + 1
        fails, passes = (fails, middle) if ok else (middle, passes)
    return rows(fails)


def rows_by_observed(level: float, confidence: float) -> dict[float, int]:
    """By observed risk (none, a quarter, a half and three quarters of a level) the rows that
    certify the level.
    """
    observed = [level * part for part in (0.0, 0.25, 0.5, 0.75)]
    return {risk: rows_needed(level, confidence, observed=risk) for risk in observed}


def _clopper_pearson(count: int, n: int, delta: float) -> float:
    """The smallest level with P(Bin(n, level) <= count) <= delta, one float step on the safe
    side.
    """
    if count >= n:
        return 1.0
    from scipy import special

    exact = float(special.betaincinv(count + 1, n - count, 1.0 - delta))
    return min(exact * (1.0 + 1e-12), 1.0)


def _certain(unit: float, plans: int) -> FloatArray:
    """p-values outside the range: a level below every loss is never shown, one above always
    kept.
    """
    return np.full(plans, 1.0 if unit <= 0.0 else 0.0)


def _unit_level(level: float, low: float, high: float) -> float:
    if not math.isfinite(level):
        raise InvalidArgument(
            f"got the level {level}, expected a finite number; give the largest risk you accept"
        )
    return (level - low) / (high - low)


def _checked(losses_PN: LossArray, low: float, high: float) -> LossArray:
    losses_PN = np.asarray(losses_PN)
    if losses_PN.ndim != 2 or losses_PN.shape[1] == 0 or losses_PN.dtype.kind not in "biuf":
        raise BadData(
            f"got losses of shape {losses_PN.shape} and type {losses_PN.dtype}, expected numbers "
            f"[P, N] on at "
            "least one row; give one row of losses per plan"
        )
    if losses_PN.size and not (losses_PN.min() >= low and losses_PN.max() <= high):  # NaN fails too
        plan, row = np.argwhere(~((losses_PN >= low) & (losses_PN <= high)))[0]
        raise BadData(
            f"got a loss of {losses_PN[plan, row]} (plan {plan}, row {row}), expected numbers in "
            f"[{low}, {high}]; "
            "correct the risk function or its range"
        )
    return losses_PN


def _permutation(order: IndexArray | None, n: int) -> IndexArray:
    if order is None or order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        got = "no order" if order is None else f"an order of shape {order.shape}"
        raise InvalidArgument(
            f"got {got}, expected a permutation of {n} rows; take order_from(fingerprint, n)"
        )
    return order
