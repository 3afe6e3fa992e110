"""JEI-DNN's gate: one linear unit on four measures of an exit's uncertainty.

Regol, Chataoui and Coates, 2024, arXiv 2310.09163. The recipe `objective` trains it. Shapes: B
samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Uncertainty", "uncertainty"]

NUMBERS = 4  # measures of uncertainty
# Activations are kept between these two, so that the logit of an activation of 0 or 1 is finite.
LEAST = 1e-30
MOST = 1 - 2.0**-20
NOTHING = 1e-12  # added to both sides of a quotient; if no rows are left, the activation is 1


class Uncertainty(Gate):
    """The logit of the activation a_l, the probability that a row leaves here if it has not left
    before.

    g_l = sigmoid(w_l . u_l + b_l) is the share of all rows like this one that should leave here,
    where u_l are the four measures of `_uncertainties`. Earlier gates have taken G = g_1 + ... +
    g_{l-1}. So a_l = min(g_l, 1 - G) / (1 - G), as in the authors' code. There a row leaves if a_l
    >= 1/2, which is a threshold of 0 here. For example, with two gates of g = 0.4 a row leaves at
    the second one, whose activation is 2/3. A plan may set, and certify, any other threshold.
    Scores end at 13.86, the logit of 1 - 2^-20, because many rows have an activation of 1.

    The exits' logits are detached, as in the authors' code, so that training a gate never changes
    an exit. A gate has copies of the earlier gates' weights, `earlier_weight` [l - 1, 4] and
    `earlier_bias` [l - 1]; `objective` keeps them up to date. The initial weights are our choice
    (the authors draw them at random): w . u + b is the margin of the probabilities less 1/2, so
    that the g of an untrained gate ranks rows by their margin.

    Args:
        earlier: the earlier exits, shallow to deep, each with a gate like this one. Without them
            the score is the logit of g_l itself, as in files of the first edition.
    """

    earlier_weight: Tensor
    earlier_bias: Tensor

    def __init__(self, earlier: Sequence[str] = ()) -> None:
        super().__init__()
        self.reads = tuple(earlier)
        self.unit = nn.Linear(NUMBERS, 1)
        with torch.no_grad():
            self.unit.weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
            self.unit.bias.fill_(-0.5)
        if self.reads:
            count = len(self.reads)
            self.register_buffer("earlier_weight", self.unit.weight.detach().repeat(count, 1))
            self.register_buffer("earlier_bias", self.unit.bias.detach().repeat(count))

    def logit(self, own: Tensor) -> Tensor:
        """w . u + b [B], the logit of g, from this exit's logits [B, C]. `objective` trains it."""
        logits: Tensor = self.unit(_uncertainties(own.detach()))  # [B, 1]
        return logits[:, 0]

    def score(self, seen: Seen) -> Tensor:
        """The logit of a_l, [B]."""
        assert seen.own is not None
        own = self.logit(seen.own)
        if not self.reads:
            return own
        own = own.float()  # in half precision 1 - 2^-20 is 1
        # G, the share that earlier gates have taken
        taken = torch.zeros_like(own)  # [B]
        for index, name in enumerate(self.reads):
            measures = _uncertainties(seen.logits[name].detach())  # [B, 4]
            logit = measures @ self.earlier_weight[index] + self.earlier_bias[index]
            taken = taken + logit.float().sigmoid()
        # a_l = min(g_l, 1 - G) / (1 - G), and its logit
        left = (1 - taken).clamp(min=0)
        activation = (torch.minimum(own.sigmoid(), left) + NOTHING) / (left + NOTHING)
        activation = activation.clamp(LEAST, MOST)
        return activation.log() - (1 - activation).log()

    @torch.no_grad()
    def follow(self, gates: Sequence[Uncertainty]) -> None:
        """Copy the weights of the earlier gates.

        Args:
            gates: the earlier gates, shallow to deep.
        """
        if not self.reads:
            return
        for index, gate in enumerate(gates):
            self.earlier_weight[index].copy_(gate.unit.weight[0])
            self.earlier_bias[index].copy_(gate.unit.bias[0])

    def score_range(self) -> ScoreRange:
        """With earlier gates, the logits of LEAST and MOST, which many rows share. Without them any
        number; all sure rows share one score.
        """
        if self.reads:
            low = math.log(LEAST) - math.log1p(-LEAST)
            high = math.log(MOST) - math.log1p(-MOST)
            return ScoreRange(low=low, high=high, saturates=(low, high))
        # a sure softmax has maximum 1, margin 1 and entropies 0
        weight = self.unit.weight.detach()[0].double()
        sure = float(weight[0] + weight[2] + self.unit.bias.detach()[0].double())
        if not math.isfinite(sure):
            return ScoreRange()
        return ScoreRange(saturates=(sure,))

    def config(self) -> dict[str, Any]:
        """The name, and the earlier exits if there are any."""
        config: dict[str, Any] = {"name": "Uncertainty"}
        if self.reads:
            config["earlier"] = list(self.reads)
        return config


def _uncertainties(logits: Tensor) -> Tensor:
    """Measures [B, 4] of p = softmax(logits) [B, C]: maximum, entropy, margin of the two largest
    probabilities, and the entropy of p^2 after normalisation.
    """
    p = logits.softmax(-1)
    squared = (2 * logits).softmax(-1)  # p^2 normalised is the softmax of twice the logits
    first, second = p.topk(2, dim=-1).values.unbind(-1)  # [B] each
    entropy = torch.special.entr(p).sum(-1)
    squared_entropy = torch.special.entr(squared).sum(-1)
    return torch.stack([first, entropy, first - second, squared_entropy], 1)


def uncertainty(reads: Sequence[str]) -> Uncertainty:
    """Make the gate of an exit.

    Args:
        reads: the earlier exits, shallow to deep.
    """
    return Uncertainty(reads)
