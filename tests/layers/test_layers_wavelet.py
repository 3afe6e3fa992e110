"""The learned halves of an image and the 9/7 wavelet, against sizes and properties of their
papers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv_transpose2d

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.wavelet import (
    HIGH_PASS,
    LOW_PASS,
    Wavelet97,
    WaveletDecoder,
    WaveletEncoder,
)
from offramp.runtime.measuring import macs
from small import seeded, sizes


def images(count=2, side=12, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_the_encoder_has_the_layers_of_the_authors_file():
    encoder = WaveletEncoder().to("meta")
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert sizes(encoder, lambda: encoder(x)) == [
        ("Conv2d", (16, 224, 224)),
        ("Conv2d", (16, 224, 224)),
        ("Conv2d", (16, 224, 224)),
        ("Conv2d", (3, 112, 112)),
        ("Conv2d", (3, 112, 112)),
    ]
    assert macs(lambda: encoder(x)) / 1e9 == pytest.approx(0.264, abs=5e-4)


@pytest.mark.parametrize("start", ["xavier", "mean"])
def test_the_encoder_starts_by_xaviers_rule_or_as_the_mean_of_2x2_pixels(start):
    encoder = seeded(lambda: WaveletEncoder(3, start), 0)
    low, high = encoder(images())
    assert low.shape == high.shape == (2, 3, 6, 6)
    same = torch.allclose(low, avg_pool2d(images(), 2), atol=1e-6)
    assert same is (start == "mean")
    assert not any(conv.bias.any() for conv in encoder.modules() if isinstance(conv, nn.Conv2d))
    bound = (6 / (9 * (16 + 3))) ** 0.5
    assert bound * 0.9 < encoder.high.weight.abs().max() <= bound


def test_all_of_an_encoder_that_starts_as_a_mean_can_learn():
    encoder = seeded(lambda: WaveletEncoder(3, "mean"), 0)
    low, high = encoder(images())
    (low.square().mean() + high.square().mean()).backward()
    assert all(value.grad is not None and value.grad.any() for value in encoder.parameters())


def test_the_decoder_gives_the_image_its_size_again():
    decoder = WaveletDecoder()
    assert decoder(torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 6)).shape == (2, 3, 12, 12)


def test_starts_are_refused():
    with pytest.raises(InvalidArgument, match="start must be one of xavier, mean, got 'zero'"):
        WaveletEncoder(3, "zero")
    with pytest.raises(
        InvalidArgument, match="channels must be at most 8 with start='mean', got 9"
    ):
        WaveletEncoder(9, "mean")


def merged(low, high, dim):
    """The inverse along one dimension by the synthesis filters of JPEG 2000; without mirrored
    ends.
    """
    channels = low.shape[1]
    shape = (channels, 1, 1, -1) if dim == 3 else (channels, 1, -1, 1)
    stride = (1, 2) if dim == 3 else (2, 1)
    total = 0
    for band, taps in ((low, HIGH_PASS), (high, LOW_PASS)):  # each band by the other one's filter
        signed = torch.tensor([value * (-1) ** index for index, value in enumerate(taps)])
        synthesis = torch.cat([signed.flip(0)[:-1], signed]).repeat(channels, 1).reshape(shape)
        spread = conv_transpose2d(band, synthesis, stride=stride, groups=channels)
        # Low p is centred at 2 p with 3 taps before it, high p at 2 p + 1 with 4.
        total = total + spread.narrow(dim, 3, 2 * band.shape[dim])
    return total


def test_the_97_wavelet_loses_nothing():
    x = images(side=40)
    low, rest = Wavelet97(3)(x)
    low_high, high_low, high_high = rest.chunk(3, 1)
    again = merged(merged(low, low_high, 2), merged(high_low, high_high, 2), 3)
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(again[inner], x[inner], atol=1e-5, rtol=1e-4)


def test_a_smooth_image_is_all_in_the_low_band():
    flat = torch.full((1, 3, 8, 8), 2.5)
    low, rest = Wavelet97(3)(flat)
    torch.testing.assert_close(low, torch.full((1, 3, 4, 4), 2.5))
    assert rest.abs().max() < 1e-6
    # four vanishing moments: a ramp too, but for its ends
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    low, rest = Wavelet97(3)(ramp)
    torch.testing.assert_close(
        low[:, :, 4:-4, 4:-4], ramp[:, :, 8:-8:2, 8:-8:2], atol=1e-4, rtol=1e-5
    )
    assert rest[:, :, :, 4:-4].abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 4, 8)])
def test_the_wavelet_refuses_odd_and_tiny_sides(shape):
    with pytest.raises(BadNetwork, match="even sides of 6 or more"):
        Wavelet97(3)(torch.zeros(shape))
