"""Parts that the exits of Zero Time Waste share: the cascade from exit to exit, and the ensemble of
all exits so far.

Shapes: B samples, F features, C classes, m the place of an exit (1 is the shallowest).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.nodes import Seen

ENSEMBLES = ("geometric", "additive", "mean")
FLOOR = 1e-6  # added to the probabilities of an additive ensemble, as in the authors' first code


class Tail(nn.Module):
    """The exit's own logits z_m and the ensemble's output, from features and the exits before.

    z_m = linear([features, stopgrad(z_{m-1})]), raw logits, under a LayerNorm if asked for (the
    authors use it on ImageNet). With final=True, z_m = linear(features), like a model's own last
    layer, which reads no exit.

    The ensemble is log p_m = log_softmax((1/m) sum_{j<=m} exp(a_mj) log softmax(z_j) + b_m), with a
    close to 0 and b = 0 at first. The other ensembles are ablations of the paper. "additive":
    p_m = (sum_{j<=m} exp(a_mj) softmax(z_j) + exp(b_m)) / S, with S the sum of that over classes;
    the output is log(p_m + 1e-6), normalised. "mean" (the authors' "standard"):
    log((1/m) sum_{j<=m} softmax(z_j)), without a and b.

    Args:
        features: F.
        classes: C.
        before: the exit before, or None at place 1.
        place: m.
        norm: whether z_{m-1} passes a LayerNorm.
        kind: of the ensemble: "geometric" (the paper's), "additive" or "mean".
        final: whether the linear layer reads only the features.

    Raises:
        InvalidArgument: the ensemble has an unknown name.
        BadNetwork: `before` and `place` do not fit.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        before: str | None,
        place: int,
        *,
        norm: bool,
        kind: str,
        final: bool = False,
    ) -> None:
        super().__init__()
        if kind not in ENSEMBLES:
            raise InvalidArgument(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {kind!r}")
        self.kind = kind
        if (before is None) != (place == 1):
            raise BadNetwork(
                "before must be None at place 1 and the name of the exit before elsewhere, "
                f"got place {place} and {before!r}"
            )
        self.before = before
        self.place = place
        self.final = final
        width = features  # of the linear layer's input
        self.norm: nn.LayerNorm | None = None
        if before is not None and not final:
            width = features + classes
            if norm:
                self.norm = nn.LayerNorm(classes)
        self.linear = nn.Linear(width, classes)
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        if kind != "mean":
            self.a = nn.Parameter(0.01 * torch.randn(place))
            self.b = nn.Parameter(torch.zeros(classes))

    def members(self, features: Tensor, seen: Seen) -> Tensor:
        """The logits of this exit and of all before it, [B, m, C], from shallow to deep."""
        if self.before is None:
            members: Tensor = self.linear(features)[:, None]  # [B, C] -> [B, 1, C]
            return members
        earlier = seen.logits[self.before]  # [B, m - 1, C]
        if earlier.dim() == 2:  # an exit that hands on only its own logits
            earlier = earlier[:, None]
        if earlier.shape[1] != self.place - 1:
            raise BadNetwork(
                f"exit {self.before!r} must hand on the logits of {self.place - 1} exits, got "
                f"{earlier.shape[1]}. Cut with exits='cascade' at every place"
            )
        if not self.final:
            last = earlier[:, -1].detach()  # [B, C]; no exit learns from the loss of the next one
            if self.norm is not None:
                last = self.norm(last)
            features = torch.cat([features, last], 1)  # [B, F + C]
        logits = self.linear(features)[:, None]  # [B, 1, C]
        return torch.cat([earlier, logits], 1)

    def ensemble(self, members: Tensor) -> Tensor:
        """[B, m, C] -> log-probabilities [B, C]."""
        if self.a is None or self.b is None:
            return members.log_softmax(-1).logsumexp(1) - math.log(self.place)
        if self.kind == "additive":
            # [m, 1] * [B, m, C] -> [B, C]
            summed = (self.a.exp()[:, None] * members.softmax(-1)).sum(1) + self.b.exp()
            return (summed / summed.sum(-1, keepdim=True) + FLOOR).log().log_softmax(-1)
        weighted = self.a.exp()[:, None] * members.log_softmax(-1)  # [B, m, C]
        return (weighted.sum(1) / self.place + self.b).log_softmax(-1)

    def own(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the classifier, without those of the ensemble."""
        return tuple(value for name, value in self.named_parameters() if name not in ("a", "b"))
