"""The convex solver behind the recipes `hinge` and `cross_entropy`: a linear exit on cached
features, with a proof.

Shapes: N rows, F features, C classes; weights W [C, F + 1] with the bias in the last column.
Minimised is

    P(W) = mean_i L(W x_i, y_i) + regularizer / 2 * |W|^2

on features standardised over the rows given, x = ((features - mean) / deviation, 1). The bias is
regularised with the rest. The objective of the decision gates (arXiv 1811.01476) is lost with their
formulas: standardising, the norm of the bias and the mean over rows are our choice, and where they
take mini-batch sub-gradients we solve to a stated gap.

How: the loss with rounded kinks is minimised by L-BFGS (Liu and Nocedal, 1989) started from the
features' second moments, and the rounding shrinks as the gap does. The scores are linear in W, so a
step's length is searched without the features: an iteration reads them twice. What proves the
result: each u_i in U is a plane below the loss of row i,

    P(W) >= D(u) = -mean_i conjugate(u_i) - |mean_i u_i x_i|^2 / (2 regularizer)   for all W and u.

D is concave, so a mean of all u so far, mixed as each one comes, bounds better than the last one
(Frank and Wolfe, 1956): 120 iterations instead of 180 for crammer_singer after layer2 of CIFAR-10's
ResNet-56, at regularizer 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from offramp.errors import BadData, InvalidArgument
from offramp.recipes._curvature import Curvature, dot
from offramp.recipes._losses import LOSSES, Loss
from offramp.recipes._standard import Standardized

WIDTH = 0.1  # over which kinks are rounded at first; the hinge losses' margins are 1 wide
SAFETY = 0.9  # the float32 gap aimed at, relative to the one asked for; float64 has the last word
ROUGH = 2e-2  # the gap that is enough to compare regularizers
REGULARIZERS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)


@dataclass(frozen=True)
class Solved:
    """weight [C, F] and bias [C] on the features as given (float64), and what proves them.

    No weights whatsoever reach an objective below `dual`; `gap` is (primal - dual) / primal. Both
    were evaluated in float64, on the loss with its kinks, and hold whether or not the gap asked for
    was reached.
    """

    weight: Tensor
    bias: Tensor
    primal: float
    dual: float
    gap: float
    iterations: int


@dataclass(frozen=True)
class Tried:
    """One regularizer of a path: accuracy on the development rows of weights solved to `gap`."""

    regularizer: float
    accuracy: float
    gap: float
    iterations: int


@dataclass(frozen=True)
class ConvexProblem:
    """What is minimised: rows, labels, classes, loss and regularizer."""

    rows: Standardized
    y: Tensor
    classes: int
    loss: Loss
    regularizer: float


def solve(
    features: Tensor,
    y: Tensor,
    classes: int,
    *,
    loss: str,
    regularizer: float,
    gap: float = 1e-3,
    start: Solved | None = None,
    limit: int = 1000,
) -> Solved:
    """The best linear exit on features [N, F] (any float type) with labels y [N], to a relative
    duality gap.

    After `limit` iterations it returns what was reached: look at its `gap`. `start` saves time, no
    more.
    """
    rows = _checked(features, y, classes, loss, (regularizer,))
    return _descend(
        ConvexProblem(rows, y.long(), classes, LOSSES[loss], regularizer), gap, start, limit
    )


def choose(
    features: Tensor,
    y: Tensor,
    classes: int,
    *,
    loss: str,
    dev: tuple[Tensor, Tensor],
    regularizers: Sequence[float] = REGULARIZERS,
    gap: float = 1e-3,
    rough: float = ROUGH,
    limit: int = 1000,
) -> tuple[Solved, list[Tried]]:
    """`solve` with the regularizer that does best on development rows (features, labels), and all
    that was tried.

    From strong to weak, each starting where the last one ended, solved to the gap `rough`; equal
    accuracy keeps the stronger. Two in a row that bring nothing end the path: the weaker, the
    slower.
    """
    if not regularizers:
        raise InvalidArgument("regularizers must have at least one number above 0, got none")
    rows = _checked(features, y, classes, loss, regularizers)
    best: tuple[Tried, Solved] | None = None
    tried: list[Tried] = []
    solved: Solved | None = None
    since = 0
    for regularizer in sorted(regularizers, reverse=True):
        problem = ConvexProblem(rows, y.long(), classes, LOSSES[loss], regularizer)
        solved = _descend(problem, max(gap, rough), solved, limit)
        tried.append(Tried(regularizer, _accuracy(solved, *dev), solved.gap, solved.iterations))
        since += 1
        if best is None or tried[-1].accuracy > best[0].accuracy:
            best = (tried[-1], solved)
            since = 0
        if since == 2:
            break
    assert best is not None
    problem = ConvexProblem(rows, y.long(), classes, LOSSES[loss], best[0].regularizer)
    return _descend(problem, gap, best[1], limit), tried


def _accuracy(solved: Solved, features: Tensor, y: Tensor) -> float:
    scores = features.double() @ solved.weight.T + solved.bias
    return float((scores.argmax(1) == y).double().mean())


def _checked(
    features: Tensor, y: Tensor, classes: int, loss: str, regularizers: Sequence[float]
) -> Standardized:
    if loss not in LOSSES:
        raise InvalidArgument(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not all(0 < each < float("inf") for each in regularizers):
        raise InvalidArgument(
            f"regularizer must be above 0, got {regularizers}: without one there is no best "
            f"solution"
        )
    if features.dim() != 2 or len(features) == 0 or y.shape != features.shape[:1]:
        raise BadData(
            f"features are {tuple(features.shape)} and labels {tuple(y.shape)}; expected [N, F] "
            f"and [N] with N from 1 "
            "upward: hand over one label for each row"
        )
    if classes < 2 or y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes:
        raise BadData(
            f"labels are {y.dtype} from {y.min().item()} to {y.max().item()} for {classes} "
            f"classes; expected integers "
            "from 0 to classes - 1, and two classes or more"
        )
    return Standardized(features)


def _descend(problem: ConvexProblem, gap: float, start: Solved | None, limit: int) -> Solved:
    """Step by step until the gap is proven or the limit reached."""
    rows = problem.rows
    y = problem.y
    loss = problem.loss
    strength = problem.regularizer
    weight = rows.mean.new_zeros(problem.classes, len(rows.mean) + 1).to(rows.dtype)
    if start is not None:
        weight = rows.unfolded(start.weight, start.bias)
    bound = DualBound(strength)
    memory = Curvature(rows.second, strength)
    width = WIDTH * loss.kinked
    aim = SAFETY * gap
    least = torch.finfo(rows.dtype).eps ** 0.5
    s = rows.scores(weight)
    u = loss.dual(s, y, width)
    pull = rows.gradient(u)
    for iteration in range(limit + 1):
        risk = float(loss.value(s, y).double().mean())
        primal = risk + strength / 2 * dot(weight, weight)
        height = -float(loss.conjugate(u, y).double().mean())
        bound.add(u, height, pull)
        if primal - bound.value <= aim * primal or iteration == limit:
            solved = _proven(problem, weight, bound.u, iteration)
            if solved.gap <= gap or iteration == limit:
                return solved
            aim, s = (
                aim / 2,
                rows.scores(weight),
            )  # float32 saw a smaller gap than there is: ask more of it
        # how far the planes of u lie below the loss, for the kinks rounded
        below = risk - height - dot(weight, pull)
        if loss.kinked and primal - bound.value <= 2 * below and below > aim / 2 * primal:
            # `below` shrinks with the square of the width
            shrunk = (0.4 * aim * primal / below) ** 0.5
            width = max(least, width * max(0.1, min(0.5, shrunk)))
            memory.gradient = None  # that of another function now
            u = loss.dual(s, y, width)
            pull = rows.gradient(u)
        direction = memory.direction(weight, pull + strength * weight)
        along = rows.scores(direction)
        line = _SearchLine(problem, s, along, dot(weight, direction), dot(direction, direction))
        length, u = line.search(width)
        weight = weight + length * direction
        s = s + length * along
        pull = rows.gradient(u)
    raise AssertionError("the last iteration returns")


@final
class DualBound:
    """The best bound found by mixing each u into the mean of those before, with the share that
    lifts it most.

    Only the plane's height and its gradient are needed for that; between two u the conjugate is at
    most linear (for the hinge losses just linear), so the true bound is nowhere lower.
    """

    def __init__(self, regularizer: float) -> None:
        self.regularizer = regularizer
        self.u = torch.zeros(())
        self.height = -float("inf")
        self.pull = torch.zeros(())

    @property
    def value(self) -> float:
        """D of the mean."""
        return self.height - dot(self.pull, self.pull) / (2 * self.regularizer)

    def add(self, u: Tensor, height: float, pull: Tensor) -> None:
        """Mix in u [N, C] with -mean conjugate(u) and the mean of u x [C, F + 1]."""
        pull = pull.double()
        if self.height == -float("inf"):
            self.u = u.clone()
            self.height = height
            self.pull = pull
            return
        turn = pull - self.pull
        rise = self.regularizer * (height - self.height) - dot(self.pull, turn)
        share = min(1.0, max(0.0, rise / max(dot(turn, turn), 1e-300)))
        self.u.lerp_(u, share)
        self.height += share * (height - self.height)
        self.pull += share * turn


@dataclass(frozen=True)
class _SearchLine:
    """The objective along a direction: scores s + t * along, |weight + t * direction|^2 from two
    products.
    """

    problem: ConvexProblem
    s: Tensor
    along: Tensor
    across: float
    square: float

    def slope(self, t: float, width: float) -> tuple[float, Tensor]:
        """The derivative at t, and the u that gives it."""
        u = self.problem.loss.dual(self.s + t * self.along, self.problem.y, width)
        loss = dot(u, self.along) / len(u)
        return loss + self.problem.regularizer * (self.across + t * self.square), u

    def search(self, width: float) -> tuple[float, Tensor]:
        """A t near the minimum, first 1, and its u: convex along the line, so the slope alone
        brackets it.
        """
        first, u = self.slope(0.0, width)
        low = 0.0
        slope_low = first
        high = float("inf")
        slope_high = 0.0
        t = 1.0
        for _ in range(12):
            slope, u = self.slope(t, width)
            if -0.5 * abs(first) <= slope <= 0.1 * abs(first):
                break
            if slope < 0:
                low = t
                slope_low = slope
            else:
                high = t
                slope_high = slope
            if high == float("inf"):
                t *= 3
            else:
                t = low + (high - low) * min(0.9, max(0.1, slope_low / (slope_low - slope_high)))
        return t, u


def _proven(problem: ConvexProblem, weight: Tensor, u: Tensor, iterations: int) -> Solved:
    """Both sides anew in float64, from the features given: nothing that float32 rounded enters the
    gap.
    """
    loss = problem.loss
    strength = problem.regularizer
    wide = weight.double()
    risk = 0.0
    height = 0.0
    pull = torch.zeros_like(wide)
    for part, block in problem.rows.blocks(torch.float64):
        y = problem.y[part]
        exact = loss.feasible(u[part].double(), y)
        risk += float(loss.value(block @ wide.T, y).sum())
        height -= float(loss.conjugate(exact, y).sum())
        pull += exact.T @ block
    rows = len(problem.y)
    primal = risk / rows + strength / 2 * dot(wide, wide)
    dual = height / rows - dot(pull, pull) / rows**2 / (2 * strength)
    return Solved(*problem.rows.folded(wide), primal, dual, (primal - dual) / primal, iterations)
