"""The convex solver behind the recipes `hinge` and `cross_entropy`: a linear exit on cached
features, with a proof.

Shapes: N rows, F features, C classes; weights W [C, F + 1] with the bias in the last column.
Minimised is

    P(W) = mean_i L(W x_i, y_i) + regularizer / 2 * |W|^2

on features standardised over these rows, x = ((features - mean) / deviation, 1). The bias is
regularised with the rest. The formulas of the decision gates (arXiv 1811.01476) are not available:
standardising, the norm of the bias and the mean over rows are our choice. They take mini-batch
sub-gradients; we solve to a stated gap.

How: L-BFGS (Liu and Nocedal, 1989), started from the features' second moments, minimises the loss
with rounded kinks, and the rounding shrinks with the gap. The scores are linear in W, so the length
of a step is searched without the features, and an iteration reads them only twice. Proof of the
result: each u_i in U is a plane below the loss of row i,

    P(W) >= D(u) = -mean_i conjugate(u_i) - |mean_i u_i x_i|^2 / (2 regularizer)   for all W and u.

D is concave, so a running mean of all u so far gives a better bound than the last one (Frank and
Wolfe, 1956): 120 iterations instead of 180 for crammer_singer after layer2 of CIFAR-10's
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

WIDTH = 0.1  # the first width over which kinks are rounded; the hinge losses' margins are 1 wide
SAFETY = 0.9  # the float32 gap to stop at, relative to the requested one; float64 decides
ROUGH = 2e-2  # a gap that is small enough to compare regularizers
REGULARIZERS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)


@dataclass(frozen=True)
class Solved:
    """A solution on the original features, and its proof.

    Primal and dual are evaluated in float64, on the loss with its kinks. They hold whether or not
    the requested gap was reached.

    Attributes:
        weight: of the linear layer, [C, F], float64.
        bias: of the linear layer, [C], float64.
        primal: the objective at this solution.
        dual: a bound: no weights have an objective below it.
        gap: (primal - dual) / primal.
        iterations: how many were needed.
    """

    weight: Tensor
    bias: Tensor
    primal: float
    dual: float
    gap: float
    iterations: int


@dataclass(frozen=True)
class Tried:
    """One regularizer of a path: the accuracy on development rows of weights solved to `gap`."""

    regularizer: float
    accuracy: float
    gap: float
    iterations: int


@dataclass(frozen=True)
class ConvexProblem:
    """The objective: rows, labels, classes, loss and regularizer."""

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
    """The best linear exit, to a relative duality gap.

    Args:
        features: [N, F], of any float type.
        y: labels [N].
        classes: C.
        loss: the name of a loss.
        regularizer: a number above 0.
        gap: the relative duality gap to reach.
        start: a solution to start from. It only saves time.
        limit: the most iterations.

    Returns:
        The solution. If `limit` ended the search, its `gap` is larger than the requested one.

    Raises:
        InvalidArgument: an unknown loss, or a regularizer that is not above 0.
        BadData: features and labels do not fit, or features are not finite.
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
    """`solve` with the regularizer that has the highest accuracy on development rows.

    The regularizers are tried from strong to weak, each from the solution of the one before, to the
    gap `rough`. Of equal accuracies the stronger regularizer wins. The path ends after two in a row
    without improvement, because weaker ones take longer.

    Args:
        features: [N, F], of any float type.
        y: labels [N].
        classes: C.
        loss: the name of a loss.
        dev: features and labels of the development rows.
        regularizers: numbers above 0.
        gap: the relative duality gap of the solution.
        rough: the gap of the trials.
        limit: the most iterations of each.

    Returns:
        The solution, and all trials in their order.

    Raises:
        InvalidArgument: an unknown loss, or a regularizer that is not above 0.
        BadData: features and labels do not fit, or features are not finite.
    """
    if not regularizers:
        raise InvalidArgument("regularizers must have at least one number above 0, got none")
    rows = _checked(features, y, classes, loss, regularizers)
    best: tuple[Tried, Solved] | None = None
    tried: list[Tried] = []
    solved: Solved | None = None
    since = 0  # regularizers since the best one
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
    """The share of rows that a solution classifies correctly."""
    scores = features.double() @ solved.weight.T + solved.bias
    return float((scores.argmax(1) == y).double().mean())


def _checked(
    features: Tensor, y: Tensor, classes: int, loss: str, regularizers: Sequence[float]
) -> Standardized:
    """Check the arguments, and standardise the features."""
    if loss not in LOSSES:
        raise InvalidArgument(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    for regularizer in regularizers:
        if not 0 < regularizer < float("inf"):
            raise InvalidArgument(
                f"regularizer must be above 0, got {regularizers}. Without a regularizer there is "
                "no best solution"
            )
    if features.dim() != 2 or len(features) == 0 or y.shape != features.shape[:1]:
        raise BadData(
            "features and labels must be [N, F] and [N] with N >= 1, got "
            f"{tuple(features.shape)} and {tuple(y.shape)}"
        )
    if classes < 2 or y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes:
        raise BadData(
            "labels must be integers from 0 to classes - 1, with at least 2 classes, got "
            f"{y.dtype} from {y.min().item()} to {y.max().item()} for {classes} classes"
        )
    return Standardized(features)


def _descend(problem: ConvexProblem, gap: float, start: Solved | None, limit: int) -> Solved:
    """Minimise step by step, until the gap is proven or the limit is reached."""
    rows = problem.rows
    y = problem.y
    loss = problem.loss
    strength = problem.regularizer
    weight = rows.mean.new_zeros(problem.classes, len(rows.mean) + 1).to(rows.dtype)
    if start is not None:
        weight = rows.unfolded(start.weight, start.bias)
    bound = DualBound(strength)
    memory = Curvature(rows.second, strength)
    width = WIDTH * loss.kinked  # 0 for a loss without kinks
    aim = SAFETY * gap
    least = torch.finfo(rows.dtype).eps ** 0.5  # the smallest width
    s = rows.scores(weight)  # [N, C]
    u = loss.dual(s, y, width)  # [N, C]
    pull = rows.gradient(u)  # [C, F + 1], the gradient of the mean loss
    for iteration in range(limit + 1):
        # Both sides of the gap at these weights.
        risk = float(loss.value(s, y).double().mean())
        primal = risk + strength / 2 * dot(weight, weight)
        height = -float(loss.conjugate(u, y).double().mean())
        bound.add(u, height, pull)
        if primal - bound.value <= aim * primal or iteration == limit:
            solved = _proven(problem, weight, bound.u, iteration)
            if solved.gap <= gap or iteration == limit:
                return solved
            # float32 saw a smaller gap than there is. Aim lower, with fresh scores.
            aim = aim / 2
            s = rows.scores(weight)

        # The distance of the planes of u below the loss, which comes from the rounded kinks. When
        # it is most of the gap, the width shrinks.
        below = risk - height - dot(weight, pull)
        if loss.kinked and primal - bound.value <= 2 * below and below > aim / 2 * primal:
            # `below` shrinks with the square of the width.
            shrunk = (0.4 * aim * primal / below) ** 0.5
            width = max(least, width * max(0.1, min(0.5, shrunk)))
            memory.gradient = None  # it was the gradient of another function
            u = loss.dual(s, y, width)
            pull = rows.gradient(u)

        # One step along the direction. Scores follow without the features.
        direction = memory.direction(weight, pull + strength * weight)
        along = rows.scores(direction)  # [N, C]
        line = _SearchLine(problem, s, along, dot(weight, direction), dot(direction, direction))
        length, u = line.search(width)
        weight = weight + length * direction
        s = s + length * along
        pull = rows.gradient(u)
    raise AssertionError("the last iteration returns")


@final
class DualBound:
    """The best bound from a running mean of all u.

    Each u is mixed in with the share that raises the bound most.

    Only the plane's height and its gradient are needed for that. Between two u the conjugate is at
    most linear (for the hinge losses exactly linear), so the true bound is never lower.
    """

    def __init__(self, regularizer: float) -> None:
        self.regularizer = regularizer
        self.u = torch.zeros(())
        self.height = -float("inf")
        self.pull = torch.zeros(())

    @property
    def value(self) -> float:
        """D at the mean."""
        return self.height - dot(self.pull, self.pull) / (2 * self.regularizer)

    def add(self, u: Tensor, height: float, pull: Tensor) -> None:
        """Mix in another u.

        Args:
            u: [N, C].
            height: -mean conjugate(u).
            pull: the mean of u x, [C, F + 1].
        """
        pull = pull.double()
        if self.height == -float("inf"):
            self.u = u.clone()
            self.height = height
            self.pull = pull
            return
        # D along the line from the mean to u is a parabola; `share` is its top within [0, 1].
        turn = pull - self.pull
        rise = self.regularizer * (height - self.height) - dot(self.pull, turn)
        share = min(1.0, max(0.0, rise / max(dot(turn, turn), 1e-300)))
        self.u.lerp_(u, share)
        self.height += share * (height - self.height)
        self.pull += share * turn


@dataclass(frozen=True)
class _SearchLine:
    """The objective along a direction.

    The scores are s + t * along, and |weight + t * direction|^2 follows from two products.
    """

    problem: ConvexProblem
    s: Tensor
    along: Tensor
    across: float
    square: float

    def slope(self, t: float, width: float) -> tuple[float, Tensor]:
        """The derivative at t, and its u."""
        u = self.problem.loss.dual(self.s + t * self.along, self.problem.y, width)
        loss = dot(u, self.along) / len(u)
        return loss + self.problem.regularizer * (self.across + t * self.square), u

    def search(self, width: float) -> tuple[float, Tensor]:
        """A t near the minimum, and its u.

        The objective is convex along the line, so the sign of the slope brackets the minimum. The
        search begins at t = 1 and ends when the slope is small compared with the first one.
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
                t *= 3  # not bracketed yet
            else:
                # Linear interpolation of the slope, kept away from both ends.
                t = low + (high - low) * min(0.9, max(0.1, slope_low / (slope_low - slope_high)))
        return t, u


def _proven(problem: ConvexProblem, weight: Tensor, u: Tensor, iterations: int) -> Solved:
    """Primal and dual computed in float64 from the original features.

    No rounding of float32 enters the gap.
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
