"""The contract of a layer: a cheaper substitute for a layer, or for a stage of layers.

A converted model is an ordinary model: it can be a member of a ladder, be cut, and has its own cost
in every figure.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import BadNetwork


@dataclass(frozen=True)
class LayerCost:
    """The cost of one row in a layer as it really runs, and the size of the layer in a file.

    Args:
        macs: multiply-adds of convolutions and matrix products, as in traces.
        bit_operations: the sum over all multiply-adds of the bits of the weight times the bits of
            the activation. An operation in float32 counts 32 x 32, also if its values are ternary.
        stored_bytes: of parameters and buffers in a file. Masked zeros that are stored count.
    """

    macs: float
    bit_operations: float
    stored_bytes: int


class SavesNothing(BadNetwork):
    """The substitute would not be smaller than the layer, so `convert` leaves the layer alone."""


class Layer(nn.Module, abc.ABC):
    """Contract of a cheaper substitute for a layer. Each one is a file in `layers`.

    Attributes:
        kinds: the classes of layers that it can replace. `convert` leaves modules of other classes
            alone, also if the pattern matches them.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    # Any arguments here let a type checker accept a layer that names its options.
    @classmethod
    @abc.abstractmethod
    def from_layer(cls, dense: nn.Module, *_: Any, **options: Any) -> Self:
        """Make the substitute for a layer.

        Args:
            dense: the layer or the stage; it stays as it is.
            options: of this kind of layer.

        Returns:
            A layer with the same input and output shapes, and the mode, device and type of `dense`.
            It starts from the weights of `dense` where that makes sense.

        Raises:
            BadNetwork: it cannot replace this layer; the message names the reason.
        """

    def options(self) -> dict[str, Any]:
        """The options with which `from_layer` makes a layer of exactly these shapes again.

        They are plain data. A choice that depended on the weights, such as a rank by energy, is
        given as the number that it led to.
        """
        return {}

    # Most layers compute the same from the first step of training to the last.
    def anneal(self, done: float) -> None:
        """Prepare the next training step of a layer that becomes harder during training.

        Args:
            done: the share of the training that is done, from 0 to 1. At 1 the layer runs as after
                training. The state goes into a buffer, so that a resumed run continues the same.
        """

    def penalty(self) -> Tensor | None:
        """A scalar that a recipe adds to its loss, such as the distance from ternary weights.

        None adds nothing.
        """
        return None

    @abc.abstractmethod
    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of one row: of the operations that really run, not of those that could.

        Args:
            shape: of one input row, without the batch: (channels, height, width).
        """


def dense_cost(module: nn.Module, shape: Sequence[int]) -> LayerCost:
    """Measure the cost of a module by running it on two rows of zeros.

    It is the right cost for layers that do not use their savings when they run (masks, ternary
    values in float tensors).

    Args:
        module: it runs in eval mode, and has its own mode again afterwards.
        shape: of one input row, without the batch.

    Returns:
        Its multiply-adds (weights and activations both have the bits of the module's weights), and
        its bytes.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # The type and device of its first float tensor are those of its input.
    like = torch.zeros(())
    for tensor in tensors:
        if tensor.is_floating_point():
            like = tensor
            break
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
    return LayerCost(float(macs), float(macs) * bits * bits, _bytes(tensors))


def stored_bytes(module: nn.Module) -> int:
    """The bytes of a module's tensors in a file of weights."""
    return _bytes(module.state_dict().values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def outer_layers(model: nn.Module) -> dict[str, Layer]:
    """The substitutes in a model by name, without those inside others."""
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Layer):
            continue
        is_inside = "" in layers  # the model itself is one
        for outer in layers:
            if name.startswith(f"{outer}."):
                is_inside = True
        if not is_inside:
            layers[name] = module
    return layers
