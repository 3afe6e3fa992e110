"""Pruning: channels are gone, importances rank them, and what cannot work is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from offramp.building.converting import conversions_of, convert
from offramp.errors import BadNetwork, InvalidArgument, MissingExtra
from offramp.layers import pruned as pruning
from small import seeded

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Small(nn.Module):
    """Two convolutions with a batch norm between them, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv1(x)))
        return self.head(torch.relu(self.conv2(h)).mean((2, 3)))


def model():
    return seeded(Small, 0).eval()


@pytest.mark.parametrize("importance", pruning.IMPORTANCES)
def test_channels_are_gone_and_the_text_builds_it_again(importance):
    pytest.importorskip("torch_pruning")
    before = model()
    method = f"pruned?ratio=0.5&importance={importance}"
    after = convert(before, {"conv1": method}, example=X, data=(X, Y))
    assert after.conv1.weight.shape == (4, 3, 3, 3)
    assert after.bn.weight.shape == (4,)
    assert after.conv2.weight.shape == (6, 4, 3, 3)
    assert before.conv1.weight.shape == (8, 3, 3, 3)
    assert all(value.grad is None for value in after.parameters())
    conversions = conversions_of(after, before)
    assert conversions["conv1"] == "resized?inputs=3&outputs=4"
    again = convert(before, conversions)
    again.load_state_dict(after.state_dict())
    assert torch.equal(again(X), after(X))


@pytest.mark.parametrize("importance", ["taylor", "thinet", "bn_scale", "magnitude"])
def test_a_channel_that_does_nothing_goes_first(importance):
    pytest.importorskip("torch_pruning")
    before = model()
    with torch.no_grad():
        for dead in (2, 5):
            before.conv1.weight[dead] = 0
            before.conv1.bias[dead] = 0
            before.bn.weight[dead] = 0
            before.bn.bias[dead] = 0
            before.conv2.weight[:, dead] = 0
    method = f"pruned?ratio=0.25&importance={importance}"
    after = convert(before, {"conv1": method}, example=X, data=(X, Y))
    assert torch.allclose(after(X), before(X), atol=1e-5)


def test_the_order_of_thinet():
    """Each turn takes the channel that leaves the smallest squared sum with those before."""
    added = torch.tensor([[1.0, 5.0, -5.0], [2.0, 7.0, -7.0]])
    turns = pruning._turns(added)
    assert turns.tolist() == [1.0, 3.0, 2.0]
    assert pruning._turns(torch.tensor([[3.0, 1.0, 2.0]])).tolist() == [3.0, 1.0, 2.0]


def test_widths_are_rounded():
    pytest.importorskip("torch_pruning")
    method = "pruned?ratio=0.3&importance=magnitude&round_to=4"
    assert convert(model(), {"conv1": method}, example=X).conv1.out_channels % 4 == 0


def test_without_the_package_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtra, match=r"offramp\[prune\]"):
        convert(model(), {"conv1": "pruned"}, example=X, data=(X, Y))


@pytest.mark.parametrize(
    ("method", "given", "error", "says"),
    [
        ("pruned?ratio=1.5", {"example": X}, InvalidArgument, "ratio must be above 0 and below 1"),
        (
            "pruned?importance=luck",
            {"example": X},
            InvalidArgument,
            "importance must be one of taylor",
        ),
        ("pruned?importance=magnitude", {}, InvalidArgument, "example must be a small batch"),
        ("pruned", {"example": X}, InvalidArgument, "data must be rows with labels"),
        (
            "pruned?ratio=0.9&round_to=8",
            {"example": X, "data": (X, Y)},
            InvalidArgument,
            "leaves none of the 8",
        ),
    ],
)
def test_what_it_refuses(method, given, error, says):
    pytest.importorskip("torch_pruning")
    with pytest.raises(error, match=says):
        convert(model(), {"conv1": method}, **given)
    with pytest.raises(BadNetwork, match="none was matched"):
        convert(model(), {"bn": "pruned?importance=magnitude"}, example=X)


class Tied(nn.Module):
    """Two layers with the same weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))))


def test_weights_that_are_shared_stay_shared_or_it_is_refused():
    pytest.importorskip("torch_pruning")
    rows = torch.randn(16, 4)
    method = "pruned?importance=magnitude"
    for name in ("first", "second"):
        with pytest.raises(BadNetwork, match="are the same weights"):
            convert(seeded(Tied, 0).eval(), {name: method}, example=rows)


def test_the_answers_keep_their_classes():
    pytest.importorskip("torch_pruning")
    for pattern in ("head", "Linear"):
        with pytest.raises(BadNetwork, match=r"must still give \(16, 4\), got \(16, 2\)"):
            convert(model(), {pattern: "pruned?importance=magnitude"}, example=X)


def test_rows_that_are_no_labels_of_a_classifier_are_refused():
    pytest.importorskip("torch_pruning")
    with pytest.raises(BadNetwork, match=r"needs a classifier that gives logits \[B, C\]"):
        convert(model(), {"conv1": "pruned"}, example=X, data=(X, Y + 1))


def test_resized_layers():
    grouped = pruning.resized(nn.Conv2d(8, 8, 3, groups=4), inputs=4, outputs=4)
    assert grouped.groups == 4
    depth_wise = pruning.resized(nn.Conv2d(8, 8, 3, groups=8), inputs=4, outputs=4)
    assert depth_wise.groups == 4
    assert pruning.resized(nn.BatchNorm2d(4, track_running_stats=False), inputs=2, outputs=2)(
        torch.ones(1, 2, 3, 3)
    ).shape == (1, 2, 3, 3)
    assert pruning.resized(nn.Linear(4, 5), inputs=2, outputs=3).weight.shape == (3, 2)
    with pytest.raises(InvalidArgument, match="do not divide"):
        pruning.resized(nn.Conv2d(8, 8, 3, groups=4), inputs=4, outputs=3)
    with pytest.raises(InvalidArgument, match="do not divide by 4 groups"):
        pruning.resized(nn.GroupNorm(4, 8), inputs=6, outputs=6)
    with pytest.raises(BadNetwork, match="got ReLU"):
        pruning.resized(nn.ReLU(), inputs=1, outputs=1)


def with_norm(norm, dims=2):
    """Two convolutions, or linear layers for one dimension, with a norm between them."""
    if dims == 1:
        layers = [nn.Flatten(), nn.Linear(192, 16), norm, nn.Linear(16, 4)]
    else:
        pool = nn.AdaptiveAvgPool2d(1)
        layers = [nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 4, 3), pool, nn.Flatten()]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("norm", "dims"),
    [
        (lambda: nn.BatchNorm1d(16), 1),
        (lambda: nn.LayerNorm(16), 1),
        (lambda: nn.BatchNorm2d(16, track_running_stats=False), 2),
        (lambda: nn.InstanceNorm2d(16, affine=True), 2),
        (lambda: nn.GroupNorm(4, 16), 2),
        (lambda: nn.PReLU(16), 2),
        (lambda: nn.ConvTranspose2d(16, 16, 3, stride=2, output_padding=1), 2),
        (lambda: nn.Conv2d(16, 16, 3, groups=4), 2),
    ],
)
def test_a_text_builds_every_layer_that_lost_channels(norm, dims):
    """Torch-Pruning narrows many kinds of layers, and each one comes back from the text."""
    pytest.importorskip("torch_pruning")
    before = seeded(lambda: with_norm(norm(), dims), 0)
    first = "1" if dims == 1 else "0"
    after = convert(before, {first: "pruned?importance=magnitude"}, example=X)
    again = convert(before, conversions_of(after, before))
    again.load_state_dict(after.state_dict())
    assert torch.equal(again(X), after(X))


class Scaled(nn.Module):
    """A parameter of its own between two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.conv2 = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x) * self.scale).mean((2, 3))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_what_no_text_can_build_has_none():
    pytest.importorskip("torch_pruning")
    before = seeded(Scaled, 0).eval()
    after = convert(before, {"conv1": "pruned?importance=magnitude"}, example=X)
    assert after(X).shape == (16, 4)
    with pytest.raises(InvalidArgument, match="cannot be written as a spec"):
        conversions_of(after, before)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (X, r"data must be rows with labels, \(x, y\), got Tensor"),
        ((X,), "importance='taylor', got no labels"),
        ((X, None), "importance='taylor', got no labels"),
        ((X[:0], Y[:0]), "data must have at least one row, got none"),
        ((X, Y.float()), "labels must be whole numbers, got torch.float32"),
        ((X, Y[:3]), r"one for each of 16 rows, got the shape \(3,\)"),
        ((X, Y - 1), "labels must be at least 0, got -1"),
    ],
)
def test_labelled_rows_are_checked(data, says):
    pytest.importorskip("torch_pruning")
    with pytest.raises(InvalidArgument, match=says):
        convert(model(), {"conv1": "pruned"}, example=X, data=data)


def test_rows_that_the_model_does_not_take_are_refused():
    pytest.importorskip("torch_pruning")
    wrong = torch.zeros(2, 4, 8, 8)
    with pytest.raises(BadNetwork, match="the model fails on the example"):
        convert(model(), {"conv1": "pruned"}, example=wrong, data=(X, Y))
    for importance in ("taylor", "thinet"):
        method = f"pruned?importance={importance}"
        with pytest.raises(BadNetwork, match="the model fails on the data"):
            convert(model(), {"conv1": method}, example=X, data=(wrong, Y[:2]))


def test_a_method_that_removes_nothing_is_refused():
    pytest.importorskip("torch_pruning")
    # a depth-wise convolution that was not named would lose the same channels
    depth_wise = with_norm(nn.Conv2d(16, 16, 3, groups=16))
    with pytest.raises(BadNetwork, match="can take no channel out of 0"):
        convert(depth_wise, {"0": "pruned?importance=magnitude"}, example=X)
    # a tenth of 8 channels is less than one
    with pytest.raises(InvalidArgument, match="leaves none of the 8 channels of 'conv1'"):
        convert(model(), {"conv1": "pruned?importance=magnitude&ratio=0.9"}, example=X)
