"""Imitation of the last exit: the loss by hand, and a stream without labels from requests to a
promise.
"""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.cli.demonstration import fit as trained
from offramp.errors import BadNetwork, InvalidArgument, OverlappingRows
from offramp.exits.pooled import Pooled
from offramp.models.digits import preprocess
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.imitated import Imitated
from small import cut_of, images_of, ladder_of, seeded

X = images_of(48)


def test_the_loss_by_hand():
    net = cut_of(exits="linear")
    seen = dict(net.look(X))
    for one in seen.values():
        one.own.retain_grad()
    outputs = TrainingOutputs(
        {name: s.own for name, s in seen.items()},
        {name: s.features for name, s in seen.items()},
        {},
        net,
    )
    losses = Imitated().loss(outputs, TrainingBatch(None, torch.arange(48), "stream"))
    assert [*losses] == ["stem", "blocks.0"]
    p, q = (outputs.logits[name].softmax(-1) for name in ("stem", "backbone"))
    kl = (q * (q / p).log()).sum(1).mean()
    torch.testing.assert_close(losses["stem"], kl / 3)  # over rows and classes
    torch.stack([*losses.values()]).sum().backward()
    assert outputs.logits["stem"].grad.any()
    assert outputs.logits["backbone"].grad is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="rate must be above 0, got 0"):
        Imitated(rate=0.0).prepare(cut_of())
    with pytest.raises(BadNetwork, match="parameters"):
        Imitated().prepare(ladder_of(2))


def test_a_stream_without_labels_ends_in_a_promise(tmp_path):
    digits = next(off.rows("digits").batches(1797))
    model = seeded(
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(2048, 10),
        ),
        0,
    )
    first = next(off.rows("digits[0:500]").batches(500))
    model = trained(model, preprocess(), first, epochs=6)
    net = seeded(
        lambda: off.cut(model, digits.x[:4], at=["1"], exits="mlp", preprocess=preprocess()), 0
    )
    stream = off.rows(digits.x[500:])  # requests: images and nothing else
    weights = [value.clone() for value in model.parameters()]
    for come in (400, 800):  # trained again when more have come
        recipe = Imitated(epochs=18, rate=0.5)
        history = off.fit(
            net, stream.select(slice(0, come)), recipe=recipe, batch_size=32, progress=False
        )
    assert history.notes == ("pooled features were computed once for stream",)
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True)
    )
    trace = off.record(net, stream.select(slice(800, 1297)), timed=False, progress=False)
    assert trace.labels is None
    plan = off.calibrate(trace, risk="disagreement", at_most=0.05)
    done = trace.evaluate(plan)
    assert done.risk.value <= 0.05
    assert done.shares[0] > 0.3
    fitted = off.record(net, stream.select(slice(0, 800)), timed=False, progress=False)
    with pytest.raises(OverlappingRows):
        off.calibrate(fitted, risk="disagreement", at_most=0.05)


def test_a_sharpened_head_divides_its_logits_and_keeps_that(tmp_path):
    net = cut_of(trained=False, exits="mlp?temperature=0.5")
    x = images_of(6)
    for name, seen in net.look(x):
        if name != "backbone":
            exit_ = net.exit_of(name)
            torch.testing.assert_close(seen.own, 2 * exit_.head(exit_.pool(seen.features)))
    off.fit(net, x, recipe=Imitated(epochs=1), progress=False)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    for before, after in zip(net(x), again(x), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(InvalidArgument, match="temperature must be a number above 0"):
        Pooled("flat", 5, 3, (4,), temperature=temperature)
