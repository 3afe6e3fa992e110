"""The history of a training run, epoch by epoch. It can be written as CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp._support.files import write_csv


@dataclass(frozen=True)
class Epoch:
    """One pass of a phase over the training rows.

    Attributes:
        phase: name of the phase.
        epoch: number of the epoch within the phase, from 0.
        step: optimizer steps of the phase so far.
        seconds: time that the training took.
        rate: the learning rate at the end; None for a solver.
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
        """Read an epoch that `dataclasses.asdict` wrote."""
        rate: float | None = None  # a solver has none
        if body["rate"] is not None:
            rate = float(body["rate"])
        figures = dict[str, float]()
        for name, value in body["figures"].items():
            figures[str(name)] = float(value)
        return Epoch(
            body["phase"],
            int(body["epoch"]),
            int(body["step"]),
            float(body["seconds"]),
            rate,
            figures,
        )

    def flat(self) -> dict[str, Any]:
        """Flatten the epoch into one row of a table. Each figure becomes a column.

        Returns:
            Values by column.
        """
        row = asdict(self)
        del row["figures"]
        return row | dict(self.figures)


@dataclass(frozen=True)
class History:
    """The epochs of a run.

    Attributes:
        epochs: in order.
        notes: sentences about the run, such as which phases read pooled features.
    """

    epochs: tuple[Epoch, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Time of all epochs together, without reading and pooling."""
        return math.fsum(epoch.seconds for epoch in self.epochs)

    @property
    def last(self) -> Epoch:
        """The last epoch."""
        return self.epochs[-1]

    def __str__(self) -> str:
        """The last epoch of each phase, one line per phase."""
        last_epochs = dict[str, Epoch]()
        for epoch in self.epochs:
            last_epochs[epoch.phase] = epoch  # a later epoch of the same phase replaces this one
        lines = list[str]()
        for phase, epoch in last_epochs.items():
            figures = list[str]()
            for name, value in epoch.figures.items():
                figures.append(f"{name} {value:.4g}")
            lines.append(f"{phase}, epoch {epoch.epoch + 1}: {', '.join(figures)}")
        return "\n".join([*lines, *self.notes])

    def save_csv(self, path: str | Path) -> None:
        """Write the history as CSV: one line per epoch, one column per figure.

        Args:
            path: the file. An earlier history there is replaced.
        """
        rows = [epoch.flat() for epoch in self.epochs]
        # Phases differ in their figures. The columns are in the order in which names first appear.
        columns = list[str]()
        for row in rows:
            for name in row:
                if name not in columns:
                    columns.append(name)
        # A phase without a figure has an empty cell.
        cells = list[list[Any]]()
        for row in rows:
            cells.append([row.get(name) for name in columns])
        write_csv(path, columns, cells, what="history of a run")
