"""Lists every module boundary of a model in order of execution.

For each boundary the list has whether it is a legal cut, which tensors a cut there carries on, and
its share of the multiply-adds. `evenly` chooses cuts from that list, and `unevenness` judges a
choice.
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

from offramp._support.sentences import first_line
from offramp.errors import BadData, InvalidArgument
from offramp.networks.taps import inputs_of
from offramp.partition.exporting import exported
from offramp.partition.graph import ExportedGraph
from offramp.partition.pieces import unfit

# A cut within this fraction of a part of its ideal position is as good as one right at it: among
# those the outermost module wins.
NEAR = 0.25


@dataclass(frozen=True)
class CutPoint:
    """The end of a module, as a place where the model may be cut.

    Attributes:
        name: of the module.
        why_not: why this is not a legal cut; None for a legal one.
        carried: shapes of the tensors that a cut here carries on, as on the example and without the
            batch dimension; empty where the cut is not legal.
        row_bytes: bytes of these tensors per row; None where the cut is not legal.
        share: multiply-adds up to here, as a share of all of them; None where the module never ran.
    """

    name: str
    why_not: str | None
    carried: tuple[tuple[int, ...], ...] = ()
    row_bytes: int | None = None
    share: float | None = None

    @property
    def legal(self) -> bool:
        """Whether `partition` accepts a cut here."""
        return self.why_not is None


def cut_points(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    length: Collection[str] = (),
) -> list[CutPoint]:
    """List the ends of all named modules of a model, with one export and one run of the example.

    Cuts that are legal one by one are also legal together, except two that end at the same place.

    Args:
        model: in eval mode; it is left as it was.
        args: positional arguments of an example call; its tensors [B, ...] are the inputs.
        kwargs: keyword arguments of the same call.
        length: names of inputs [B, T, ...] whose T may differ from call to call.

    Returns:
        The modules in order of execution, then those that never ran.

    Raises:
        BadNetwork: the model is in training mode or cannot be exported.
        BadData: the example does not fit the model.
    """
    marks = dict(model.named_modules())
    del marks[""]  # the model itself
    source = exported(model, args, kwargs, marks, length)
    example = [tensor.detach() for tensor in inputs_of(args, kwargs).values()]
    try:
        shares = _shares(source, example)
    except IndexError as problem:
        # The export only looks at shapes, so a token beyond the vocabulary first fails here.
        why = first_line(problem).rstrip(".;")
        raise BadData(
            f"the model fails on the example: {why}. Use an example whose values the model accepts."
        ) from problem

    ran = sorted(source.taps, key=lambda name: source.taps[name].end)
    names = list(dict.fromkeys([*ran, *marks]))  # those that ran come first
    return [_point(source, name, shares) for name in names]


def evenly(points: Sequence[CutPoint], parts: int) -> tuple[str, ...]:
    """Choose legal cuts that divide the multiply-adds into nearly equal parts.

    For each ideal position the legal cuts near it compete. The outermost module wins, then the one
    that carries the fewest bytes, then the nearest.

    Args:
        points: all module boundaries of the model, as `cut_points` lists them.
        parts: number of parts, at least 2.

    Returns:
        Names of `parts - 1` modules, in order of execution.

    Raises:
        InvalidArgument: the model has too few legal cuts; the message names the obstacle.
    """
    # Several modules can end at the same share of the work, such as a block and its last layer.
    # Only the best of them is a candidate.
    best = dict[float, CutPoint]()
    for point in points:
        share = point.share or 0.0
        if not point.legal or not 0 < share < 1:
            continue
        if share not in best or _badness(point) <= _badness(best[share]):
            best[share] = point
    shares = sorted(best)
    _require_parts(points, parts, len(shares))

    # Cut number k belongs at k / parts of the work. Each search starts behind the cut before, and
    # leaves at least one candidate for every cut that is still to be chosen.
    chosen = list[str]()
    start = 0
    for number in range(1, parts):
        stop = len(shares) - (parts - 1 - number)
        nearest = _nearest(shares, best, range(start, stop), number / parts, NEAR / parts)
        chosen.append(best[shares[nearest]].name)
        start = nearest + 1
    return tuple(chosen)


def _nearest(
    shares: Sequence[float],
    best: Mapping[float, CutPoint],
    candidates: Sequence[int],
    ideal: float,
    tolerance: float,
) -> int:
    """The index of the best candidate within `tolerance` of `ideal`, or else of the nearest one."""

    def distance(index: int) -> float:
        return abs(shares[index] - ideal)

    def rank(index: int) -> tuple[int, int, float]:
        depth, row_bytes = _badness(best[shares[index]])
        return depth, row_bytes, distance(index)

    close = [index for index in candidates if distance(index) <= tolerance]
    if close:
        return min(close, key=rank)
    return min(candidates, key=distance)


def _require_parts(points: Sequence[CutPoint], parts: int, usable: int) -> None:
    """Raise InvalidArgument unless `usable` cuts are enough for `parts` parts."""
    if 2 <= parts <= usable + 1:
        return
    # The first obstacle helps the reader: any of them where no cut is usable, otherwise one about
    # a shape, which the model's author can change.
    obstacle = ""
    for point in points:
        if point.why_not and (not usable or "shape" in point.why_not):
            obstacle = f" For example, {point.name!r} {point.why_not}."
            break
    if not usable:
        raise InvalidArgument(
            f"the model cannot be cut into {parts} parts. It has no legal cut with work on both "
            f"sides.{obstacle}"
        )
    raise InvalidArgument(
        f"parts must be between 2 and {usable + 1} for this model, got {parts}. It has too few "
        f"legal cuts with work between them.{obstacle}"
    )


def unevenness(points: Sequence[CutPoint], names: Sequence[str]) -> str | None:
    """Describe how badly cuts divide the multiply-adds, and what prevents better ones.

    A division is good enough if no part has more than half of the work that it should leave to the
    others. With one cut a part may have up to 3/4 of the work, with three cuts up to 5/8.

    Args:
        points: all module boundaries of the model.
        names: the cuts that were chosen.

    Returns:
        A clause that follows a name, such as "gives parts of 20.0%, 80.0% of the work: ..."; None
        where the division is good enough.
    """
    parts = len(names) + 1
    fair = 1 / parts
    ends = [0.0, 1.0]  # of the parts, as shares of the work
    for point in points:
        if point.name in names:
            ends.append(point.share or 0.0)
    ends.sort()
    sizes = [end - start for start, end in pairwise(ends)]
    largest = max(sizes)
    if largest <= fair + (1 - fair) / 2:
        return None

    # Look for the illegal cut nearest to the middle of the largest part: it is the one to fix.
    start = ends[sizes.index(largest)]
    end = start + largest
    middle = start + largest / 2
    nearest: CutPoint | None = None
    smallest = math.inf
    for point in points:
        if point.why_not is None or point.share is None or not start < point.share < end:
            continue
        distance = abs(point.share - middle)
        if distance < smallest:
            nearest = point
            smallest = distance
    percentages = ", ".join(f"{size:.1%}" for size in sizes)
    division = f"gives parts of {percentages} of the work"
    if nearest is None:
        return f"{division}: no module ends inside the largest part"
    return (
        f"{division}, because no cut inside the largest part is legal: {nearest.name!r} "
        f"{nearest.why_not}"
    )


def _badness(point: CutPoint) -> tuple[int, int]:
    """How deep inside the model a cut is, and how many bytes it carries per row."""
    return point.name.count("."), point.row_bytes or 0


def _point(source: ExportedGraph, name: str, shares: Sequence[float]) -> CutPoint:
    """The cut at the end of a module, or the reason why it is not legal."""
    why = unfit(source, name)
    tap = source.taps.get(name)
    if tap is None:
        return CutPoint(name, why)
    share = shares[tap.end] if tap.end >= 0 else None
    if why is not None:
        return CutPoint(name, why, share=share)

    # All tensors that are carried on must have one row per sample.
    carried = source.carried(tap.end)
    for node in carried:
        why = source.obstacle(node)
        if why is not None:
            return CutPoint(name, why, share=share)
    if set(carried) <= set(source.outputs.values()):
        return CutPoint(name, "ends where the model does", share=share)

    shapes = list[tuple[int, ...]]()
    row_bytes = 0
    for node in carried:
        value = node.meta["val"]
        shape = tuple(_number(size) for size in value.shape[1:])  # without the batch dimension
        shapes.append(shape)
        row_bytes += math.prod(shape) * value.element_size()
    return CutPoint(name, None, tuple(shapes), row_bytes, share)


def _number(size: int | torch.SymInt) -> int:
    """A size as it is on the example."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return size


def _shares(source: ExportedGraph, example: Sequence[torch.Tensor]) -> list[float]:
    """For every node of the graph, the share of all multiply-adds that ran up to it."""
    meter = _Meter(source.graph)
    copies = [tensor.clone() for tensor in example]  # the graph may write into its inputs
    with torch.no_grad():
        meter.run(*copies, enable_io_processing=False)
    total = max(meter.flops[-1], 1)
    return [flops / total for flops in meter.flops]


class _Meter(fx.Interpreter):
    """Runs a graph and counts the floating-point operations up to every node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.flops: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        before = self.flops[-1] if self.flops else 0
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.flops.append(before + counter.get_total_flops())
        return result
