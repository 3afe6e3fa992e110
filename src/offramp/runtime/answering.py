"""Answers for all rows of a data set as columns, one value per row. `offramp run` prints and writes
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp._support.arguments import require_path
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
        plan: the plan.
        exits: names, shallow to deep.
        columns: row, answer, exit, why and flagged, one value per row; and label if the data has
            labels.
        seconds: the network took for all rows.
    """

    plan: Plan
    exits: tuple[str, ...]
    columns: Mapping[str, Array]
    seconds: float

    def __len__(self) -> int:
        return len(self.columns["row"])

    def shares(self) -> dict[str, float]:
        """The share of rows that left at each exit, by name."""
        return {name: float((self.columns["exit"] == name).mean()) for name in self.exits}

    def reasons(self) -> dict[str, int]:
        """How many rows left for each reason (gate, end, deadline, ...)."""
        names, counts = np.unique(self.columns["why"], return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def accuracy(self) -> float | None:
        """The share of right answers, 0 to 1; None without labels."""
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
        """Write the columns, except the labels, as .npz or .csv. Raises BadFile."""
        path = require_path("path", path)
        if path.suffix == ".npz":
            arrays = {name: self.columns[name] for name in COLUMNS}
            write_arrays(path, to_document("answers", 1, {"plan": str(self.plan)}), arrays)
            return
        columns = [self.columns[name].tolist() for name in COLUMNS]
        lines = zip(*columns, strict=True)  # one tuple per row
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
        deadline_ms: milliseconds for each batch. A segment does not start if it would end later.
            Answers cut short by a deadline have no promise.
        engine: as for `open`.
        progress: whether to draw a bar.

    Returns:
        The answers of all rows, in the order of the data.

    Raises:
        BadData: the rows do not fit.
        Mismatch: the plan belongs to another network or engine.
    """
    source = rows_for(network, data)
    with proposing(network.fronts.values()):
        # Rows to open with: an engine compiles for them, and a deadline needs their times.
        example = None
        if deadline_ms is not None or (engine != "torch" and not source.one_pass):
            example = next(source.batches(batch_size)).x
        timing_rows = None if deadline_ms is None else example
        runner = open(network, plan, engine=engine, timing_rows=timing_rows, example=example)
        columns, seconds = _columns(runner, source, batch_size, deadline_ms, progress)
    return AnsweredRows(plan, runner.topology.exits, columns, seconds)


def _columns(
    runner: Runner, source: Rows, size: int, deadline_ms: float | None, progress: bool
) -> tuple[dict[str, Array], float]:
    """Columns over all rows, and the seconds that the network took for them."""
    total = None  # batches, for the bar
    if source.length is not None:
        total = math.ceil(source.length / size)
    chunks = dict[str, list[Array]]()
    seconds = 0.0
    for batch in track(source.batches(size), what="running", total=total, show=progress):
        start = time.perf_counter()
        outputs = runner(batch.x, deadline_ms=deadline_ms)
        seconds += time.perf_counter() - start
        names = np.array(outputs.exits)
        columns = {
            "row": batch.row,
            "answer": outputs.logits.argmax(1).cpu().numpy(),  # [B, C] -> [B]
            "exit": names[outputs.exit.cpu().numpy()],
            "why": np.array(outputs.reasons()),
            "flagged": outputs.flagged.cpu().numpy(),
        }
        if batch.y is not None:
            columns["label"] = batch.y
        for name, values in columns.items():
            chunks.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in chunks.items()}, seconds
