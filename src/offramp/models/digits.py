"""Two small convolutional nets for scikit-learn's 8x8 digits, for the demo and for tests; no
weights come with them.
"""

from __future__ import annotations

from torch import nn

from offramp.layers.preprocess import Preprocess

__all__ = ["digits_large", "digits_small"]


def preprocess() -> Preprocess:
    """The digits' values are 0 to 16."""
    return Preprocess(scale=16.0, expects=(8, 8))


def digits_small() -> nn.Sequential:
    """Images [B, 1, 8, 8] -> logits [B, 10]: one convolution; 1,386 parameters, 2.4 k MACs."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits_large() -> nn.Sequential:
    """Images [B, 1, 8, 8] -> logits [B, 10]: four convolutions of 64 channels; 121,930 parameters,
    5.4 M MACs.
    """
    # [B, 64, 8, 8] up to the pooling, [B, 64, 4, 4] after it
    body = [*_block(1), *_block(64), *_block(64), nn.MaxPool2d(2), *_block(64)]
    return nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 10))


def _block(width_in: int) -> list[nn.Module]:
    """A 3x3 convolution to 64 channels, a batch norm and a ReLU."""
    return [nn.Conv2d(width_in, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
