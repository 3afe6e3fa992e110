"""Binary layers: two values on both sides, the temperature, and gradients within their window."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork
from offramp.layers.binary import Binary
from offramp.layers.packed import Packed
from offramp.testing import check_layer
from small import seeded


def convolution(**options):
    return seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, **options), 0).eval()


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (convolution(stride=2), (6, 7, 8)),
        (convolution(groups=2, bias=False), (6, 7, 8)),
        (seeded(lambda: nn.Linear(9, 4), 0).eval(), (9,)),
        # maps with the channels last, as in a Swin transformer
        (seeded(lambda: nn.Linear(9, 4), 0).eval(), (5, 7, 9)),
    ],
)
def test_it_keeps_the_contract(dense, shape):
    check_layer(Binary, dense, shape)


def test_two_values_on_both_sides():
    layer = Binary.from_layer(convolution())
    assert layer.used().unique().tolist() == [-1.0, 1.0]
    x = torch.randn(2, 6, 4, 4)
    assert layer.signs(x).unique().tolist() == [-1.0, 1.0]
    assert torch.equal(layer.signs(x), torch.where(x >= 0, 1.0, -1.0))


def test_the_scale_is_the_nearest():
    dense = convolution(bias=False)
    layer = Binary.from_layer(dense)
    wanted = dense.weight.flatten(1)
    signs = wanted.sign()
    best = (signs * wanted).sum(1) / (signs * signs).sum(1)
    assert torch.allclose(layer.scale, best)


def test_the_temperature_of_the_authors():
    layer = Binary.from_layer(convolution()).train()
    layer.anneal(0.0)
    assert layer.temperature() == 1
    layer.anneal(10 / 153)
    assert layer.temperature() == pytest.approx(0.9**10)
    soft = layer.used()
    assert torch.allclose(soft, (layer.weight / 0.9**10).clamp(-1, 1))
    layer.anneal(1.0)
    assert 0.9**153 < 1e-7 * 1.01
    assert layer.temperature() == 0
    layer.anneal(0.5)
    assert layer.eval().temperature() == 0


def test_gradients_pass_within_the_window():
    layer = Binary.from_layer(convolution()).train()
    layer.ready.fill_(True)
    x = torch.tensor([-2.0, -1.0, 0.5, 1.6]).view(1, 1, 2, 2).repeat(1, 6, 1, 1).requires_grad_()
    layer.signs(x).sum().backward()
    assert x.grad[0, 0].flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
    layer.used().sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))
    with torch.no_grad():
        layer.weight.add_(9)
    layer.anneal(0.5)
    assert layer.weight.max() == 1.5


def test_the_shift_starts_from_the_first_batch():
    layer = Binary.from_layer(convolution()).train()
    x = torch.rand(4, 6, 5, 5)
    layer(x)
    assert torch.allclose(layer.shift, -x.mean((0, 2, 3)))
    layer(2 * x)
    assert torch.allclose(layer.shift, -x.mean((0, 2, 3)))


def test_other_layers_are_refused():
    with pytest.raises(BadNetwork, match="replaces a Conv2d or a Linear layer, got ReLU"):
        Binary.from_layer(nn.ReLU())


def test_a_linear_layer_shifts_the_last_dimension():
    """Also where an earlier dimension of its inputs has the same size."""
    layer = Binary.from_layer(seeded(lambda: nn.Linear(6, 4), 0)).train()
    x = torch.rand(2, 6, 5, 6)
    layer(x)
    assert torch.allclose(layer.shift, -x.mean((0, 1, 2)))
    assert torch.equal(layer.eval().signs(x)[:, 0], layer.signs(x[:, 0]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_nan_gives_nan(packed, training):
    """Signs have no NaN, and with an answer such a row would leave early."""
    layer = Binary.from_layer(convolution()).train(training)
    layer.ready.fill_(True)
    if packed:
        layer = Packed.from_layer(layer)
    x = torch.randn(3, 6, 5, 5)
    before = layer(x)
    x[1] = torch.nan
    after = layer(x)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
