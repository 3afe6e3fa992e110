"""Exits of Zero Time Waste: each reads the logits of the one before it, and answers for all exits so far.

Wolczyk et al., 2021, arXiv 2106.05409. Shapes: B samples, F pooled features, C classes, m the place of an exit.
Cut with exits="cascade" or "cascade_conv" at every place, and teach by the recipe `ztw`. The model's own answer, at the
end, takes no part, as in the authors' later code; their first one had an ensemble there too. The score of the paper,
the ensemble's largest probability, is the gate `max_prob`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.exits._cascading import Tail
from offramp.exits._pooling import Mixed, pooled, require_pooling, width
from offramp.nodes import Exit, Seen

__all__ = ["Cascade", "CascadeConv", "cascade", "cascade_conv"]


class Cascade(Exit):
    """A linear layer on pooled features and the logits before. pooling: "mean", "grid" or "flat", as of `Pooled`.

    Where we differ from the paper's heads: no convolution, so that features are pooled once (`CascadeConv` has one).
    """

    def __init__(
        self,
        pooling: str,
        features: int,
        classes: int,
        *,
        before: str | None = None,
        place: int = 1,
        norm: bool = False,
    ) -> None:
        super().__init__()
        require_pooling(pooling, "pooling")
        self.pooling, self.features, self.classes, self.norm = pooling, int(features), int(classes), bool(norm)
        self.reads = () if before is None else (before,)
        self.tail = Tail(self.features, self.classes, before, place, norm=norm)

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, ...] -> [B, F]."""
        return pooled(features, self.pooling)

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The ensemble's log-probabilities [B, C], and its members' logits [B, m, C], which are handed on."""
        members = self.tail.members(self.pool(seen.features), seen)
        return self.tail.ensemble(members), members

    def forward(self, seen: Seen) -> Tensor:
        """The ensemble's log-probabilities [B, C]."""
        return self.both(seen)[0]

    def config(self) -> dict[str, Any]:
        """Pooling, widths, the exit before, the place in the cascade, and whether logits are normed on the way."""
        widths = {"pooling": self.pooling, "features": self.features, "classes": self.classes}
        return {"name": "Cascade", **widths, **_config(self.tail), "norm": self.norm}


class CascadeConv(Exit):
    """The paper's head for small images: 3x3 convolution of as many channels, ReLU, mixed pooling to about 4x4, linear.

    shape: of one row's features, [channels, H, W]. stride: of the convolution (there 2 on Tiny-ImageNet, else 1).
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        before: str | None = None,
        place: int = 1,
        norm: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.shape, self.classes, self.norm, self.stride = tuple(shape), int(classes), bool(norm), int(stride)
        self.reads = () if before is None else (before,)
        sides = [(side - 1) // self.stride + 1 for side in self.shape[1:]]
        self.mixed = Mixed((*self.shape[:1], *sides))
        self.convolution = nn.Conv2d(self.shape[0], self.shape[0], 3, self.stride, padding=1)
        self.tail = Tail(self.mixed.features, self.classes, before, place, norm=norm)

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The ensemble's log-probabilities [B, C], and its members' logits [B, m, C], which are handed on."""
        features = self.mixed(self.mixed.both(self.convolution(seen.features).relu()))
        members = self.tail.members(features, seen)
        return self.tail.ensemble(members), members

    def forward(self, seen: Seen) -> Tensor:
        """The ensemble's log-probabilities [B, C]."""
        return self.both(seen)[0]

    def config(self) -> dict[str, Any]:
        """Shape, classes, the exit before, the place in the cascade, norm and stride."""
        config = {"shape": list(self.shape), "classes": self.classes, **_config(self.tail)}
        return {"name": "CascadeConv", **config, "norm": self.norm, "stride": self.stride}


def _config(tail: Tail) -> dict[str, Any]:
    return {"before": tail.before, "place": tail.place}


def cascade(shape: Sequence[int], classes: int, reads: Sequence[str]) -> Cascade:
    """Linear on mean, maximum and a 4x4 grid of means."""
    before = reads[-1] if reads else None
    return Cascade("grid", width(shape, "grid"), classes, before=before, place=len(reads) + 1)


def cascade_conv(shape: Sequence[int], classes: int, reads: Sequence[str]) -> CascadeConv:
    """The paper's head for small images."""
    return CascadeConv(shape, classes, before=reads[-1] if reads else None, place=len(reads) + 1)
