"""Every unit of a stage of adaptive depth as a stage of the schedule: what runs, for which rows;
what is refused.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork
from offramp.layers.adaptive_depth import AdaptiveDepth, depths, stages_of
from offramp.layers.preprocess import Preprocess
from offramp.models.cifar_resnet import CifarResNet
from small import seeded

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + torch.linspace(
    -3, 3, 48
).view(-1, 1, 1, 1)


def adaptive(stages, blocks=3, per="sample"):
    """A model whose samples halt after different units."""
    plain = seeded(lambda: CifarResNet(blocks), 0).eval()
    model = seeded(lambda: off.halting(plain, stages, per=per, bias=-0.5), 0)
    with torch.no_grad():
        for stage in stages_of(model).values():
            for halt in stage.halts:
                halt.all.weight.mul_(20)
    return model


def counting(net):
    """By node the number of rows of every call."""
    rows = {name: [] for name in net.topology.names}

    def count(name):
        return lambda module, given, output: rows[name].append(len(output))

    for name in net.topology.names:
        net.backbone[name].register_forward_hook(count(name))
    return rows


def test_rows_leave_a_stage_and_meet_again():
    model = adaptive(["layer1", "layer2", "layer3"])
    net = off.unrolled(model, X[:1])
    plan = off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.99))
    rows = counting(net)  # before `open`, because a Runner notices new hooks
    runner = off.open(net, plan)
    for calls in rows.values():
        calls.clear()
    y = runner(X)
    with torch.no_grad():
        torch.testing.assert_close(y.logits, model(X), atol=1e-4, rtol=1e-4)
    for name, cost in depths(model, X).items():
        units = (cost.ceil() - 1).flatten()
        for number in range(3):
            going = int((units > number).sum())
            assert rows[f"{name}-{number}"] == ([going] if going else [])
    assert rows["head"] == [48]
    assert 0 < rows["layer1-2"][0] < 48
    one = torch.cat([runner(X[row : row + 1]).logits for row in range(len(X))])
    torch.testing.assert_close(one, y.logits, atol=1e-4, rtol=1e-4)


def test_the_weights_of_every_path_add_up_to_one():
    class Ones(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4, 5)

    stage = AdaptiveDepth(
        [nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)], 4, per="sample"
    )
    model = seeded(lambda: nn.Sequential(stage, nn.Flatten(), nn.Linear(20, 3)), 1).eval()
    net = off.unrolled(model, torch.randn(2, 4, 5))
    for name in ("0-0", "0-1"):
        first = net.backbone[name]
        setattr(first, "piece" if name == "0-0" else "unit", Ones().eval())
    x = torch.randn(6, 4, 5)
    with torch.no_grad():
        want = model[2](torch.ones(6, 20))
    for threshold in (-1.0, 0.05, 2.0):
        y = off.run(net, off.Plan.by_hand({"0-0": threshold}), x)
        torch.testing.assert_close(y.logits, want, atol=1e-5, rtol=1e-5)


def test_thresholds_are_chosen_certified_and_replayed():
    net = off.unrolled(adaptive(["layer3"]), X[:2])
    labels = torch.arange(48) % 10
    trace = off.record(net, (X, labels), timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.3, confidence=0.8)
    assert plan.promise is not None
    for some in (plan, off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.99))):
        run = off.run(net, some, X)
        replay = trace.replay(some)
        assert np.array_equal(run.logits.argmax(1).numpy(), replay.answer)
    shares = trace.replay(some).ran.mean(0)
    assert trace.replay(some).schedule.stages[2].name == "layer3-2"
    assert 0 < shares[2] < 1  # some rows left after two units


def test_images_behind_preprocessing():
    model = adaptive(["layer3"])
    preprocess = Preprocess(mean=(0.5,), std=(0.25,))
    x = (X * 30 + 128).clamp(0, 255).to(torch.uint8)
    net = off.unrolled(model, x[:2], preprocess=preprocess)
    y = off.run(net, off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.99)), x)
    with torch.no_grad():
        torch.testing.assert_close(y.logits, model(preprocess(x)), atol=1e-4, rtol=1e-4)


class Around(nn.Module):
    """Hands what comes before a stage on to what comes after it."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head((x + self.stage(x)).flatten(1))


def test_models_that_are_refused():
    with pytest.raises(BadNetwork, match="no stage of adaptive depth"):
        off.unrolled(CifarResNet(2).eval(), X[:2])
    with pytest.raises(BadNetwork, match="'layer2' halts by position"):
        off.unrolled(adaptive(["layer2"], per="position"), X[:2])
    with pytest.raises(BadNetwork, match="training mode"):
        off.unrolled(adaptive(["layer2"]).train(), X[:2])
    stage = AdaptiveDepth([nn.Conv1d(4, 4, 3, padding=1) for _ in range(2)], 4, per="sample")
    with pytest.raises(BadNetwork, match="only the output of a stage"):
        off.unrolled(Around(stage).eval(), torch.randn(2, 4, 5))
    with pytest.raises(BadNetwork, match="must have a single input"):
        off.unrolled(adaptive(["layer2"]), {"a": X[:2], "b": X[:2]})


def test_more_than_sixteen_paths_run_and_are_not_recorded():
    net = off.unrolled(adaptive(["layer1", "layer2", "layer3"]), X[:2])
    with pytest.raises(BadNetwork, match="more than sixteen paths"):
        off.record(net, (X, torch.arange(48) % 10), timed=False, progress=False)


def test_it_runs_and_is_exported_on_onnx_runtime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = adaptive(["layer1"], blocks=2)
    net = off.unrolled(model, X[:2])
    plan = off.Plan.by_hand({"layer1-0": 0.99})
    y = off.run(net, plan, X, engine="onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(y.logits, model(X), atol=1e-4, rtol=1e-4)
    written = off.export(net, plan, tmp_path / "act", example=X[:4])
    # two units and the head
    assert len([name for name in written.files if name.endswith(".onnx")]) == 3
