"""GhostNet: the sizes of the paper, and timm's answers to the last bit."""

from __future__ import annotations

import pytest
import torch

from offramp.models.ghostnet import ghostnet
from offramp.networks.layer import dense_cost
from packages import real


def test_the_sizes_of_the_paper():
    model = ghostnet()
    assert sum(value.numel() for value in model.parameters()) == 5_182_508
    macs = dense_cost(model, (3, 224, 224)).macs
    assert macs == pytest.approx(142e6, rel=0.02)


@pytest.mark.parametrize(
    ("width", "name"), [(1.0, "ghostnet_100"), (0.5, "ghostnet_050"), (1.3, "ghostnet_130")]
)
def test_it_is_timms(width, name):
    timm = real("timm")
    theirs = timm.create_model(name, pretrained=False, num_classes=7).eval()
    ours = ghostnet(7, width).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
