"""`inspect`: list where a trained model can be cut, the share of its work up to each cut, and the
tensors that are needed behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from offramp.building.costing import Change, changes
from offramp.errors import InvalidArgument
from offramp.networks.inputs import as_inputs, count_of, texts_of
from offramp.networks.network import Network
from offramp.networks.wrappers import require_plain, unwrapped
from offramp.partition import CutPoint
from offramp.partition.segmenting import check_cut, points_of
from offramp.runtime.measuring import pace

ROWS = 8  # rows that the model is exported with; all rows of the example are timed


@dataclass(frozen=True)
class Inspection:
    """The places where a model can be cut.

    Attributes:
        points: every module in the order in which they end; see `offramp.partition.CutPoint`.
        batch: number of rows that were timed together.
        forward_ms: milliseconds of the plain model on these rows, measured once on this machine.
        time_shares: by module, the share of these milliseconds up to its end.
        changes: the cost of every converted layer before and after, and of the complete model under
            the name ""; empty unless the original was given. A cost has parameters, stored_bytes,
            macs, bit_operations and ms.
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
        """The inspection as plain data."""
        points = []
        for point in self.points:
            entry = asdict(point)
            entry["legal"] = point.legal
            entry["time_share"] = self.time_shares.get(point.name)
            points.append(entry)
        return {
            "batch": self.batch,
            "forward_ms": self.forward_ms,
            "points": points,
            "changes": [asdict(change) for change in self.changes],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The texts of a table, one row per module.

        Returns:
            Name, share of the MACs so far, share of the time so far, bytes carried on per row, and
            the shapes that are carried on or the reason why there is no cut.
        """
        rows = list[tuple[str, ...]]()
        for point in self.points:
            macs = _percent(point.share)
            time = _percent(self.time_shares.get(point.name))
            if point.why_not is not None:
                rows.append((point.name, macs, time, "-", f"no cut: {point.why_not}"))
                continue
            # [3, 32, 32] is printed as 3x32x32
            shapes = list[str]()
            for shape in point.carried:
                shapes.append("x".join(map(str, shape)))
            rows.append((point.name, macs, time, f"{point.row_bytes:,}", ", ".join(shapes)))
        return rows

    def __str__(self) -> str:
        return (
            f"{len(self.legal)} legal cuts among {len(self.points)} modules; "
            f"{self.forward_ms:.3g} ms for a batch of {self.batch}, measured once on this machine"
        )


def inspect(
    model: nn.Module,
    example: Any,
    *,
    preprocess: nn.Module | None = None,
    length: Sequence[str] | str = (),
    original: nn.Module | None = None,
) -> Inspection:
    """List where a model can be cut: for every module the share of the work up to its end, and the
    tensors that are needed behind it.

    Args:
        model: in eval mode; of a network that was cut, the model that it was made of.
        example: a batch as the model (or its preprocessing) takes it; all of its rows are timed
            together.
        preprocess: the preprocessing of the model.
        length: inputs [B, T, ...] whose T may differ between batches, as for `cut`.
        original: the model before it was converted. With it, the costs of converted layers are
            listed next to the costs before.

    Returns:
        All modules in the order in which they end.

    Raises:
        BadNetwork: the model mixes rows, or cannot be exported.
        BadData: the model fails on the example.
        InvalidArgument: the original is not a torch module, or a network has several models.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> inspection = inspect(model, torch.randn(4, 8))
        >>> inspection.legal
        ('0', '1')
    """
    model, _ = unwrapped(model)
    if isinstance(model, Network):
        model, preprocess = _one_model(model, preprocess)
    require_plain(model, "model")
    batch = as_inputs(example)
    rows = {name: value[:ROWS] for name, value in batch.items()}
    points = points_of(model, preprocess, rows, texts_of(rows, length))
    legal = [point.name for point in points if point.legal]
    if legal:
        # The list does not show whether rows are kept apart: check it at the deepest cut.
        check_cut(model, preprocess, rows, legal[-1])
    timed = pace(model, preprocess, batch)
    changed: list[Change] = []
    if original is not None:
        if not isinstance(original, nn.Module):
            raise InvalidArgument(
                f"original must be a torch.nn.Module, got {type(original).__name__}"
            )
        x = example
        if len(batch) == 1:
            (x,) = batch.values()
        changed = changes(original, model, x if preprocess is None else preprocess(x))
    return Inspection(tuple(points), count_of(batch), timed.ms, timed.shares, tuple(changed))


def _one_model(
    network: Network, preprocess: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The one model of a network, and its preprocessing. Raises InvalidArgument for several."""
    if len(network.members) > 1:
        raise InvalidArgument(
            f"inspect lists where one model can be cut, and this network has "
            f"{len(network.members)}. Use print(network) for its topology, and report for its costs"
        )
    member = network.members[0]
    if preprocess is None:
        preprocess = network.preprocess_of(member)
    return network.model_of(member), preprocess


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
