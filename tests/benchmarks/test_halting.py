"""benchmarks/halting.py counts multiply-adds as torch does where nothing halts, and fewer where
something does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import offramp as off
from offramp.layers.adaptive_depth import depths
from offramp.models.cifar_resnet import resnet20
from offramp.networks.layer import dense_cost
from small import seeded

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from halting import STAGES, augmented, dense_macs, spent

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_plain_network():
    assert dense_macs(20) == dense_cost(resnet20(), (3, 32, 32)).macs


@pytest.mark.parametrize("per", ["position", "sample"])
def test_what_is_spent(per):
    model = seeded(lambda: resnet20().eval(), 0)
    slow = seeded(lambda: off.halting(model, STAGES, per=per, bias=-40.0), 0)
    full = spent(slow, depths(slow, X))
    heads = sum(9 * width * side**2 + width for width, side in ((16, 32), (32, 16), (64, 8)))
    heads = 2 * (heads if per == "position" else 16 + 32 + 64)  # of two units in each stage
    assert full.tolist() == pytest.approx([dense_macs(20) + heads] * 4)
    quick = seeded(lambda: off.halting(model, STAGES, per=per, bias=40.0), 0)
    least = spent(quick, depths(quick, X))
    assert (least < 0.45 * dense_macs(20)).all()  # one unit of three in every stage


def test_batches_are_the_same_for_the_same_seed():
    one = augmented(X, torch.Generator().manual_seed(3))
    assert torch.equal(one, augmented(X, torch.Generator().manual_seed(3)))
    assert not torch.equal(one, augmented(X, torch.Generator().manual_seed(4)))
