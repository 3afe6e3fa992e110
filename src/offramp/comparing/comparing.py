"""`measure`: every method, seed and gate of a settings file, each network made once, then
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp._support.files import require_writable
from offramp.comparing.cells import Cell
from offramp.comparing.checking import require_apart, require_known, require_lengths, require_models
from offramp.comparing.figures import Figures
from offramp.comparing.reading import read_settings
from offramp.comparing.settings import OWN, Method, Settings

FAR = 0.05  # of accuracy


@dataclass(frozen=True)
class Result:
    """One network under one gate. seconds: of training; timed: what `bench` says, where it was
    asked for.
    """

    method: str
    seed: int
    gate: str
    static: bool
    figures: Figures
    seconds: float | None = None
    timed: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """The method, and the gate where it is not the network's own."""
        return self.method if self.gate == OWN else f"{self.method}, {self.gate}"


@dataclass(frozen=True)
class Comparison:
    """All results.

    Attributes:
        settings: what was asked for.
        unit: MACs per row of the plain network that costs are told in shares of.
        results: of every method, seed and gate.
        files: what was written.
    """

    settings: Settings
    unit: float
    results: tuple[Result, ...]
    files: tuple[Path, ...] = ()

    def written(self, files: Sequence[Path]) -> Comparison:
        """The same, with the files that tell it."""
        return replace(self, files=tuple(files))

    def mean_accuracies(self) -> dict[str, list[float | None]]:
        """By label and budget the mean accuracy over seeds; None where no seed has a plan within
        the budget.
        """
        found = dict[str, list[float | None]]()
        for label in self.labels():
            found[label] = [
                sum(values) / len(values) if values else None for values in self.within(label)
            ]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data: files, the unit of cost, budgets and mean accuracies."""
        files = [str(file) for file in self.files]
        budgets = list(self.settings.budgets)
        return {
            "files": files,
            "unit_macs": self.unit,
            "budgets": budgets,
            "accuracy": self.mean_accuracies(),
        }

    def labels(self, *, static: bool = False) -> list[str]:
        """What is compared, in the order of the file: methods, each under its gates."""
        return list(
            dict.fromkeys(result.label for result in self.results if result.static == static)
        )

    def leading(self) -> list[str]:
        """The labels of each method under its first gate, static networks left out."""
        firsts = {method.name: method.gates[0] for method in self.settings.methods}
        own = (
            result
            for result in self.results
            if not result.static and result.gate == firsts[result.method]
        )
        return list(dict.fromkeys(result.label for result in own))

    def of(self, label: str) -> list[Result]:
        """The results of a label, one per seed, in the order of the file."""
        return [result for result in self.results if result.label == label]

    def within(self, label: str) -> list[list[float]]:
        """For each budget the accuracies on test rows by seed, of the seeds that have a plan within
        it.
        """
        budgets = [result.figures.budgets for result in self.of(label)]
        return [
            [each.point.accuracy for each in column if each.point is not None]
            for column in zip(*budgets, strict=True)
        ]

    def doubts(self) -> list[str]:
        """A sentence for each method whose last exit is far worse than an earlier one: its cost is
        no measure then.
        """
        doubts = []
        for label in self.leading():
            figures = self.of(label)[0].figures
            *earlier, last = figures.alone
            if earlier and last < max(earlier) - FAR:
                best = figures.exits[earlier.index(max(earlier))]
                doubts.append(
                    f"{label}: the last exit answers {last:.1%} of the test rows right and {best} "
                    f"{max(earlier):.1%}; "
                    "was its model ever trained? name its weights, or a recipe that trains it too"
                )
        return doubts


def measure(
    file: str | Path,
    folder: str | Path,
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Comparison:
    """Train, record, calibrate and measure what a file asks for; what lies in the folder already is
    not made again.

    say: told what begins, a line each. A run that was stopped goes on where it was, in the middle
    of training too. Before anything is trained it raises BadFile, InvalidArgument and UnknownName
    for the file, InvalidArgument for a folder in which a network of the same name was made
    otherwise, and OverlappingRows for rows in two roles; later what cut, fit, record and bench
    raise.
    """
    settings = read_settings(file)
    home = Path(folder)
    require_writable(home, folder=True)
    require_known(settings)
    cells = [
        Cell(method, seed, settings, home, progress)
        for method in settings.methods
        for seed in method.seeds
    ]
    _require_all(cells, settings, progress=progress)
    say(_opening(cells, home))
    unit = _unit(cells, say)
    results = [
        result
        for number, cell in enumerate(cells)
        for result in _results(cell, unit, _told(say, number, cells))
    ]
    return Comparison(settings, unit, tuple(results))


def _opening(cells: list[Cell], home: Path) -> str:
    """How much there is to do, and what is there already."""
    seeds = {len(cell.method.seeds) for cell in cells}
    each = f"{seeds.pop()} seeds each" if len(seeds) == 1 else "seeds as the file says"
    methods = len({cell.method.name for cell in cells})
    done = sum(cell.done for cell in cells)
    said = f"{methods} methods, {each}: {len(cells)} networks"
    if done:
        return f"{said}, of which {done} are in {home} already and are kept"
    return said


def _require_all(cells: list[Cell], settings: Settings, *, progress: bool) -> None:
    """Refuse what cannot be made, or would not be apart, before the first of it is made."""
    left = list(dict.fromkeys(cell.method for cell in cells if not cell.done))
    require_models(left)
    require_lengths(settings, left)
    if left:
        require_apart(settings, _involved(settings, left), progress=progress)
    for cell in cells:
        cell.claim()


def _involved(settings: Settings, methods: Sequence[Method]) -> list[Method]:
    """Methods, and those that they start from or stack."""
    found = list(methods)
    for method in found:  # grows meanwhile
        for name in (*method.members, *filter(None, [method.start])):
            if (other := settings.method(name)) not in found:
                found.append(other)
    return found


def _told(say: Callable[[str], None], number: int, cells: list[Cell]) -> Callable[[str], None]:
    cell = cells[number]
    return lambda what: say(
        f"{number + 1}/{len(cells)} {cell.method.name}, seed {cell.seed}: {what}"
    )


def _unit(cells: list[Cell], say: Callable[[str], None]) -> float:
    """MACs of the plain network of the first method that is cut, which is made first if it has to
    be.
    """
    first = next(cell for cell in cells if not cell.method.static and not cell.method.members)
    if not first.done:
        _told(say, cells.index(first), cells)(_step(first))
    made = replace(first)
    made.make()
    return made.plain()


def _step(cell: Cell) -> str:
    return "training and recording" if cell.method.trained else "recording"


def _results(cell: Cell, unit: float, say: Callable[[str], None]) -> list[Result]:
    """A network, made and measured under all its gates."""
    cell = replace(cell)  # a copy: the network that it holds goes with it
    if not cell.done:
        say(_step(cell))
    cell.make()
    method = cell.method
    results = []
    for gate in method.scores:
        if cell.kept_figures(gate, unit) is None:
            say(f"figures under {'its own gate' if gate == OWN else gate}")
        figures = cell.figures(gate, unit)
        timed = cell.timed(unit) if gate == method.gates[0] else None
        results.append(
            Result(method.name, cell.seed, gate, method.static, figures, cell.seconds, timed)
        )
    return results
