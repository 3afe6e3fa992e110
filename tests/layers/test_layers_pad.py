"""PAD layers: the formulas of the paper, compact storage, and the partition of their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from offramp.building.converting import conversions_of, convert
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.pad import Pad, partitioned
from offramp.networks.layer import dense_cost
from offramp.testing import check_layer
from small import seeded


def convolution(**options):
    return seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, **options), 0).eval()


def moved(layer):
    """With kernels that differ, as after training."""
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(
                0.3
                * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
            )
    return layer


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (convolution(stride=2), (6, 7, 9)),
        (convolution(dilation=2, bias=False), (6, 7, 9)),
        (seeded(lambda: nn.Linear(6, 5), 0).eval(), (6,)),
    ],
)
def test_it_starts_as_the_dense_layer(dense, shape, ratio):
    check_layer(Pad, dense, shape, same=True, ratio=ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_weights_are_those_of_the_formula(ratio):
    layer = moved(seeded(lambda: Pad.from_layer(convolution(), ratio=ratio, kernels=3), 0))
    x = torch.randn(2, 6, 5, 5)
    mask = layer.mask().float()
    phi = 2 / (1 + torch.exp(-layer.balance))
    mixes = layer.attend(x)
    assert torch.allclose(mixes.sum(1), torch.ones(2))
    for row in range(2):
        dynamic = torch.zeros(3, mask.numel())
        dynamic[:, mask.flatten().bool()] = layer.dynamic.detach()
        static = torch.zeros(mask.numel())
        static[~mask.flatten().bool()] = layer.static.detach()
        mixed = (mixes[row][:, None] * dynamic).sum(0).view(mask.shape)
        weight = phi * mask * mixed + (2 - phi) * (1 - mask) * static.view(mask.shape)
        wanted = conv2d(x[row : row + 1], weight, layer.bias, padding=1)
        assert torch.allclose(layer(x)[row : row + 1], wanted, atol=1e-4)


def test_all_ones_and_all_zeros():
    x = torch.randn(3, 6, 5, 5)
    one = moved(Pad.from_layer(convolution(), ratio=1.0))
    kernels = (one.attend(x) @ one.dynamic).view(3, 8, 6, 3, 3)
    wanted = torch.cat(
        [conv2d(x[i : i + 1], one.phi() * kernels[i], one.bias, padding=1) for i in range(3)]
    )
    assert torch.allclose(one(x), wanted, atol=1e-4)
    none = moved(Pad.from_layer(convolution(), ratio=0.0))
    static = (2 - none.phi()) * none.static.view(8, 6, 3, 3)
    assert torch.allclose(none(x), conv2d(x, static, none.bias, padding=1), atol=1e-4)


def test_memory_and_mixing_shrink():
    dense = nn.Conv2d(32, 32, 3, padding=1, bias=False).eval()
    costs = {
        ratio: Pad.from_layer(dense, ratio=ratio).cost((32, 8, 8)) for ratio in (0.0, 0.25, 1.0)
    }
    count = dense.weight.numel()
    attention = 32 * 2 + 2 * 4
    for ratio, cost in costs.items():
        assert cost.macs == dense_cost(dense, (32, 8, 8)).macs + attention + 4 * ratio * count
        values = 4 * ratio * count + (1 - ratio) * count + attention + 2 + 4 + 1
        assert cost.stored_bytes == 4 * values + count // 8


def test_experts_are_picked_per_position():
    layer = moved(Pad.from_layer(seeded(lambda: nn.Linear(6, 5), 0).eval(), ratio=0.5, kernels=3))
    x = torch.randn(4, 7, 6)
    best = layer.attention(x).argmax(-1)
    assert len(best.unique()) > 1
    out = layer(x)
    for row, column in ((0, 0), (1, 3), (3, 6)):
        flat = layer.base().clone()
        flat[layer.place] = layer.phi() * layer.dynamic[best[row, column]]
        wanted = flat.view(5, 6) @ x[row, column] + layer.bias
        assert torch.allclose(out[row, column], wanted, atol=1e-5)
    layer.train()(x).sum().backward()
    assert layer.attention.weight.grad.abs().sum() > 0  # the router learns


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


X = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


def dynamic():
    return moved(seeded(lambda: convert(Net().eval(), {"Conv2d": "pad?ratio=1"}), 0))


@pytest.mark.parametrize("score", ["sensitivity", "variance", "magnitude", "random"])
@pytest.mark.parametrize(("scope", "rounds"), [("model", 1), ("layer", 3)])
def test_the_partition_keeps_the_share_that_was_asked_for(score, scope, rounds):
    model = dynamic()
    made = partitioned(model, X, Y, ratio=0.25, rounds=rounds, score=score, scope=scope)
    sizes = [part.dynamic.shape[1] for part in (made.one, made.two)]
    assert sum(sizes) == pytest.approx(0.25 * (54 + 432), abs=2)
    if scope == "layer":
        assert sizes == [14, 108]
    assert model.one.dynamic.shape[1] == 54  # the original is as it was
    assert made(X).shape == (40, 3)
    whole = partitioned(model, X, Y, ratio=1.0)
    assert torch.allclose(whole(X), model(X), atol=1e-5)


def test_sensitivity_is_the_derivative_by_the_mask():
    """Against a mask that really stands in the formula, by torch's own gradient."""
    from offramp.layers.pad import _sensitivities

    model = dynamic()
    found = _sensitivities(model, ["one", "two"], X, Y, 16)
    layer = model.one
    mask = torch.ones(54, requires_grad=True)
    mean = layer.dynamic.detach().mean(0)
    weights = layer.phi() * (mask * (layer.attend(X) @ layer.dynamic) + (1 - mask) * mean)
    hidden = torch.relu(layer.convolved(X, weights))
    logits = model.head(torch.relu(model.two(hidden)).mean((2, 3)))
    loss = torch.nn.functional.cross_entropy(logits, Y, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, mask)
    assert torch.allclose(found["one"], wanted.abs(), atol=1e-3, rtol=1e-3)


def test_sensitive_weights_stay_dynamic():
    """The partition by sensitivity changes the answers less than one at random."""
    model = dynamic()
    loss = torch.nn.functional.cross_entropy(model(X), Y).item()

    def change(**how):
        made = partitioned(model, X, Y, ratio=0.3, **how)
        return abs(torch.nn.functional.cross_entropy(made(X), Y).item() - loss)

    by_chance = [change(score="random", seed=seed) for seed in range(9)]
    assert change(score="sensitivity") < sorted(by_chance)[4]


def test_a_partitioned_model_is_built_again_from_its_text():
    base = seeded(Net, 0).eval()
    made = partitioned(dynamic(), X, Y, ratio=0.25, scope="layer")
    again = convert(base, conversions_of(made, base))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(X), made(X))


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (nn.ReLU(), {}, BadNetwork, "got ReLU"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, BadNetwork, "grouped convolution, got groups=2"),
        (nn.Linear(4, 4), {"ratio": 1.2}, InvalidArgument, "ratio must be between 0 and 1"),
        (nn.Linear(4, 4), {"kernels": 0}, InvalidArgument, "kernels must be a whole number"),
        (nn.Linear(4, 4), {"temperature": 0.0}, InvalidArgument, "temperature must be above 0"),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        Pad.from_layer(dense, **options)


def test_what_the_partition_refuses():
    with pytest.raises(BadNetwork, match="must have PAD layers"):
        partitioned(Net(), X, Y)
    less = partitioned(dynamic(), X, Y, ratio=0.2)
    with pytest.raises(InvalidArgument, match=r"ratio must be at most 0\.2"):
        partitioned(less, X, Y, ratio=0.5)
    for wrong in ({"score": "luck"}, {"scope": "half"}, {"rounds": 0}):
        with pytest.raises(InvalidArgument, match="must be"):
            partitioned(dynamic(), X, Y, **wrong)


def test_no_rows_and_flags_as_shares():
    layer = Pad.from_layer(convolution(stride=2))
    assert layer(torch.zeros(0, 6, 7, 9)).shape == (0, 8, 4, 5)
    with pytest.raises(InvalidArgument, match="ratio must be a number between 0 and 1, got True"):
        Pad.from_layer(convolution(), ratio=True)
