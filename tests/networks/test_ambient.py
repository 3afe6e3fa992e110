"""Settings of the process: autocast does not count, and what float32 means is written down."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import Mismatch, StaleRunner
from offramp.networks import ambient
from offramp.plans.plan import Plan
from small import cut_of, images_of, ladder_of, rows_of

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture
def settings():
    """Torch's settings as they were, whatever a test changes."""
    matmul = torch.get_float32_matmul_precision()
    default = torch.get_default_dtype()
    yield
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision(matmul)
    torch.set_default_dtype(default)


@pytest.mark.parametrize(
    "make", [lambda: (ladder_of(2), rows_of(40)), lambda: (cut_of("stem"), images_of(40))]
)
def test_a_runner_in_autocast_computes_as_outside(make):
    net, x = make()
    gate = net.topology.gates[0]
    runner = off.open(net, Plan.by_hand({gate: 0.4}))
    want = runner(x)
    with torch.autocast(**BF16):
        got = runner(x)
        inside = off.open(net, Plan.by_hand({gate: 0.4}))(x)
        steps = [answers.logits for answers in runner.anytime(x)]
        assert torch.is_autocast_enabled("cpu")
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    for answers in (got, inside):
        assert answers.logits.dtype == torch.float32
        assert torch.equal(answers.logits, want.logits)
        assert torch.equal(answers.exit, want.exit)
    assert torch.equal(steps[-1], list(runner.anytime(x))[-1].logits)


def test_a_trace_recorded_in_autocast_is_the_one_recorded_outside():
    net = ladder_of(2)
    x = rows_of(40)
    want = off.record(net, x, timed=False, progress=False)
    with torch.autocast(**BF16):
        got = off.record(net, x, timed=False, progress=False)
    for name in ("logits/small", "logits/middle", "score/small"):
        assert (got.columns[name] == want.columns[name]).all()
    assert got.header == want.header


def test_a_cut_and_its_training_in_autocast_are_in_float32():
    x = images_of(40)
    y = torch.arange(40) % 3
    nets = []
    for enabled in (False, True):
        with torch.autocast(**BF16, enabled=enabled):
            net = cut_of("stem", exits="linear_grid")
            off.fit(net, (x, y), recipe="cross_entropy", progress=False)
        nets.append(net)
    one, other = (off.run(net, Plan.by_hand({"stem": 0.0}), x).logits for net in nets)
    assert one.dtype == other.dtype == torch.float32
    assert torch.equal(one, other)


def test_the_engine_option_still_asks_for_it():
    net = ladder_of(2)
    x = rows_of(9)
    plan = Plan.by_hand({"small": 0.4})
    assert not torch.equal(
        off.open(net, plan, engine="torch:bf16")(x).logits, off.open(net, plan)(x).logits
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: torch.set_float32_matmul_precision("medium"), "float32 matmul precision medium"),
        (lambda: torch.set_default_dtype(torch.float64), "default type float64"),
    ],
)
def test_settings_that_change_results_void_a_promise_and_a_runner(settings, change, told):
    net = ladder_of(2)
    x = rows_of(40)
    origin = off.record(net, x, timed=False, progress=False).header.origin
    runner = off.open(net, Plan(thresholds={"small": (0.4,)}, origin=origin))
    assert ambient.told() == ""
    change()
    assert ambient.told() == told
    with pytest.raises(StaleRunner, match="has changed since the network was opened"):
        runner(x)
    with pytest.raises(Mismatch, match=told):
        off.open(net, Plan(thresholds={"small": (0.4,)}, origin=origin))
    assert (
        off.record(net, x, timed=False, progress=False).header.origin.precision
        == f"float32 ({told})"
    )


def test_a_precision_that_was_set_for_one_backend_is_stated_and_noticed(settings):
    net = ladder_of(2)
    x = rows_of(40)
    runner = off.open(net, Plan.by_hand({"small": 0.4}))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(StaleRunner, match="mixed"):
        runner(x)
    trace = off.record(net, x, timed=False, progress=False)
    assert "float32 matmul precision mixed and cuda matmul in tf32" in trace.header.origin.precision
    off.open(net, Plan(thresholds={"small": (0.4,)}, origin=trace.header.origin))(x)


@pytest.mark.parametrize("value", ["tf32", "bf16"])
def test_convolutions_that_round_are_stated(settings, value):
    assert ambient.told() == ""
    torch.backends.mkldnn.conv.fp32_precision = value
    assert ambient.told() == f"mkldnn convolutions in {value}"
