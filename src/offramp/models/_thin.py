"""A narrower copy of a network, with new weights: every layer has a part of its channels."""

from __future__ import annotations

import copy

from torch import nn

from offramp.errors import BadNetwork

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def thinned(model: nn.Module, by: int, image: int, channels: int) -> nn.Module:
    """A copy of a network of images without its classifier, 1 / `by` as wide.

    A width of n becomes max(1, n // by) everywhere, so that what is added still fits.

    Args:
        model: its convolutions, linear layers and norms are made anew; all else is copied.
        by: 1 or more.
        image: channels of the images that the model reads.
        channels: channels of those that the copy reads.

    Returns:
        The copy, whose layers start by torch's own rules.

    Raises:
        BadNetwork: a layer that has no narrower form.
    """
    found = copy.deepcopy(model)
    for name, part in list(found.named_modules()):
        narrow = _narrow(name, part, by, image, channels)
        if narrow is not None:
            parent, _, key = name.rpartition(".")
            setattr(found.get_submodule(parent), key, narrow)
    return found


def _narrow(name: str, part: nn.Module, by: int, image: int, channels: int) -> nn.Module | None:
    """The narrower form of one layer, or None for what has no width of its own."""
    if isinstance(part, CONVOLUTIONS):
        first = part.in_channels == image and part.groups == 1
        width_in = channels if first else _less(part.in_channels, by)
        width = _less(part.out_channels, by)
        groups = part.groups
        if groups == part.in_channels and groups > 1:
            groups = width_in  # depthwise
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
    own = any(True for _ in part.parameters(recurse=False))
    if own and by > 1:
        raise BadNetwork(
            f"{name!r} is a {type(part).__name__}, which has no thinner form. Give high="
        )
    return None


def _less(width: int, by: int) -> int:
    return max(1, width // by)
