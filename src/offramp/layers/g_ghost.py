"""G-Ghost: a whole stage in which a share of the channels skips the middle blocks.

Han et al., 2022, arXiv 2201.03297. With n blocks of width c the first runs as it is; the blocks in
the middle run on the first c_raw of its channels; the others come from the first block by one 1x1
convolution, corrected by a vector that is mixed from the means of all blocks; the last block reads
both. Convolutions stay dense, which suits GPUs. A stage of one or two blocks stays plain.
For stages like ResNet's (basic blocks or bottlenecks) and RegNet's (grouped convolutions).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers._replacing import placed_like
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["GGhost"]

TRIED = 16  # pixels a side on which a narrower block is tried out


class GGhost(Layer):
    """The stage: `base`, the narrower `middle`, `cheap` with `mix`, and `end`.

    Args:
        base: the first block, [B, C, H, W] -> [B, c, H', W'].
        middle: blocks of width `kept`.
        end: the last block, of width c.
        width: c.
        kept: c_raw, the channels that go through the middle.
        ratio: the share of channels that was asked to skip it.
    """

    kinds = (nn.Sequential,)

    def __init__(
        self,
        base: nn.Module,
        middle: Sequence[nn.Module],
        end: nn.Module,
        width: int,
        kept: int,
        ratio: float,
    ) -> None:
        super().__init__()
        self.kept = kept
        self.ratio = ratio
        skipping = width - kept
        self.base = base
        self.middle = nn.ModuleList(middle)
        self.end = end
        self.cheap = nn.Conv2d(skipping, skipping, 1, bias=False)
        self.cheap_norm = nn.BatchNorm2d(skipping)
        self.mix = nn.Sequential(
            nn.Conv2d(width + kept * len(middle), skipping, 1, bias=False),
            nn.BatchNorm2d(skipping),
            nn.ReLU(),
            nn.Conv2d(skipping, skipping, 1, bias=False),
            nn.BatchNorm2d(skipping),
        )

    @classmethod
    def from_layer(cls, dense: nn.Module, *, ratio: float = 0.5) -> GGhost:
        """The stage of the same blocks, those in the middle narrower.

        Weights of narrower layers are the first rows and columns of those that stood there, but for
        grouped convolutions, which start anew. The channels that skip the middle start as the first
        block gives them, and the mix starts at zero.

        Args:
            dense: a Sequential of at least three blocks that keep their width after the first.
            ratio: the share of channels that skips the middle.

        Raises:
            BadNetwork: fewer blocks, or blocks that cannot be made narrower.
            InvalidArgument: a ratio that leaves no channel.
        """
        if not isinstance(dense, nn.Sequential) or len(dense) < 3:
            blocks = len(dense) if isinstance(dense, nn.Sequential) else 0
            raise BadNetwork(
                f"g_ghost replaces a Sequential of at least three blocks, got a "
                f"{type(dense).__name__} of {blocks}"
            )
        require("ratio", ratio, above=0, below=1)
        first, *inner, last = dense
        width = _width_of(first)
        group = _group_width(inner)
        kept = int(width * (1 - ratio)) // group * group
        if not 0 < kept < width:
            raise InvalidArgument(
                f"ratio={ratio:g} keeps {kept} of {width} channels in multiples of {group}; at "
                "least one must be kept and one must skip"
            )
        narrow = [narrowed(block, width, kept, group) for block in inner]
        made = cls(copy.deepcopy(first), narrow, copy.deepcopy(last), width, kept, ratio)
        mixed = made.mix[4]
        assert isinstance(mixed, nn.BatchNorm2d)
        nn.init.dirac_(made.cheap.weight)
        nn.init.zeros_(mixed.weight)
        modes = [module.training for module in dense.modules()]
        if any(modes) != all(modes):
            raise BadNetwork("g_ghost replaces a stage whose modules are in one mode")
        return placed_like(made, dense)

    def options(self) -> dict[str, Any]:
        """The share of channels that skips the middle."""
        return {"ratio": self.ratio}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """What all blocks cost at their widths."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the first block takes -> [B, c, H', W']."""
        first = self.base(x)
        state = first[:, : self.kept]  # e_1
        states = []
        for block in self.middle:
            state = block(state)
            states.append(state)
        means = [part.mean((2, 3), keepdim=True) for part in (first, *states)]
        mixed = self.mix(torch.cat(means, 1))  # [B, c - c_raw, 1, 1]
        cheap = self.cheap_norm(self.cheap(first[:, self.kept :]))
        skipping = torch.relu(cheap + mixed)
        out: Tensor = self.end(torch.cat([state, skipping], 1))
        return out


def _width_of(block: nn.Module) -> int:
    """The channels that the last convolution outside of a shortcut's gives."""
    widths = [part.num_features for part in block.modules() if isinstance(part, nn.BatchNorm2d)]
    convolutions = [part for part in block.modules() if isinstance(part, nn.Conv2d)]
    widths = widths or [part.out_channels for part in convolutions]
    if not widths:
        raise BadNetwork(f"g_ghost replaces stages of convolutions, got a {type(block).__name__}")
    return widths[-1]


def _group_width(blocks: Sequence[nn.Module]) -> int:
    """g' = floor(0.75 x the channels of a group) in stages like RegNet's; 1 in others."""
    found = 1
    for block in blocks:
        for part in block.modules():
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                found = max(found, int(0.75 * (part.in_channels // part.groups)))
    return found


def narrowed(block: nn.Module, width: int, kept: int, group: int) -> nn.Module:
    """A copy of a block in which every width is the share kept / width of what it was.

    Args:
        block: it takes and gives [B, width, H, W].
        width: its channels.
        kept: those of the copy.
        group: channels of a group in the copy's grouped convolutions.

    Raises:
        BadNetwork: the copy does not take and give `kept` channels.
    """
    made = copy.deepcopy(block)
    for part in made.modules():
        if isinstance(part, nn.Conv2d):
            _narrow_convolution(part, width, kept, group)
        elif isinstance(part, nn.BatchNorm2d):
            _narrow_norm(part, max(1, part.num_features * kept // width))
    like = next(made.parameters())
    modes = [(part, part.training) for part in made.modules()]
    try:
        with torch.no_grad():
            out = made.eval()(like.new_zeros(1, kept, TRIED, TRIED))
    except (RuntimeError, ValueError, AttributeError) as problem:
        why = str(problem).strip().splitlines()[0]
        raise BadNetwork(f"a {type(block).__name__} cannot be made narrower ({why})") from problem
    finally:
        for part, training in modes:
            part.training = training
    if out.shape[1] != kept or out.shape[2] != TRIED:
        raise BadNetwork(f"a {type(block).__name__} in the middle of the stage changes its shape")
    return made


def _narrow_convolution(conv: nn.Conv2d, width: int, kept: int, group: int) -> None:
    """Fewer channels on both sides, in place."""
    inputs = max(1, conv.in_channels * kept // width)
    outputs = max(1, conv.out_channels * kept // width)
    weight = conv.weight.detach()
    if conv.groups > 1:
        if inputs % group or outputs % group:
            raise BadNetwork(
                f"{inputs} and {outputs} channels do not divide into groups of {group} channels"
            )
        conv.groups = inputs // group
        fresh = torch.empty(outputs, group, *weight.shape[2:], dtype=weight.dtype)
        nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu")
        sliced = fresh.to(weight.device)
    else:
        sliced = weight[:outputs, :inputs].clone()
    conv.weight = nn.Parameter(sliced)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[:outputs].clone())
    conv.in_channels = inputs
    conv.out_channels = outputs


def _narrow_norm(norm: nn.BatchNorm2d, width: int) -> None:
    """Fewer channels, in place."""
    norm.num_features = width
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, nn.Parameter(value.detach()[:width].clone()))
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        if value is not None:
            setattr(norm, name, value[:width].clone())
