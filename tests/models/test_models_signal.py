"""Networks for signals: sizes, cuts with exits on peaks, and the deepest exit as the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import offramp as off
from offramp.building.factories import make_model, preprocess_of
from offramp.exits.pooled import linear_peaks
from offramp.models.signal_resnet import SignalResNet
from offramp.networks.nodes import Seen
from offramp.plans.plan import Plan
from offramp.recipes.distill import soft_cross_entropy
from offramp.runtime.measuring import macs
from small import moved, seeded


def signals(count, length=64):
    return torch.randn(count, 1, length, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["signal_resnet", "signal_resnet_adaptive"])
def test_by_name(name):
    model = make_model(f"offramp:{name}")
    assert preprocess_of(f"offramp:{name}") is None
    heard = {}
    for stage in ("stem", *model.names):
        part = model.get_submodule(stage)
        part.register_forward_hook(
            lambda _, __, out, stage=stage: heard.__setitem__(stage, tuple(out.shape[1:]))
        )
    x = signals(2, 1000)
    y = model(x)
    assert [*heard.values()] == [(16, 500), (16, 500), (32, 250), (64, 125)]
    torch.testing.assert_close(model(5 * x + 3), y, atol=1e-3, rtol=1e-3)
    units = (
        500 * 6 * 5 * 16**2
        + 250 * (5 * 16 * 32 + 5 * 5 * 32**2)
        + 125 * (5 * 32 * 64 + 5 * 5 * 64**2)
    )
    plain = 500 * 7 * 16 + units + 128 * 30
    halts = sum(
        2 * count * (length * width * 3 + width)
        for count, length, width in ((1, 500, 16), (1, 250, 32))
    )
    halts += 2 * (125 * 64 * 3 + 64)
    assert macs(lambda: model(x[:1])) == plain + (halts if name.endswith("adaptive") else 0)


@pytest.mark.parametrize("adaptive", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cut_run_and_replay(adaptive, tmp_path):
    model = seeded(
        lambda: SignalResNet((2, 2, 1), (4, 6, 8), classes=5, adaptive=adaptive), 0
    ).eval()
    x = signals(40)
    net = moved(
        seeded(lambda: off.cut(model, x[:4], at=["stage1", "stage2"], exits="linear_peaks"), 0)
    )
    assert net.exits["stage1"].features == 4 * 9
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", model)
    trace = off.record(net, x, timed=False, progress=False)
    plan = Plan.by_hand(
        {name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.topology.gates}
    )
    replay = trace.replay(plan)
    answers = off.run(again, plan, x)
    assert len(set(replay.exit.tolist())) == 3
    assert (answers.exit.numpy() == replay.exit).all()
    assert (answers.logits.argmax(1).numpy() == replay.answer).all()


def test_peaks_are_found_where_they_are():
    exit_ = linear_peaks((2, 61), 3)
    x = torch.zeros(1, 2, 61)
    x[0, 0, 17], x[0, 1, 60] = 7.0, 5.0  # cells of 8 positions, the last of 5
    found = exit_.pool(x)[0]
    assert found[:2].tolist() == pytest.approx([7 / 61, 5 / 61])
    assert found[2:].reshape(2, 8).nonzero().tolist() == [[0, 2], [1, 7]]
    assert exit_(Seen(x, {})).shape == (1, 3)


def test_a_weight_a_t2_on_kl_is_an_alpha_of_distill():
    a = 0.7
    t = 2.0
    y = torch.tensor([0, 2, 1])
    teacher = torch.randn(3, 4)
    logits = torch.randn(3, 4, requires_grad=True)
    p = (logits / t).log_softmax(-1)
    q = (teacher / t).log_softmax(-1)
    whole = cross_entropy(logits, y) + a * t**2 * kl_div(
        p, q, reduction="batchmean", log_target=True
    )
    alpha = a * t**2 / (1 + a * t**2)
    ours = (1 - alpha) * cross_entropy(logits, y) + alpha * soft_cross_entropy(logits, teacher, t)
    one, other = (torch.autograd.grad(loss, logits)[0] for loss in (whole, ours))
    torch.testing.assert_close(one * (1 - alpha), other)
