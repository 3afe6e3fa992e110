"""Inline subnetwork collaboration: what an exit makes of the one before it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import BadNetwork
from offramp.exits.inline import Inline, parted
from offramp.exits.pooled import Pooled
from offramp.exits.strided import Strided
from offramp.exits.surest import Surest
from offramp.networks.nodes import Seen
from small import cut_of, images_of, seeded


def of_two(**options):
    """An exit on five features and four classes that reads the exit "a", with a batch norm that has
    seen something.
    """
    exit_ = seeded(lambda: Inline(Pooled("flat", 5, 4), "a", **options), 0)
    norm = exit_.block[1]
    with torch.no_grad():
        norm.running_mean.copy_(torch.linspace(-1, 1, 5))
        norm.running_var.copy_(torch.linspace(0.5, 2, 5))
        norm.weight.copy_(torch.linspace(0.7, 1.4, 5))
        norm.bias.copy_(torch.linspace(-0.2, 0.3, 5))
    return exit_.eval()


def seen_of(features=5, classes=4):
    draw = torch.Generator().manual_seed(1)
    return Seen(
        torch.randn(6, features, generator=draw), {"a": torch.randn(6, classes, generator=draw)}
    )


def test_it_is_linear_on_features_and_on_what_a_block_makes_of_the_logits_before():
    exit_ = of_two()
    seen = seen_of()
    dense, norm, _ = exit_.block
    k = seen.logits["a"] @ dense.weight.T + dense.bias
    k = (k - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    k = k.clamp(min=0)
    expected = torch.cat([seen.features, k], 1) @ exit_.linear.weight.T + exit_.linear.bias
    torch.testing.assert_close(exit_(seen), expected)


def test_the_first_exit_reads_features_alone():
    exit_ = Inline(Pooled("flat", 5, 4))
    assert exit_.reads == ()
    assert exit_.linear.in_features == 5
    seen = seen_of()
    torch.testing.assert_close(exit_(seen), exit_.linear(seen.features))


@pytest.mark.parametrize("detach", [False, True])
def test_an_exit_trains_the_one_before_unless_detached(detach):
    exit_ = of_two(detach=detach)
    seen = seen_of()
    seen.logits["a"].requires_grad_()
    cross_entropy(exit_(seen), torch.zeros(6).long()).backward()
    assert (seen.logits["a"].grad is None) is detach
    assert exit_.block[0].weight.grad.any()  # it learns from them either way


def test_layers_before_the_linear_one_are_kept():
    plain = seeded(lambda: Strided((2, 8, 8), 3, 4), 0).eval()
    body, last = parted(plain)
    seen = Seen(torch.randn(6, 2, 8, 8), {})
    features = body(seen)
    assert features.shape == (6, last.in_features)
    torch.testing.assert_close(last(features), plain(seen))
    exit_ = Inline(plain).eval()
    assert torch.equal(exit_.exit(seen), features)
    assert plain.layers[-1].out_features == 3  # the exit that was given stays whole


def test_what_has_no_linear_layer_is_refused():
    with pytest.raises(BadNetwork, match="got a Surest without one"):
        Inline(Surest(("a",)))


def test_an_exit_of_another_width_before_is_refused():
    with pytest.raises(BadNetwork, match="must hand on the logits of 4 classes"):
        of_two()(seen_of(classes=3))


def test_a_network_with_them_runs_as_it_was_recorded():
    net = cut_of()
    for name, before in (("stem", None), ("blocks.0", "stem")):
        plain = net.exit_of(name)
        net.hang_exit(name, seeded(partial(Inline, plain, before), 7).eval())
    assert [node.exit_reads for node in net.topology.nodes] == [(), ("stem",), ()]
    x = images_of(40, 3)
    trace = off.record(net, x, timed=False, progress=False)
    middle = {name: float(trace.columns[f"score/{name}"].mean()) for name in net.topology.gates}
    for closed in (None, "stem"):
        plan = off.Plan.by_hand(middle | ({closed: float("inf")} if closed else {}))
        y = off.run(net, plan, x)
        replayed = trace.replay(plan)
        assert (y.exit.numpy() == replayed.exit).all()
        chosen = torch.stack(net(x)).detach()[y.exit.clone(), torch.arange(40)]
        torch.testing.assert_close(y.logits, chosen, atol=1e-4, rtol=1e-4)
    assert len(set(replayed.exit.tolist())) == 2
