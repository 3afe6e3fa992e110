"""Scores from an exit's own logits [B, C] -> [B]; higher = readier to leave.

The margin of the logits is the default: probabilities tie at 1.0 in float32 (a third of CIFAR-10's
test set on ResNet-20), margins do not.
"""

from __future__ import annotations

from torch import Tensor

from offramp.plans.scores import ScoreRange, scores_in, spreads_nan

__all__ = ["margin", "max_logit", "max_prob", "neg_entropy"]


@scores_in(ScoreRange(low=0.0))
def margin(logits: Tensor) -> Tensor:
    """The difference of the two largest logits, [B, C] -> [B].

    >>> import torch
    >>> margin(torch.tensor([[2.0, 7.0, 4.0]]))
    tensor([3.])
    """
    two = logits.topk(2, dim=-1).values  # [B, 2]
    # `select` is one node of an exported graph, `unbind` is two
    return two.select(-1, 0) - two.select(-1, 1)


def max_logit(logits: Tensor) -> Tensor:
    """The largest logit, [B, C] -> [B]. It is the d-gate's score, a distance to a boundary, for
    exits trained with a hinge loss (arXiv 1811.01476).

    >>> import torch
    >>> max_logit(torch.tensor([[-2.0, 7.0, 4.0]]))
    tensor([7.])
    """
    return logits.amax(-1)


@scores_in(ScoreRange(0.0, 1.0, saturates=(1.0,)))
def max_prob(logits: Tensor) -> Tensor:
    """The largest softmax probability, [B, C] -> [B] (Hendrycks & Gimpel, 2017, arXiv
    1610.02136).
    """
    return logits.softmax(-1).amax(-1)


@spreads_nan
@scores_in(ScoreRange(high=0.0, saturates=(0.0,)))
def neg_entropy(logits: Tensor) -> Tensor:
    """Minus the entropy of the softmax in nats, [B, C] -> [B], in [-ln C, 0] (BranchyNet;
    Teerapittayanon et al., 2016).

    It is finite for finite logits, also for [120, 0], because log_softmax takes no logarithm of a
    rounded 0. It is NaN if a logit is NaN or infinite (0 times minus infinity).
    """
    logs = logits.log_softmax(-1)  # [B, C]
    return (logs.exp() * logs).sum(-1)
