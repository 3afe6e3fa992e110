"""Local response norm over neighbouring channels (Krizhevsky et al., 2012), with Chainer's meaning
of alpha.
"""

from __future__ import annotations

from torch import nn

__all__ = ["lateral_norm"]


def lateral_norm(
    n: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 2.0
) -> nn.LocalResponseNorm:
    """Make the layer x / (k + alpha * sum of squares over n channels) ** beta on [B, C, ...].

    The defaults are BranchyNet's; k = 2 is Chainer's default.

    Args:
        n: number of neighbouring channels.
        alpha: factor of the sum of squares.
        beta: the exponent.
        k: the constant.
    """
    # Chainer multiplies alpha with the sum of the squares, PyTorch with their mean.
    return nn.LocalResponseNorm(n, n * alpha, beta, k)
