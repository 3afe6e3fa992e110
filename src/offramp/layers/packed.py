"""Ternary and binary layers in the form in which they are stored: two bits or one bit a weight.

The whole layer is one tensor of bytes, `code`: the weights, then the scale of each output channel
and the biases; for binary layers also the shift of each input channel. The scales of ternary layers
stay float32, so nothing changes. The vectors of binary layers become float16, so scores may change
a little.
The weights are unpacked once, when they are loaded, and a dense layer in float32 runs. So the file
is smaller, but not the memory or the time, and an exported graph has dense weights too. There is no
kernel for packed bits here: one in NumPy (XOR and a count of bits, exact) takes 0.7 to 2.8 times as
long as oneDNN's dense convolution on one core, and longer for all layers of a ResNet-20 together.
`benchmarks/cheaper_parts.py --kernel` measures it.
"""

from __future__ import annotations

import math
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

BITS = {"ternary": 2, "binary": 1}  # of a weight
VECTOR_TYPES = {"ternary": torch.float32, "binary": torch.float16}  # of scales, biases and shifts


class Packed(Layer):
    """A ternary or binary layer that can be stored and run, but not trained.

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
        code_size = _bytes_for(count, BITS[of]) + vectors * VECTOR_TYPES[of].itemsize
        self.register_buffer("code", torch.zeros(code_size, dtype=torch.uint8))
        # `unpack` fills these from the code. They are not stored.
        bias: Tensor | None = None
        if has_bias:
            bias = torch.zeros(outputs)
        shift: Tensor | None = None
        if of == "binary":
            shift = torch.zeros(inputs)
        self.register_buffer("weight", torch.zeros(self.shape), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    @classmethod
    def from_layer(cls, dense: nn.Module, *, of: str = "") -> Packed:
        """Pack a ternary or binary layer.

        Args:
            dense: a Ternary or Binary layer. If a text builds a model again, it is the layer that
                was converted to one.
            of: in that case "ternary" or "binary".

        Raises:
            SavesNothing: `dense` is another kind of layer. `convert` then leaves it as it is.
            InvalidArgument: `of` is neither.
        """
        layer = dense
        if of:
            if of not in BITS:
                raise InvalidArgument(f"of must be ternary or binary, got {of!r}")
            if type(dense) in (nn.Conv2d, nn.Linear):
                kind: type[Ternary] | type[Binary] = Binary
                if of == "ternary":
                    kind = Ternary
                layer = kind.from_layer(require_zeros(dense, "packed"))
        # The code has the signs as numbers from 0, then the vectors one after the other.
        vectors = list[Tensor]()
        if isinstance(layer, Ternary):
            signs, scale = ternary(layer.weight)
            packed = cls("ternary", signs.shape, layer.moves, has_bias=layer.bias is not None)
            numbers = (signs + 1).to(torch.uint8)  # 0, 1, 2
            vectors.append(scale)
            if layer.bias is not None:
                vectors.append(layer.bias)
        elif isinstance(layer, Binary):
            signs = softened(layer.weight.detach(), 0.0)
            packed = cls(
                "binary",
                signs.shape,
                layer.moves,
                has_bias=layer.bias is not None,
                has_scale=layer.scale is not None,
            )
            numbers = (signs > 0).to(torch.uint8)  # 0, 1
            for vector in (layer.scale, layer.bias, layer.shift):
                if vector is not None:
                    vectors.append(vector)
        else:
            raise SavesNothing(
                f"packed replaces Ternary and Binary layers, got {type(dense).__name__}"
            )
        sign_bytes = packed_bits(numbers.flatten().cpu(), BITS[packed.of])
        floats = torch.cat([vector.detach() for vector in vectors]).to(VECTOR_TYPES[packed.of])
        packed.code.copy_(torch.cat([sign_bytes, floats.cpu().view(torch.uint8)]))
        placed_like(packed, layer)
        packed.unpack()
        return packed

    def unpack(self) -> None:
        """Set the weights, biases and shifts from the code."""
        # 1. Split the code into the numbers of the signs and the floats of the vectors.
        count = self.weight.numel()
        size = _bytes_for(count, BITS[self.of])
        code = self.code.detach().cpu()
        numbers = unpacked_bits(code[:size], BITS[self.of], count).to(torch.float32)
        vectors = code[size:].clone().view(VECTOR_TYPES[self.of]).float()
        # 2. Make signs of the numbers: 0, 1, 2 of ternary layers, 0, 1 of binary ones.
        if self.of == "ternary":
            signs = numbers - 1
        else:
            signs = 2 * numbers - 1
        # 3. Take the vectors in the order in which they were stored.
        weight = signs.view(self.shape)
        outputs = self.shape[0]
        if self.has_scale:
            scale = vectors[:outputs]
            vectors = vectors[outputs:]
            weight = weight * spread(scale, weight)
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(vectors[:outputs])
            vectors = vectors[outputs:]
        if self.shift is not None:
            self.shift.copy_(vectors)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        self.unpack()

    def options(self) -> dict[str, Any]:
        """The kind of the layer, ternary or binary."""
        return {"of": self.of}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of a dense layer in float32, which really runs, and the bytes of the code."""
        return replace(dense_cost(self, shape), stored_bytes=stored_bytes(self))

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the replaced layer."""
        if self.shift is not None:  # a binary layer also takes the signs of its inputs
            shift = self.shift
            if self.weight.dim() == 4:  # of a convolution; a linear layer has the channels last
                shift = shift.view(1, -1, 1, 1)
            x = softened(x + shift, 0.0)
        return moved(x, self.weight, self.bias, self.moves)


def _bytes_for(count: int, bits: int) -> int:
    """The number of bytes for some numbers of `bits` bits each."""
    return math.ceil(count * bits / 8)


def packed_bits(values: Tensor, bits: int) -> Tensor:
    """Pack numbers below 2^bits [n] into bytes, the first number in the lowest bits.

    >>> packed_bits(torch.tensor([1, 0, 2, 3, 1], dtype=torch.uint8), 2).tolist()
    [225, 1]
    """
    per_byte = 8 // bits
    missing = -len(values) % per_byte  # zeros that fill the last byte
    padded = torch.cat([values, values.new_zeros(missing)])
    table = padded.view(-1, per_byte).int()  # [bytes, numbers of a byte]
    shifts = torch.arange(per_byte) * bits
    return (table << shifts).sum(1).to(torch.uint8)


def unpacked_bits(code: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` numbers [n] of some bytes.

    >>> unpacked_bits(torch.tensor([225, 1], dtype=torch.uint8), 2, 5).tolist()
    [1, 0, 2, 3, 1]
    """
    per_byte = 8 // bits
    shifts = torch.arange(per_byte) * bits
    lowest_bits = (1 << bits) - 1
    table = (code.int()[:, None] >> shifts) & lowest_bits  # [bytes, numbers of a byte]
    return table.flatten()[:count].to(torch.uint8)
