"""The ResNets of CIFAR-10: their size, their names, and with --data the accuracies of the public
weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.building.factories import make_model
from offramp.data.rows import rows
from offramp.errors import BadData
from offramp.layers.residual import Block
from offramp.models.cifar_resnet import preprocess
from offramp.runtime.measuring import macs

SIZES = {
    "resnet20": (269_722, 40.6),
    "resnet32": (464_154, 68.9),
    "resnet44": (658_586, 97.2),
    "resnet56": (853_018, 125.5),
    "resnet110": (1_727_962, 252.9),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = make_model(f"offramp:{name}")
    parameters, millions = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.zeros(1, 3, 32, 32)
    assert macs(lambda: model(x)) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == int(
        name[6:]
    )


def test_a_block_halves_and_pads():
    block = Block(16, 32).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    got = block(x)
    assert got.shape == (2, 32, 4, 4)
    assert torch.equal(got[:, 8:24], x[:, :, ::2, ::2])
    assert not got[:, :8].any()
    assert not got[:, 24:].any()
    same = Block(16, 16).eval()
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_the_front_refuses_images_of_another_size():
    assert preprocess()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3, 32, 32)
    for shape in ((1, 3, 224, 224), (1, 1, 32, 32)):
        with pytest.raises(BadData):
            preprocess()(torch.zeros(shape, dtype=torch.uint8))


def right(name, data_dir, part):
    model = make_model(f"offramp:{name}", data_dir / "weights" / f"cifar10_{name}.safetensors")
    counted = 0
    prepare = preprocess()
    with torch.inference_mode():
        for batch in rows(f"cifar10:{data_dir}{part}").batches(250):
            counted += int(
                (model(prepare(torch.from_numpy(batch.x))).argmax(1).numpy() == batch.y).sum()
            )
    return counted


def test_public_weights_on_500_rows(data_dir):
    assert right("resnet20", data_dir, "[0:500]") == 455


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "want"), [("resnet20", 9173), ("resnet32", 9263), ("resnet56", 9339)]
)
def test_public_weights_on_all_rows(data_dir, name, want):
    assert right(name, data_dir, "") == want
