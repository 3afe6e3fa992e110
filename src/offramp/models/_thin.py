"""A narrower copy of a network, with new weights: every layer has a part of its channels."""

from __future__ import annotations

from torch import nn

from offramp.errors import BadNetwork
from offramp.networks.wrappers import deep_copy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def thinned(model: nn.Module, by: int, image: int, channels: int) -> nn.Module:
    """Copy a network of images without its classifier, with all widths divided by a number.

    A width of n becomes max(1, n // by) everywhere, so that the terms of a sum still fit.

    Args:
        model: its convolutions, linear layers and norms get new weights; everything else is copied.
        by: the divisor, at least 1.
        image: channels of the images that the model reads.
        channels: channels of the images that the copy reads.

    Returns:
        The copy, whose layers start by torch's own rules.

    Raises:
        BadNetwork: a layer has no narrower form.
    """
    thin = deep_copy(model)
    for name, module in list(thin.named_modules()):
        narrow = _narrow(name, module, by, image, channels)
        if narrow is not None:
            parent, _, key = name.rpartition(".")
            setattr(thin.get_submodule(parent), key, narrow)
    return thin


def _narrow(name: str, part: nn.Module, by: int, image: int, channels: int) -> nn.Module | None:
    """The narrower form of one layer, or None for a module without a width of its own."""
    if isinstance(part, CONVOLUTIONS):
        width_in = _less(part.in_channels, by)
        if part.in_channels == image and part.groups == 1:  # it reads the image
            width_in = channels
        width = _less(part.out_channels, by)
        groups = part.groups
        if groups == part.in_channels and groups > 1:
            groups = width_in  # depth-wise
        if width_in % groups or width % groups:
            raise BadNetwork(
                f"{name!r} has {groups} groups and cannot be made {by} times thinner. Give high="
            )
        return type(part)(
            width_in,
            width,
            part.kernel_size,  # type: ignore[arg-type]
            stride=part.stride,  # type: ignore[arg-type]
            padding=part.padding,  # type: ignore[arg-type]
            dilation=part.dilation,  # type: ignore[arg-type]
            groups=groups,
            bias=part.bias is not None,
            padding_mode=part.padding_mode,
        )
    if isinstance(part, nn.Linear):
        width_in = _less(part.in_features, by)
        return nn.Linear(width_in, _less(part.out_features, by), bias=part.bias is not None)
    if isinstance(part, BATCH_NORMS):
        return type(part)(
            _less(part.num_features, by),
            part.eps,
            part.momentum,
            affine=part.affine,
            track_running_stats=part.track_running_stats,
        )
    if isinstance(part, nn.GroupNorm):
        width = _less(part.num_channels, by)
        if width % part.num_groups:
            raise BadNetwork(
                f"{name!r} has {part.num_groups} groups and cannot be made {by} times "
                "thinner. Give high="
            )
        return nn.GroupNorm(part.num_groups, width, part.eps, part.affine)
    own_parameters = list(part.parameters(recurse=False))
    if own_parameters and by > 1:
        raise BadNetwork(
            f"{name!r} is a {type(part).__name__}, which has no thinner form. Give high="
        )
    return None


def _less(width: int, by: int) -> int:
    """A width divided by a number."""
    return max(1, width // by)
