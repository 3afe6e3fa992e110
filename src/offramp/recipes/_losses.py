"""Three convex losses of a linear exit, each with its conjugate.

Shapes: N rows, C classes. Scores s [N, C] float, labels y [N] int64. Each loss is the upper
envelope of planes,

    L(s) = max over u in U of <u, s> - conjugate(u),

so every u in U bounds it from below, for any s. `dual(s, y, mu)` is the maximiser of <u, s> -
conjugate(u) - mu/2 |u|^2, the gradient of L with its kinks rounded over a width mu (Nesterov,
Smooth minimization of non-smooth functions, 2005). It is a point of U too, and so also a bound for
L itself. Cross-entropy has no kinks and ignores mu.

The hinge losses are those of Dogan, Glasmachers and Igel, A unified view on multi-class support
vector classification, JMLR 17(45), 2016. It is not known which one the decision gates (arXiv
1811.01476) use, so there are both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """The functions of a convex loss that the solver needs.

    u is a gradient with respect to the scores, [N, C].
    """

    value: Callable[[Tensor, Tensor], Tensor]  # s, y -> L [N]
    dual: Callable[[Tensor, Tensor, float], Tensor]  # s, y, mu -> u in U
    conjugate: Callable[[Tensor, Tensor], Tensor]  # u, y -> [N]
    feasible: Callable[[Tensor, Tensor], Tensor]  # u, y -> the nearest in U
    kinked: bool


def _own(s: Tensor, y: Tensor) -> Tensor:
    """1 at the label and 0 elsewhere, [N, C] in the type of s."""
    return torch.zeros_like(s).scatter_(1, y[:, None], 1)


def _signs(s: Tensor, y: Tensor) -> Tensor:
    """z: 1 at the label and -1 elsewhere, [N, C]."""
    return torch.full_like(s, -1).scatter_(1, y[:, None], 1)


def _apart_value(s: Tensor, y: Tensor) -> Tensor:
    return (1 - _signs(s, y) * s).clamp_(min=0).sum(1)


def _apart_dual(s: Tensor, y: Tensor, mu: float) -> Tensor:
    z = _signs(s, y)
    return (1 - z * s).div_(mu).clamp_(0, 1).mul_(z).neg_()


def _apart_conjugate(u: Tensor, y: Tensor) -> Tensor:
    return -u.abs().sum(1)


def _apart_feasible(u: Tensor, y: Tensor) -> Tensor:
    z = _signs(u, y)
    return -z * (-z * u).clamp(0, 1)


def _simplex(v: Tensor) -> Tensor:
    """The nearest point with entries of at least 0 and sum 1, row by row (Held, Wolfe and Crowder,
    1974).
    """
    # The nearest point is max(v - shift, 0). The shift makes the sum 1, and follows from the number
    # of entries that stay positive, which are the largest ones.
    falling = v.sort(1, descending=True).values  # [N, C]
    excess = falling.cumsum(1) - 1  # of the sum of the largest 1, 2, ... C entries
    counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    positive = (falling * counts > excess).sum(1, keepdim=True).clamp_(min=1)  # [N, 1]
    shift = excess.gather(1, positive - 1) / positive  # [N, 1]
    return (v - shift).clamp_(min=0)


def _together_value(s: Tensor, y: Tensor) -> Tensor:
    own = _own(s, y)
    return (s + 1 - own).amax(1) - (s * own).sum(1)


def _together_dual(s: Tensor, y: Tensor, mu: float) -> Tensor:
    # u = p - own with p on the simplex. mu/2 |u|^2 pulls p to the label, so a row beyond its margin
    # has u = 0.
    own = _own(s, y)
    return _simplex((s + 1 - own) / mu + own) - own


def _together_conjugate(u: Tensor, y: Tensor) -> Tensor:
    return u.gather(1, y[:, None])[:, 0]


def _softmax_value(s: Tensor, y: Tensor) -> Tensor:
    return s.logsumexp(1) - s.gather(1, y[:, None])[:, 0]


def _softmax_dual(s: Tensor, y: Tensor, mu: float) -> Tensor:
    return s.softmax(1) - _own(s, y)


def _softmax_conjugate(u: Tensor, y: Tensor) -> Tensor:
    # p - 1 + 1 can round to just below 0, so it is clamped.
    entropies: Tensor = torch.special.entr((u + _own(u, y)).clamp_(min=0))
    return -entropies.sum(1)


def _simplex_feasible(u: Tensor, y: Tensor) -> Tensor:
    own = _own(u, y)
    return _simplex(u + own) - own


LOSSES = {
    # sum_c max(0, 1 - z_c s_c): a distance to each class's own boundary
    "one_vs_rest": Loss(_apart_value, _apart_dual, _apart_conjugate, _apart_feasible, kinked=True),
    # max(0, 1 + max_{c != y} s_c - s_y): a distance between the label and the best other class
    "crammer_singer": Loss(
        _together_value, _together_dual, _together_conjugate, _simplex_feasible, kinked=True
    ),
    "cross_entropy": Loss(
        _softmax_value, _softmax_dual, _softmax_conjugate, _simplex_feasible, kinked=False
    ),
}
