"""Local response norm over neighbouring channels (Krizhevsky et al., 2012), with Chainer's meaning
of alpha.
"""

from __future__ import annotations

from torch import nn

__all__ = ["lateral_norm"]


def lateral_norm(
    n: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 2.0
) -> nn.LocalResponseNorm:
    """x / (k + alpha * sum of squares over n channels) ** beta on [B, C, ...]; the defaults are
    BranchyNet's.

    Chainer weighs the sum of the squares and PyTorch their mean, so PyTorch's alpha is n times as
    large; k = 2 is what Chainer takes where nothing is said.
    """
    return nn.LocalResponseNorm(n, n * alpha, beta, k)
