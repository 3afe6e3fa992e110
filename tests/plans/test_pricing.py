"""What plans cost, against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.errors import InvalidArgument
from offramp.plans.pricing import Prices
from offramp.plans.schedule import compiled
from offramp.plans.topology import Node, Topology

PLAIN = Topology.chain([Node("a"), Node("b"), Node("c")])
READING = Topology.chain([Node("a"), Node("b"), Node("c", exit_reads=("b",))])
TRUNK = Topology.chain([Node("a"), Node("b", after=("a",)), Node("c", after=("b",))])
PARTS = {
    "segment/a": np.array([10.0, 1.0, 0.1]),
    "segment/b": np.array([20.0, 2.0, 0.2]),
    "segment/c": np.array([40.0, 4.0, 0.4]),
    "exit/b": np.array([3.0, 0.0, 0.0]),
    "gate/a": np.array([1.0, 0.5, 0.0]),
    "gate/b": np.array([1.0, 0.5, 0.0]),
}
EXITS = np.array([0, 0, 1, 2])


def schedule(topology, gates, max_exit=None):
    """The schedule of a plan with these gates open."""
    return compiled(topology, dict.fromkeys(gates, (0.0,)), max_exit)


def ran(topology, of, exits):
    """Which stages ran for rows that left a chain at these exits, [N, stages]."""
    return np.stack([exits >= topology.exit_index(stage.name) for stage in of], axis=1)


def mean(topology, gates, unit="macs", batch=1, max_exit=None, exits=EXITS, parts=PARTS):
    of = schedule(topology, gates, max_exit)
    return Prices(topology, parts).mean(of, ran(topology, of, exits), unit=unit, batch=batch)


@pytest.mark.parametrize(
    ("topology", "gates", "max_exit", "exits", "want"),
    [
        (PLAIN, "ab", None, EXITS, 11 + 0.5 * 24 + 0.25 * 40),
        (PLAIN, "a", None, [0, 0, 2, 2], 11 + 0.5 * 40),
        (PLAIN, "", None, [2, 2], 40),
        (PLAIN, "b", None, [1, 2], 24 + 0.5 * 40),
        (PLAIN, "ab", "b", [0, 1], 11 + 0.5 * 23),
        (READING, "a", None, [0, 2], 11 + 0.5 * 23 + 0.5 * 40),
        (TRUNK, "", None, [2, 2], 70),
        (TRUNK, "b", None, [1, 2], 10 + 24 + 0.5 * 40),
    ],
)
def test_macs(topology, gates, max_exit, exits, want):
    assert mean(topology, gates, max_exit=max_exit, exits=np.array(exits)) == pytest.approx(want)


def test_milliseconds_charge_a_call_when_anyone_arrives():
    assert mean(PLAIN, "ab", "ms", 1) == pytest.approx(1.6 + 0.5 * 2.7 + 0.25 * 4.4)
    calls = [1, 1 - 0.5**8, 1 - 0.75**8]
    want = [1.5 * calls[0] / 8 + 0.1, 2.5 * calls[1] / 8 + 0.5 * 0.2, 4 * calls[2] / 8 + 0.25 * 0.4]
    assert mean(PLAIN, "ab", "ms", 8) == pytest.approx(sum(want))


def test_a_price_per_row():
    parts = {
        **PARTS,
        "segment/b": np.array([[100.0, 0, 0], [200.0, 0, 0], [300.0, 0, 0], [400.0, 0, 0]]),
    }
    assert mean(PLAIN, "ab", parts=parts) == pytest.approx(11 + (304 + 404) / 4 + 0.25 * 40)


@pytest.mark.parametrize(
    ("topology", "gates", "max_exit", "want"),
    [
        (PLAIN, "ab", None, [11, 35, 75]),
        (PLAIN, "a", None, [11, 11, 51]),
        (PLAIN, "", None, [0, 0, 40]),
        (PLAIN, "ab", "b", [11, 34]),
        (PLAIN, "", "a", [10]),
        (TRUNK, "", None, [10, 30, 70]),
        (READING, "", None, [0, 23, 63]),
    ],
)
def test_to_exit(topology, gates, max_exit, want):
    assert Prices(topology, PARTS).to_exit(gates, max_exit).tolist() == want


def test_to_exit_and_mean_agree_in_macs():
    prices = Prices(PLAIN, PARTS)
    assert prices.to_exit("ab", None)[EXITS].mean() == pytest.approx(mean(PLAIN, "ab"))


def test_to_exit_shares_a_call_among_the_batch():
    assert Prices(PLAIN, PARTS).to_exit("ab", None, unit="ms", batch=10) == pytest.approx(
        [0.25, 0.7, 1.5]
    )


@pytest.mark.parametrize(
    ("topology", "reference", "want"),
    [(PLAIN, "c", 40), (PLAIN, "b", 23), (TRUNK, "c", 70), (TRUNK, "b", 33)],
)
def test_plain_is_one_network_without_gates(topology, reference, want):
    assert Prices(topology, PARTS).plain(reference, unit="macs", batch=1) == want


def test_what_was_not_measured_cannot_be_priced():
    parts = {**PARTS, "segment/b": np.array([20.0, np.nan, np.nan])}
    assert mean(PLAIN, "ab", parts=parts) > 0
    with pytest.raises(InvalidArgument, match=r"segment/b.*not measured"):
        mean(PLAIN, "ab", "ms", parts=parts)


@pytest.mark.parametrize(("unit", "batch"), [("seconds", 1), ("macs", 0), ("ms", -3)])
def test_units_and_batches_that_are_none(unit, batch):
    prices = Prices(PLAIN, PARTS)
    for ask in (
        lambda: prices.plain("c", unit=unit, batch=batch),
        lambda: mean(PLAIN, "", unit, batch),
        lambda: prices.to_exit("", None, unit=unit, batch=batch),
    ):
        with pytest.raises(InvalidArgument):
            ask()


RUNNING = {
    **PARTS,
    "runner": np.array([0.0, 0.8, 0.01]),
    "runner/a": np.array([0.0, 0.4, 0.0]),
    "runner/b": np.array([0.0, 0.2, 0.0]),
    "plain": np.array([0.0, 3.0, 0.3]),
}


def test_milliseconds_hold_the_runner_and_the_bare_plain_network():
    prices = Prices(PLAIN, RUNNING)
    assert mean(PLAIN, "ab", "ms", parts=RUNNING) == pytest.approx(
        0.81 + 2.0 + 0.5 * 2.9 + 0.25 * 4.4
    )
    assert mean(PLAIN, "", "ms", 8, parts=RUNNING) == pytest.approx(
        0.1 + 0.01 + 0.25 * 0.4 + 4 / 8 * (1 - 0.75**8)
    )
    assert prices.plain("c", unit="ms", batch=1) == pytest.approx(3.3)
    assert prices.plain("b", unit="ms", batch=1) == pytest.approx(2.2)
    np.testing.assert_allclose(
        prices.to_exit("ab", None, unit="ms", batch=1), [2.81, 2.81 + 2.9, 2.81 + 2.9 + 4.4]
    )
    assert prices.with_runner
    assert not Prices(PLAIN, PARTS).with_runner


def test_the_runner_has_no_macs():
    for parts in (PARTS, RUNNING):
        assert mean(PLAIN, "ab", parts=parts) == pytest.approx(11 + 0.5 * 24 + 0.25 * 40)
        assert Prices(PLAIN, parts).plain("c", unit="macs", batch=1) == 40


@pytest.mark.parametrize(
    ("topology", "macs", "unknown"),
    [
        (PLAIN, (1, 1, 1), ()),
        (PLAIN, (1, 1, 0), ("c",)),
        (PLAIN, (0, 1, 1), ("a",)),
        (PLAIN, (1, np.nan, 1), ("b",)),
        (TRUNK, (0, 1, 0), ()),  # a piece that computes nothing is no model that does
        (TRUNK, (0, 0, 0), ("c",)),
        (TRUNK, (1, np.nan, 1), ("c",)),
    ],
)
def test_models_whose_macs_nobody_knows(topology, macs, unknown):
    parts = {
        f"segment/{name}": np.array([each, 1.0, 1.0])
        for name, each in zip("abc", macs, strict=True)
    }
    prices = Prices(topology, parts)
    assert prices.uncounted == unknown
    assert prices.unit(None) == ("ms" if unknown else "macs")
    assert prices.unit("ms") == "ms"
    if not unknown:
        assert prices.unit("macs") == "macs"
        return
    with pytest.raises(InvalidArgument, match="use unit='ms'"):
        prices.unit("macs")
    untimed = {name: np.array([price[0], np.nan, np.nan]) for name, price in parts.items()}
    with pytest.raises(InvalidArgument, match="record with timed=True"):
        Prices(topology, untimed).unit(None)
