"""`inspect`: where a trained model can be cut, how much of its work is done by then, and what would
be carried on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from offramp.building.costing import Change, changes
from offramp.errors import InvalidArgument
from offramp.networks.inputs import as_inputs, count_of, texts_of
from offramp.networks.wrappers import require_plain, unwrapped
from offramp.partition import CutPoint
from offramp.partition.segmenting import check_cut, points_of
from offramp.runtime.measuring import pace

ROWS = 8  # on which the model is exported; all rows are timed


@dataclass(frozen=True)
class Inspection:
    """Where a model can be cut.

    Attributes:
        points: every module in the order in which they end; see `offramp.partition.CutPoint`.
        batch: rows that were timed together.
        forward_ms: milliseconds of the plain model on them, measured once on this machine.
        time_shares: by module the share of these milliseconds up to its end.
        changes: what every converted layer costs, before and after, and under the name "" the whole
            model; empty unless the original was given. Costs have parameters, stored_bytes, macs,
            bit_operations and ms.
    """

    points: tuple[CutPoint, ...]
    batch: int
    forward_ms: float
    time_shares: Mapping[str, float]
    changes: tuple[Change, ...] = ()

    @property
    def legal(self) -> tuple[str, ...]:
        """The modules after which `cut` can cut."""
        return tuple(point.name for point in self.points if point.legal)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        points = []
        for point in self.points:
            points.append(
                {
                    **asdict(point),
                    "legal": point.legal,
                    "time_share": self.time_shares.get(point.name),
                }
            )
        changed = [asdict(one) for one in self.changes]
        return {
            "batch": self.batch,
            "forward_ms": self.forward_ms,
            "points": points,
            "changes": changed,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Texts of a table: cut after, MACs so far, milliseconds so far, bytes per row, and what is
        carried.
        """
        rows = list[tuple[str, ...]]()
        for point in self.points:
            macs = _percent(point.share)
            time = _percent(self.time_shares.get(point.name))
            if point.why_not is not None:
                rows.append((point.name, macs, time, "-", f"no cut: {point.why_not}"))
                continue
            shapes = ", ".join("x".join(map(str, shape)) for shape in point.carried)
            rows.append((point.name, macs, time, f"{point.row_bytes:,}", shapes))
        return rows

    def __str__(self) -> str:
        once = (
            f"{self.forward_ms:.3g} ms for a batch of {self.batch}, measured once on this machine"
        )
        return f"{len(self.legal)} legal cuts among {len(self.points)} modules; {once}"


def inspect(
    model: nn.Module,
    example: Any,
    *,
    preprocess: nn.Module | None = None,
    length: Sequence[str] | str = (),
    original: nn.Module | None = None,
) -> Inspection:
    """List where a model can be cut: for every module the work done by its end, and what would be
    carried on.

    Args:
        model: in eval mode.
        example: a batch as the model (or its preprocessing) takes it; all of its rows are timed
            together.
        preprocess: the preprocessing of the model.
        length: inputs [B, T, ...] whose T may be another one in every batch, as for `cut`.
        original: the model before it was converted: then the costs of converted layers are listed
            beside its own.

    Returns:
        All modules in the order in which they end.

    Raises:
        BadNetwork: the model mixes rows, or cannot be exported.
        BadData: the model fails on the example.
        InvalidArgument: the original is no torch module.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> found = inspect(model, torch.randn(4, 8))
        >>> found.legal
        ('0', '1')
    """
    model, _ = unwrapped(model)
    require_plain(model, "model")
    batch = as_inputs(example)
    tried = {name: value[:ROWS] for name, value in batch.items()}
    points = points_of(model, preprocess, tried, texts_of(tried, length))
    legal = [point.name for point in points if point.legal]
    for name in legal[-1:]:  # the list alone does not tell that rows are kept apart
        check_cut(model, preprocess, tried, name)
    timed = pace(model, preprocess, batch)
    changed: list[Change] = []
    if original is not None:
        if not isinstance(original, nn.Module):
            raise InvalidArgument(
                f"original must be a torch.nn.Module, got {type(original).__name__}"
            )
        (x,) = batch.values() if len(batch) == 1 else (example,)
        changed = changes(original, model, x if preprocess is None else preprocess(x))
    return Inspection(tuple(points), count_of(batch), timed.ms, timed.shares, tuple(changed))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
