"""G-Ghost: a stage of blocks in which a share of the channels skips the middle blocks.

Han et al., 2022, arXiv 2201.03297. In a stage of n blocks of width c the first block is unchanged.
The middle blocks run on its first c_raw channels. The other channels skip them: one 1x1 convolution
of the first block's output, corrected by a vector that is mixed from the means of all blocks. The
last block reads both. All convolutions stay dense, which suits GPUs. A stage of one or two blocks
stays as it is. For stages like ResNet's (basic blocks or bottlenecks) and RegNet's (grouped
convolutions).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp._support.sentences import first_line
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
        kept: c_raw, the number of channels that go through the middle.
        ratio: the share of channels that skips the middle, before rounding.
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
        """Make a G-Ghost stage from the blocks of a stage.

        The weights of the narrower layers are the first rows and columns of the old ones. Grouped
        convolutions start anew. The channels that skip the middle start as copies of the first
        block's, and the mix starts at zero.

        Args:
            dense: a Sequential of at least three blocks. All but the first keep the width.
            ratio: the share of channels that skips the middle.

        Raises:
            BadNetwork: there are fewer blocks, or a block cannot be made narrower.
            InvalidArgument: the ratio leaves no channel.
        """
        if not isinstance(dense, nn.Sequential) or len(dense) < 3:
            count = len(dense) if isinstance(dense, nn.Sequential) else 0
            raise BadNetwork(
                f"g_ghost replaces a Sequential of at least three blocks, got a "
                f"{type(dense).__name__} of {count}"
            )
        require("ratio", ratio, above=0, below=1)
        first, *inner, last = dense
        width = _width_of(first)
        # whole groups, so that the narrower grouped convolutions still divide
        group = _group_width(inner)
        kept = int(width * (1 - ratio)) // group * group
        if not 0 < kept < width:
            raise InvalidArgument(
                f"ratio must keep some of {width} channels and skip some, got {ratio:g}, which "
                f"keeps {kept} in multiples of {group}"
            )
        narrow = [narrowed(block, width, kept, group) for block in inner]
        stage = cls(copy.deepcopy(first), narrow, copy.deepcopy(last), width, kept, ratio)
        # at the start `cheap` is the identity, and the norm at the end of `mix` gives zero
        last_norm = stage.mix[4]
        assert isinstance(last_norm, nn.BatchNorm2d)
        nn.init.dirac_(stage.cheap.weight)
        nn.init.zeros_(last_norm.weight)
        modes = {module.training for module in dense.modules()}
        if len(modes) > 1:
            raise BadNetwork("the modules of a stage must be in one mode for g_ghost, got both")
        return placed_like(stage, dense)

    def options(self) -> dict[str, Any]:
        """The share of channels that skips the middle."""
        return {"ratio": self.ratio}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of all blocks at their widths."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The input of the first block -> [B, c, H', W']."""
        first = self.base(x)  # [B, c, H', W']
        state = first[:, : self.kept]  # [B, c_raw, H', W'], e_1 of the paper
        states = []
        for block in self.middle:
            state = block(state)
            states.append(state)
        means = [values.mean((2, 3), keepdim=True) for values in (first, *states)]
        mixed = self.mix(torch.cat(means, 1))  # [B, c - c_raw, 1, 1]
        cheap = self.cheap_norm(self.cheap(first[:, self.kept :]))  # [B, c - c_raw, H', W']
        skipping = torch.relu(cheap + mixed)
        out: Tensor = self.end(torch.cat([state, skipping], 1))
        return out


def _width_of(block: nn.Module) -> int:
    """The channels of the last batch norm in a block, or of its last convolution."""
    norm_widths = list[int]()
    conv_widths = list[int]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            norm_widths.append(module.num_features)
        elif isinstance(module, nn.Conv2d):
            conv_widths.append(module.out_channels)
    widths = norm_widths or conv_widths
    if not widths:
        raise BadNetwork(f"g_ghost replaces stages of convolutions, got a {type(block).__name__}")
    return widths[-1]


def _group_width(blocks: Sequence[nn.Module]) -> int:
    """g' = floor(0.75 x the channels of a group) in stages like RegNet's; 1 in others."""
    group = 1
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                group = max(group, int(0.75 * (module.in_channels // module.groups)))
    return group


def narrowed(block: nn.Module, width: int, kept: int, group: int) -> nn.Module:
    """Copy a block, and make every width in it smaller by the factor kept / width.

    Args:
        block: [B, width, H, W] -> [B, width, H, W].
        width: channels of the block.
        kept: channels of the copy.
        group: channels of a group in the copy's grouped convolutions.

    Returns:
        The copy, [B, kept, H, W] -> [B, kept, H, W].

    Raises:
        BadNetwork: the copy does not work on `kept` channels.
    """
    narrow = copy.deepcopy(block)
    for module in narrow.modules():
        if isinstance(module, nn.Conv2d):
            _narrow_convolution(module, width, kept, group)
        elif isinstance(module, nn.BatchNorm2d):
            _narrow_norm(module, max(1, module.num_features * kept // width))
    # Try the copy on one image of zeros, in eval mode, and put the modes back.
    like = next(narrow.parameters())
    modes = [(module, module.training) for module in narrow.modules()]
    try:
        with torch.no_grad():
            out = narrow.eval()(like.new_zeros(1, kept, TRIED, TRIED))
    except (RuntimeError, ValueError, AttributeError) as problem:
        why = first_line(problem)
        raise BadNetwork(f"a {type(block).__name__} cannot be made narrower ({why})") from problem
    finally:
        for module, training in modes:
            module.training = training
    if out.shape[1] != kept or out.shape[2] != TRIED:
        raise BadNetwork(f"a {type(block).__name__} in the middle of the stage changes its shape")
    return narrow


def _narrow_convolution(conv: nn.Conv2d, width: int, kept: int, group: int) -> None:
    """Fewer channels on both sides, in place."""
    inputs = max(1, conv.in_channels * kept // width)
    outputs = max(1, conv.out_channels * kept // width)
    weight = conv.weight.detach()  # [O, C / groups, k, k]
    if conv.groups > 1:
        if inputs % group or outputs % group:
            raise BadNetwork(
                f"{inputs} and {outputs} channels do not divide into groups of {group} channels"
            )
        conv.groups = inputs // group
        # groups of another width: their weights mix other channels, so they start anew
        fresh = torch.empty(outputs, group, *weight.shape[2:], dtype=weight.dtype)
        nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu")
        narrow_weight = fresh.to(weight.device)
    else:
        narrow_weight = weight[:outputs, :inputs].clone()
    conv.weight = nn.Parameter(narrow_weight)
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
