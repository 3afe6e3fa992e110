"""Residual units as many as each sample, or each position, needs: (spatially) adaptive computation
time, ACT and SACT.

Figurnov et al., 2017, arXiv 1612.02297 (after Graves, 2016, arXiv 1603.08983), for signals and for
images. In training mode, under autograd and in an exported graph all units run everywhere and masks
are multiplied, as in the authors' code. In eval mode without gradients work is really skipped:
- samples whose positions have all halted leave the batch, and the stage ends when nobody is left;
- of images with `per="position"` only tiles that hold an active position are computed
  (layers/_sparse.py), while their share is below `break_even`: gathering costs too, so that a dense
  unit is quicker where most tiles are active. `tuned` measures where that is.
Both ways give the same up to the last bits. Where we differ: units of the caller's own, not
pre-activation ones.
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

from offramp._support.arguments import require
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
    """How ready each position is to halt, sigmoid(conv3(BN(x)) + conv1(BN(mean over positions))):
    [B, 1, L].

    Args:
        width: channels.
        dims: 1 for signals, 2 for images: [B, 1, H, W].
        bias: at the start. By default -3, at first 5 % per unit.
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
        """The part that all positions share: [B, C, L] -> [B, 1, 1]."""
        found: Tensor = self.all(self.norm_mean(_mean(x)))
        return found

    def at(self, x: Tensor, tiles: Tiles) -> Tensor:
        """The same at the active tiles of images: [B, C, H, W] -> [n, 1, side, side]."""
        h = self.norm(tiles.read(x, 1)) * tiles.inside(1)
        near = nn.functional.conv2d(
            h, self.near.get_parameter("weight"), self.near.get_parameter("bias")
        )
        return torch.sigmoid(near + self.overall(x)[tiles.index[0]])


class HaltSample(nn.Module):
    """How ready each sample is to halt, sigmoid(conv1(BN(mean over positions))): [B, 1, 1];
    arguments as of `Halt`.
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
    """A stage that gives sum_l p_l x_l of its units' states x_l, where p follows from scores h_l
    that add up to 1.

    A position halts at unit N, the first with h_1 + ... + h_N >= 1 - eps (the last one at the
    latest): p_l = h_l before it, p_N = R = 1 - (h_1 + ... + h_{N-1}), and 0 after it. What
    `ponder`, which does nothing, is given is the cost N + R of every position, [B, 1, L], or of
    every sample, [B, 1, 1]: the recipe `pondered` listens to it.

    Args:
        units: the first may change channels and size, the others keep [B, width, L] or [B, width,
            H, W].
        width: the channels of their states.
        eps: as above.
        per: "position" (SACT) or "sample" (ACT): what halts.
        dims: 1 for signals, 2 for images; None takes what the units' batch norms and convolutions
            are for.
        bias: of the halting scores at the start, before the sigmoid. A short fine-tuning wants more
            than -3.
        break_even: the share of active tiles below which a unit is computed by tiles; 0 for never.
        tile: the largest side of a tile.
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
        if not 0 < eps < 1:
            raise InvalidArgument(f"eps must be between 0 and 1, got {eps}")
        if not 0 <= break_even <= 1 or tile < 1:
            raise InvalidArgument(
                f"break_even must be from 0 to 1 and tile at least 1, got {break_even} and {tile}"
            )
        bias = require("bias", bias)
        self.width = width
        self.units = nn.ModuleList(units)
        self.dims = _dims_of(self.units) if dims is None else dims
        self.halts = nn.ModuleList(HALTS[per](width, self.dims, bias) for _ in self.units[1:])
        self.ponder = nn.Identity()
        self.width = width
        self.eps = eps
        self.per = per
        self.break_even = break_even
        self.tile = tile
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
        """The stage of the same units, with their weights, whose positions or samples may halt
        early.

        Args:
            dense: a Sequential of units, as in the constructor.
            width: the channels of their states; 0 takes those of the last batch norm or convolution
                in it.
            eps: as in the constructor.
            per: as in the constructor.
            bias: as in the constructor.
            break_even: as in the constructor.
            tile: as in the constructor.

        Returns:
            A stage with halting scores of its own, on the device, in the type and in the mode of
            `dense`.

        Raises:
            BadNetwork: it is no Sequential of at least two units, or does not tell its width.
        """
        if not isinstance(dense, nn.Sequential) or len(dense) < 2:
            raise BadNetwork(
                f"adaptive depth must replace a Sequential of at least two units, got a "
                f"{type(dense).__name__}"
            )
        width = width or _width_of(dense)
        units = [copy.deepcopy(unit) for unit in dense]
        stage = cls(units, width, eps, per=per, bias=bias, break_even=break_even, tile=tile)
        like = next((value for value in dense.parameters() if value.is_floating_point()), None)
        if like is not None:
            stage.to(like.device, like.dtype)
        stage.halts.train(dense.training)
        for part in (
            stage,
            stage.units,
            stage.ponder,
        ):  # units keep modes of their own, such as frozen norms
            part.training = dense.training
        return stage

    def options(self) -> dict[str, Any]:
        """Channels, margin, what halts, and how it is computed. The scores' bias is a weight."""
        return {
            "width": self.width,
            "eps": self.eps,
            "per": self.per,
            "break_even": self.break_even,
            "tile": self.tile,
        }

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """All units on all positions, and the halting scores: the most that a row can cost. `spent`
        tells what it did.

        Args:
            shape: of one row.

        Returns:
            Its cost.
        """
        return dense_cost(_Masked(self), shape)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the first unit takes -> [B, width, L] or [B, width, H, W]."""
        graph = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        out, cost = (
            self.masked(x)
            if self.training or graph or torch.is_grad_enabled()
            else self.skipping(x)
        )
        self.ponder(cost)
        return out

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All units on all positions, with masks: what the stage gives, and what it cost, N + R."""
        state: Tensor = self.units[0](x)
        # of the scores so far, [B, 1, L] or [B, 1, 1] as all that follows
        total = self._blank(state)
        going = torch.ones_like(total, dtype=torch.bool)
        cost = torch.zeros_like(total)
        out = torch.zeros_like(state)
        for number, unit in enumerate(self.units):
            state = torch.where(going, unit(state), state) if number else state
            score = self._score(number, state, total)
            ends = going & (total + score >= 1 - self.eps)
            out = out + torch.where(ends, 1 - total, score) * going * state
            cost = cost + going + ends * (1 - total)
            going = going & ~ends
            total = total + score * going
        return out, cost

    def skipping(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `masked`, where what has halted is left out. Needs eval mode, and passes no
        gradient.
        """
        state: Tensor = self.units[0](x)
        if state.data_ptr() == x.data_ptr():
            state = state.clone()
        else:
            state = state.contiguous()
        now = _Going(state, self._blank(state))
        out = torch.zeros_like(state)
        cost = torch.zeros_like(now.total)
        rows: Tensor | None = None  # numbers of those that are still here; None for all
        last = len(self.units) - 1
        for number in range(len(self.units)):
            self._advance(number, now)
            here = now.going.flatten(1).any(1)  # [b]
            if number == last:  # also rows with NaN scores, which never halt
                here = torch.zeros_like(here)
            left = int(here.sum())
            if left == len(here):
                continue
            keep = here.nonzero()[:, 0]
            gone = (~here).nonzero()[:, 0]
            numbers = gone if rows is None else rows[gone]
            out[numbers] = now.out[gone]
            cost[numbers] = now.cost[gone]
            if not left:
                break
            rows = keep if rows is None else rows[keep]
            now = now.taken(keep)
        return out, cost

    def _advance(self, number: int, now: _Going) -> None:
        """One unit on what is going, and who halts there; in place."""
        steps = self._steps(number) if self.break_even else None
        if steps is not None:
            tiles = Tiles(now.going, tile_of(now.state.shape[2], now.state.shape[3], self.tile))
            if tiles.share < self.break_even:
                self._by_tiles(number, now, tiles, steps)
                return
        self._everywhere(number, now)

    def _everywhere(self, number: int, now: _Going) -> None:
        """One unit on all positions of the rows that are here."""
        if number:
            new: Tensor = self.units[number](now.state)
            every = self.per == "sample"  # whoever is here is going
            now.state = new if every else torch.where(now.going, new, now.state)
        score = self._score(number, now.state, now.total)
        ends, weight, now.total, spent = self._halted(score, now.total, now.going)
        now.out += weight * now.state
        now.cost += spent
        now.going = now.going & ~ends

    def _by_tiles(self, number: int, now: _Going, tiles: Tiles, steps: Sequence[Step]) -> None:
        """The same at the active tiles alone."""
        going = tiles.read(now.going)  # [n, 1, side, side]
        now.state = now.state.contiguous()
        new, before = on_tiles(steps, now.state, tiles)
        state = torch.where(going, new, before)
        tiles.write(now.state, state)
        total = tiles.read(now.total)
        if number < len(self.halts):
            halt = self.halts[number]
            assert isinstance(halt, Halt)
            score = halt.at(now.state, tiles)
        else:
            score = torch.ones_like(total)
        ends, weight, total, spent = self._halted(score, total, going)
        tiles.write(now.out, tiles.read(now.out) + weight * state)
        tiles.write(now.cost, tiles.read(now.cost) + spent)
        tiles.write(now.total, total)
        tiles.write(now.going, going & ~ends)

    def _halted(
        self, score: Tensor, total: Tensor, going: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Who halts now, the weights p of these states, the scores so far, and the cost of this
        unit.
        """
        ends = going & (total + score >= 1 - self.eps)
        weight = torch.where(ends, 1 - total, score) * going
        spent = going + ends * (1 - total)
        return ends, weight, total + score * (going & ~ends), spent

    def _score(self, number: int, state: Tensor, like: Tensor) -> Tensor:
        """h of a unit, 1 at the last one."""
        if number == len(self.halts):
            return torch.ones_like(like)
        score: Tensor = self.halts[number](state)
        return score

    def _blank(self, state: Tensor) -> Tensor:
        """Zeros [B, 1, L] for every position, or [B, 1, 1] for every sample."""
        return torch.zeros_like(state[:, :1] if self.per == "position" else _mean(state)[:, :1])

    def _steps(self, number: int) -> tuple[Step, ...] | None:
        """The steps of a unit that can be computed by tiles here."""
        if not number or self.per == "sample" or not self._local[number]:
            return None
        return steps_of(self.units[number])

    def tuned(self, x: Tensor, *, repeats: int = 5) -> dict[float, float]:
        """Set `break_even` by measuring the second unit dense and by tiles, on some rows.

        Args:
            x: what the stage is given, [B, C, H, W], in batches of the size that will be run.
            repeats: of each timing; dense and sparse ones take turns.

        Returns:
            By share of active tiles the time of the sparse unit over that of the dense one.

        Raises:
            BadNetwork: the stage is in training mode.
        """
        if self.training:
            raise BadNetwork("the stage must be in eval mode. Call model.eval() first")
        found = dict[float, float]()
        self.break_even = 0.0
        if self._steps(1) is None:
            return found
        with torch.inference_mode():
            state: Tensor = self.units[0](x)
            for share in SHARES:
                found[share] = self.sparse_over_dense(state, share, repeats=repeats)
        below = list[float]()
        for share, relation in found.items():
            if relation >= 1:
                break
            below.append(share)
        self.break_even = below[-1] if below else 0.0
        return found

    def sparse_over_dense(
        self,
        state: Tensor,
        share: float,
        *,
        repeats: int = 5,
        same: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> float:
        """The time of the second unit, its score and sums by tiles over that on the whole map, as a
        ratio of medians.

        Args:
            state: what the first unit gives, [B, width, H, W].
            share: of tiles that are active, drawn at random.
            repeats: of each; they take turns.
            same: time the dense one twice instead, which tells how noisy the clock is.
            clock: gives seconds; `time.process_time` on a machine that others use too.
        """
        steps = self._steps(1)
        if steps is None:
            raise BadNetwork(
                "tiles need residual units on images, and the units of this stage are "
                "something else"
            )
        side = tile_of(state.shape[2], state.shape[3], self.tile)
        going = tile_mask(state, side, share)

        def dense() -> None:
            now = _Going(state.clone(), self._blank(state))
            now.going = going
            self._everywhere(1, now)

        def sparse() -> None:
            now = _Going(state.clone(), self._blank(state))
            now.going = going.clone()
            self._by_tiles(1, now, Tiles(now.going, side), steps)

        return _ratio(dense if same else sparse, dense, repeats, clock)


class _Going:
    """What goes on of a batch: its states, what it gives so far, scores so far, costs, and which
    positions go on.
    """

    def __init__(self, state: Tensor, total: Tensor) -> None:
        self.state = state
        self.total = total
        self.out = torch.zeros_like(state)
        self.cost = torch.zeros_like(total)
        self.going = torch.ones_like(total, dtype=torch.bool)

    def taken(self, rows: Tensor) -> _Going:
        """Some rows of it."""
        found = _Going.__new__(_Going)
        for name, value in vars(self).items():
            setattr(found, name, value[rows])
        return found


class _Masked(nn.Module):
    """A stage that computes everything, whatever mode it is in: the worst that it costs."""

    def __init__(self, stage: AdaptiveDepth) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """What the stage gives."""
        return self.stage.masked(x)[0]


def tile_mask(state: Tensor, side: int, share: float) -> Tensor:
    """A seeded mask [B, 1, H, W] of maps [B, C, H, W] of which a share of tiles is active."""
    down = state.shape[2] // side
    across = state.shape[3] // side
    count = len(state) * down * across
    draw = torch.Generator().manual_seed(0)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=draw)[: round(share * count)]] = True
    grid = chosen.view(len(state), 1, down, across).to(state.device)
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


def _ratio(
    above: Callable[[], None], below: Callable[[], None], repeats: int, clock: Callable[[], float]
) -> float:
    """Of the medians of two calls that take turns, after one of each that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for call, kept in zip((above, below), times, strict=True):
            start = clock()
            call()
            if turn:
                kept.append(clock() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def _mean(x: Tensor) -> Tensor:
    """Over positions, kept as dimensions of size 1."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _dims_of(units: nn.Module) -> int:
    """1 or 2: what the units' norms and convolutions are for; 1 where there is none."""
    for part in units.modules():
        for dims, kind in (*NORMS.items(), *CONVS.items()):
            if isinstance(part, kind):
                return dims
    return 1


def _width_of(stage: nn.Sequential) -> int:
    norms = tuple(NORMS.values())
    convs = tuple(CONVS.values())
    widths = [part.num_features for part in stage.modules() if isinstance(part, norms)]
    widths = widths or [part.out_channels for part in stage.modules() if isinstance(part, convs)]
    if not widths:
        raise BadNetwork(
            "the stage must have a batch norm or a convolution, got neither. Give width="
        )
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

    with (
        torch.inference_mode(),
        listening({name: part.ponder for name, part in stages_of(model).items()}, heard),
    ):
        model(x)
    return found


class PonderMaps:
    """The ponder maps of images, for the gallery of a report:
    `report(trace, plan, path, data=..., maps=this)`.

    Args:
        model: with stages that halt by position or by sample, in eval mode.
        preprocess: what stands before it.
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module | None = None) -> None:
        if not stages_of(model):
            raise BadNetwork(
                "the model has no stage of adaptive depth; make some with offramp.halting"
            )
        self.model = model
        self.preprocess = preprocess

    def __call__(self, images: Any) -> dict[str, Any]:
        """Images [W, C, H, W'] of NumPy -> by stage the cost N + R of each position, [W, h, w]."""
        x = torch.as_tensor(images)
        x = x if self.preprocess is None else self.preprocess(x)
        return {
            f"{name}, units": cost[:, 0].cpu().numpy()
            for name, cost in depths(self.model, x).items()
        }
