"""Testing: the count that RC-EENN gets wrong by one, orders that nobody chooses, and promises
kept.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offramp.errors import InvalidArgument
from offramp.guarantees.bounds import binomial, find_bound
from offramp.guarantees.risks import find_risk
from offramp.guarantees.testing import fixed_sequence, order_from, split_from


@pytest.fixture(scope="module")
def promises():
    file = Path(__file__).parents[2] / "benchmarks" / "promises.py"
    spec = importlib.util.spec_from_file_location("promises", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["promises"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["promises"]


@pytest.mark.parametrize(
    ("p", "count"),
    [
        ([], 0),
        ([0.2], 0),
        ([0.05], 1),
        ([0.01, 0.04, 0.20, 0.01], 2),
        ([0.2, 0.0, 0.0], 0),
        ([0.0, 0.0, 0.0], 3),
        ([0.0, np.nan, 0.0], 1),
        ([np.nan, 0.0], 0),
    ],
)
def test_leading_plans_are_counted(p, count):
    assert fixed_sequence(p, delta=0.05) == count
    assert fixed_sequence(np.array(p), 0.05) == count


@given(st.lists(st.floats(0, 1) | st.just(float("nan"))), st.floats(0.001, 0.999))
def test_what_is_counted_passed_and_the_next_did_not(p, delta):
    count = fixed_sequence(p, delta)
    assert all(value <= delta for value in p[:count])
    assert count == len(p) or not p[count] <= delta


def test_delta_is_checked():
    for delta in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InvalidArgument, match="1 - confidence"):
            fixed_sequence([0.1], delta)


def broken_draws(return_index_of_the_first_failure):
    """A grid of 11 points, coarse: risk 0, 0.02, ..., 0.20 against a level of 0.1, 500 rows, 2,000
    draws.
    """
    rng = np.random.default_rng(1)
    draws = 2000
    delta = 0.1
    risk_P = np.arange(11) * 0.02
    count = 0
    for _ in range(draws):
        p = binomial(rng.random(500) < risk_P[:, None], 0.1)
        safe = fixed_sequence(p, delta)
        plan = min(safe, 10) if return_index_of_the_first_failure else safe - 1
        count += risk_P[plan] >= 0.1
    return count, stats.binom.ppf(0.999, draws, delta)


def test_the_off_by_one_of_rc_eenn_stays_out():
    ours, allowed = broken_draws(return_index_of_the_first_failure=False)
    assert 0 < ours <= allowed
    theirs, _ = broken_draws(return_index_of_the_first_failure=True)
    assert theirs > 4 * allowed  # so the test above can tell


def test_order_is_a_permutation_that_the_data_alone_decides():
    order = order_from("rows", 1000)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, order_from(b"rows", 1000))
    assert (order == order_from("other rows", 1000)).mean() < 0.02
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert order_from("rows", 0).shape == (0,)
    with pytest.raises(InvalidArgument, match="-1 rows"):
        order_from("rows", -1)


def test_order_is_the_same_for_ever():
    """A promise can be checked again years later: these numbers may never change."""
    assert order_from("offramp", 8).tolist() == [0, 3, 5, 1, 2, 4, 7, 6]
    assert [rows.tolist() for rows in split_from("offramp", 12, 0.4)] == [
        [0, 1, 2, 7, 10],
        [3, 4, 5, 6, 8, 9, 11],
    ]


@given(st.text(max_size=5), st.integers(2, 200), st.floats(0.001, 0.999))
def test_split_parts_the_rows(fingerprint, n, share):
    search, certify = split_from(fingerprint, n, share)
    assert sorted([*search, *certify]) == list(range(n))
    assert (np.diff(search) > 0).all()
    assert (np.diff(certify) > 0).all()
    assert len(certify) >= 1
    assert abs(len(search) - share * n) <= 1


def test_split_is_another_stream_than_order():
    search, _ = split_from("rows", 1000, 0.5)
    first = order_from("rows", 1000)[:500]
    assert 200 < len(np.intersect1d(search, first)) < 300
    assert [len(rows) for rows in split_from("rows", 2, 0.01)] == [1, 1]
    assert [len(rows) for rows in split_from("rows", 2, 0.99)] == [1, 1]
    for n, share in [(1, 0.5), (10, 0.0), (10, 1.0), (10, float("nan"))]:
        with pytest.raises(InvalidArgument, match=r"search (share|rows)"):
            split_from("rows", n, share)


def test_the_populations_are_hard(promises):
    """Risk just above the level at the edge, below before it, and not monotone."""
    for population in promises.populations(None):
        assert population.path_P[0] == np.inf
        for risk in promises.RISKS:
            true_P = population.losses_PM(risk).mean(axis=1, dtype=float)
            level = promises.hard_level(risk, population)
            assert np.argmax(true_P > level) == promises.EDGE
            assert true_P[promises.EDGE] < level * 1.001
            assert true_P[: promises.EDGE].max() < 0.8 * level
            assert (np.diff(true_P) < 0).any() or population.name == "edge"


@pytest.mark.parametrize("name", ["edge", "waves", "mixed"])
@pytest.mark.parametrize(
    ("risk", "bound"), [("disagreement", "binomial"), ("accuracy_gap", "betting")]
)
def test_promises_are_kept(promises, name, risk, bound):
    """The benchmark in small: 200 calibration sets of 600 rows."""
    population = next(p for p in promises.populations(None) if p.name == name)
    risk = find_risk(risk)
    level = promises.hard_level(risk, population)
    settings = {"n": 600, "draws": 200, "level": level, "delta": 0.1, "seed": 2}
    outcome = promises.simulate(risk, find_bound(bound, risk), population, **settings)
    assert 0 < outcome.broken <= stats.binom.ppf(0.999, 200, 0.1) / 200
    assert outcome.promised > 0.9
    assert outcome.mean_cost < 0.95


def test_the_benchmark_sees_a_broken_promise(promises):
    """The same draws, with "p-values" that only look at the mean."""
    population = next(p for p in promises.populations(None) if p.name == "edge")
    risk = find_risk("accuracy_gap")
    settings = {
        "n": 600,
        "draws": 100,
        "level": promises.hard_level(risk, population),
        "delta": 0.1,
        "seed": 2,
    }

    def mean_below(losses_PN, level, **_):
        return (losses_PN.mean(axis=1) > level).astype(float)

    assert promises.simulate(risk, mean_below, population, **settings).broken > 0.3


def test_the_benchmark_runs_and_writes(promises, tmp_path, capsys):
    rng = np.random.default_rng(3)
    answers = rng.integers(3, size=(500, 2))
    own = {"scores": rng.normal(size=(500, 1)), "answers": answers, "labels": answers[:, 1]}
    np.savez(tmp_path / "mine.npz", **own)
    arguments = [
        "--draws",
        "3",
        "--rows",
        "200",
        "--json",
        str(tmp_path / "out.json"),
        "--data",
        str(tmp_path),
    ]
    assert promises.main(arguments) in (0, 1)
    printed = capsys.readouterr().out
    assert "mine" in printed
    assert "waves" in printed
    assert '"broken"' in (tmp_path / "out.json").read_text()
