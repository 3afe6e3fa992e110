"""The two backbones of the decision gates: cost and features up to every cut, and that they are
taken apart.

The figures are those that follow from the paper's own (arXiv 1811.01476): 39 % of 5.02 GFLOPs, 36 %
of 2.73 GFLOPs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import offramp as off
from offramp._support import find
from offramp.building.factories import make_model, preprocess_of
from offramp.models.cifar_bottleneck import Bottleneck
from offramp.models.cifar_densenet import DenseLayer, Transition
from offramp.networks.taps import listening
from offramp.partition.segmenting import segments_of
from offramp.runtime.measuring import macs
from small import moved

SIZES = {  # parameters, millions of MACs, and (cut, shape, millions of MACs up to there)
    "resnet101": (
        42_512_970,
        2510.0,
        {
            "layer1": ((256, 32, 32), 219.9),
            "layer2": ((512, 16, 16), 555.4),
            "layer3": ((1024, 8, 8), 2245.7),
        },
    ),
    "densenet201": (
        18_104_330,
        1363.9,
        {
            "block1": ((256, 32, 32), 341.5),
            "block2": ((512, 16, 16), 607.8),
            "block3": ((1792, 8, 8), 1151.0),
        },
    ),
}


def images(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = make_model(f"offramp:{name}")
    x = torch.zeros(1, 3, 32, 32)
    parameters, millions, cuts = SIZES[name]
    assert sum(value.numel() for value in model.parameters()) == parameters
    counted = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    projections = [
        part
        for part in model.modules()
        if isinstance(part, Bottleneck) and len([*part.shortcut.children()])
    ]
    assert len(counted) - len(projections) == int(name[-3:])
    shapes = {}
    reached = {}

    def heard(cut, out):
        shapes[cut], reached[cut] = tuple(out.shape[1:]), counter.get_total_flops() / 2e6

    with (
        FlopCounterMode(display=False) as counter,
        listening({cut: getattr(model, cut) for cut in cuts}, heard),
    ):
        model(x)
    assert shapes == {cut: shape for cut, (shape, _) in cuts.items()}
    assert reached == pytest.approx({cut: upto for cut, (_, upto) in cuts.items()}, abs=0.05)
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_cuts_of_the_gates_cost_what_the_paper_implies(name):
    model = make_model(f"offramp:{name}")
    preprocess = preprocess_of(f"offramp:{name}")
    x = images(2)
    _, millions, cuts = SIZES[name]
    net = moved(off.cut(model, x, at=[*cuts][:2], exits="linear", preprocess=preprocess))
    assert [net.exits[cut].features for cut in [*cuts][:2]] == [256, 512]
    state = {"x": x}
    so_far = 0.0
    reached = []
    for segment in segments_of(net).values():
        so_far += macs(lambda segment=segment: state.update(segment.call(state))) / 2e6
        reached.append(so_far)
    assert reached == pytest.approx(
        [*(upto for _, upto in [*cuts.values()][:2]), millions], abs=0.1
    )
    with torch.no_grad():
        torch.testing.assert_close(state["backbone"], model(preprocess(x)), atol=1e-4, rtol=1e-4)


def test_a_bottleneck_strides_in_its_second_convolution():
    block = Bottleneck(8, 4, 2).eval()
    assert [layer.stride for layer in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1),
        (2, 2),
        (1, 1),
    ]
    assert block(torch.rand(2, 8, 6, 6)).shape == (2, 16, 3, 3)
    same = Bottleneck(16, 4, 1).eval()
    nn.init.zeros_(same.conv3.weight)
    x = torch.rand(2, 16, 6, 6)
    assert torch.equal(same(x), x)


def test_a_dense_layer_keeps_what_came_in_and_a_transition_halves():
    x = torch.rand(2, 6, 8, 8)
    got = DenseLayer(6).eval()(x)
    assert got.shape == (2, 38, 8, 8)
    assert torch.equal(got[:, :6], x)
    assert Transition(6).eval()(x).shape == (2, 3, 4, 4)


def test_names_on_the_shelf_are_their_own():
    found = [
        name
        for file in find._files("models")
        for name in find._public(file)
        if name != "preprocess"
    ]
    assert len(found) == len(set(found))
    assert {"resnet101", "densenet201"} <= set(found)
