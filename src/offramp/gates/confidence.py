"""Scores from an exit's own logits [B, C] -> [B]; higher = readier to leave.

The margin of the logits is the default: probabilities tie at 1.0 in float32 (a third of CIFAR-10's test set on
ResNet-20), margins do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.plans.scores import ScoreRange, scores_in

__all__ = ["margin", "max_logit", "max_prob", "neg_entropy"]


@scores_in(ScoreRange(low=0.0))
def margin(logits: Tensor) -> Tensor:
    """Difference of the two largest logits.

    >>> margin(torch.tensor([[2.0, 7.0, 4.0]]))
    tensor([3.])
    """
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


def max_logit(logits: Tensor) -> Tensor:
    """Largest logit: the d-gate's score, a distance to a boundary, for exits taught by hinge (arXiv 1811.01476).

    >>> max_logit(torch.tensor([[-2.0, 7.0, 4.0]]))
    tensor([7.])
    """
    return logits.amax(-1)


@scores_in(ScoreRange(0.0, 1.0, saturates=(1.0,)))
def max_prob(logits: Tensor) -> Tensor:
    """Largest softmax probability (Hendrycks & Gimpel, 2017, arXiv 1610.02136)."""
    return logits.softmax(-1).amax(-1)


@scores_in(ScoreRange(high=0.0, saturates=(0.0,)))
def neg_entropy(logits: Tensor) -> Tensor:
    """Minus the entropy of the softmax in nats, in [-ln C, 0] (BranchyNet; Teerapittayanon et al., 2016).

    Finite for any finite logits: `torch.special.entr` takes 0 ln 0 as 0, where p * log p gives NaN for [120, 0].
    """
    terms: Tensor = torch.special.entr(logits.softmax(-1))
    return -terms.sum(-1)
