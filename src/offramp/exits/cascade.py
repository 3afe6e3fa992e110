"""Exits of Zero Time Waste: each reads the logits of the exit before it, and its output is an
ensemble of all exits so far.

Wolczyk et al., 2021, arXiv 2106.05409. Shapes: B samples, F pooled features, C classes, m the place
of an exit. Cut with exits="cascade" or "cascade_conv" at every place, and train by the recipe
`ztw`. The score of the paper, the ensemble's largest probability, is the gate `max_prob`.
The model's own output, at the end, is not part of the cascade, as in the authors' later code: it is
the reference of every promise and stays that of the plain model. Their first code has an ensemble
there too. Here that ensemble is an exit before the model's last layer, with a copy of the layer
(`ztw?final=true`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from offramp.exits._cascading import Tail
from offramp.exits._pooling import Mixed, pooled, require_layout, require_pooling, width
from offramp.networks.nodes import Exit, Seen

__all__ = ["Cascade", "CascadeConv", "cascade", "cascade_conv"]

SMALL = 8  # pixels of a side up to which the authors pad their strided convolution by 1


class Cascade(Exit):
    """A linear layer on pooled features and on the logits of the exit before.

    The paper's heads have a convolution. This one has none, so that features are pooled only once
    (`CascadeConv` has one).

    Args:
        pooling: "mean", "grid" or "flat", as of `Pooled`.
        features: F.
        classes: C.
        before: the exit whose logits this one reads.
        place: of this exit in the cascade, from 1.
        norm: whether those logits pass a layer norm.
        layout: where the channels are, as of `Pooled`.
        ensemble: "geometric", the paper's; "additive" or "mean", its ablations.
        final: whether the linear layer is a copy of the model's last one, which reads no logits and
            stays as it is. The recipe `ztw` makes such an exit.
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
        layout: str | None = None,
        ensemble: str = "geometric",
        final: bool = False,
    ) -> None:
        super().__init__()
        require_pooling(pooling, "pooling")
        require_layout(layout)
        self.layout = layout
        self.pooling = pooling
        self.features = int(features)
        self.classes = int(classes)
        self.norm = bool(norm)
        self.reads = _reads(before)
        self.tail = Tail(
            self.features, self.classes, before, place, norm=norm, kind=ensemble, final=final
        )

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, ...] -> [B, F]."""
        return pooled(features, self.pooling, self.layout)

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The ensemble's log-probabilities [B, C], and its members' logits [B, m, C], which are
        handed on.
        """
        members = self.tail.members(self.pool(seen.features), seen)
        return self.tail.ensemble(members), members

    def forward(self, seen: Seen) -> Tensor:
        """The ensemble's log-probabilities [B, C]."""
        return self.both(seen)[0]

    def config(self) -> dict[str, Any]:
        """Pooling, widths, the exit before, the place in the cascade, and the norm."""
        config = {
            "name": "Cascade",
            "pooling": self.pooling,
            "features": self.features,
            "classes": self.classes,
            **_config(self.tail),
            "norm": self.norm,
        }
        # Files of earlier editions keep their fingerprint, because defaults are left out.
        if self.layout is not None:
            config["layout"] = self.layout
        if self.tail.final:
            config["final"] = True
        return config


class CascadeConv(Exit):
    """The paper's head for small images: a 3x3 convolution with the same number of channels, ReLU,
    mixed pooling to about 4x4, and a linear layer.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        before: the exit whose logits this one reads.
        place: of this exit in the cascade, from 1.
        norm: whether those logits pass a layer norm.
        stride: of the convolution: in the authors' code 2 on Tiny-ImageNet, otherwise 1.
        padding: of the convolution. None is the authors' rule: 2 for a stride of 2 on sides of more
            than 8 (on Tiny-ImageNet), otherwise 1. Files of the first edition have 1 everywhere.
        ensemble: "geometric", the paper's; "additive" or "mean", its ablations.
    """

    FIRST_EDITION: ClassVar[Mapping[str, Any]] = {"padding": 1}

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        before: str | None = None,
        place: int = 1,
        norm: bool = False,
        stride: int = 1,
        padding: int | None = None,
        ensemble: str = "geometric",
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.classes = int(classes)
        self.norm = bool(norm)
        self.stride = int(stride)
        if padding is None:
            if self.stride == 2 and min(self.shape[1:], default=0) > SMALL:
                padding = 2
            else:
                padding = 1
        self.padding = int(padding)
        self.reads = _reads(before)
        # The sides behind the convolution.
        sides = [(side + 2 * self.padding - 3) // self.stride + 1 for side in self.shape[1:]]
        self.mixed = Mixed((*self.shape[:1], *sides))
        self.convolution = nn.Conv2d(self.shape[0], self.shape[0], 3, self.stride, self.padding)
        self.tail = Tail(self.mixed.features, self.classes, before, place, norm=norm, kind=ensemble)

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The ensemble's log-probabilities [B, C], and its members' logits [B, m, C], which are
        handed on.
        """
        activations = self.convolution(seen.features).relu()  # [B, channels, H, W]
        features = self.mixed(self.mixed.both(activations))  # [B, F]
        members = self.tail.members(features, seen)
        return self.tail.ensemble(members), members

    def forward(self, seen: Seen) -> Tensor:
        """The ensemble's log-probabilities [B, C]."""
        return self.both(seen)[0]

    def config(self) -> dict[str, Any]:
        """Shape, classes, the exit before, the place in the cascade, norm, stride, and a padding
        other than 1.
        """
        config = {
            "name": "CascadeConv",
            "shape": list(self.shape),
            "classes": self.classes,
            **_config(self.tail),
            "norm": self.norm,
            "stride": self.stride,
        }
        if self.padding != 1:
            config["padding"] = self.padding
        return config


def _reads(before: str | None) -> tuple[str, ...]:
    """The exits that an exit in a cascade reads."""
    if before is None:
        return ()
    return (before,)


def _config(tail: Tail) -> dict[str, Any]:
    """The config of both classes' tails."""
    config: dict[str, Any] = {"before": tail.before, "place": tail.place}
    if tail.kind != "geometric":
        config["ensemble"] = tail.kind
    return config


def cascade(
    shape: Sequence[int],
    classes: int,
    reads: Sequence[str],
    layout: str | None = None,
    ensemble: str = "geometric",
) -> Cascade:
    """Linear on mean, maximum and a 4x4 grid of means; `cascade?ensemble=additive` has an
    ablation's ensemble.
    """
    features = width(shape, "grid", layout)
    before = None
    if reads:
        before = reads[-1]
    return Cascade(
        "grid",
        features,
        classes,
        before=before,
        place=len(reads) + 1,
        layout=layout,
        ensemble=ensemble,
    )


def cascade_conv(
    shape: Sequence[int],
    classes: int,
    reads: Sequence[str],
    stride: int = 1,
    ensemble: str = "geometric",
) -> CascadeConv:
    """The paper's head for small images; `cascade_conv?stride=2` is that for Tiny-ImageNet."""
    before = None
    if reads:
        before = reads[-1]
    return CascadeConv(
        shape, classes, before=before, place=len(reads) + 1, stride=stride, ensemble=ensemble
    )
