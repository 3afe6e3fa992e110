"""Multi-scale dense networks for ImageNet (Huang et al., 2017, arXiv 1703.09844): four scales, five
blocks.

Follows the authors' PyTorch port, where the first block has as many layers as the others; the
paper, as quoted by its readers, has three more there. Cut it as those for CIFAR, with exits
`strided_wide`, which keep the channels' number.
"""

from __future__ import annotations

from offramp.layers.preprocess import Preprocess
from offramp.models.msdnet import MSDNet

__all__ = ["msdnet_imagenet"]


def preprocess() -> Preprocess:
    """ImageNet's constants."""
    return Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), expects=(224, 224))


def msdnet_imagenet(step: int = 4, blocks: int = 5, classes: int = 1000) -> MSDNet:
    """Blocks of `step` layers each: 4, 6 and 7 are the usual ones."""
    return MSDNet(
        [step] * blocks, classes, channels=32, growth=16, factors=(1, 2, 4, 4), large=True
    )
