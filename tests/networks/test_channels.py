"""Where channels are, read from the operations; and exits that pool over the right dimension
because of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.placement.measure import _ProbePass
from offramp.exits._pooling import pooled
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.inputs import as_input, as_inputs


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CONV = nn.Conv1d(6, 5, 3)
IMAGE = nn.Conv2d(3, 5, 3)
LINEAR = nn.Linear(16, 16)
KNOWN = {
    "conv1d": (CONV, (2, 6, 9), 1),
    "conv1d, norm, relu in place": (
        nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU(inplace=True)),
        (2, 6, 8),
        1,
    ),
    "conv1d, permuted": (lambda x: CONV(x).permute(0, 2, 1), (2, 6, 9), 2),
    "conv1d, transposed and copied": (
        lambda x: CONV(x).transpose(1, 2).contiguous().relu(),
        (2, 6, 9),
        2,
    ),
    "image to patches": (lambda x: IMAGE(x).flatten(2).mT, (2, 3, 9, 9), 2),
    "image to patches, not transposed": (lambda x: IMAGE(x).flatten(2), (2, 3, 9, 9), 1),
    "linear": (LINEAR, (2, 9, 16), 2),
    "recurrent": (lambda x: nn.GRU(16, 4, batch_first=True)(x)[0], (2, 9, 16), 2),
    "transformer": (nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), (2, 9, 16), 2),
    "token dropped": (lambda x: LINEAR(x)[:, 1:], (2, 9, 16), 2),
    "tokens joined": (lambda x: torch.cat([x, LINEAR(x)], 1), (2, 9, 16), 2),
    "tokens to an image": (
        lambda x: LINEAR(x).view(2, 3, 3, 16).permute(0, 3, 1, 2),
        (2, 9, 16),
        1,
    ),
    "image, channels innermost": (nn.Linear(4, 4), (2, 8, 8, 4), 3),
    "as many channels as places": (nn.Conv1d(7, 7, 3, padding=1), (2, 7, 7), 1),
    "unknown": (lambda x: x + 1, (2, 9, 16), None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_dimension_of_the_channels(name):
    made, shape, expected = KNOWN[name]
    with torch.no_grad(), ChannelTracker() as tracker:
        features = made(torch.randn(shape))
    assert tracker.dim_of(features) == expected


def test_layouts_of_what_is_unknown():
    with ChannelTracker() as tracker:
        values = {
            "signal": torch.zeros(2, 3, 4) + 1,
            "image": torch.zeros(2, 3, 4, 4),
            "flat": torch.ones(2, 3),
        }
    assert layouts_of(values, tracker) == {
        "signal": "both",
        "image": "channels_first",
        "flat": None,
    }
    assert layouts_of(values, tracker, free=True)["signal"] == "channels_last"


@pytest.mark.parametrize("pool", ["mean", "grid"])
def test_pooling_follows_the_layout(pool):
    signal = torch.randn(2, 5, 12)  # [B, C, L]
    first = pooled(signal, pool, "channels_first")
    assert torch.equal(first[:, :5], signal.mean(2))
    assert torch.equal(pooled(signal, pool, "channels_last"), signal.mean(1))
    both = torch.cat([signal.mean(1), signal.mean(2)], 1)
    assert torch.equal(pooled(signal, pool, "both"), both)
    assert torch.equal(pooled(signal, pool), signal.mean(1)), "as the first edition read it"
    image = torch.randn(2, 5, 8, 8)
    inner = image.permute(0, 2, 3, 1)  # [B, H, W, C]
    torch.testing.assert_close(pooled(inner, pool, "channels_last"), pooled(image, pool))


def test_short_signals_have_no_grid():
    assert pooled(torch.zeros(2, 5, 3), "grid", "channels_first").shape == (2, 10)
    assert pooled(torch.zeros(2, 5, 4), "grid", "channels_first").shape == (2, 30)


def test_the_maximum_is_one_in_both_memory_formats():
    image = torch.randn(4, 5, 8, 8)
    innermost = image.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pooled(innermost, "grid"), pooled(image, "grid"))


def test_arrays_with_a_free_stride_are_not_taken_for_channels_last():
    pixels = np.zeros((4, 28, 28), np.float32)[:, None]
    assert torch.as_tensor(pixels).stride() == (784, 0, 28, 1)
    assert as_input(pixels).stride() == (784, 784, 28, 1)
    asked = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert as_input(asked).stride() == asked.stride(), "what the user asked for stays"


class Signals(nn.Module):
    """Convolutions over time, [B, channels, T]; the classes differ in a channel's energy."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv1d(4, 12, 5, padding=2), nn.ReLU())
        self.c2 = nn.Sequential(nn.Conv1d(12, 12, 5, padding=2), nn.ReLU())
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.c2(self.c1(x)).mean(2))


def signals(rows):
    """A burst on one of four channels, anywhere in time."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, rows)
    x = rng.normal(0, 1, (rows, 4, 32)).astype(np.float32)
    for row, (label, start) in enumerate(zip(y, rng.integers(0, 16, rows), strict=True)):
        x[row, label, start : start + 16] *= 2.5
    return x, y


def accuracy(exit_):
    torch.manual_seed(0)
    x, y = signals(900)
    net = off.cut(Signals().eval(), x[:8], at=["c1"], exits=exit_)
    off.fit(net, (x[:600], y[:600]), recipe="cross_entropy", progress=False)
    trace = off.record(net, (x[600:], y[600:]), timed=False, progress=False)
    return float((trace.columns["answer/c1"] == trace.labels).mean())


def test_the_default_exit_on_convolutions_over_time_is_as_good_as_pooling_over_time():
    default = accuracy("linear_grid")
    over_time = accuracy("linear_peaks")
    assert default >= over_time - 0.02
    assert default > 0.6


@pytest.mark.parametrize("exit_", ["linear", "linear_grid", "mlp", "cascade", "selective"])
def test_every_exit_that_pools_learns_the_layout_from_cut(exit_, tmp_path):
    x, _ = signals(16)
    net = off.cut(Signals().eval(), x[:8], at=["c1"], exits=exit_)
    assert net.exit_of("c1").config()["layout"] == "channels_first"
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", Signals().eval())
    assert again.exit_of("c1").config() == net.exit_of("c1").config()


def test_placement_pools_over_the_right_dimension_too():
    x, _ = signals(16)
    probe_pass = _ProbePass(Signals().eval(), None, ["c1"], "linear")
    probe_pass.add(as_inputs(x))
    assert probe_pass.heads["c1"].config()["layout"] == "channels_first"
    assert dict(probe_pass.features())["c1"].shape == (16, 12)
