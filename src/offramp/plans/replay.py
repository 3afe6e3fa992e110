"""What a plan does to recorded rows: which stages they visit, and where they leave.

`Trace.replay` uses it. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from offramp.plans.columns import Array
from offramp.plans.plan import choose
from offramp.plans.schedule import Schedule, Stage
from offramp.plans.topology import LEAVE, Topology
from offramp.plans.topology import Path as Passed

WHY = ("gate", "end", "deepest", "deadline", "unavailable")


@dataclass(frozen=True)
class Replay:
    """What a plan does to the rows of a trace.

    Attributes:
        exit: the exit that answers [N], an index into the topology's `exits`.
        answer: the predicted class [N].
        why: why the row left there [N], an index into `WHY`.
        ran: bool [N, stages], which stages of the schedule ran for each row.
        output: the recorded answer [N], an index into the topology's `exit_labels`. In a chain it
            is the same as `exit`.
        schedule: the stages that the plan runs.
    """

    exit: Array
    answer: Array
    why: Array
    ran: Array
    output: Array
    schedule: Schedule

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Replay of {len(self.exit):,} rows through {self.ran.shape[1]} stages>"


@dataclass(frozen=True)
class Visit:
    """Rows that arrive at a stage on the same path.

    Attributes:
        number: of the stage.
        stage: the stage.
        label: the name of the stage among the columns of this path.
        rows: row numbers [n].
        scores: float32 [n, K - 1] of a stage that decides; None otherwise.
        chosen: the index [n] of the edge that each row takes.
    """

    number: int
    stage: Stage
    label: str
    rows: Array
    scores: Array | None
    chosen: Array


def visits_of(
    topology: Topology, columns: Mapping[str, Array], count: int, schedule: Schedule
) -> Iterator[Visit]:
    """Follow the rows of the trace through a schedule.

    Args:
        topology: of the network.
        columns: of the trace.
        count: N, the number of rows.
        schedule: the stages of a plan for this network.

    Yields:
        The rows that arrive at a stage, each stage in turn, once for every path to it.
    """
    # For each stage that has not run yet: the rows that wait for it, with the path they came
    # on.
    waiting: dict[str, list[tuple[Passed, Array]]] = {stage.name: [] for stage in schedule}
    first = schedule.stages[0].name
    waiting[first].append(((*schedule.skipped, first), np.arange(count)))
    for number, stage in enumerate(schedule):
        thresholds = np.asarray(stage.thresholds, np.float32)
        for path, rows in waiting.pop(stage.name):
            if topology.is_chain:
                label = stage.name
            else:
                label = topology.label(path)
            scores: Array | None = None
            chosen: Array = np.zeros(len(rows), np.int64)
            if stage.gate:
                scores = _scores_at(topology, columns, stage, label, rows)
                chosen = choose(scores, thresholds)
            yield Visit(number, stage, label, rows, scores, chosen)
            # Hand the rows on to the stages that their edges lead to.
            for index, edge in enumerate(stage.edges):
                if edge.to == LEAVE:
                    continue
                followers = rows
                if stage.gate:
                    followers = rows[chosen == index]
                if len(followers):
                    waiting[edge.to].append(((*path, *edge.via, edge.to), followers))


def _scores_at(
    topology: Topology, columns: Mapping[str, Array], stage: Stage, label: str, rows: Array
) -> Array:
    """Scores [n, routes] of some rows at a stage that decides."""
    names = topology.score_columns(label)
    scores = [columns[names[route]][rows] for route in stage.routes]
    return np.column_stack(scores)
