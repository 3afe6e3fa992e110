"""earlyon beside offramp on one network: its wrapper, its heads, its training and its calibration,
for peers.py.

Everything of earlyon 0.3.0 (MIT, https://github.com/sohams25/earlyon) is its own code by its
documented names. It reads logits and pooled features computed once through a `Replayed` backbone,
so that 200 calibrations need not run the model 200 times: its hooks, its grid and its simulation
run as they are. Shapes: B rows, F features, C classes.
"""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo_models import without_compiled_operations

import offramp as off
from offramp.contracts import Seen
from offramp.exits.pooled import Pooled
from offramp.gates.confidence import max_prob, neg_entropy

# its argument `grid`, ten times finer than its own
GRID = tuple(round(step / 100, 2) for step in range(99, 0, -1))
HIDDEN = 128  # of its heads, by default


@dataclass(frozen=True)
class Setting:
    """How earlyon is calibrated: its policy, whether it fits temperatures (on rows of their own),
    its grid.
    """

    policy: str = "confidence"
    tempered: bool = False
    grid: tuple[float, ...] | None = None


SETTINGS = {
    "confidence": Setting(),
    "confidence, temperatures": Setting(tempered=True),
    "entropy": Setting("entropy"),
    "entropy, temperatures": Setting("entropy", tempered=True),
    "confidence, temperatures, 99 values": Setting(tempered=True, grid=GRID),
}


@dataclass(frozen=True)
class Found:
    """What earlyon chose: its settings as a plan on scores of logits divided by temperatures, and
    how long it took.
    """

    plan: off.Plan
    policy: str
    temperatures: tuple[float, ...]
    accuracy: float  # by its own count, on the rows it was given
    seconds: float

    def scores(self, trace: off.Trace) -> off.Trace:
        """The trace with earlyon's scores in the place of its own."""
        score = max_prob if self.policy == "confidence" else neg_entropy
        columns = dict(trace.columns)
        for gate, temperature in zip(trace.topology.gates, self.temperatures, strict=True):
            logits = torch.from_numpy(trace.columns[f"logits/{gate}"]) / temperature
            columns[f"score/{gate}"] = score(logits).numpy()
        return replace(trace, columns=columns)


def earlyon(name: str = "") -> Any:
    """A module of earlyon. Its models need torchvision; one built for CUDA is let in beside a CPU
    build of torch.
    """
    without_compiled_operations()
    return importlib.import_module(f"earlyon.{name}" if name else "earlyon")


class _Columns(nn.Module):
    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first = first
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.last]


class Replayed(nn.Module):
    """A backbone that computes nothing: rows [B, F] hold what stands at its nodes, side by side,
    the answer last.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        start = 0
        for name, width in widths.items():
            self.add_module(name, _Columns(start, start := start + width))

    def forward(self, x: Tensor) -> Tensor:
        """All nodes in order; the last one answers."""
        for part in self.children():
            found: Tensor = part(x)
        return found


class Ours(nn.Module):
    """An exit of ours as a head of earlyon's."""

    def __init__(self, exit_: Pooled) -> None:
        super().__init__()
        self.exit = exit_

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> logits."""
        logits: Tensor = self.exit(Seen(features, {}))
        return logits


def wrapped(
    backbone: nn.Module,
    layers: Sequence[str],
    heads: Sequence[nn.Module],
    setting: Setting,
    shape: tuple[int, ...],
) -> Any:
    """earlyon's wrapper of a backbone in eval mode; the widths that it notes are for its own heads
    only.
    """
    types = earlyon("core.types")
    points = [types.ExitPoint(f"e{index}", layer, 1) for index, layer in enumerate(layers)]
    config = types.EarlyExitConfig("custom", 10, points, routing_policy=setting.policy)
    named = {point.name: head for point, head in zip(points, heads, strict=True)}
    make = earlyon("core.wrappers").EarlyExitWrapper
    return make(backbone, named, _same, config, input_shape=(1, *shape)).eval()


def _same(x: Tensor) -> Tensor:
    return x


def own_head(width: int, exit_: Pooled | None = None) -> nn.Module:
    """A head of earlyon's own kind, [B, width, H, W] or [B, width] -> 10 classes; with the weights
    of an exit.
    """
    head: nn.Module = earlyon("core.exit_head").EarlyExitHead(width, 10, hidden_dim=HIDDEN)
    if exit_ is not None:
        head.load_state_dict(_renamed(exit_, head))
    return head


def as_exit(head: Any) -> Pooled:
    """The same head as an exit of ours."""
    first = head.classifier[0]
    last = head.classifier[-1]
    exit_ = Pooled("mean", first.in_features, last.out_features, (first.out_features,))
    exit_.load_state_dict(_renamed(head, exit_))
    return exit_


def _renamed(source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    return dict(zip(target.state_dict(), source.state_dict().values(), strict=True))


class _Shuffled:
    """Batches in a new order each time, without a DataLoader's work per row."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 128) -> None:
        self.x = x
        self.y = y
        self.size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y)).split(self.size):
            yield self.x[rows], self.y[rows]


def trained(features: Mapping[str, np.ndarray], y: np.ndarray, epochs: int) -> list[nn.Module]:
    """Its heads, trained by its own second stage (Adam, a frozen backbone) on means over positions,
    computed once.
    """
    torch.manual_seed(0)
    widths = {name: column.shape[1] for name, column in features.items()}
    heads = [own_head(width) for width in list(widths.values())[:-1]]
    model = wrapped(Replayed(widths), list(widths)[:-1], heads, Setting(), (sum(widths.values()),))
    rows = torch.cat([torch.from_numpy(np.asarray(column)) for column in features.values()], 1)
    train = earlyon("training.two_stage_trainer").stage2_train_exits
    train(model, _Shuffled(rows, torch.from_numpy(y)), epochs=epochs, on_epoch_end=lambda log: None)
    model.eval()
    return heads


def calibrated(
    trace: off.Trace, held: off.Trace, setting: Setting, drop: float, fractions: Mapping[str, float]
) -> Found:
    """`calibrate_thresholds` for a drop of accuracy on the rows of a trace; temperatures are fitted
    on those of `held`.

    fractions: of the backbone's FLOPs at each exit, as earlyon estimates them on the real model.
    """
    model = _over(trace, setting, fractions)
    if setting.tempered:
        extra = {"fit_temperature": True, "temperature_loader": [_batch(held)]}
    else:
        extra = {}
    calibrate = earlyon("core.thresholds").calibrate_thresholds
    rows = [_batch(trace)]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = calibrate(model, rows, target_accuracy_drop=drop, grid=setting.grid, **extra)
    seconds = time.perf_counter() - start
    sign = 1.0 if setting.policy == "confidence" else -1.0
    chosen = zip(trace.topology.gates, result.thresholds, result.enabled_exits, strict=True)
    plan = off.Plan.by_hand({gate: sign * value if on else math.inf for gate, value, on in chosen})
    temperatures = tuple(
        model.config.temperatures[f"e{index}"] for index in range(len(trace.topology.gates))
    )
    return Found(plan, setting.policy, temperatures, result.final_accuracy, seconds)


def _over(trace: off.Trace, setting: Setting, fractions: Mapping[str, float]) -> Any:
    """A wrapper that replays the logits of a trace."""
    gates = trace.topology.gates
    classes = trace.header.classes
    backbone = Replayed(dict.fromkeys(trace.topology.exits, classes))
    model = wrapped(
        backbone,
        gates,
        [nn.Identity() for _ in gates],
        setting,
        (classes * len(trace.topology.exits),),
    )
    model._flops_estimate = earlyon("core.flops").FlopsEstimate(
        dict(fractions), "of the real model", reliable=True
    )
    return model


def _batch(trace: off.Trace) -> tuple[Tensor, Tensor]:
    assert trace.labels is not None
    logits = [torch.from_numpy(trace.columns[f"logits/{name}"]) for name in trace.topology.exits]
    return torch.cat(logits, 1), torch.from_numpy(trace.labels)


def fractions_of(model: Any, gates: Sequence[str]) -> dict[str, float]:
    """What earlyon estimates a backbone to have done at each exit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.flops_estimate
    return dict(zip(gates, found.fractions.values(), strict=True))
