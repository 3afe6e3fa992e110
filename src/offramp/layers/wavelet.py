"""Transforms of an image into two images of half its size: a learned one (WAE) and the 9/7 wavelet.

Chen, Lin, Zuo, Luo and Zhang, Learning a Wavelet-like Auto-Encoder to Accelerate Deep Neural
Networks, AAAI 2018, arXiv 1712.07493. The encoder is that of the authors' file for Caffe; their
decoder was never published, so its layers are ours. Shapes: B images, C channels, H and W even.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

__all__ = ["Wavelet97", "WaveletDecoder", "WaveletEncoder"]

WIDTH = 16  # inner channels of the encoder and the decoder
STARTS = ("xavier", "mean")

# Cohen, Daubechies and Feauveau's 9/7 filters as JPEG 2000 has them, from the middle outwards.
LOW_PASS = (0.602949018236, 0.266864118443, -0.078223266529, -0.016864118443, 0.026748757411)
HIGH_PASS = (1.115087052457, -0.591271763114, -0.057543526229, 0.091271763114)


class WaveletEncoder(nn.Module):
    """Images [B, C, H, W] -> a low-frequency and a high-frequency image, both [B, C, H/2, W/2].

    Three 3x3 convolutions of 16 channels with ReLU, then one 3x3 convolution of stride 2 for each
    image.

    Args:
        channels: C.
        start: how weights start. "xavier" is the authors' choice. With "mean" (ours) the low image
            is at first exactly the mean over 2x2 pixels, so that a trained network can read it. The
            image may then have at most 8 channels, because each needs two inner channels.

    Raises:
        InvalidArgument: `start` is another one, or there are too many channels for "mean".
    """

    def __init__(self, channels: int = 3, start: str = "xavier") -> None:
        super().__init__()
        if start not in STARTS:
            raise InvalidArgument(f"start must be one of {', '.join(STARTS)}, got {start!r}")
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.low = nn.Conv2d(WIDTH, channels, 3, stride=2, padding=1)
        self.high = nn.Conv2d(WIDTH, channels, 3, stride=2, padding=1)
        _xavier(self)
        if start == "mean":
            self._start_as_mean()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] -> the low and the high image, [B, C, H/2, W/2] each."""
        h = torch.relu(self.conv1(x))  # [B, 16, H, W]
        h = torch.relu(self.conv2(h))
        h = torch.relu(self.conv3(h))
        return self.low(h), self.high(h)

    @torch.no_grad()
    def _start_as_mean(self) -> None:
        """Set the weights so that the low image is the mean over 2x2 pixels.

        After a ReLU no value is negative, so 2 C inner channels carry relu(x) and relu(-x). The
        last convolution takes the mean of their difference, which is x.
        """
        signed = 2 * self.channels
        if signed > WIDTH:
            raise InvalidArgument(
                f"channels must be at most {WIDTH // 2} with start='mean', got {self.channels}"
            )
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.weight[:signed] = 0
        self.low.weight.zero_()
        for channel in range(self.channels):
            positive = channel
            negative = self.channels + channel
            self.conv1.weight[positive, channel, 1, 1] = 1
            self.conv1.weight[negative, channel, 1, 1] = -1
            for conv in (self.conv2, self.conv3):
                conv.weight[positive, positive, 1, 1] = 1
                conv.weight[negative, negative, 1, 1] = 1
            # Output i reads rows 2i-1, 2i and 2i+1; the last two are its 2x2 block.
            self.low.weight[channel, positive, 1:, 1:] = 0.25
            self.low.weight[channel, negative, 1:, 1:] = -0.25


class WaveletDecoder(nn.Module):
    """Reconstruct the image [B, C, H, W] from both images of an encoder; used only in training.

    One 4x4 transposed convolution of stride 2 for each image, their sum, a ReLU, and three 3x3
    convolutions.

    Args:
        channels: C.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.low = nn.ConvTranspose2d(channels, WIDTH, 4, stride=2, padding=1)
        self.high = nn.ConvTranspose2d(channels, WIDTH, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv3 = nn.Conv2d(WIDTH, channels, 3, padding=1)
        _xavier(self)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Low and high image [B, C, H/2, W/2] each -> [B, C, H, W]."""
        h = torch.relu(self.low(low) + self.high(high))  # [B, 16, H, W]
        h = torch.relu(self.conv1(h))
        h = torch.relu(self.conv2(h))
        image: Tensor = self.conv3(h)
        return image


class Wavelet97(nn.Module):
    """Images [B, C, H, W] -> the low band [B, C, H/2, W/2] and three others [B, 3 C, H/2, W/2].

    The 9/7 wavelet with symmetric ends, without parameters: the baseline of WAE. The low band of a
    constant image has the same constant.

    Args:
        channels: C.

    Raises:
        BadNetwork: in a run, H or W is odd or below 6.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        # The filters are symmetric: the taps after the middle one, reversed, come first.
        low = torch.tensor([*LOW_PASS[:0:-1], *LOW_PASS])  # 9 taps
        high = torch.tensor([*HIGH_PASS[:0:-1], *HIGH_PASS])  # 7 taps
        # One filter for each channel: [C, 1, taps]. `_split` makes a row or a column of it.
        self.register_buffer("low_pass", low.repeat(channels, 1, 1), persistent=False)
        self.register_buffer("high_pass", high.repeat(channels, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] -> the low band [B, C, H/2, W/2], and the horizontal, vertical and
        diagonal bands, concatenated: [B, 3 C, H/2, W/2].
        """
        if min(x.shape[2:]) < 6 or x.shape[2] % 2 or x.shape[3] % 2:
            height, width = x.shape[2:]
            raise BadNetwork(
                f"images must have even sides of 6 or more for the 9/7 wavelet, got "
                f"{height}x{width}"
            )
        # along the rows of pixels first, then both halves along the columns
        low, high = self._split(x, 3)
        low_low, low_high = self._split(low, 2)
        high_low, high_high = self._split(high, 2)
        return low_low, torch.cat([low_high, high_low, high_high], 1)

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Low pass at the even and high pass at the odd positions of one dimension, 2 or 3."""
        low_filter = cast(Tensor, self.low_pass)  # [C, 1, taps]
        high_filter = cast(Tensor, self.high_pass)
        # Low at 2k reads 2k-4 to 2k+4, high at 2k+1 reads 2k-2 to 2k+4; the ends are mirrored. The
        # padding is that of width and height: left, right, top, bottom.
        if dim == 3:
            low_filter = low_filter.unsqueeze(2)  # a row, [C, 1, 1, taps]
            high_filter = high_filter.unsqueeze(2)
            stride = (1, 2)
            low_ends = (4, 3, 0, 0)
            high_ends = (2, 3, 0, 0)
        else:
            low_filter = low_filter.unsqueeze(3)  # a column, [C, 1, taps, 1]
            high_filter = high_filter.unsqueeze(3)
            stride = (2, 1)
            low_ends = (0, 0, 4, 3)
            high_ends = (0, 0, 2, 3)
        padded = nn.functional.pad(x, low_ends, mode="reflect")
        low = nn.functional.conv2d(padded, low_filter, stride=stride, groups=self.channels)
        padded = nn.functional.pad(x, high_ends, mode="reflect")
        high = nn.functional.conv2d(padded, high_filter, stride=stride, groups=self.channels)
        return low, high


def _xavier(module: nn.Module) -> None:
    """Xavier's rule for weights, and biases of zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
