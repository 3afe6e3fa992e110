"""Every module boundary of a model in order of execution: which are legal cuts, what they carry, what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.partition.exporting import exported
from offramp.partition.graph import Exported
from offramp.partition.pieces import unfit
from offramp.taps import inputs_of


@dataclass(frozen=True)
class CutPoint:
    """The end of a module. `why_not` is None for a legal cut.

    carried: shapes without the batch of what goes on; row_bytes: its size per row; share: multiply-adds up to here as a
    part of all. For a cut that is not legal, carried is empty and row_bytes None; share is None where it never ran.
    """

    name: str
    why_not: str | None
    carried: tuple[tuple[int, ...], ...] = ()
    row_bytes: int | None = None
    share: float | None = None

    @property
    def legal(self) -> bool:
        """Whether `partition` takes it."""
        return self.why_not is None


def cut_points(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None = None) -> list[CutPoint]:
    """Every named module in order of execution, then those that never ran; one export and one pass over the example.

    Legal alone is legal together, but for two that end at the same place. Raises as `partition` does.
    """
    marks = {name: module for name, module in model.named_modules() if name}
    source = exported(model, args, kwargs, marks)
    shares = _shares(source, [tensor.detach() for tensor in inputs_of(args, kwargs).values()])
    ran = sorted(source.taps, key=lambda name: source.taps[name].end)
    return [_point(source, name, shares) for name in ran] + [
        _point(source, name, shares) for name in marks if name not in ran
    ]


def _point(source: Exported, name: str, shares: Sequence[float]) -> CutPoint:
    why, end = unfit(source, name), source.taps[name].end if name in source.taps else -1
    share = shares[end] if end >= 0 else None
    carried = [] if why else source.carried(end)
    why = why or next(filter(None, map(source.obstacle, carried)), None)
    if why is None and all(node in source.outputs.values() for node in carried):
        why = "ends where the model does"
    if why is not None:
        return CutPoint(name, why, share=share)
    values = [node.meta["val"] for node in carried]
    shapes = tuple(tuple(int(size) for size in value.shape[1:]) for value in values)
    row_bytes = sum(math.prod(shape) * value.element_size() for shape, value in zip(shapes, values, strict=True))
    return CutPoint(name, None, shapes, row_bytes, share)


def _shares(source: Exported, example: Sequence[torch.Tensor]) -> list[float]:
    """For every place in the graph the part of all multiply-adds that ran before it."""
    meter = _Meter(source.graph)
    with torch.no_grad():
        meter.run(*(tensor.clone() for tensor in example), enable_io_processing=False)
    return [flops / max(meter.flops[-1], 1) for flops in meter.flops]


class _Meter(fx.Interpreter):
    """Runs a graph and notes after every node how many floating-point operations there have been."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.flops: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = super().run_node(n)
        self.flops.append(counter.get_total_flops() + (self.flops[-1] if self.flops else 0))
        return found
