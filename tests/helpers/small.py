"""Small networks and made-up traces for tests."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.building.cutting import cut, ladder
from offramp.data.rows import fingerprint_of
from offramp.networks.network import Network
from offramp.networks.nodes import Exit
from offramp.networks.taps import listening
from offramp.plans.header import Header
from offramp.plans.provenance import Origin
from offramp.plans.topology import Node, Topology
from offramp.plans.trace import Trace

NAMES = ("small", "middle", "large", "huge")
NAN_MARK, INF_MARK = (
    50.0,
    60.0,
)  # a row whose first value is one of these spoils the logits of a `Spoiled`


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
    """What `make()` gives when torch's generator starts from a seed; the generator is left as it
    was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker that makes for the same arguments once for all tests, and gives copies of that: a
    network takes longer to export than most tests.
    """
    kept = functools.cache(make)

    @functools.wraps(make)
    def copied(*args: Any, **options: Any) -> Any:
        return copy.deepcopy(kept(*args, **options))

    return copied


def dense(index: int, *, inputs: int = 4, classes: int = 3, seed: int = 0) -> nn.Module:
    """The model of a member: deeper members are wider."""
    width = 8 * index
    if not index:
        return seeded(lambda: nn.Linear(inputs, classes), seed).eval()
    return seeded(
        lambda: nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes)),
        seed + index,
    ).eval()


def whole_numbers(index: int, *, inputs: int = 4, classes: int = 3, seed: int = 0) -> nn.Module:
    """A member whose weights are small integers: on integer rows its logits are exact, and scores
    tie.
    """
    model = nn.Linear(inputs, classes)
    draw = torch.Generator().manual_seed(100 * seed + index)
    with torch.no_grad():
        for value in (model.weight, model.bias):
            value.copy_(torch.randint(-2, 3, value.shape, generator=draw))
    return model.eval()


def spoiled(index: int, *, seed: int = 0) -> nn.Module:
    """Whole-number members of which the first gives NaN and infinities on marked rows."""
    model = whole_numbers(index, seed=seed)
    return Spoiled(model).eval() if index == 0 else model


def conv(index: int, *, classes: int = 3, seed: int = 0) -> nn.Module:
    """A member on images [B, 1, 6, 6]."""
    width = 2 + 2 * index
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, classes),
        ),
        seed + index,
    ).eval()


def ladder_of(members: int, *, make: Any = dense, seed: int = 0, **options: Any) -> Network:
    """A seeded ladder in eval mode."""
    return ladder(
        {name: make(index, seed=seed) for index, name in enumerate(NAMES[:members])}, **options
    ).eval()


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
    """A made-up trace: an exit of skill s is right on a share s of the rows, and surer where it is
    right.
    """
    rng = np.random.default_rng(seed)
    exits = tuple(names[: len(skill)])
    label = rng.integers(0, classes, rows)
    hard = rng.random(rows)
    columns: dict[str, Any] = {
        "row": np.arange(rows),
        "digest": rng.integers(0, 2**63, rows).astype(np.uint64),
    }
    if labelled:
        columns["label"] = label
    for name, s in zip(exits, skill, strict=True):
        right = hard + 0.2 * rng.standard_normal(rows) < s
        logits = 0.5 * rng.standard_normal((rows, classes))
        logits[np.arange(rows), np.where(right, label, (label + 1) % classes)] += (
            1 + 6 * np.maximum(s - hard, 0)
        )
        columns[f"logits/{name}"] = logits.astype(np.float32)
        columns[f"answer/{name}"] = columns[f"logits/{name}"].argmax(1)
        two = np.sort(columns[f"logits/{name}"], axis=1)[:, -2:]
        if name != exits[-1]:
            columns[f"score/{name}"] = two[:, 1] - two[:, 0]
    for name, price in zip(exits, macs, strict=True):
        columns[f"cost/segment/{name}"] = np.array([price, np.nan, np.nan])
    topology = Topology.chain([Node(name) for name in exits])
    header = Header(
        topology=topology,
        reference=exits[-1],
        classes=classes,
        data="made-up",
        data_fingerprint=fingerprint_of(columns["digest"]),
        origin=Origin("0123456789abcdef", "torch", "float32"),
    )
    return Trace(columns, header)


class Stages(nn.Module):
    """A stem, two blocks in a list, and a head, on images [B, 1, 8, 8]; the second block works in
    place.
    """

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)) for _ in range(2)]
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.drop(h.flatten(1)))


def images_of(count: int, seed: int = 0) -> Tensor:
    """Images [count, 1, 8, 8]."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def stages(seed: int = 0, **options: Any) -> nn.Module:
    """Seeded `Stages` in eval mode."""
    return seeded(lambda: Stages(**options), seed).eval()


def cut_of(*at: str, seed: int = 0, trained: bool = True, **options: Any) -> Network:
    """`Stages` cut at some modules (by default two); `trained` moves its exits a little, as any
    training does.

    Where options are names it is cut once for all tests and copied: the export takes longer than
    most of them.
    """
    at = at or ("stem", "blocks.0")
    if all(isinstance(value, str) for value in options.values()):
        net = _cut_once(at, seed, **options)
    else:
        net = _cut(at, seed, **options)
    return moved(net) if trained else net


def _cut(at: Sequence[str], seed: int, **options: Any) -> Network:
    return seeded(lambda: cut(stages(seed), images_of(4), at=at, **options), seed)


_cut_once = made_once(_cut)


def moved(net: Network, by: float = 0.01) -> Network:
    """The exits' parameters moved a little."""
    with torch.no_grad():
        for value in net.exits.parameters():
            value.add_(by)
    return net


class Reader(Exit):
    """An exit that doubles the logits of the one at `stem`."""

    reads = ("stem",)

    def forward(self, seen):
        return seen.logits["stem"] * 2

    def config(self):
        return {"name": "tests:Reader"}


def sizes(module: nn.Module, call: Callable[[], object]) -> list[tuple[str, tuple[int, ...]]]:
    """The kind of every layer that ran, in order, with the shape of what it gave, without the
    batch.
    """
    heard: list[tuple[str, tuple[int, ...]]] = []
    layers = {
        name: part for name, part in module.named_modules() if not list(part.children()) and name
    }
    with listening(
        layers, lambda name, out: heard.append((type(layers[name]).__name__, tuple(out.shape[1:])))
    ):
        call()
    return heard
