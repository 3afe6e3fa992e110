"""JEI-DNN's gate: one linear unit on four numbers that tell how uncertain an exit is.

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

NUMBERS = 4
LEAST, MOST = (
    1e-30,
    1 - 2.0**-20,
)  # what an activation counts as where it is 0 or 1, so that its logit is finite
NOTHING = 1e-12  # added above and below: where nobody is left, the activation is 1


class Uncertainty(Gate):
    """The logit of the activation a_l: of the probability of leaving here for a row that has not
    left before.

    g_l = sigmoid(w_l . u_l + b_l), where u_l are the four numbers of `_uncertainties`, is the share
    of all rows like this one that should leave here. The gates before have taken G = g_1 + ... +
    g_{l-1}, so that a_l = min(g_l, 1 - G) / (1 - G), as in the authors' code, which lets a row
    leave where a_l >= 1/2: a threshold of 0 here. Two gates of g = 0.4 thus let the row leave at
    the second, whose activation is 2/3. The plan may set, and certify, any other threshold. Scores
    end at 13.86, the logit of 1 - 2^-20: many rows have an activation of 1.

    The exits' logits are detached, as in the authors' code: training a gate never moves an exit. A
    gate holds copies of the earlier gates' weights, `earlier_weight` [l - 1, 4] and `earlier_bias`
    [l - 1], which `objective` keeps up to date. Where it starts is our choice (the authors draw
    weights at random): at the margin of the probabilities less 1/2, so that the g of a gate that
    nobody trained ranks rows by their margin.

    Args:
        earlier: the exits before, shallow to deep, each with a gate like this. Without them the
            score is the logit of g_l itself: so it was in the first edition, whose files keep that
            meaning.
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
        """w . u + b [B], the logit of g, of this exit's logits [B, C]: what `objective` trains."""
        logits: Tensor = self.unit(_uncertainties(own.detach()))
        return logits[:, 0]

    def score(self, seen: Seen) -> Tensor:
        """The logit of a_l, [B]."""
        assert seen.own is not None
        own = self.logit(seen.own)
        if not self.reads:
            return own
        own = own.float()  # in half precision 1 - 2^-20 is 1
        taken = torch.zeros_like(own)  # G
        for index, name in enumerate(self.reads):
            numbers = _uncertainties(seen.logits[name].detach())  # [B, 4]
            logit = numbers @ self.earlier_weight[index] + self.earlier_bias[index]
            taken = taken + logit.float().sigmoid()
        left = (1 - taken).clamp(min=0)
        activation = (torch.minimum(own.sigmoid(), left) + NOTHING) / (left + NOTHING)
        activation = activation.clamp(LEAST, MOST)
        return activation.log() - (1 - activation).log()

    @torch.no_grad()
    def follow(self, gates: Sequence[Uncertainty]) -> None:
        """Copy the weights of the earlier gates, shallow to deep."""
        for index, gate in enumerate(gates if self.reads else ()):
            self.earlier_weight[index].copy_(gate.unit.weight[0])
            self.earlier_bias[index].copy_(gate.unit.bias[0])

    def score_range(self) -> ScoreRange:
        """Any number; a sure softmax (maximum and margin 1, entropies 0) always gives the same one.

        Behind earlier gates the activation is kept between LEAST and MOST, and many rows stand at
        either end.
        """
        if self.reads:
            ends = (math.log(LEAST) - math.log1p(-LEAST), math.log(MOST) - math.log1p(-MOST))
            return ScoreRange(low=ends[0], high=ends[1], saturates=ends)
        weight = self.unit.weight.detach()[0].double()
        sure = float(weight[0] + weight[2] + self.unit.bias.detach()[0].double())
        return ScoreRange(saturates=(sure,)) if math.isfinite(sure) else ScoreRange()

    def config(self) -> dict[str, Any]:
        """Name, and the exits before where there are any."""
        return {"name": "Uncertainty", **({"earlier": list(self.reads)} if self.reads else {})}


def _uncertainties(logits: Tensor) -> Tensor:
    """Of p = softmax(logits) [B, C]: maximum, entropy, margin of the two largest, entropy of p^2
    renormalised: [B, 4].

    p^2 renormalised is the softmax of twice the logits.
    """
    p = logits.softmax(-1)
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    entropies = [torch.special.entr(each).sum(-1) for each in (p, (2 * logits).softmax(-1))]
    return torch.stack([first, entropies[0], first - second, entropies[1]], 1)


def uncertainty(reads: Sequence[str]) -> Uncertainty:
    """The gate for an exit behind those in `reads`."""
    return Uncertainty(reads)
