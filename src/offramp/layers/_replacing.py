"""What the substitutes on this shelf share: checks of what they replace, and its copy's mode."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

Made = TypeVar("Made", bound=nn.Module)


def require_dense(dense: nn.Module, what: str) -> nn.Conv2d | nn.Linear:
    """A plain convolution or linear layer, without groups.

    Args:
        dense: the layer to replace.
        what: the method, for the sentence.

    Raises:
        BadNetwork: it is another kind of layer, or a grouped convolution.
    """
    if type(dense) not in (nn.Conv2d, nn.Linear):
        raise BadNetwork(f"{what} replaces a Conv2d or a Linear layer, got {type(dense).__name__}")
    assert isinstance(dense, (nn.Conv2d, nn.Linear))
    if isinstance(dense, nn.Conv2d) and dense.groups > 1:
        raise BadNetwork(f"{what} cannot replace a grouped convolution, got groups={dense.groups}")
    return dense


def require_convolution(dense: nn.Module, what: str) -> nn.Conv2d:
    """A plain two-dimensional convolution, grouped or not.

    Args:
        dense: the layer to replace.
        what: the method, for the sentence.

    Raises:
        BadNetwork: it is another kind of layer.
    """
    if type(dense) is not nn.Conv2d:
        raise BadNetwork(f"{what} replaces a Conv2d, got {type(dense).__name__}")
    assert isinstance(dense, nn.Conv2d)
    return dense


def require_whole(name: str, value: object, least: int) -> int:
    """A whole number of at least `least`.

    Args:
        name: of the option, for the sentence.
        value: what was given.
        least: the smallest that is allowed.

    Raises:
        InvalidArgument: it is another kind of value, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def placed_like(made: Made, dense: nn.Module) -> Made:
    """The substitute on the device, in the type and in the mode of what it replaces, in place."""
    tensors = [*dense.parameters(), *dense.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if floats:
        made.to(floats[0].device, floats[0].dtype)
    made.train(dense.training)
    return made


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """How a convolution moves over the image, as arguments of another one."""
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def copied(value: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own with the same values, or None."""
    return None if value is None else nn.Parameter(value.detach().clone())


def rank_of(
    values: Tensor,
    rank: int | None,
    energy: float,
    *,
    largest: int,
    method: str,
    saves: int,
    name: str,
) -> int:
    """A rank as it was asked for: given, or the smallest that keeps a share of the energy.

    Args:
        values: singular values, falling.
        rank: the rank; None lets the energy decide.
        energy: the share of the squared singular values to keep.
        largest: the full rank.
        method: its name, for the sentence.
        saves: the largest rank with which the substitute is smaller than the dense layer; where
            the energy asks for more, the method saves nothing here.
        name: of the option, for the sentence.

    Raises:
        InvalidArgument: a rank that is not from 1 to `largest`, or an energy that is no share.
        SavesNothing: the energy needs a rank above `saves`.
    """
    from offramp.networks.layer import SavesNothing

    if rank is not None:
        whole = require_whole(name, rank, 1)
        if whole > largest:
            raise InvalidArgument(f"{name} must be at most {largest} for this layer, got {whole}")
        return whole
    if not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise InvalidArgument(f"energy must be a share above 0 and at most 1, got {energy!r}")
    squares = values.double() ** 2
    kept = torch.cumsum(squares, 0) / squares.sum().clamp_min(1e-300)
    found = int((kept < energy - 1e-12).sum()) + 1
    found = min(found, largest)
    if found > saves:
        raise SavesNothing(
            f"{method} needs rank {found} to keep {energy:g} of this layer's energy and is smaller "
            f"than the dense layer only up to rank {saves}"
        )
    return found
