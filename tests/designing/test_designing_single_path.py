"""Training a supernet: averaged gradients of single paths, tasks in turn, and batch norms estimated
anew.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.designing.single_path import loss_of, reestimate, train_supernet
from offramp.designing.supernet import Subnet
from offramp.errors import BadData, InvalidArgument, OverlappingRows
from small import images_of
from supernets import supernet_of

X = images_of(64)
Y = (X.mean((1, 2, 3)) > 0).long()
DATA = {"three": (X, Y), "two": (X, 1 - Y)}


def test_a_step_averages_the_gradients_of_its_paths():
    one = supernet_of()
    other = supernet_of()
    drawn = []
    draw = other.drawn

    def noted(rng):
        drawn.append(draw(rng))
        return drawn[-1]

    other.drawn = noted
    options = {
        "steps": 1,
        "paths": 3,
        "batch_size": 64,
        "rate": 0.5,
        "decay": 0.0,
        "smoothing": 0.1,
    }
    train_supernet(other, DATA, progress=False, **options)
    rows = np.random.default_rng(0).integers(0, 64, 64)
    one.train()
    losses = [loss_of(one(X[rows], subnet, "three"), Y[rows], 0.1) for subnet in drawn]
    (sum(losses) / 3).backward()
    assert len(drawn) == 3
    before = supernet_of().state_dict()
    for name, value in one.named_parameters():
        step = 0 if value.grad is None else 0.5 * value.grad
        torch.testing.assert_close(
            dict(other.named_parameters())[name], before[name] - step, atol=1e-5, rtol=1e-4
        )


def test_the_loss_is_that_of_the_head_and_the_mean_of_the_exits():
    logits = torch.randn(3, 6, 4).unbind()
    y = torch.arange(6) % 4
    each = [cross_entropy(one, y, label_smoothing=0.2) for one in logits]
    torch.testing.assert_close(loss_of(logits, y, 0.2), each[2] + (each[0] + each[1]) / 2)
    torch.testing.assert_close(loss_of(logits[2:], y, 0.2), each[2])


def test_tasks_take_turns_and_all_learn():
    net = supernet_of()
    losses = train_supernet(net, DATA, steps=120, batch_size=32, rate=0.1, progress=False)
    assert {task: len(values) for task, values in losses.items()} == {"three": 60, "two": 60}
    for values in losses.values():
        assert np.mean(values[-10:]) < np.mean(values[:10])
    assert not net.training
    model = net.extract(Subnet((0, 0, 0)), "two")
    reestimate(model, X.split(32))
    assert (model(X).argmax(1) == 1 - Y).float().mean() > 0.8


def test_a_limit_keeps_networks_out():
    net = supernet_of()
    before = {name: value.clone() for name, value in net.named_parameters()}
    train_supernet(
        net,
        DATA,
        steps=4,
        batch_size=16,
        within=lambda subnet, task: subnet.options[0] == 3,
        progress=False,
    )
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert not any(name.startswith("options.0.") for name in moved)  # only "skip" stood there
    assert any(name.startswith("options.1.") for name in moved)
    with pytest.raises(InvalidArgument, match=r"must allow some networks of .*got none of 100"):
        train_supernet(net, DATA, steps=1, within=lambda *_: False, progress=False)


def test_the_same_seed_gives_the_same_weights():
    nets = [supernet_of(), supernet_of()]
    for net in nets:
        train_supernet(net, DATA, steps=3, batch_size=16, seed=5, progress=False)
    for one, other in zip(
        nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_rows_that_trained_it_promise_nothing():
    net = supernet_of()
    train_supernet(net, DATA, steps=4, batch_size=32, progress=False)
    hung = net.network(Subnet((0, 0, 0), ("body.1",)), "three")
    trace = off.record(hung, (X, Y), timed=False, progress=False)
    with pytest.raises(OverlappingRows):
        off.calibrate(trace, risk="accuracy_gap", at_most=0.5)


def test_batch_norms_get_the_statistics_of_their_own_rows():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    with torch.no_grad():
        model[0].running_mean.fill_(7.0)
    reestimate(model, [X[:32] * 3 + 1, X[32:] * 3 + 1])
    batches = [X[:32] * 3 + 1, X[32:] * 3 + 1]
    torch.testing.assert_close(
        model[0].running_mean, torch.stack([part.mean() for part in batches]).mean()[None]
    )
    torch.testing.assert_close(
        model[0].running_var, torch.stack([part.var() for part in batches]).mean()[None]
    )
    assert model[0].momentum == 0.1
    assert not model[0].training
    before = model[0].running_mean.clone()
    model(X)
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (
            {"three": (X, Y)},
            {},
            InvalidArgument,
            r"rows for each of the tasks",
        ),
        (
            {**DATA, "two": (X, Y + 1)},
            {},
            BadData,
            "labels of the task 'two' must be 0 to 1, got 1 to 2",
        ),
        ({**DATA, "two": X}, {}, BadData, "'two' must have labels"),
        (DATA, {"paths": 0}, InvalidArgument, "paths must be a whole number of at least 1, got 0"),
    ],
)
def test_rows_and_numbers_that_cannot_train_are_refused(data, options, error, says):
    with pytest.raises(error, match=says):
        train_supernet(supernet_of(), data, steps=1, progress=False, **options)
