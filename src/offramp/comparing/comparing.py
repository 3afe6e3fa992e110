"""`compare`: every method, seed and gate of a settings file, each network made once; then the page and the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.comparing.cells import Cell
from offramp.comparing.figures import Figures
from offramp.comparing.settings import Settings, read_settings
from offramp.files import require_writable


@dataclass(frozen=True)
class Result:
    """One network under one gate. seconds: of teaching; timed: lines of `bench`, where they were asked for."""

    method: str
    seed: int
    gate: str
    static: bool
    figures: Figures
    seconds: float | None
    timed: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        """The method, and the gate where it is not the network's own."""
        return self.method if self.gate == "own" else f"{self.method}, {self.gate}"


@dataclass(frozen=True)
class Comparison:
    """All results. unit: MACs of the plain network that costs are told in shares of."""

    settings: Settings
    unit: float
    results: tuple[Result, ...]

    def labels(self, *, static: bool = False) -> list[str]:
        """What is compared, in the order of the file: methods, each under its gates."""
        return list(dict.fromkeys(result.label for result in self.results if result.static == static))

    def of(self, label: str) -> list[Result]:
        """The results of a label, one per seed."""
        return [result for result in self.results if result.label == label]


def compare(
    file: str | Path, folder: str | Path, *, say: Callable[[str], None] = print, progress: bool = True
) -> Comparison:
    """Teach, record, calibrate and measure what a file asks for; what lies in the folder already is not made again.

    say: told what begins, a line each. A run that was stopped goes on where it was, in the middle of teaching too.
    Raises BadInput and UnknownName for the file (before anything is taught), and what cut, fit, record and bench raise.
    """
    settings, home = read_settings(file), Path(folder)
    require_writable(home, folder=True)
    cells = [Cell(method, seed, settings, home, progress) for method in settings.methods for seed in method.seeds]
    for cell in cells:
        cell.claim()
    for number, cell in enumerate(cells, 1):
        if not cell.done:
            say(f"{number}/{len(cells)} {cell.method.name}, seed {cell.seed}")
        cell.make()
    unit = _unit(cells)
    return Comparison(settings, unit, tuple(result for cell in cells for result in _results(cell, unit)))


def _unit(cells: list[Cell]) -> float:
    """MACs of the plain network of the first method that is cut."""
    first = next(cell for cell in cells if not cell.method.static and not cell.method.rungs)
    return first.plain()


def _results(cell: Cell, unit: float) -> list[Result]:
    method = cell.method
    return [
        Result(
            method.name, cell.seed, gate, method.static, cell.figures(gate, unit), cell.seconds, cell.timed(gate, unit)
        )
        for gate in (("own",) if method.static else method.gates)
    ]
