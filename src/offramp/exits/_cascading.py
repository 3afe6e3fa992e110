"""What the exits of Zero Time Waste share: the cascade from exit to exit, and the ensemble over all
so far.

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
    """From features [B, F] and the logits of the exits before, to own logits z_m and to the
    ensemble's answer.

    z_m = linear([features, stopgrad(z_{m-1})]), raw logits, under a LayerNorm if asked for (there
    on ImageNet). log p_m = log_softmax((1/m) sum_{j<=m} exp(a_mj) log softmax(z_j) + b_m), with a
    near 0 and b = 0 at first. The other ensembles are ablations of the paper. "additive":
    p_m = (sum_{j<=m} exp(a_mj) softmax(z_j) + exp(b_m)) / S,
    S the sum of that over classes, and the answer is log(p_m + 1e-6), normalised. "mean" (the
    authors' "standard"): log((1/m) sum_{j<=m} softmax(z_j)), without a and b.
    final: z_m = linear(features), as of a model's own last layer, which reads no exit.
    Raises InvalidArgument for another name of an ensemble.
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
        cascaded = before is not None and not final
        self.norm = nn.LayerNorm(classes) if norm and cascaded else None
        self.linear = nn.Linear(features + (classes if cascaded else 0), classes)
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        if kind != "mean":
            self.a = nn.Parameter(0.01 * torch.randn(place))
            self.b = nn.Parameter(torch.zeros(classes))

    def members(self, features: Tensor, seen: Seen) -> Tensor:
        """Own logits of this exit and of all before it, [B, m, C], shallow to deep."""
        if self.before is None:
            members: Tensor = self.linear(features)[:, None]
            return members
        earlier = seen.logits[self.before]
        # an exit that hands on its answer alone
        earlier = earlier[:, None] if earlier.dim() == 2 else earlier
        if earlier.shape[1] != self.place - 1:
            raise BadNetwork(
                f"exit {self.before!r} must hand on the logits of {self.place - 1} exits, got "
                f"{earlier.shape[1]}. Cut with exits='cascade' at every place"
            )
        if self.final:
            return torch.cat([earlier, self.linear(features)[:, None]], 1)
        last = earlier[:, -1].detach()  # no head is trained by what the next one makes of it
        last = last if self.norm is None else self.norm(last)
        return torch.cat([earlier, self.linear(torch.cat([features, last], 1))[:, None]], 1)

    def ensemble(self, members: Tensor) -> Tensor:
        """[B, m, C] -> log-probabilities [B, C]."""
        if self.a is None or self.b is None:
            return members.log_softmax(-1).logsumexp(1) - math.log(self.place)
        if self.kind == "additive":
            summed = (self.a.exp()[:, None] * members.softmax(-1)).sum(1) + self.b.exp()
            return (summed / summed.sum(-1, keepdim=True) + FLOOR).log().log_softmax(-1)
        weighted = self.a.exp()[:, None] * members.log_softmax(-1)
        return (weighted.sum(1) / self.place + self.b).log_softmax(-1)

    def own(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the classifier, without those of the ensemble."""
        return tuple(value for name, value in self.named_parameters() if name not in ("a", "b"))
