"""Residual units as many as each position of a signal needs: spatially adaptive computation time along one axis.

Figurnov et al., 2017, arXiv 1612.02297 (after Graves, 2016, arXiv 1603.08983), here for signals. Positions that have
halted keep their features while others go on; but masks are multiplied, as in the authors' code: every unit still runs
on all positions, so that `depths` says what could be saved and no time is. Where we differ: units of the caller's own,
not pre-activation ones. Shapes: B samples, C channels, L positions, n units.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.layer import Layer, LayerCost, dense_cost
from offramp.networks.taps import listening

__all__ = ["AdaptiveDepth"]


class Halt(nn.Module):
    """How ready each position is to halt, sigmoid(conv3(BN(x)) + conv1(BN(mean over positions))): [B, 1, L].

    The bias starts at -3: at first 5 % per unit, so that stages of fewer than 20 units start at full depth.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mean = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.near, self.all = nn.Conv1d(width, 1, 3, padding=1), nn.Conv1d(width, 1, 1, bias=False)
        assert self.near.bias is not None
        nn.init.constant_(self.near.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, 1, L] in (0, 1)."""
        return torch.sigmoid(self.near(self.norm(x)) + self.all(self.norm_mean(x.mean(2, keepdim=True))))


class AdaptiveDepth(Layer):
    """A stage that gives sum_l p_l x_l of its units' states x_l, where p follows from scores h_l that add up to 1.

    A position halts at unit N, the first with h_1 + ... + h_N >= 1 - eps (the last one at the latest): p_l = h_l before
    it, p_N = R = 1 - (h_1 + ... + h_{N-1}), and 0 after it. units: the first may change channels and length, the others
    keep [B, width, L]. What `ponder`, which does nothing, is given is the cost N + R of every position, [B, 1, L]: the
    recipe `pondered` listens to it.
    """

    kinds = (nn.Sequential,)

    def __init__(self, units: Sequence[nn.Module], width: int, eps: float = 0.01) -> None:
        super().__init__()
        self.width = width
        self.units = nn.ModuleList(units)
        self.halts = nn.ModuleList(Halt(width) for _ in self.units[1:])
        self.ponder = nn.Identity()
        self.eps = eps

    @classmethod
    def from_layer(cls, dense: nn.Module, *, width: int = 0, eps: float = 0.01) -> AdaptiveDepth:
        """The stage of the same units, with their weights, whose positions may halt early.

        Args:
            dense: a Sequential of units, as in the constructor.
            width: the channels of their states; 0 takes those of the last batch norm or convolution in it.
            eps: as in the constructor.

        Raises:
            BadNetwork: it is no Sequential of at least two units, or does not tell its width.
        """
        if not isinstance(dense, nn.Sequential) or len(dense) < 2:
            raise BadNetwork(
                f"adaptive depth must replace a Sequential of at least two units, got a {type(dense).__name__}"
            )
        width = width or _width_of(dense)
        stage = cls([copy.deepcopy(unit) for unit in dense], width, eps)
        like = next((value for value in dense.parameters() if value.is_floating_point()), None)
        if like is not None:
            stage.to(like.device, like.dtype)
        stage.halts.train(dense.training)
        for part in (stage, stage.units, stage.ponder):  # units keep modes of their own, such as frozen norms
            part.training = dense.training
        return stage

    def options(self) -> dict[str, Any]:
        """The channels and the margin."""
        return {"width": self.width, "eps": self.eps}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """All units on all positions, and the halting scores: masks are multiplied, and no work is saved."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the first unit takes -> [B, width, L]."""
        state: Tensor = self.units[0](x)
        total = torch.zeros_like(state[:, :1])  # of the scores so far, [B, 1, L] as all that follows
        going = torch.ones_like(total, dtype=torch.bool)
        cost, out = torch.zeros_like(total), torch.zeros_like(state)
        for place, unit in enumerate(self.units):
            state = torch.where(going, unit(state), state) if place else state
            last = place == len(self.halts)
            score = torch.ones_like(total) if last else self.halts[place](state)
            ends = going & (total + score >= 1 - self.eps)
            out = out + torch.where(ends, 1 - total, score) * going * state
            cost = cost + going + ends * (1 - total)
            going = going & ~ends
            total = total + score * going
        self.ponder(cost)
        return out


def _width_of(stage: nn.Sequential) -> int:
    widths = [part.num_features for part in stage.modules() if isinstance(part, nn.BatchNorm1d)]
    widths = widths or [part.out_channels for part in stage.modules() if isinstance(part, nn.Conv1d)]
    if not widths:
        raise BadNetwork("the stage must have a batch norm or a convolution over signals, got neither; give width=")
    return widths[-1]


def stages_of(model: nn.Module) -> dict[str, AdaptiveDepth]:
    """The stages of adaptive depth in a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, AdaptiveDepth)}


def depths(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every such stage N + R at each position, [B, 1, L]: N units, and a remainder in (0, 1]."""
    found: dict[str, Tensor] = {}

    def heard(name: str, cost: object) -> None:
        assert isinstance(cost, Tensor)
        found[name] = cost

    with torch.inference_mode(), listening({name: part.ponder for name, part in stages_of(model).items()}, heard):
        model(x)
    return found
