"""Adaptive computation time: each sample (ACT) or each position (SACT) runs only as many residual
units as it needs.

Figurnov et al., 2017, arXiv 1612.02297 (after Graves, 2016, arXiv 1603.08983), for signals and for
images. In training mode, under autograd and in an exported graph all units run everywhere, and
masks are multiplied, as in the authors' code. In eval mode without gradients work is really
skipped:
- A sample leaves the batch when all its positions have halted. The stage ends when the batch is
  empty.
- For images with `per="position"` only the tiles with an active position are computed
  (layers/_sparse.py), as long as their share is below `break_even`. Gathering tiles has a cost, so
  a dense unit is faster when most tiles are active. `tuned` measures the break-even point.
Both ways give the same result up to the last bits. Where we differ: the units are the caller's own
and not pre-activation units.
Shapes: B samples, C channels, n units, and positions: L of a signal, H x W of an image.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require, require_count
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers._sparse import Step, Tiles, computes, on_tiles, steps_of, tile_of
from offramp.networks.layer import Layer, LayerCost, dense_cost
from offramp.networks.taps import listening

__all__ = ["AdaptiveDepth"]

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
BIAS = -3.0  # sigmoid(-3) = 0.047: stages of fewer than 20 units start at full depth
TILE = 8
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of active tiles, at which `tuned` measures


class Halt(nn.Module):
    """The halting score of each position: sigmoid(conv3(BN(x)) + conv1(BN(mean over positions))).

    Args:
        width: channels C.
        dims: 1 for signals [B, C, L], 2 for images [B, C, H, W].
        bias: of the score at the start, before the sigmoid. With -3 the first scores are about 5 %.
    """

    def __init__(self, width: int, dims: int = 1, bias: float = BIAS) -> None:
        super().__init__()
        self.norm = NORMS[dims](width)
        self.norm_mean = NORMS[dims](width)
        self.near: nn.Module = CONVS[dims](width, 1, 3, padding=1)
        self.all: nn.Module = CONVS[dims](width, 1, 1, bias=False)
        nn.init.constant_(self.near.get_parameter("bias"), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, 1, L] in (0, 1)."""
        return torch.sigmoid(self.near(self.norm(x)) + self.overall(x))

    def overall(self, x: Tensor) -> Tensor:
        """The term that all positions share: [B, C, L] -> [B, 1, 1]."""
        shared: Tensor = self.all(self.norm_mean(_mean(x)))
        return shared

    def at(self, x: Tensor, tiles: Tiles) -> Tensor:
        """The scores at the active tiles of images: [B, C, H, W] -> [n, 1, side, side]."""
        # Tiles with a halo of 1, so that the 3x3 convolution needs no padding. The dense one pads
        # after the norm, so positions outside of the map are set to zero here as well.
        h = self.norm(tiles.read(x, 1)) * tiles.inside(1)  # [n, C, side + 2, side + 2]
        near = nn.functional.conv2d(
            h, self.near.get_parameter("weight"), self.near.get_parameter("bias")
        )  # [n, 1, side, side]
        return torch.sigmoid(near + self.overall(x)[tiles.index[0]])


class HaltSample(nn.Module):
    """The halting score of each sample: sigmoid(conv1(BN(mean over positions))). Arguments as for
    `Halt`.
    """

    def __init__(self, width: int, dims: int = 1, bias: float = BIAS) -> None:
        super().__init__()
        self.norm_mean = NORMS[dims](width)
        self.all: nn.Module = CONVS[dims](width, 1, 1)
        nn.init.constant_(self.all.get_parameter("bias"), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, 1, 1] in (0, 1)."""
        return torch.sigmoid(self.all(self.norm_mean(_mean(x))))


HALTS: dict[str, type[Halt] | type[HaltSample]] = {"position": Halt, "sample": HaltSample}


class AdaptiveDepth(Layer):
    """A stage whose output is a weighted mean of its units' states, sum_l p_l x_l.

    The weights p follow from the halting scores h. A position halts at unit N, the first one with
    h_1 + ... + h_N >= 1 - eps (at the latest at the last unit). Then p_l = h_l before N, p_N = R =
    1 - (h_1 + ... + h_{N-1}), and p_l = 0 after N, so they add up to 1. The cost N + R of every
    position, [B, 1, L], or of every sample, [B, 1, 1], goes through the identity module `ponder`.
    The recipe `pondered` listens there.

    Args:
        units: the first one may change channels and size, the others keep [B, width, L] or [B,
            width, H, W].
        width: channels of the states.
        eps: a position halts when its scores add up to 1 - eps.
        per: "position" (SACT) or "sample" (ACT), which halts as a whole.
        dims: 1 for signals, 2 for images; None finds it in the units' batch norms and convolutions.
        bias: of the halting scores at the start, before the sigmoid. A short fine-tuning needs more
            than -3.
        break_even: the share of active tiles below which a unit is computed by tiles; 0 for never.
        tile: the largest side of a tile.

    Raises:
        InvalidArgument: an argument is out of range.
    """

    kinds = (nn.Sequential,)

    def __init__(
        self,
        units: Sequence[nn.Module],
        width: int,
        eps: float = 0.01,
        *,
        per: str = "position",
        dims: int | None = None,
        bias: float = BIAS,
        break_even: float = 0.0,
        tile: int = TILE,
    ) -> None:
        super().__init__()
        if per not in HALTS:
            raise InvalidArgument(f"per must be 'position' or 'sample', got {per!r}")
        require("eps", eps, above=0, below=1)
        require("break_even", break_even, low=0, high=1)
        require_count("tile", tile)
        bias = require("bias", bias)
        self.width = width
        self.units = nn.ModuleList(units)
        if dims is None:
            dims = _dims_of(self.units)
        self.dims = dims
        # no score for the last unit, where everything halts
        self.halts = nn.ModuleList(HALTS[per](width, dims, bias) for _ in self.units[1:])
        self.ponder = nn.Identity()
        self.eps = eps
        self.per = per
        self.break_even = break_even
        self.tile = tile
        # by unit, whether it can be computed by tiles
        self._local = tuple(computes(unit, steps_of(unit)) for unit in self.units)

    @classmethod
    def from_layer(
        cls,
        dense: nn.Module,
        *,
        width: int = 0,
        eps: float = 0.01,
        per: str = "position",
        bias: float = BIAS,
        break_even: float = 0.0,
        tile: int = TILE,
    ) -> AdaptiveDepth:
        """Make a stage of adaptive depth from a Sequential of units, with copies of their weights.

        Args:
            dense: a Sequential of units, as in the constructor.
            width: channels of the states; 0 takes those of the last batch norm or convolution.
            eps: as in the constructor.
            per: as in the constructor.
            bias: as in the constructor.
            break_even: as in the constructor.
            tile: as in the constructor.

        Returns:
            A stage with new halting scores. Device, dtype and mode are those of `dense`.

        Raises:
            BadNetwork: `dense` is not a Sequential of at least two units, or has neither a batch
                norm nor a convolution to find the width in.
        """
        if not isinstance(dense, nn.Sequential) or len(dense) < 2:
            raise BadNetwork(
                f"adaptive depth must replace a Sequential of at least two units, got a "
                f"{type(dense).__name__}"
            )
        width = width or _width_of(dense)
        units = [copy.deepcopy(unit) for unit in dense]
        stage = cls(units, width, eps, per=per, bias=bias, break_even=break_even, tile=tile)
        for value in dense.parameters():
            if value.is_floating_point():
                stage.to(value.device, value.dtype)
                break
        # The mode is set module by module: the units keep their own modes, such as frozen norms.
        stage.halts.train(dense.training)
        for module in (stage, stage.units, stage.ponder):
            module.training = dense.training
        return stage

    def options(self) -> dict[str, Any]:
        """The arguments that build the stage again. The bias of the scores is among the weights."""
        return {
            "width": self.width,
            "eps": self.eps,
            "per": self.per,
            "break_even": self.break_even,
            "tile": self.tile,
        }

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The most that a row can cost: all units on all positions, and the halting scores.

        Args:
            shape: of one row.
        """
        return dense_cost(_Masked(self), shape)

    def forward(self, x: Tensor) -> Tensor:
        """The input of the first unit -> [B, width, L] or [B, width, H, W]."""
        in_graph = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if self.training or in_graph or torch.is_grad_enabled():
            out, cost = self.masked(x)
        else:
            out, cost = self.skipping(x)
        self.ponder(cost)
        return out

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run all units on all positions, with masks.

        Returns:
            The output of the stage, and the cost N + R, [B, 1, L] or [B, 1, 1].
        """
        state: Tensor = self.units[0](x)  # [B, C, L]
        total = self._blank(state)  # scores so far, [B, 1, L] or [B, 1, 1]
        going = torch.ones_like(total, dtype=torch.bool)
        cost = torch.zeros_like(total)
        out = torch.zeros_like(state)
        for number, unit in enumerate(self.units):
            # 1. The unit, except the first, which has run. Halted positions keep their state.
            if number:
                state = torch.where(going, unit(state), state)
            # 2. Who halts here gets the rest of the weight, 1 - total; others get their score.
            score = self._score(number, state, total)
            ends = going & (total + score >= 1 - self.eps)
            out = out + torch.where(ends, 1 - total, score) * going * state
            # 3. A unit costs 1, and the last one of a position the remainder R as well.
            cost = cost + going + ends * (1 - total)
            going = going & ~ends
            total = total + score * going
        return out, cost

    def skipping(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same as `masked`, but skip the samples and positions that have halted. The
        stage must be in eval mode, and no gradient passes.
        """
        state: Tensor = self.units[0](x)
        # the state is written to in place, so it must not be the caller's tensor
        if state.data_ptr() == x.data_ptr():
            state = state.clone()
        else:
            state = state.contiguous()
        batch = _Going(state, self._blank(state))
        out = torch.zeros_like(state)
        cost = torch.zeros_like(batch.total)
        rows: Tensor | None = None  # numbers [b] of the rows in the batch; None for all
        last = len(self.units) - 1
        for number in range(len(self.units)):
            self._advance(number, batch)
            # A row leaves when all its positions have halted. Its results go to its place in the
            # outputs, and the batch is compacted to the other rows.
            goes_on = batch.going.flatten(1).any(1)  # [b]
            if number == last:  # also rows with NaN scores, which never halt
                goes_on = torch.zeros_like(goes_on)
            remaining = int(goes_on.sum())
            if remaining == len(goes_on):
                continue
            keep = goes_on.nonzero()[:, 0]
            gone = (~goes_on).nonzero()[:, 0]
            numbers = gone if rows is None else rows[gone]
            out[numbers] = batch.out[gone]
            cost[numbers] = batch.cost[gone]
            if not remaining:
                break
            rows = keep if rows is None else rows[keep]
            batch = batch.taken(keep)
        return out, cost

    def _advance(self, number: int, batch: _Going) -> None:
        """Run one unit on a batch, by tiles if few are active, and halt positions. In place."""
        steps: tuple[Step, ...] | None = None
        if self.break_even:
            steps = self._steps(number)
        if steps is not None:
            height, width = batch.state.shape[2:]
            tiles = Tiles(batch.going, tile_of(height, width, self.tile))
            if tiles.share < self.break_even:
                self._by_tiles(number, batch, tiles, steps)
                return
        self._everywhere(number, batch)

    def _everywhere(self, number: int, batch: _Going) -> None:
        """Run one unit on all positions of a batch, in place."""
        if number:
            new: Tensor = self.units[number](batch.state)
            if self.per == "position":  # halted positions keep their state
                new = torch.where(batch.going, new, batch.state)
            batch.state = new
        score = self._score(number, batch.state, batch.total)
        ends, weight, batch.total, spent = self._halted(score, batch.total, batch.going)
        batch.out += weight * batch.state
        batch.cost += spent
        batch.going = batch.going & ~ends

    def _by_tiles(self, number: int, batch: _Going, tiles: Tiles, steps: Sequence[Step]) -> None:
        """Run one unit on the active tiles of a batch, in place. [n, C, side, side] each."""
        going = tiles.read(batch.going)  # [n, 1, side, side]
        batch.state = batch.state.contiguous()
        new, before = on_tiles(steps, batch.state, tiles)
        state = torch.where(going, new, before)
        tiles.write(batch.state, state)
        total = tiles.read(batch.total)
        if number < len(self.halts):
            halt = self.halts[number]
            assert isinstance(halt, Halt)
            score = halt.at(batch.state, tiles)
        else:
            score = torch.ones_like(total)
        ends, weight, total, spent = self._halted(score, total, going)
        tiles.write(batch.out, tiles.read(batch.out) + weight * state)
        tiles.write(batch.cost, tiles.read(batch.cost) + spent)
        tiles.write(batch.total, total)
        tiles.write(batch.going, going & ~ends)

    def _halted(
        self, score: Tensor, total: Tensor, going: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which positions halt at a unit, the weights p of their states, the scores so far, and the
        cost of the unit.
        """
        ends = going & (total + score >= 1 - self.eps)
        weight = torch.where(ends, 1 - total, score) * going
        spent = going + ends * (1 - total)
        return ends, weight, total + score * (going & ~ends), spent

    def _score(self, number: int, state: Tensor, like: Tensor) -> Tensor:
        """The scores h of a unit; 1 at the last unit."""
        if number == len(self.halts):
            return torch.ones_like(like)
        score: Tensor = self.halts[number](state)
        return score

    def _blank(self, state: Tensor) -> Tensor:
        """Zeros [B, 1, L] for every position, or [B, 1, 1] for every sample."""
        if self.per == "sample":
            state = _mean(state)
        return torch.zeros_like(state[:, :1])

    def _steps(self, number: int) -> tuple[Step, ...] | None:
        """The steps of a unit; None if it cannot be computed by tiles."""
        if not number or self.per == "sample" or not self._local[number]:
            return None
        return steps_of(self.units[number])

    def tuned(self, x: Tensor, *, repeats: int = 5) -> dict[float, float]:
        """Set `break_even` from timings of the second unit, dense and by tiles.

        Args:
            x: input of the stage, [B, C, H, W], with B as large as the batches that will run.
            repeats: of each timing; dense and sparse runs alternate.

        Returns:
            By share of active tiles, the time of the sparse unit over that of the dense one. Empty
            if the unit cannot be computed by tiles.

        Raises:
            BadNetwork: the stage is in training mode.
        """
        if self.training:
            raise BadNetwork("the stage must be in eval mode. Call model.eval() first")
        ratios = dict[float, float]()
        self.break_even = 0.0
        if self._steps(1) is None:
            return ratios
        with torch.inference_mode():
            state: Tensor = self.units[0](x)
            for share in SHARES:
                ratios[share] = self.sparse_over_dense(state, share, repeats=repeats)
        # the largest share up to which tiles have been faster at every share
        for share, ratio in ratios.items():
            if ratio >= 1:
                break
            self.break_even = share
        return ratios

    def sparse_over_dense(
        self,
        state: Tensor,
        share: float,
        *,
        repeats: int = 5,
        same: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> float:
        """Time the second unit, its score and its sums, by tiles and on the whole map.

        Args:
            state: output of the first unit, [B, width, H, W].
            share: of tiles that are active, drawn at random.
            repeats: of each timing; both alternate.
            same: time the dense run twice instead. The result then shows the noise of the clock.
            clock: returns seconds; `time.process_time` on a machine that others use too.

        Returns:
            The median time by tiles over the median time on the whole map.

        Raises:
            BadNetwork: the unit cannot be computed by tiles.
        """
        steps = self._steps(1)
        if steps is None:
            raise BadNetwork(
                "the units of the stage must be residual units on images for tiles, got others"
            )
        side = tile_of(state.shape[2], state.shape[3], self.tile)
        going = tile_mask(state, side, share)

        def dense() -> None:
            batch = _Going(state.clone(), self._blank(state))
            batch.going = going
            self._everywhere(1, batch)

        def sparse() -> None:
            batch = _Going(state.clone(), self._blank(state))
            batch.going = going.clone()
            self._by_tiles(1, batch, Tiles(batch.going, side), steps)

        measured = dense if same else sparse
        return _ratio(measured, dense, repeats, clock)


class _Going:
    """The rows of a batch that have not left the stage.

    Attributes: state: of the last unit, [b, C, L]. total: scores so far, [b, 1, L]. out: the
    weighted sum of states so far, [b, C, L]. cost: so far, [b, 1, L]. going: which positions have
    not halted, bool [b, 1, L].
    """

    def __init__(self, state: Tensor, total: Tensor) -> None:
        self.state = state
        self.total = total
        self.out = torch.zeros_like(state)
        self.cost = torch.zeros_like(total)
        self.going = torch.ones_like(total, dtype=torch.bool)

    def taken(self, rows: Tensor) -> _Going:
        """Some rows of the batch."""
        batch = _Going.__new__(_Going)
        for name, value in vars(self).items():
            setattr(batch, name, value[rows])
        return batch


class _Masked(nn.Module):
    """A stage that computes everything in every mode: its highest cost."""

    def __init__(self, stage: AdaptiveDepth) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """The output of the stage."""
        return self.stage.masked(x)[0]


def tile_mask(state: Tensor, side: int, share: float) -> Tensor:
    """Draw which positions are active, with a fixed seed, tile by tile.

    Args:
        state: maps [B, C, H, W].
        side: of a tile, which divides H and W.
        share: of tiles that are active.

    Returns:
        A mask, bool [B, 1, H, W].
    """
    down = state.shape[2] // side
    across = state.shape[3] // side
    count = len(state) * down * across
    draw = torch.Generator().manual_seed(0)
    active = torch.zeros(count, dtype=torch.bool)
    active[torch.randperm(count, generator=draw)[: round(share * count)]] = True
    tiles = active.view(len(state), 1, down, across).to(state.device)
    return tiles.repeat_interleave(side, 2).repeat_interleave(side, 3)  # [B, 1, H, W]


def _ratio(
    above: Callable[[], None], below: Callable[[], None], repeats: int, clock: Callable[[], float]
) -> float:
    """The ratio of the median times of two calls that alternate. The first run of each is not
    counted.
    """
    times_above = list[float]()
    times_below = list[float]()
    for run in range(repeats + 1):
        for call, times in ((above, times_above), (below, times_below)):
            start = clock()
            call()
            if run:
                times.append(clock() - start)
    return statistics.median(times_above) / statistics.median(times_below)


def _mean(x: Tensor) -> Tensor:
    """The mean over positions: [B, C, L] -> [B, C, 1], [B, C, H, W] -> [B, C, 1, 1]."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _dims_of(units: nn.Module) -> int:
    """The dimensions of the first norm or convolution, 1 or 2; 1 if there is none."""
    for module in units.modules():
        for dims, kind in (*NORMS.items(), *CONVS.items()):
            if isinstance(module, kind):
                return dims
    return 1


def _width_of(stage: nn.Sequential) -> int:
    """The channels of the last batch norm in a stage, or of its last convolution."""
    norms = tuple(NORMS.values())
    convs = tuple(CONVS.values())
    norm_widths = list[int]()
    conv_widths = list[int]()
    for module in stage.modules():
        if isinstance(module, norms):
            norm_widths.append(module.num_features)
        elif isinstance(module, convs):
            conv_widths.append(module.out_channels)
    widths = norm_widths or conv_widths
    if not widths:
        raise BadNetwork(
            "the stage must have a batch norm or a convolution, got neither. Set width="
        )
    return widths[-1]


def stages_of(model: nn.Module) -> dict[str, AdaptiveDepth]:
    """Find the stages of adaptive depth in a model, by name."""
    stages = dict[str, AdaptiveDepth]()
    for name, module in model.named_modules():
        if isinstance(module, AdaptiveDepth):
            stages[name] = module
    return stages


def depths(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run a model, and return the cost N + R at each position of every stage: N units, and a
    remainder R in (0, 1].

    Args:
        model: a model with stages of adaptive depth.
        x: a batch as the model takes it.

    Returns:
        By stage, [B, 1, L], [B, 1, H, W], or [B, 1, 1] if samples halt as a whole.
    """
    costs: dict[str, Tensor] = {}

    def note(name: str, cost: object) -> None:
        assert isinstance(cost, Tensor)
        costs[name] = cost

    ponders = {name: stage.ponder for name, stage in stages_of(model).items()}
    with torch.inference_mode(), listening(ponders, note):
        model(x)
    return costs


class PonderMaps:
    """The ponder maps of images, for the gallery of a report:
    `report(trace, plan, path, data=..., maps=this)`.

    Args:
        model: a model with stages of adaptive depth, in eval mode.
        preprocess: the module in front of it, or None.

    Raises:
        BadNetwork: the model has no stage of adaptive depth.
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module | None = None) -> None:
        if not stages_of(model):
            raise BadNetwork(
                "the model has no stage of adaptive depth. Make one with offramp.halting"
            )
        self.model = model
        self.preprocess = preprocess

    def __call__(self, images: Any) -> dict[str, Any]:
        """Compute the maps of images.

        Args:
            images: NumPy array [B, C, H, W].

        Returns:
            By stage, the cost N + R of each position, NumPy array [B, h, w].
        """
        x = torch.as_tensor(images)
        if self.preprocess is not None:
            x = self.preprocess(x)
        maps = dict[str, Any]()
        for name, cost in depths(self.model, x).items():
            maps[f"{name}, units"] = cost[:, 0].cpu().numpy()
        return maps
