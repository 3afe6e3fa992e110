"""Networks of every kind that engines and exports must run like the eager one, each with a maker of
seeded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.building.cutting import cut, ladder
from offramp.layers.preprocess import Preprocess
from offramp.networks.network import Network
from offramp.plans.plan import Plan
from small import (
    INF_MARK,
    NAN_MARK,
    cut_of,
    dense,
    images_of,
    ladder_of,
    moved,
    rows_of,
    seeded,
    spoiled,
)

SIZES = (0, 1, 2, 7, 64)
Rows = Callable[[int], Any]


class Pair(nn.Module):
    """Gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).relu_(), x * 2


class Carrying(nn.Module):
    """A tuple is carried over its first cut, a tensor beside the tap over its second; it works in
    place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, beside = self.pair(x)
        h = self.middle(h).add_(beside.sum(1, keepdim=True)).relu_()
        return self.last(h.mul_(2) + beside[:, :1])


class Reading(nn.Module):
    """Two inputs: numbers of tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.block(self.table(ids) * mask.unsqueeze(-1))
        return self.last((h * mask.unsqueeze(-1)).sum(1) / (1 + mask.sum(1, keepdim=True)))


def texts(count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(0, 10, (count, 5), generator=draw)
    return {"ids": ids, "mask": torch.randint(0, 2, (count, 5), generator=draw).float()}


def pictures(count: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(count), dtype=torch.uint8
    )


def marked(count: int) -> Tensor:
    """Whole numbers, some of whose rows give NaN and infinities at the first exit."""
    x = rows_of(count, whole=True, seed=count)
    x[2::5, 0], x[3::5, 0] = NAN_MARK, INF_MARK
    return x


def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def preprocessed() -> Network:
    preprocess = Preprocess([0.5], [0.25])
    one = moved(cut(seeded(small_net, 1).eval(), pictures(4), at=["1"], preprocess=preprocess))
    flat = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 2).eval()
    return ladder({"flat": (flat, preprocess), "cut": one}, answer="mean")


def carrying() -> Network:
    return moved(cut(seeded(Carrying, 0).eval(), rows_of(4), at=["pair", "middle"], exits="linear"))


def two_inputs() -> Network:
    return moved(cut(seeded(Reading, 0).eval(), texts(4), at=["table", "block"]))


CASES: dict[str, tuple[Callable[[], Network], Rows]] = {
    "ladder": (lambda: ladder_of(3), rows_of),
    "spoiled": (lambda: ladder_of(3, make=spoiled, seed=3), marked),
    "mean and preprocessing, a cut member": (preprocessed, pictures),
    "cut, in place": (cut_of, images_of),
    "tuples": (carrying, rows_of),
    "two inputs": (two_inputs, texts),
    "entropy": (lambda: ladder_of(2, gate="neg_entropy"), rows_of),
    "wide": (lambda: ladder({"a": dense(0), "b": dense(3)}, gate="max_prob"), rows_of),
}


def middling(net: Network, x: Any) -> Plan:
    """Thresholds about the middle of the scores, as far off all of them as may be: some rows leave
    at every gate.
    """
    found = {}
    with torch.no_grad():
        for name, _, score in net.walk(x):
            if score is not None:
                known = np.unique(score[score.isfinite()].numpy())
                third = len(known) // 3
                about = known[third : len(known) - third + 1]
                at = int(np.argmax(np.diff(about)))
                found[name] = float((about[at] + about[at + 1]) / 2)
    return Plan.by_hand(found)
