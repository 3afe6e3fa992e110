"""`consecutive`: the loss of BNext, the turns of its teachers, and the temperature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import convert
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.binary import Binary
from offramp.recipes.consecutive import Consecutive, _adamw, _scheduled, consecutive_loss
from small import images_of, stages

X = images_of(48)


def binary():
    return convert(stages(), {"blocks.*.1": "binary"})


def test_the_loss():
    draw = torch.Generator().manual_seed(0)
    logits, one, other = (torch.randn(6, 4, generator=draw) for _ in range(3))
    ways = [
        torch.nn.functional.cross_entropy(logits, t.softmax(-1), reduction="none")
        for t in (one, other)
    ]
    alpha = torch.stack(ways).softmax(0)
    wanted = (alpha[0] * ways[0] + alpha[1] * ways[1]).mean() / 2
    assert torch.allclose(consecutive_loss(logits, [one, other]), wanted)
    assert torch.allclose(consecutive_loss(logits, [one]), ways[0].mean())


def test_it_learns_without_labels():
    teacher = stages()
    model = binary()
    with torch.no_grad():
        teacher.head.weight.mul_(5)
        before = consecutive_loss(model(X), [teacher(X)])
    off.fit(
        model,
        X,
        recipe="consecutive",
        teachers=[teacher],
        epochs=20,
        rate=1e-2,
        batch_size=16,
        progress=False,
    )
    with torch.no_grad():
        assert consecutive_loss(model(X), [teacher(X)]) < before
    assert all(float(part.done) == 1 for part in model.modules() if isinstance(part, Binary))


def test_assistants_take_turns():
    calls = []

    class Teacher(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name
            self.model = stages()

        def forward(self, x):
            calls.append(self.name)
            return self.model(x)

    teachers = [Teacher("first"), Teacher("second"), Teacher("main")]
    recipe = Consecutive(teachers, epochs=4)
    off.fit(binary(), X, recipe=recipe, batch_size=24, progress=False)
    assert calls.count("main") == 8
    assert [name for name in calls if name != "main"] == ["first"] * 4 + ["second"] * 4


def test_rates_and_decay():
    values = [nn.Parameter(torch.zeros(2, 2, 1, 1)), nn.Parameter(torch.zeros(2))]
    optimizer = _adamw(values, rate=1e-3, decay=1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 1e-8]
    schedule = _scheduled(optimizer, 100, warm=0.1)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == rates[10] == pytest.approx(1e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teachers": []}, "needs teachers="),
        ({"teachers": ["resnet"]}, "needs teachers="),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"warm": 2.0}, "warm must be at least 0 and below 1, got 2.0"),
    ],
)
def test_what_it_refuses(options, says):
    with pytest.raises(InvalidArgument, match=says):
        off.fit(
            binary(), X, recipe=Consecutive(**{"teachers": [stages()], **options}), progress=False
        )


def test_ladders_are_refused():
    net = off.ladder({"a": binary(), "b": stages()}).eval()
    with pytest.raises(BadNetwork, match="got a ladder of 2"):
        off.fit(net, X, recipe=Consecutive([stages()]), progress=False)
