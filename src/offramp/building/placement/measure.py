"""Try exits at all candidate cuts of a model: the features of the labelled rows there, and the
times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.find import find
from offramp.building.factories import make_exit, make_gate
from offramp.building.placement.select import Array, CutCandidate, chosen, expected, leaving, probed
from offramp.building.routing import reason_of
from offramp.data.rows import Batch, fingerprint_of, rows
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.dependence import unread_text
from offramp.networks.inputs import State, as_inputs, count_of
from offramp.networks.members import BACKBONE, RESERVED, ModelSpec, values_of
from offramp.networks.nodes import Exit, Gate, Seen, grade
from offramp.networks.nodes import answer as logits_of
from offramp.networks.recipe import Pools, pooled_by
from offramp.partition import CutPoint, evenly
from offramp.partition.segmenting import points_of
from offramp.plans.provenance import SeenRows
from offramp.runtime.measuring import interleaved, pace

CANDIDATES = 24  # the most cuts that are tried
MOST_ROWS = 4000  # about as many labelled rows are used
LEAST_ROWS = 40
BATCH = 64
GRID = "linear_grid"  # pools the features if the exit itself does not pool


@dataclass(frozen=True)
class Placement:
    """The chosen cuts, and the measurements of all candidates.

    Attributes:
        names: the chosen cuts, in order.
        candidates: all candidates, in order.
        full: milliseconds per row of the plain model.
        mean: the estimated milliseconds per row with the chosen exits.
        seen: the labelled rows.
    """

    names: tuple[str, ...]
    candidates: tuple[CutCandidate, ...]
    full: float
    mean: float
    seen: SeenRows

    def to_json(self) -> dict[str, Any]:
        """The placement as plain data: every candidate, and the estimated and the plain
        milliseconds per row.
        """
        candidates = list[dict[str, Any]]()
        for candidate in self.candidates:
            break_even = candidate.break_even(self.full)
            candidates.append(
                {
                    "name": candidate.name,
                    "ms": candidate.reach,
                    "exit_ms": candidate.head,
                    "could_leave": candidate.share,
                    "pays_from": break_even if break_even <= 1 else None,
                    "chosen": candidate.name in self.names,
                }
            )
        return {"places": candidates, "estimated_ms": self.mean, "plain_ms": self.full}

    def rows(self) -> list[tuple[str, ...]]:
        """The texts of a table, one row per candidate.

        Returns:
            Name, milliseconds so far, milliseconds of the exit, share that could leave, share from
            which the exit pays, and "chosen" or "".
        """
        rows = list[tuple[str, ...]]()
        for candidate in self.candidates:
            break_even = candidate.break_even(self.full)
            pays_from = f"{break_even:.1%}" if break_even <= 1 else "never"
            mark = "chosen" if candidate.name in self.names else ""
            rows.append(
                (
                    candidate.name,
                    f"{candidate.reach:.3g}",
                    f"{candidate.head:.3g}",
                    f"{candidate.share:.1%}",
                    pays_from,
                    mark,
                )
            )
        return rows

    def __str__(self) -> str:
        return (
            f"estimated ms per row {self.mean:.3g}, without exits {self.full:.3g}; measured "
            "once on this machine"
        )


def placed(
    model: nn.Module,
    preprocess: nn.Module | None,
    example: State,
    labelled: object,
    *,
    exits: object = GRID,
    length: Sequence[str] = (),
    most: int | None = None,
) -> Placement:
    """Choose the cuts where exits pay, by the rule of this package. It exports the model once, runs
    the labelled rows once, and times the exits.

    Args:
        model: the model.
        preprocess: its preprocessing; None if there is none.
        example: the inputs of a batch by name.
        labelled: at least 40 labelled rows, of which about the first 4,000 are used.
        exits: a name or a function, as in `cut`.
        length: as in `cut`.
        most: the largest number of exits; None if there is no limit.

    Returns:
        The chosen cuts and the measurements.

    Raises:
        BadNetwork: no exit pays, or no cut is legal.
        BadData: the rows do not fit.
        InvalidArgument: exits is neither a name nor a function.
    """
    if isinstance(exits, Exit) or not (isinstance(exits, str) or callable(exits)):
        raise InvalidArgument(
            f"exits must be a name or a function for at='auto', got {exits!r}: it must suit any cut"
        )
    points = _candidates(points_of(model, preprocess, example, length))
    batches, y, seen = _labelled(labelled)
    device = next(iter(example.values())).device

    # Run all labelled rows: the features at every cut, and the model's own logits.
    names = [point.name for point in points]
    probe_pass = _ProbePass(model, preprocess, names, exits, length)
    first_batch = as_inputs(batches[0].x, device)
    extra = [name for name in first_batch if name not in example]
    if extra:
        raise BadData(unread_text(extra, list(first_batch), "the labelled rows"))
    for batch in batches:
        _add_batch(probe_pass, as_inputs(batch.x, device))
    logits = torch.cat(probe_pass.logits).float().cpu().numpy()  # [N, C]
    classes = logits.shape[1]
    if y.max() >= classes:
        raise BadData(
            f"the labels of the labelled rows must be between 0 and {classes - 1}, got {y.max()}"
        )

    # Time everything, and estimate which held-out rows could leave at each cut.
    full, reach, heads = probe_pass.times(first_batch)
    right = logits.argmax(1) == y  # [N, C] -> [N]
    candidates = list[CutCandidate]()
    for name, features in probe_pass.features():
        scores = probed(features, y, classes)  # [H, C]
        leaves = leaving(scores, y[1::2], right[1::2])  # [H]
        candidates.append(CutCandidate(name, reach[name], heads[name], leaves))
    best = chosen(candidates, full, most)
    if not best:
        raise _unpaid(candidates, full)
    best_names = tuple(candidate.name for candidate in best)
    return Placement(best_names, tuple(candidates), full, expected(best, full), seen)


class _ProbePass:
    """One pass over the labelled rows. It collects pooled features and the model's own logits, and
    makes exits to time.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: nn.Module | None,
        names: Sequence[str],
        kind: object,
        length: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.preprocess = preprocess
        self.kind = kind
        self.member = ModelSpec(BACKBONE, cuts=tuple(names), length=tuple(length))
        self.logits: list[Tensor] = []  # of the model itself, by batch
        self.heads: dict[str, Exit] = {}
        self.pools: dict[str, Callable[[Tensor, State], Tensor]] = {}
        self.pooled: dict[str, list[Array]] = {}  # by cut and batch, [b, F]
        self.problem: BadNetwork | None = None  # why the last cut without an exit has none

    def add(self, inputs: State) -> None:
        """Run a batch."""
        with torch.inference_mode():
            with ChannelTracker() as tracker:
                values = values_of(self.model, self.preprocess, self.member, inputs)
            if not self.logits:  # the first batch shows the shapes
                self._prepare(values, layouts_of(values, tracker, free=bool(self.member.length)))
            self.logits.append(values[BACKBONE])
            for name, pool in self.pools.items():
                features = pool(values[name], inputs).float().cpu().numpy()
                self.pooled.setdefault(name, []).append(features)

    def _prepare(self, values: dict[str, Any], layouts: Mapping[str, str | None]) -> None:
        """Make an exit at every cut that can have one."""
        own_exit = find("exits", "Own")()
        classes = logits_of(own_exit, Seen(values[BACKBONE], {}), BACKBONE).shape[1]
        kind: Any = self.kind
        for name in self.member.cuts:
            value = values[name]
            if not value.is_floating_point():
                continue
            try:
                with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                    shape = tuple(value.shape[1:])
                    layout = layouts.get(name)
                    head = make_exit(kind, shape, classes, (), layout)
                    pooling_exit = head
                    if not isinstance(head, Pools):
                        pooling_exit = make_exit(GRID, shape, classes, None, layout)
            except BadNetwork as problem:  # the exit cannot read these features
                self.problem = problem
                continue
            self.heads[name] = head.to(value.device, value.dtype).eval()
            self.pools[name] = partial(pooled_by, pooling_exit)
        if not self.heads:
            raise self.problem or BadNetwork(
                "no cut of this model carries floating-point features. Name the cuts yourself"
            )

    def features(self) -> list[tuple[str, Array]]:
        """Pooled features [N, F] by cut, for the cuts where all are finite."""
        features = list[tuple[str, Array]]()
        for name, batches in self.pooled.items():
            joined = np.concatenate(batches)
            if np.isfinite(joined).all():
                features.append((name, joined))
        if not features:
            raise BadData(
                "the features of the labelled rows must be finite, got NaN or infinity at every cut"
            )
        return features

    def times(self, inputs: State) -> tuple[float, dict[str, float], dict[str, float]]:
        """Milliseconds per row.

        Args:
            inputs: of one batch.

        Returns:
            The time of the plain model, the time up to each cut, and the time of each exit with a
            margin as its gate.
        """
        timed = pace(self.model, self.preprocess, inputs)
        count = count_of(inputs)
        calls = dict[str, Callable[[], object]]()
        with torch.inference_mode():
            values = values_of(self.model, self.preprocess, self.member, inputs)
            gate = make_gate("margin")
            for name, head in self.heads.items():
                seen = Seen(values[name], {}, None, inputs)
                calls[name] = partial(_answer_and_score, gate, head, seen, name)
            samples = interleaved(calls, repeats=9, warmup=2)
        # Modules end at growing times; the maximum evens out noise.
        shares = [timed.shares.get(name, 1.0) for name in self.heads]
        ends = np.maximum.accumulate(shares) * timed.ms / count
        reach = dict[str, float]()
        heads = dict[str, float]()
        for name, end in zip(self.heads, ends, strict=True):
            reach[name] = float(end)
            heads[name] = float(np.median(samples[name])) / count
        return timed.ms / count, reach, heads


def _answer_and_score(gate: Gate, head: Exit, seen: Seen, name: str) -> object:
    """One run of an exit and its gate."""
    return grade(gate, seen, logits_of(head, seen, name))


def _add_batch(probe_pass: _ProbePass, inputs: State) -> None:
    """Run a batch. Raises BadData if the model fails on it."""
    try:
        probe_pass.add(inputs)
    except OfframpError:
        raise
    except Exception as problem:  # the user's code can raise anything
        raise BadData(
            f"the model fails on the labelled rows: {reason_of(problem)}. Use rows of the "
            f"example's shape and type"
        ) from problem


def _candidates(points: Sequence[CutPoint]) -> list[CutPoint]:
    """The legal cuts in order, one for each place with work before and behind it, and at most
    CANDIDATES of them.
    """
    inner = list[CutPoint]()
    for point in points:
        can_name_a_node = point.name not in (*RESERVED, "y") and "/" not in point.name
        if point.legal and 0 < (point.share or 0) < 1 and can_name_a_node:
            inner.append(point)
    places = len({point.share for point in inner})  # cuts at one place have the same share
    if not places:
        raise BadNetwork(
            "this model has no legal cut with work before and behind it (see offramp inspect)"
        )
    names = evenly(inner, min(places, CANDIDATES) + 1)
    return [point for point in inner if point.name in names]


def _labelled(labelled: object) -> tuple[list[Batch], Array, SeenRows]:
    """The first labelled rows: batches, labels [N], and digests. Raises BadData."""
    source = rows(labelled)
    batches = list[Batch]()
    count = 0
    for batch in source.batches(BATCH):
        batches.append(batch)
        count += len(batch)
        if count >= MOST_ROWS:
            break
    labels = [batch.y for batch in batches if batch.y is not None]
    if not labels or count < LEAST_ROWS:
        got = f"{count} rows" if labels else "no labels"
        raise BadData(f"{source.name} must have at least {LEAST_ROWS} labelled rows, got {got}")
    digests = np.concatenate([batch.digest for batch in batches])
    return batches, np.concatenate(labels), SeenRows(source.name, fingerprint_of(digests), digests)


def _unpaid(candidates: Sequence[CutCandidate], full: float) -> BadNetwork:
    """The error for a model without an exit that pays; it names the best one."""
    best = min(candidates, key=lambda candidate: expected([candidate], full))
    return BadNetwork(
        f"no exit pays on these rows: after {best.name!r}, the best place, {best.share:.1%} of "
        f"them could leave, and the exit costs as much as it saves at "
        f"{best.break_even(full):.1%}. Name cuts yourself, or use a smaller exit"
    )
