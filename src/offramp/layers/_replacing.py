"""Shared by the substitutes on this shelf: checks of the layer that is replaced and of options, and
copies of its weights, geometry and mode.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument

ENERGY = 0.9  # the share to keep where neither a rank nor a share is given
Made = TypeVar("Made", bound=nn.Module)


def require_dense(dense: nn.Module, what: str) -> nn.Conv2d | nn.Linear:
    """Check that a layer is a plain convolution without groups, or a linear layer.

    Args:
        dense: the layer to replace.
        what: the method, for the message.

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
    """Check that a layer is a plain two-dimensional convolution, grouped or not.

    Args:
        dense: the layer to replace.
        what: the method, for the message.

    Raises:
        BadNetwork: it is another kind of layer.
    """
    if type(dense) is not nn.Conv2d:
        raise BadNetwork(f"{what} replaces a Conv2d, got {type(dense).__name__}")
    assert isinstance(dense, nn.Conv2d)
    return dense


def require_whole(name: str, value: object, least: int) -> int:
    """Check that an option is an int of at least `least`. Unlike `require_count` it takes Python's
    own int alone, because options are written as JSON.

    Args:
        name: of the option, for the message.
        value: the option.
        least: the smallest value.

    Raises:
        InvalidArgument: it is another kind of value, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def placed_like(made: Made, dense: nn.Module) -> Made:
    """Move a substitute to the device, dtype and mode of the layer that it replaces, in place."""
    for tensor in (*dense.parameters(), *dense.buffers()):
        if tensor.is_floating_point():
            made.to(tensor.device, tensor.dtype)
            break
    made.train(dense.training)
    return made


def geometry(conv: nn.Module) -> dict[str, Any]:
    """The kernel, stride, padding and dilation of a convolution, as arguments of another one."""
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def copied(value: Tensor | None) -> nn.Parameter | None:
    """A new parameter with the same values; None for None."""
    if value is None:
        return None
    return nn.Parameter(value.detach().clone())


def decomposed(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of weights.

    Args:
        matrix: [O, C].
        method: its name, for the message.

    Returns:
        Left vectors [O, m], singular values [m] from the largest, and right vectors [m, C].

    Raises:
        BadNetwork: the weights are not finite.
    """
    if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
        raise BadNetwork(f"{method} needs finite weights, got NaN or infinities")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def require_one_rule(energy: float | None, **ranks: int | None) -> None:
    """Raise InvalidArgument if all ranks are given and an energy too, which would decide nothing.

    Args:
        energy: as the user gave it; None if it was left out.
        ranks: the ranks by the names of their options.
    """
    if energy is None or None in ranks.values():
        return
    given = ", ".join(f"{name}={rank!r}" for name, rank in ranks.items())
    raise InvalidArgument(
        f"energy must be left out beside {' and '.join(ranks)}, got energy={energy!r} and {given}"
    )


def rank_of(
    values: Tensor,
    rank: int | None,
    energy: float | None,
    *,
    largest: int,
    method: str,
    saves: int,
    name: str,
) -> int:
    """Choose the rank of a factorization: the given one, or the smallest that keeps a share of the
    energy.

    Args:
        values: singular values, falling.
        rank: the rank; None lets the energy decide.
        energy: the share of the squared singular values to keep; None is 0.9.
        largest: the full rank.
        method: its name, for the message.
        saves: the largest rank with which the substitute is smaller than the dense layer. If the
            energy needs more, the method saves nothing here.
        name: of the option, for the message.

    Raises:
        InvalidArgument: the rank is not from 1 to `largest`, or the energy is not a share.
        SavesNothing: the energy needs a rank above `saves`.
    """
    from offramp.networks.layer import SavesNothing

    if rank is not None:
        whole = require_whole(name, rank, 1)
        if whole > largest:
            raise InvalidArgument(f"{name} must be at most {largest} for this layer, got {whole}")
        return whole
    if energy is None:
        energy = ENERGY
    require("energy", energy, above=0, high=1)
    # The energy of the first r values, as a share of all. The rank is one more than the number of r
    # that keep too little; the tolerance is for rounding in the sums.
    squares = values.double() ** 2
    kept = torch.cumsum(squares, 0) / squares.sum().clamp_min(1e-300)
    needed = int((kept < energy - 1e-12).sum()) + 1
    needed = min(needed, largest)
    if needed > saves:
        raise SavesNothing(
            f"{method} needs rank {needed} to keep {energy:g} of this layer's energy and is "
            f"smaller than the dense layer only up to rank {saves}"
        )
    return needed
