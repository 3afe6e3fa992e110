"""Another gate on a trained network: the trace that recording would give, mostly without
recording.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp._support.find import find, names
from offramp.building.factories import make_gate
from offramp.comparing import gating
from offramp.comparing.gating import regated, rescored
from offramp.data.rows import rows
from offramp.errors import InvalidArgument, UnknownName
from offramp.networks.nodes import Gate, Seen
from offramp.plans.header import Header
from offramp.plans.trace import Trace
from offramp.runtime.recording import record
from small import cut_of, images_of, ladder_of, rows_of

ROWS = 100  # more than are recorded to compare


def gates() -> list[str]:
    """Every name on the shelf that makes a gate by itself."""
    found = []
    for name in names("gates"):
        try:
            gate = make_gate(name, ("a",))
            if isinstance(gate, Gate) and not isinstance(find("gates", name), type):
                found.append(name)
        except InvalidArgument:
            continue
    return found


class Brightness(Gate):
    """Reads the features at its cut: logits have none, or others."""

    def score(self, seen: Seen) -> Tensor:
        return seen.features.flatten(1).mean(1)

    def config(self):
        return {"name": "tests:Brightness"}


class Maps(Brightness):
    """Fails where there are no features of the right shape, with an error that is nobody's own."""

    def score(self, seen: Seen) -> Tensor:
        assert seen.features is not None
        if seen.features.ndim != 4:
            raise ZeroDivisionError
        return seen.features.amax((1, 2, 3))


def taken(net, source, gate) -> tuple[Trace, Trace]:
    """The trace under another gate: from the network's own one, and recorded."""
    other = regated(net, gate)
    own = record(net, source, timed=False, progress=False)
    return rescored(own, other, source, "torch"), record(other, source, timed=False, progress=False)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are recorded, call by call."""
    counted: list[int] = []
    monkeypatch.setattr(
        gating, "record", lambda *a, **options: counted.append(len(a[1])) or record(*a, **options)
    )
    return counted


def without_probe(trace: Trace) -> Header:
    """The header: the probe of a trace whose first rows alone were recorded again is of these."""
    return replace(trace.header, origin=replace(trace.header.origin, probe=None))


def same(one: Trace, other: Trace) -> None:
    assert without_probe(one) == without_probe(other)
    assert one.columns.keys() == other.columns.keys()
    for name, column in other.columns.items():
        np.testing.assert_allclose(one.columns[name], column, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_shelf_has_gates_of_all_kinds() -> None:
    assert {"margin", "max_prob", "patience", "agreement", "ensemble", "uncertainty"} <= {*gates()}


@pytest.mark.parametrize("gate", gates())
def test_a_trace_under_another_gate_is_that_of_the_regated_network(
    gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = counting(monkeypatch)
    one, other = taken(ladder_of(4), rows(rows_of(ROWS), torch.arange(ROWS) % 3), gate)
    same(one, other)
    assert counted == [gating.ROWS]  # only the first rows were recorded again


@pytest.mark.parametrize("gate", [Brightness, Maps])
def test_a_gate_that_reads_features_is_recorded(
    gate: type[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = counting(monkeypatch)
    one, other = taken(
        cut_of(), rows(images_of(ROWS), torch.arange(ROWS) % 3), f"{__name__}:{gate.__name__}"
    )
    same(one, other)
    assert counted == [gating.ROWS, ROWS]


def test_a_network_with_other_gates_is_otherwise_the_same() -> None:
    net = cut_of(gate="patience")
    net.trained_on = rows_trained()
    other = regated(net, "margin")
    assert other.backbone is net.backbone
    assert dict(other.exits.items()) == dict(net.exits.items())
    assert [node.gate_reads for node in net.topology.nodes][1] == ("stem",)
    assert [node.gate_reads for node in other.topology.nodes] == [()] * 3
    assert other.trained_on is net.trained_on
    assert other.untrained() == net.untrained() == ()
    assert regated(other, "patience").fingerprint() == net.fingerprint() != other.fingerprint()


def rows_trained():
    from offramp.plans.provenance import SeenRows

    return SeenRows("made up", "0", np.array([1, 2], np.uint64))


def test_a_cut_network_takes_other_gates_too() -> None:
    same(*taken(cut_of(), rows(images_of(ROWS), torch.arange(ROWS) % 3), "agreement"))


def test_a_gate_that_nobody_has_is_refused() -> None:
    with pytest.raises(UnknownName, match="max_prob"):
        regated(cut_of(), "max_prb")
    with pytest.raises(InvalidArgument, match="must be a name, a Gate"):
        regated(cut_of(), f"{__name__}:ROWS")
