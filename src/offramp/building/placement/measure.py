"""Trying places on a model: what stands there for the labelled rows, and how long everything
takes.
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
from offramp.data.rows import Batch, fingerprint_of, rows
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.dependence import unread_text
from offramp.networks.inputs import State, as_inputs, count_of
from offramp.networks.members import BACKBONE, RESERVED, ModelSpec, values_of
from offramp.networks.nodes import Exit, Seen, grade
from offramp.networks.nodes import answer as logits_of
from offramp.networks.recipe import Pools, pooled_by
from offramp.partition import CutPoint, evenly
from offramp.partition.segmenting import points_of
from offramp.plans.provenance import SeenRows
from offramp.runtime.measuring import interleaved, pace

CANDIDATES = 24
MOST_ROWS = 4000
LEAST_ROWS = 40
BATCH = 64
GRID = "linear_grid"  # what is pooled where the exit itself does not pool


@dataclass(frozen=True)
class Placement:
    """What was chosen: names in order. `candidates` are all candidates, `full` the plain model's
    milliseconds per row.

    mean: the estimated milliseconds per row with the chosen exits. seen: the labelled rows.
    """

    names: tuple[str, ...]
    candidates: tuple[CutCandidate, ...]
    full: float
    mean: float
    seen: SeenRows

    def to_json(self) -> dict[str, Any]:
        """Plain data: every candidate, and the estimated and the plain milliseconds per row."""
        candidates = list[dict[str, Any]]()
        for candidate in self.candidates:
            even = candidate.break_even(self.full)
            candidates.append(
                {
                    "name": candidate.name,
                    "ms": candidate.reach,
                    "exit_ms": candidate.head,
                    "could_leave": candidate.share,
                    "pays_from": even if even <= 1 else None,
                    "chosen": candidate.name in self.names,
                }
            )
        return {"places": candidates, "estimated_ms": self.mean, "plain_ms": self.full}

    def rows(self) -> list[tuple[str, ...]]:
        """Texts of a table: exit after, ms so far, ms of the exit, could leave, pays from,
        chosen.
        """
        rows = list[tuple[str, ...]]()
        for candidate in self.candidates:
            even = candidate.break_even(self.full)
            pays = f"{even:.1%}" if even <= 1 else "never"
            chosen_ = "chosen" if candidate.name in self.names else ""
            rows.append(
                (
                    candidate.name,
                    f"{candidate.reach:.3g}",
                    f"{candidate.head:.3g}",
                    f"{candidate.share:.1%}",
                    pays,
                    chosen_,
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
    """Where at most `most` exits pay, by the rule of this room; one export, one pass over the
    labelled rows, some timing.

    probe: at least 40 labelled rows, of which the first 4,000 or so are used. exits: a name or a
    function, as in `cut`. Raises BadNetwork when no exit pays or no cut is legal, BadData for the
    rows, InvalidArgument for the rest.
    """
    if isinstance(exits, Exit) or not (isinstance(exits, str) or callable(exits)):
        raise InvalidArgument(
            f"got at='auto' and exits={exits!r}, expected a name or a function: one that suits "
            f"any place"
        )
    points = _candidates(points_of(model, preprocess, example, length))
    batches, y, seen = _labelled(labelled)
    device = next(iter(example.values())).device
    probe_pass = _ProbePass(model, preprocess, [point.name for point in points], exits, length)
    given = as_inputs(batches[0].x, device)
    if extra := [name for name in given if name not in example]:
        raise BadData(unread_text(extra, list(given), "the labelled rows"))
    for batch in batches:
        _look_at(probe_pass, as_inputs(batch.x, device))
    own = torch.cat(probe_pass.own).float().cpu().numpy()
    if y.max() >= own.shape[1]:
        raise BadData(
            f"the labelled rows have the label {y.max()}, expected 0 to {own.shape[1] - 1}; give "
            f"data of these classes"
        )
    full, reach, heads = probe_pass.times(given)
    right = own.argmax(1) == y
    candidates = [
        CutCandidate(
            name,
            reach[name],
            heads[name],
            leaving(probed(features, y, own.shape[1]), y[1::2], right[1::2]),
        )
        for name, features in probe_pass.features()
    ]
    best = chosen(candidates, full, most)
    if not best:
        raise _unpaid(candidates, full)
    return Placement(
        tuple(candidate.name for candidate in best),
        tuple(candidates),
        full,
        expected(best, full),
        seen,
    )


class _ProbePass:
    """What a pass over the labelled rows leaves: pooled features and the model's own logits; and
    exits to time.
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
        self.own: list[Tensor] = []
        self.heads: dict[str, Exit] = {}
        self.pools: dict[str, Callable[[Tensor, State], Tensor]] = {}
        self.pooled: dict[str, list[Array]] = {}
        self.why: BadNetwork | None = None

    def add(self, inputs: State) -> None:
        """Look at a batch."""
        with torch.inference_mode():
            with ChannelTracker() as tracker:
                values = values_of(self.model, self.preprocess, self.member, inputs)
            if not self.own:
                self._prepare(values, layouts_of(values, tracker, free=bool(self.member.length)))
            self.own.append(values[BACKBONE])
            for name, pool in self.pools.items():
                self.pooled.setdefault(name, []).append(
                    pool(values[name], inputs).float().cpu().numpy()
                )

    def _prepare(self, values: dict[str, Any], layouts: Mapping[str, str | None]) -> None:
        """An exit for every place that can have one."""
        classes = logits_of(find("exits", "Own")(), Seen(values[BACKBONE], {}), BACKBONE).shape[1]
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
                    pools = isinstance(head, Pools)
                    if pools:
                        stand_in = head
                    else:
                        stand_in = make_exit(GRID, shape, classes, None, layout)
            except BadNetwork as problem:  # an exit that does not suit what stands here
                self.why = problem
                continue
            self.heads[name] = head.to(value.device, value.dtype).eval()
            self.pools[name] = partial(pooled_by, stand_in)
        if not self.heads:
            raise self.why or BadNetwork(
                "no cut of this model stands on numbers, expected features; name the cuts"
            )

    def features(self) -> list[tuple[str, Array]]:
        """Pooled features [N, F] by place, where all are finite."""
        joined = ((name, np.concatenate(parts)) for name, parts in self.pooled.items())
        features = [(name, value) for name, value in joined if np.isfinite(value).all()]
        if not features:
            raise BadData(
                "the features of the labelled rows are not finite at any cut, expected numbers; "
                "check the rows"
            )
        return features

    def times(self, inputs: State) -> tuple[float, dict[str, float], dict[str, float]]:
        """Milliseconds per row: of the plain model, up to each place, and of its exit with a margin
        for a gate.
        """
        timed = pace(self.model, self.preprocess, inputs)
        count = count_of(inputs)
        with torch.inference_mode():
            values = values_of(self.model, self.preprocess, self.member, inputs)
            gate = make_gate("margin")

            def call(name: str) -> Callable[[], object]:
                head = self.heads[name]
                seen = Seen(values[name], {}, None, inputs)
                return lambda: grade(gate, seen, logits_of(head, seen, name))

            each = interleaved({name: call(name) for name in self.heads}, repeats=9, warmup=2)
        ends = [timed.shares.get(name, 1.0) for name in self.heads]
        reach = np.maximum.accumulate(ends) * timed.ms / count
        heads = {name: float(np.median(ms)) / count for name, ms in each.items()}
        return timed.ms / count, dict(zip(self.heads, map(float, reach), strict=True)), heads


def _look_at(probe_pass: _ProbePass, inputs: State) -> None:
    try:
        probe_pass.add(inputs)
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        raise BadData(
            f"the model fails on the labelled rows: {why}; give rows of the example's shape and "
            f"type"
        ) from problem


def _candidates(points: Sequence[CutPoint]) -> list[CutPoint]:
    """Legal cuts in order, one for each place with work before and behind it, and no more than
    CANDIDATES.
    """
    inner = [
        point
        for point in points
        if point.legal and 0 < (point.share or 0) < 1 and "/" not in point.name
    ]
    inner = [point for point in inner if point.name not in (*RESERVED, "y")]
    count = len({point.share for point in inner})
    if not count:
        raise BadNetwork(
            "this model has no legal cut between work, expected at least one; see offramp inspect"
        )
    names = evenly(inner, min(count, CANDIDATES) + 1)
    return [point for point in inner if point.name in names]


def _labelled(labelled: object) -> tuple[list[Batch], Array, SeenRows]:
    """The first labelled rows in batches, their labels, and what they are. Raises BadData."""
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
        raise BadData(
            f"the probe {source.name} has {got}, expected {LEAST_ROWS} labelled rows or more; "
            f"give such"
        )
    digests = np.concatenate([batch.digest for batch in batches])
    return batches, np.concatenate(labels), SeenRows(source.name, fingerprint_of(digests), digests)


def _unpaid(candidates: Sequence[CutCandidate], full: float) -> BadNetwork:
    """The error for a model none of whose exits pays, with the one that came nearest."""
    best = min(candidates, key=lambda candidate: expected([candidate], full))
    return BadNetwork(
        f"no exit pays on these rows: after {best.name!r}, the best place, {best.share:.1%} of "
        f"them could leave, and "
        f"the exit costs as much as it saves at {best.break_even(full):.1%}; name cuts yourself, "
        f"or take a smaller exit"
    )
