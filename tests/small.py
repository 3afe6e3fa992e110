"""Small networks and made-up traces for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.chain import Chain, Node
from offramp.cutting import ladder
from offramp.data.rows import fingerprint_of
from offramp.network import Network
from offramp.provenance import Origin
from offramp.trace import Header, Trace

NAMES = ("small", "middle", "large", "huge")
NAN_MARK, INF_MARK = 50.0, 60.0  # a row whose first value is one of these spoils the logits of a `Spoiled`


class Counting(nn.Module):
    """A model that counts its calls and the rows it saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.model(x)


class Spoiled(nn.Module):
    """A model whose logits are NaN, or infinite, on marked rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        y = torch.where(x[:, :1] == NAN_MARK, torch.nan, y)
        wide = torch.where(x[:, :1] == INF_MARK, torch.inf, y[:, :1])
        return torch.cat([wide, y[:, 1:]], 1)


def seeded(make: Any, seed: int) -> Any:
    """What `make()` gives when torch's generator starts from a seed; the generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def dense(place: int, *, inputs: int = 4, classes: int = 3, seed: int = 0) -> nn.Module:
    """The model of a rung: deeper rungs are wider."""
    width = 8 * place
    if not place:
        return seeded(lambda: nn.Linear(inputs, classes), seed).eval()
    return seeded(
        lambda: nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes)), seed + place
    ).eval()


def whole_numbers(place: int, *, inputs: int = 4, classes: int = 3, seed: int = 0) -> nn.Module:
    """A rung whose weights are small integers: on integer rows its logits are exact, and scores tie."""
    model = nn.Linear(inputs, classes)
    draw = torch.Generator().manual_seed(100 * seed + place)
    with torch.no_grad():
        for value in (model.weight, model.bias):
            value.copy_(torch.randint(-2, 3, value.shape, generator=draw))
    return model.eval()


def spoiled(place: int, *, seed: int = 0) -> nn.Module:
    """Whole-number rungs of which the first gives NaN and infinities on marked rows."""
    model = whole_numbers(place, seed=seed)
    return Spoiled(model).eval() if place == 0 else model


def conv(place: int, *, classes: int = 3, seed: int = 0) -> nn.Module:
    """A rung on images [B, 1, 6, 6]."""
    width = 2 + 2 * place
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, classes)
        ),
        seed + place,
    ).eval()


def ladder_of(rungs: int, *, make: Any = dense, seed: int = 0, **options: Any) -> Network:
    """A seeded ladder in eval mode."""
    return ladder({name: make(place, seed=seed) for place, name in enumerate(NAMES[:rungs])}, **options).eval()


def rows_of(count: int, *, inputs: int = 4, seed: int = 0, whole: bool = False) -> Tensor:
    """Rows [count, inputs]; `whole` gives integers."""
    draw = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-3, 4, (count, inputs), generator=draw).float()
    return torch.randn(count, inputs, generator=draw)


def trace_of(
    rows: int,
    *,
    skill: Sequence[float] = (0.7, 0.85, 0.95),
    macs: Sequence[float] = (1.0, 2.0, 8.0),
    classes: int = 5,
    seed: int = 0,
    names: Sequence[str] = NAMES,
    labelled: bool = True,
) -> Trace:
    """A made-up trace: an exit of skill s is right on a share s of the rows, and surer where it is right."""
    rng = np.random.default_rng(seed)
    exits = tuple(names[: len(skill)])
    label = rng.integers(0, classes, rows)
    hard = rng.random(rows)
    columns: dict[str, Any] = {"row": np.arange(rows), "digest": rng.integers(0, 2**63, rows).astype(np.uint64)}
    if labelled:
        columns["label"] = label
    for name, s in zip(exits, skill, strict=True):
        right = hard + 0.2 * rng.standard_normal(rows) < s
        logits = 0.5 * rng.standard_normal((rows, classes))
        logits[np.arange(rows), np.where(right, label, (label + 1) % classes)] += 1 + 6 * np.maximum(s - hard, 0)
        columns[f"logits/{name}"] = logits.astype(np.float32)
        columns[f"answer/{name}"] = columns[f"logits/{name}"].argmax(1)
        two = np.sort(columns[f"logits/{name}"], axis=1)[:, -2:]
        if name != exits[-1]:
            columns[f"score/{name}"] = two[:, 1] - two[:, 0]
    for name, price in zip(exits, macs, strict=True):
        columns[f"cost/segment/{name}"] = np.array([price, np.nan, np.nan])
    chain = Chain(tuple(Node(name, after) for name, after in zip(exits, (*exits[1:], None), strict=True)))
    header = Header(
        chain=chain,
        reference=exits[-1],
        classes=classes,
        data="made-up",
        data_fingerprint=fingerprint_of(columns["digest"]),
        origin=Origin("0123456789abcdef", "torch", "float32"),
    )
    return Trace(columns, header)
