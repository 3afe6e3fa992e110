"""The contract of a layer: a cheaper substitute for a layer, or for a stage of layers.

A converted model is an ordinary model: it can be a member of a ladder, be cut, and has its own cost
in every figure.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import BadNetwork


@dataclass(frozen=True)
class LayerCost:
    """What one row costs in a layer as it really runs, and what the layer takes to store.

    Args:
        macs: multiply-adds of convolutions and matrix products, as in traces.
        bit_operations: macs times the bits of a weight times the bits of an activation, summed over
            them. What is computed in float32 has 32 x 32 for each, also where its values are
            ternary.
        stored_bytes: of parameters and buffers as they lie in a file. Masked zeros that are stored
            count.
    """

    macs: float
    bit_operations: float
    stored_bytes: int


class SavesNothing(BadNetwork):
    """A layer for which the substitute would be no smaller: `convert` leaves it as it is."""


class Layer(nn.Module, abc.ABC):
    """Contract of a cheaper substitute. Where it goes: the shelf `layers`, one file each.

    Attributes:
        kinds: the classes of layers that it can replace. Where a pattern of `convert` also matches
            modules of other classes, those are left alone.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    # Any arguments here let a type checker accept a layer that names its options.
    @classmethod
    @abc.abstractmethod
    def from_layer(cls, dense: nn.Module, *_: Any, **options: Any) -> Self:
        """The substitute for what stands there now.

        Args:
            dense: the layer or the stage; it stays as it is.
            options: of this kind of layer.

        Returns:
            A layer that takes and gives the same shapes, in the mode, on the device and in the type
            of `dense`; with its weights where there is a sensible start.

        Raises:
            BadNetwork: it cannot stand for this layer, and why.
        """

    def options(self) -> dict[str, Any]:
        """The options with which `from_layer` makes a layer of exactly these shapes again.

        Plain data. What followed from the weights, such as a rank by energy, is here a number.
        """
        return {}

    # Most layers compute the same from the first step of training to the last.
    def anneal(self, done: float) -> None:
        """Get ready for the next training step of a layer that hardens while it is trained.

        Args:
            done: the share of the training that is done, 0 to 1; 1 is how the layer runs in the
                end. What follows from it is kept in a buffer, so that a resumed run goes on alike.
        """

    def penalty(self) -> Tensor | None:
        """What a recipe adds to its loss, such as the distance from ternary weights; None for
        nothing.
        """
        return None

    @abc.abstractmethod
    def cost(self, shape: Sequence[int]) -> LayerCost:
        """What it costs for one row, honestly: what is computed, not what could be saved.

        Args:
            shape: of one row that goes in, without the batch: (channels, height, width).
        """


def dense_cost(module: nn.Module, shape: Sequence[int]) -> LayerCost:
    """The cost of what runs as it stands, seen by running it on two rows of zeros.

    For layers whose savings are not computed (masks, ternary values in float tensors) this is the
    honest cost.

    Args:
        module: in eval mode while it is run; its own mode stays.
        shape: of one row that goes in, without the batch.

    Returns:
        Its multiply-adds, each with the bits of the module's weights on both sides, and its bytes.
    """
    tensors = [*module.parameters(), *module.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    like = floats[0] if floats else torch.zeros(())
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(like.new_zeros((2, *shape)))
    finally:
        for part, training in modes:
            part.training = training
    macs = counter.get_total_flops() / 2 / 2  # two operations for each multiply-add, two rows
    bits = 8 * like.element_size()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return LayerCost(float(macs), float(macs) * bits * bits, stored)


def stored_bytes(module: nn.Module) -> int:
    """The bytes of a module's tensors in a file of weights."""
    tensors = module.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def outer_layers(model: nn.Module) -> dict[str, Layer]:
    """The substitutes in a model by name, without those inside of others."""
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found if outer)
        if isinstance(module, Layer) and not inside and "" not in found:
            found[name] = module
    return found
