"""Stages one at a time, with queues of the caller's own: several batches share them, and two
machines share a schedule.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from forked import WIDTH, three
from offramp.errors import BadData, StaleRunner
from offramp.runtime.merging import Group
from offramp.runtime.outputs import OutputBuffer
from small import ladder_of, rows_of

FORKED = off.Plan.by_hand({"size": (1.0, 0.0), "middle": 1.0})
CHAIN = off.Plan.by_hand({"small": 0.5})


def whole_numbers(count):
    """Rows whose sums are exact in any batch."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(-4, 5, (count, WIDTH), generator=draw).float()


def opened(kind):
    """A runner and rows of a network with forks, and of a ladder, also on another engine."""
    if kind == "forks":
        return off.open(three(), FORKED), whole_numbers(60)
    if kind == "ladder":
        return off.open(ladder_of(2), CHAIN), rows_of(60)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = rows_of(60)
    return off.open(ladder_of(2), CHAIN, engine="onnxruntime", example=x[:4]), x


def buffer(runner, count):
    return OutputBuffer(count, runner.device, runner.topology.exits, 0)


def require_same(got, wanted):
    torch.testing.assert_close(got.logits, wanted.logits)
    for name in ("exit", "why", "flagged"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))


@pytest.mark.parametrize("kind", ["forks", "ladder", "ladder on onnxruntime"])
def test_rows_of_several_batches_run_together_and_get_what_a_call_gives(kind):
    runner, x = opened(kind)
    answers = buffer(runner, 60)
    first = runner.stages[0].name
    waiting = {first: [runner.enter(x[:20]), runner.enter(x[20:55], 20), runner.enter(x[55:], 55)]}
    ran = []
    for stage in runner.stages:
        groups = waiting.pop(stage.name)
        before = [dict(group.state) for group in groups]
        runner.advance(stage.name, groups, answers, waiting)
        assert [group.state.keys() for group in groups] == [state.keys() for state in before]
        ran.append(stage.name)
    assert not waiting
    assert ran == [stage.name for stage in runner.plan.schedule(runner.topology)]
    require_same(answers.answers(), runner(x))


@pytest.mark.parametrize("kind", ["forks", "ladder"])
def test_what_goes_on_may_cross_a_link_as_bytes(kind):
    here, x = opened(kind)
    there, _ = opened(kind)
    answers = buffer(here, 60)
    waiting = {here.stages[0].name: [here.enter(x)]}
    for number, stage in enumerate(here.stages):
        groups = waiting.pop(stage.name)
        if number == 0:
            here.advance(stage.name, groups, answers, waiting)
        else:
            there.advance(stage.name, [sent(group) for group in groups], answers, waiting)
    require_same(answers.answers(), here(x))


def sent(group):
    """A group as it comes out of a message without pickles."""
    message = io.BytesIO()
    tensors = {f"state/{name}": value.numpy() for name, value in group.state.items()}
    np.savez(message, allow_pickle=False, rows=group.rows, **tensors)
    message.seek(0)
    with np.load(message, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[f"state/{name}"]) for name in group.state}
        return Group(arrays["rows"], state, group.size, None)


def test_rows_are_checked_where_they_enter_and_changes_where_they_run():
    net = ladder_of(2)
    runner = off.open(net, CHAIN)
    with pytest.raises(BadData, match="one and the same number of rows"):
        runner.enter({"x": rows_of(4), "y": rows_of(3)})
    group = runner.enter(rows_of(4))
    net.backbone.small = nn.Linear(3, 3)
    with pytest.raises(StaleRunner):
        runner.enter(rows_of(4))
    assert group.size == 4
