"""Answers for all rows of a data set, batch by batch, as columns: what `offramp run` prints and
writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp._support.files import document_mark, to_document, write_arrays, write_csv
from offramp._support.progress import track
from offramp.data.rows import Rows, proposing, rows_for
from offramp.networks.network import Network
from offramp.plans.plan import Plan
from offramp.runtime.running import Runner
from offramp.runtime.session import open

COLUMNS = ("row", "answer", "exit", "why", "flagged")
MARKS = {
    ".npz": (document_mark("answers"), "answers"),
    ".csv": (",".join(COLUMNS[:3]).encode(), "table of answers"),
}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class AnsweredRows:
    """The answers for rows under a plan.

    Attributes:
        plan: under which they were given.
        exits: names, shallow to deep.
        columns: row, answer, exit, why and flagged, one value per row, and label where there are
            any.
        seconds: that the network took for all of them.
    """

    plan: Plan
    exits: tuple[str, ...]
    columns: Mapping[str, Array]
    seconds: float

    def __len__(self) -> int:
        return len(self.columns["row"])

    def shares(self) -> dict[str, float]:
        """By exit the share of rows that left there."""
        return {name: float((self.columns["exit"] == name).mean()) for name in self.exits}

    def reasons(self) -> dict[str, int]:
        """By reason (gate, end, deadline, ...) how many rows left for it."""
        why = self.columns["why"]
        return {reason: int((why == reason).sum()) for reason in sorted(set(why.tolist()))}

    def accuracy(self) -> float | None:
        """The share of right answers; None without labels."""
        label = self.columns.get("label")
        if label is None:
            return None
        return float((self.columns["answer"] == label).mean())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "rows": len(self),
            "shares": self.shares(),
            "why": self.reasons(),
            "flagged": int(self.columns["flagged"].sum()),
            "accuracy": self.accuracy(),
            "seconds": self.seconds,
            "rows_per_second": len(self) / self.seconds,
        }

    def save(self, path: str | Path) -> None:
        """Write the columns but the label as .npz or .csv. Raises BadFile."""
        if Path(path).suffix == ".npz":
            arrays = {name: self.columns[name] for name in COLUMNS}
            write_arrays(path, to_document("answers", 1, {"plan": str(self.plan)}), arrays)
            return
        lines = zip(*(self.columns[name].tolist() for name in COLUMNS), strict=True)
        write_csv(path, COLUMNS, lines, what="table of answers")


def answer_rows(
    network: Network,
    plan: Plan,
    data: object,
    *,
    batch_size: int = 64,
    deadline_ms: float | None = None,
    engine: str = "torch",
    progress: bool = True,
) -> AnsweredRows:
    """Answer all rows of some data under a plan.

    Args:
        network: in eval mode.
        plan: from `calibrate`, or set by hand.
        data: rows, as for `record`.
        batch_size: rows that run together.
        deadline_ms: no segment starts that would end later than this after its batch began; such
            answers carry no promise.
        engine: as for `open`.
        progress: whether to draw a bar.

    Returns:
        The answers of all rows in their order.

    Raises:
        BadData: the rows do not fit.
        Mismatch: the plan belongs to another network or engine.
    """
    source = rows_for(network, data)
    with proposing(network.fronts.values()):
        example = None  # rows, where an engine compiles for them or a deadline needs times
        if deadline_ms is not None or (engine != "torch" and not source.one_pass):
            example = next(source.batches(batch_size)).x
        timed = None if deadline_ms is None else example
        runner = open(network, plan, engine=engine, timing_rows=timed, example=example)
        columns, seconds = _columns(runner, source, batch_size, deadline_ms, progress)
    return AnsweredRows(plan, runner.topology.exits, columns, seconds)


def _columns(
    runner: Runner, source: Rows, size: int, deadline_ms: float | None, progress: bool
) -> tuple[dict[str, Array], float]:
    """Columns over all rows, and the seconds that the network took for them."""
    total = None if source.length is None else -(-source.length // size)
    chunks = list[dict[str, Array]]()
    seconds = 0.0
    for batch in track(source.batches(size), what="running", total=total, show=progress):
        start = time.perf_counter()
        got = runner(batch.x, deadline_ms=deadline_ms)
        seconds += time.perf_counter() - start
        names = np.array(got.exits)
        chunk = {
            "row": batch.row,
            "answer": got.logits.argmax(1).cpu().numpy(),
            "exit": names[got.exit.cpu().numpy()],
            "why": np.array(got.reasons()),
            "flagged": got.flagged.cpu().numpy(),
        }
        if batch.y is not None:
            chunk["label"] = batch.y
        chunks.append(chunk)
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}, seconds
