"""The direction of a step: L-BFGS (Liu and Nocedal, 1989), started from the second moments of the
features.

Shapes: F features, C classes; weights and gradients [C, F + 1].
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

MEMORY = 20  # the number of steps that are remembered


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of products in float64."""
    return float((a.double() * b.double()).sum())


@final
class Curvature:
    """L-BFGS: a direction from the gradient, the last steps, and the second moments of the
    features.
    """

    def __init__(self, second: Tensor | None, regularizer: float) -> None:
        self.factor: Tensor | None = None
        if second is not None:
            # 1/4 is the largest curvature of a logistic loss, and close to the average curvature of
            # the rounded hinges.
            curved = second.double() / 4 + regularizer * torch.eye(len(second), dtype=torch.float64)
            self.factor = torch.linalg.cholesky(curved).to(second.dtype)
        self.steps: list[tuple[Tensor, Tensor, float]] = []
        self.weight = torch.zeros(())
        self.gradient: Tensor | None = None

    def direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """A direction of descent.

        It learns from the change since the last call, unless `self.gradient` was set to None in
        between.

        Args:
            weight: the current weights, [C, F + 1].
            gradient: of the objective there, [C, F + 1].
        """
        if self.gradient is not None:
            step = weight - self.weight
            change = gradient - self.gradient
            if dot(step, change) > 0:
                self.steps = [*self.steps, (step, change, dot(step, change))][-MEMORY:]
        self.weight = weight
        self.gradient = gradient
        # The two loops of L-BFGS: from the last step to the first, then back.
        direction = -gradient
        shares = []
        for step, change, curved in reversed(self.steps):
            shares.append(dot(step, direction) / curved)
            direction = direction - shares[-1] * change
        direction = self._first(direction)
        for (step, change, curved), share in zip(self.steps, reversed(shares), strict=True):
            direction = direction + (share - dot(change, direction) / curved) * step
        if dot(direction, gradient) >= 0:  # rounding errors prevail: start over
            self.steps = []
            direction = self._first(-gradient)
        return direction

    def _first(self, gradient: Tensor) -> Tensor:
        """The gradient preconditioned by the second moments, with the length of the last step."""
        whitened = self._whitened(gradient)
        if not self.steps:
            return whitened
        _, change, curved = self.steps[-1]
        return whitened * (curved / dot(change, self._whitened(change)))

    def _whitened(self, gradient: Tensor) -> Tensor:
        """The gradient times the inverse of the second moments, [C, F + 1]."""
        if self.factor is None:
            return gradient
        return torch.cholesky_solve(gradient.T.contiguous(), self.factor).T
