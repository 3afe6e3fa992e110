"""What happened while a network was trained, epoch by epoch; also as CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp._support.files import write_csv


@dataclass(frozen=True)
class Epoch:
    """One pass of a phase. step: optimizer steps of the phase so far; rate: the learning rate at
    its end.

    figures: mean losses by name ("loss" is their sum), `accuracy/<exit>` on development rows,
    `gap/<exit>` of solvers.
    """

    phase: str
    epoch: int
    step: int
    seconds: float
    rate: float | None
    figures: Mapping[str, float]

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Epoch:
        """The epoch written by `dataclasses.asdict`."""
        rate = None if body["rate"] is None else float(body["rate"])
        figures = {str(name): float(value) for name, value in body["figures"].items()}
        return Epoch(
            body["phase"],
            int(body["epoch"]),
            int(body["step"]),
            float(body["seconds"]),
            rate,
            figures,
        )

    def flat(self) -> dict[str, Any]:
        """One row of a table."""
        row = asdict(self)
        return {
            **{name: row[name] for name in ("phase", "epoch", "step", "seconds", "rate")},
            **self.figures,
        }


@dataclass(frozen=True)
class History:
    """The epochs of a run, in order, and what it says about itself (`notes`)."""

    epochs: tuple[Epoch, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """All epochs together, without reading and pooling."""
        return math.fsum(epoch.seconds for epoch in self.epochs)

    @property
    def last(self) -> Epoch:
        """The last epoch."""
        return self.epochs[-1]

    def __str__(self) -> str:
        """The last epoch of each phase, a line each."""
        last = {epoch.phase: epoch for epoch in self.epochs}
        lines = [
            f"{epoch.phase}, epoch {epoch.epoch + 1}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in epoch.figures.items())
            for epoch in last.values()
        ]
        return "\n".join([*lines, *self.notes])

    def save_csv(self, path: str | Path) -> None:
        """One line per epoch, one column per figure."""
        rows = [epoch.flat() for epoch in self.epochs]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name) for name in columns] for row in rows]
        write_csv(path, columns, cells, what="history of a run")
