"""Every module boundary of a model in order of execution: which are legal cuts, what they carry,
what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import BadData, InvalidArgument
from offramp.networks.taps import inputs_of
from offramp.partition.exporting import exported
from offramp.partition.graph import ExportedGraph
from offramp.partition.pieces import unfit

NEAR = 0.25  # of a part: how far from equal shares an outer module is still taken for an inner one


@dataclass(frozen=True)
class CutPoint:
    """The end of a module. `why_not` is None for a legal cut.

    carried: shapes of what goes on, on the example and without the batch; row_bytes: its size per
    row; share: multiply-adds up to here as a part of all. For a cut that is not legal, carried is
    empty and row_bytes None; share is None where it never ran.
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


def cut_points(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    length: Collection[str] = (),
) -> list[CutPoint]:
    """Every named module in order of execution, then those that never ran; one export and one pass
    over the example.

    Legal alone is legal together, but for two that end at the same place. Raises as `partition`
    does.
    """
    marks = {name: module for name, module in model.named_modules() if name}
    source = exported(model, args, kwargs, marks, length)
    try:
        shares = _shares(source, [tensor.detach() for tensor in inputs_of(args, kwargs).values()])
    # the export runs on shapes alone, and takes any number for a token
    except IndexError as problem:
        why = str(problem).strip().splitlines()[0].rstrip(".;")
        raise BadData(
            f"the model fails on the example: {why}; give rows whose numbers it knows"
        ) from problem
    ran = sorted(source.taps, key=lambda name: source.taps[name].end)
    return [_point(source, name, shares) for name in ran] + [
        _point(source, name, shares) for name in marks if name not in ran
    ]


def evenly(points: Sequence[CutPoint], parts: int) -> tuple[str, ...]:
    """The legal cuts near equal shares of the multiply-adds: of those about there the outermost,
    that carry least.

    Raises InvalidArgument, with what is in the way, when there are too few.
    """
    inner = [point for point in points if point.legal and 0 < (point.share or 0) < 1]
    # at each share
    best = {point.share or 0: point for point in sorted(inner, key=_badness, reverse=True)}
    shares = sorted(best)
    if not 2 <= parts <= len(shares) + 1:
        barred = [one for one in points if one.why_not and (not shares or "shape" in one.why_not)]
        why = f"; {barred[0].name!r} {barred[0].why_not}" if barred else ""
        if not shares:
            raise InvalidArgument(
                f"got parts={parts}, and this model has no legal cut with work before and behind "
                f"it{why}"
            )
        raise InvalidArgument(
            f"got parts={parts}, expected 2 to {len(shares) + 1} parts, as many as legal cuts "
            f"with work between{why}"
        )
    picked = list[int]()
    for position in range(1, parts):
        free = range(picked[-1] + 1 if picked else 0, len(shares) - (parts - 1 - position))
        away = {index: abs(shares[index] - position / parts) for index in free}
        about = [index for index in free if away[index] <= NEAR / parts]
        rank = {index: (*_badness(best[shares[index]]), away[index]) for index in about}
        picked.append(min(rank, key=rank.__getitem__) if rank else min(away, key=away.__getitem__))
    return tuple(best[shares[index]].name for index in picked)


def unevenness(points: Sequence[CutPoint], names: Sequence[str]) -> str | None:
    """How badly cuts divide the multiply-adds, and what is in the way; None where they do it well
    enough.

    Well enough is: no part has more than half of what it should leave to the others. Cuts in two
    may have up to 3/4 in one part, cuts in four up to 5/8.

    Args:
        points: all module boundaries of the model.
        names: the cuts that were chosen.
    """
    parts = len(names) + 1
    fair = 1 / parts
    chosen = sorted(point.share or 0.0 for point in points if point.name in names)
    ends = [0.0, *chosen, 1.0]
    sizes = [end - start for start, end in pairwise(ends)]
    largest = max(sizes)
    if largest <= fair + (1 - fair) / 2:
        return None
    start = ends[sizes.index(largest)]
    middle = start + largest / 2
    barred = [
        point
        for point in points
        if point.why_not and point.share is not None and start < point.share < start + largest
    ]
    said = "gives parts of " + ", ".join(f"{size:.1%}" for size in sizes) + " of the work"
    if not barred:
        return f"{said}: no module ends inside the largest part"
    nearest = min(barred, key=lambda point: abs((point.share or 0.0) - middle))
    return (
        f"{said}, because no cut inside the largest part is legal: {nearest.name!r} "
        f"{nearest.why_not}"
    )


def _badness(point: CutPoint) -> tuple[int, int]:
    """How deep inside the model a cut lies, and how much it carries."""
    return point.name.count("."), point.row_bytes or 0


def _point(source: ExportedGraph, name: str, shares: Sequence[float]) -> CutPoint:
    why = unfit(source, name)
    end = source.taps[name].end if name in source.taps else -1
    share = shares[end] if end >= 0 else None
    carried = [] if why else source.carried(end)
    why = why or next(filter(None, map(source.obstacle, carried)), None)
    if why is None and all(node in source.outputs.values() for node in carried):
        why = "ends where the model does"
    if why is not None:
        return CutPoint(name, why, share=share)
    values = [node.meta["val"] for node in carried]
    shapes = tuple(tuple(map(_number, value.shape[1:])) for value in values)
    row_bytes = sum(
        math.prod(shape) * value.element_size() for shape, value in zip(shapes, values, strict=True)
    )
    return CutPoint(name, None, shapes, row_bytes, share)


def _number(size: int | torch.SymInt) -> int:
    """A size as it is on the example."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _shares(source: ExportedGraph, example: Sequence[torch.Tensor]) -> list[float]:
    """For every place in the graph the part of all multiply-adds that ran before it."""
    meter = _Meter(source.graph)
    with torch.no_grad():
        meter.run(*(tensor.clone() for tensor in example), enable_io_processing=False)
    return [flops / max(meter.flops[-1], 1) for flops in meter.flops]


class _Meter(fx.Interpreter):
    """Runs a graph and notes after every node how many floating-point operations there have
    been.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.flops: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = super().run_node(n)
        self.flops.append(counter.get_total_flops() + (self.flops[-1] if self.flops else 0))
        return found
