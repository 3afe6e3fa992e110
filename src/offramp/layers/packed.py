"""Ternary and binary layers as they are stored: two bits or one bit a weight.

All of a layer is one tensor of bytes, `code`: the weights, then the scale of each output channel
and the biases; for binary layers also the shift of each input channel. Ternary scales keep float32,
so nothing changes. Binary vectors are float16, so scores may change a little when it is packed.
The weights are unpacked once, when they are loaded, and what runs is a dense layer in float32. So
only the file is smaller, not the memory or the time; an exported graph holds dense weights too.
A kernel over packed bits (XOR and counting bits in NumPy, exact) takes 0.7 to 2.8 times as long as
oneDNN's dense convolution on one core, and longer for the layers of a ResNet-20 together, so there
is none here; `benchmarks/cheaper_parts.py --kernel` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgument
from offramp.layers._replacing import placed_like
from offramp.layers.binary import Binary, softened
from offramp.layers.ternary import Ternary, moved, require_zeros, spread, ternary
from offramp.networks.layer import Layer, LayerCost, SavesNothing, dense_cost, stored_bytes

__all__ = ["Packed"]

BITS = {"ternary": 2, "binary": 1}


class Packed(Layer):
    """A ternary or binary layer that is ready to be stored and run, and is not trained any more.

    Args:
        of: "ternary" or "binary".
        shape: of the weights.
        moves: how the convolution moves; empty for a linear layer.
        has_bias: whether there are biases.
        has_scale: whether there are scales.
    """

    kinds = (Ternary, Binary, nn.Conv2d, nn.Linear)
    code: Tensor
    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        of: str,
        shape: Sequence[int],
        moves: dict[str, Any],
        *,
        has_bias: bool,
        has_scale: bool = True,
    ) -> None:
        super().__init__()
        self.of = of
        self.shape = tuple(shape)
        self.moves = moves
        self.has_scale = has_scale
        outputs = self.shape[0]
        inputs = self.shape[1] * int(moves.get("groups", 1))
        count = torch.Size(self.shape).numel()
        vectors = outputs * (has_scale + has_bias)
        if of == "binary":
            vectors += inputs
        word = 4 if of == "ternary" else 2
        size = -(-count * BITS[of] // 8) + vectors * word
        self.register_buffer("code", torch.zeros(size, dtype=torch.uint8))
        # What follows from the code, and is in no file:
        self.register_buffer("weight", torch.zeros(self.shape), persistent=False)
        self.register_buffer("bias", torch.zeros(outputs) if has_bias else None, persistent=False)
        shift = torch.zeros(inputs) if of == "binary" else None
        self.register_buffer("shift", shift, persistent=False)

    @classmethod
    def from_layer(cls, dense: nn.Module, *, of: str = "") -> Packed:
        """The packed form of a ternary or binary layer.

        Args:
            dense: a Ternary or Binary layer; or, where a text builds a model again, the layer that
                stood there first.
            of: in that case "ternary" or "binary".

        Raises:
            SavesNothing: another kind of layer: `convert` leaves it as it is.
            InvalidArgument: `of` is neither.
        """
        layer = dense
        if of:
            if of not in BITS:
                raise InvalidArgument(f"of must be ternary or binary, got {of!r}")
            if type(dense) in (nn.Conv2d, nn.Linear):
                kind = Ternary if of == "ternary" else Binary
                layer = kind.from_layer(require_zeros(dense, "packed"))
        if isinstance(layer, Ternary):
            signs, scale = ternary(layer.weight)
            made = cls("ternary", signs.shape, layer.moves, has_bias=layer.bias is not None)
            words = [scale] if layer.bias is None else [scale, layer.bias.detach()]
            codes = (signs + 1).to(torch.uint8)
            vectors = torch.cat([word.float() for word in words])
        elif isinstance(layer, Binary):
            signs = softened(layer.weight.detach(), 0.0)
            made = cls(
                "binary",
                signs.shape,
                layer.moves,
                has_bias=layer.bias is not None,
                has_scale=layer.scale is not None,
            )
            given = [layer.scale, layer.bias, layer.shift]
            words = [value.detach() for value in given if value is not None]
            codes = (signs > 0).to(torch.uint8)
            vectors = torch.cat(words).to(torch.float16)
        else:
            raise SavesNothing(
                f"packed replaces Ternary and Binary layers, got {type(dense).__name__}"
            )
        bits = packed_bits(codes.flatten().cpu(), BITS[made.of])
        made.code.copy_(torch.cat([bits, vectors.cpu().view(torch.uint8)]))
        placed_like(made, layer)
        made.unpack()
        return made

    def unpack(self) -> None:
        """Make the weights that it computes with from the code."""
        count = self.weight.numel()
        size = -(-count * BITS[self.of] // 8)
        code = self.code.detach().cpu()
        values = unpacked_bits(code[:size], BITS[self.of], count).to(torch.float32)
        kind = torch.float32 if self.of == "ternary" else torch.float16
        rest = code[size:].clone().view(kind).float()
        signs = values - 1 if self.of == "ternary" else 2 * values - 1
        weight = signs.view(self.shape)
        outputs = self.shape[0]
        if self.has_scale:
            scale = rest[:outputs]
            rest = rest[outputs:]
            weight = weight * spread(scale, weight)
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(rest[:outputs])
            rest = rest[outputs:]
        if self.shift is not None:
            self.shift.copy_(rest)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        self.unpack()

    def options(self) -> dict[str, Any]:
        """Which kind of layer it was."""
        return {"of": self.of}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """It runs as a dense layer in float32, and stores the code alone."""
        return replace(dense_cost(self, shape), stored_bytes=stored_bytes(self))

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the layer that it replaces."""
        if self.shift is not None:
            shift = self.shift.view(1, -1, 1, 1) if x.dim() == 4 else self.shift
            x = softened(x + shift, 0.0)
        return moved(x, self.weight, self.bias, self.moves)


def packed_bits(values: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits [n] -> bytes, the first number in the lowest bits.

    >>> packed_bits(torch.tensor([1, 0, 2, 3, 1], dtype=torch.uint8), 2).tolist()
    [225, 1]
    """
    each = 8 // bits
    missing = -len(values) % each
    padded = torch.cat([values, values.new_zeros(missing)]).view(-1, each).int()
    places = torch.arange(each) * bits
    return (padded << places).sum(1).to(torch.uint8)


def unpacked_bits(code: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers [n] in bytes.

    >>> unpacked_bits(torch.tensor([225, 1], dtype=torch.uint8), 2, 5).tolist()
    [1, 0, 2, 3, 1]
    """
    each = 8 // bits
    places = torch.arange(each) * bits
    values = (code.int()[:, None] >> places) & ((1 << bits) - 1)
    return values.flatten()[:count].to(torch.uint8)
