"""`measure` runs every method, seed and gate of a settings file.

Each network is trained and recorded once, then measured under all its gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp._support.arguments import require_path
from offramp._support.files import require_writable
from offramp.comparing.cells import Cell
from offramp.comparing.checking import require_apart, require_known, require_lengths, require_models
from offramp.comparing.costing import ModelCost
from offramp.comparing.figures import Figures
from offramp.comparing.reading import read_settings
from offramp.comparing.settings import OWN, Method, Settings

FAR = 0.05  # accuracy that the last exit may be below an earlier one before the page warns


@dataclass(frozen=True)
class Result:
    """One network under one gate.

    Attributes:
        method: name of the method in the settings file.
        seed: seed of its training.
        gate: name of the gate, or `OWN` for the gate of the network itself.
        static: True for a network without exits.
        figures: costs and accuracies on the test rows.
        seconds: of training; None if nothing was trained.
        timed: the report of `bench`; None if it was not asked for.
        cost: of its model; None for ladders, later seeds and other gates than the first.
    """

    method: str
    seed: int
    gate: str
    static: bool
    figures: Figures
    seconds: float | None = None
    timed: Mapping[str, Any] | None = None
    cost: ModelCost | None = None

    @property
    def label(self) -> str:
        """The method, followed by the gate if it is not the network's own."""
        if self.gate == OWN:
            return self.method
        return f"{self.method}, {self.gate}"


@dataclass(frozen=True)
class Comparison:
    """All results of a settings file.

    Attributes:
        settings: the settings that were read.
        unit: MACs per row of the plain network; costs are reported as shares of it.
        results: one for every method, seed and gate.
        files: paths of the written files.
    """

    settings: Settings
    unit: float
    results: tuple[Result, ...]
    files: tuple[Path, ...] = ()

    def written(self, files: Sequence[Path]) -> Comparison:
        """The same comparison with the paths of the files written for it."""
        return replace(self, files=tuple(files))

    def mean_accuracies(self) -> dict[str, list[float | None]]:
        """The mean accuracy over seeds by label, one per budget.

        Returns:
            By label a list in the order of the budgets; None where no seed has a plan within the
            budget.
        """
        means: dict[str, list[float | None]] = {}
        for label in self.labels():
            means[label] = list(map(_mean, self.within(label)))
        return means

    def to_json(self) -> dict[str, Any]:
        """The files, the unit of cost, the budgets and the mean accuracies as plain data."""
        files = [str(file) for file in self.files]
        budgets = list(self.settings.budgets)
        return {
            "files": files,
            "unit_macs": self.unit,
            "budgets": budgets,
            "accuracy": self.mean_accuracies(),
        }

    def labels(self, *, static: bool = False) -> list[str]:
        """The labels in the order of the file: methods, each under its gates.

        Args:
            static: True for the labels of networks without exits, False for all others.
        """
        labels: dict[str, None] = {}  # a dict keeps the order and drops repeats
        for result in self.results:
            if result.static == static:
                labels[result.label] = None
        return list(labels)

    def leading(self) -> list[str]:
        """The labels of each method under its first gate, static networks left out."""
        labels: dict[str, None] = {}  # a dict keeps the order and drops repeats
        for result in self.results:
            first_gate = self.settings.method(result.method).gates[0]
            if not result.static and result.gate == first_gate:
                labels[result.label] = None
        return list(labels)

    def of(self, label: str) -> list[Result]:
        """The results of a label, one per seed, in the order of the file."""
        return [result for result in self.results if result.label == label]

    def within(self, label: str) -> list[list[float]]:
        """The accuracies of a label on test rows, one list per budget.

        Returns:
            For each budget one accuracy per seed. Seeds without a plan within it are left out.
        """
        by_seed = [result.figures.budgets for result in self.of(label)]
        by_budget = []
        # from one tuple per seed to one per budget
        for budgets in zip(*by_seed, strict=True):
            accuracies = []
            for budget in budgets:
                if budget.point is not None:
                    accuracies.append(budget.point.accuracy)
            by_budget.append(accuracies)
        return by_budget

    def doubts(self) -> list[str]:
        """A sentence for each method whose last exit is far worse than an earlier exit.

        The cost of such a network is not a fair unit: nobody would run it to the end.
        """
        doubts = []
        for label in self.leading():
            figures = self.of(label)[0].figures
            *earlier, last = figures.alone
            if not earlier:
                continue
            highest = max(earlier)
            if last < highest - FAR:
                best = figures.exits[earlier.index(highest)]
                doubts.append(
                    f"{label}: the last exit is right on {last:.1%} of the test rows, but {best} "
                    f"on {highest:.1%}. Was its model ever trained? Name its weights, or a recipe "
                    "that trains it too"
                )
        return doubts


def measure(
    file: str | Path,
    folder: str | Path,
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Comparison:
    """Train, record, calibrate and measure every network of a settings file.

    Networks that the folder already holds are not made again. A stopped run continues where it
    was, even in the middle of training. The file is checked before anything is trained.

    Args:
        file: the settings file.
        folder: where networks, recordings and figures are kept.
        say: called with one line of text as each step begins.
        progress: True to show progress bars.

    Returns:
        All results, in the order of the file.

    Raises:
        BadFile: the settings file cannot be read.
        UnknownName: the file names something that does not exist.
        InvalidArgument: a setting is wrong, or the folder holds a network of the same name that was
            made with other settings.
        OverlappingRows: rows are used in two roles.
        OfframpError: whatever `cut`, `fit`, `record` and `bench` raise later.
    """
    settings = read_settings(file)
    home = require_path("folder", folder)
    require_writable(home, folder=True)
    require_known(settings)
    cells = []
    for method in settings.methods:
        for seed in method.seeds:
            cells.append(Cell(method, seed, settings, home, progress))
    _require_all(cells, settings, progress=progress)
    say(_opening(cells, home))
    unit = _unit(cells, say)
    results: list[Result] = []
    for index, cell in enumerate(cells):
        results += _results(cell, unit, _first_cut(cells), _prefixed(say, index, cells))
    return Comparison(settings, unit, tuple(results))


def _mean(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    if not values:
        return None
    return sum(values) / len(values)


def _opening(cells: list[Cell], home: Path) -> str:
    """The first line of output: how many networks there are, and how many are done already."""
    seeds_of = {cell.method.name: len(cell.method.seeds) for cell in cells}
    methods = len(seeds_of)
    seed_counts = set(seeds_of.values())
    seeds = "seeds as the file says"
    if len(seed_counts) == 1:
        seeds = f"{seed_counts.pop()} seeds each"
    done = [cell for cell in cells if cell.done]
    line = f"{methods} methods, {seeds}: {len(cells)} networks"
    if done:
        return f"{line}, of which {len(done)} are in {home} already and are kept"
    return line


def _require_all(cells: list[Cell], settings: Settings, *, progress: bool) -> None:
    """Check everything that can be checked before the first network is made."""
    undone = [cell.method for cell in cells if not cell.done]
    methods = list(dict.fromkeys(undone))  # one entry per method, not per seed
    require_models(settings, methods)
    require_lengths(settings, methods)
    if methods:
        require_apart(settings, _involved(settings, methods), progress=progress)
    for cell in cells:
        cell.claim()


def _involved(settings: Settings, methods: Sequence[Method]) -> list[Method]:
    """The methods, and all methods that they start from or stack."""
    involved = list(methods)
    for method in involved:  # the list grows during the loop, so sources of sources are visited too
        sources = list(method.members)
        if method.start:
            sources.append(method.start)
        for name in sources:
            source = settings.method(name)
            if source not in involved:
                involved.append(source)
    return involved


def _prefixed(say: Callable[[str], None], index: int, cells: list[Cell]) -> Callable[[str], None]:
    """`say` with the number, method and seed of a cell in front of each line."""
    cell = cells[index]
    prefix = f"{index + 1}/{len(cells)} {cell.method.name}, seed {cell.seed}"
    return lambda line: say(f"{prefix}: {line}")


def _unit(cells: list[Cell], say: Callable[[str], None]) -> float:
    """MACs per row of the plain network of the first method that is cut.

    Its network is made here if the folder does not hold it yet.
    """
    first = _first_cut(cells)
    if not first.done:
        _prefixed(say, cells.index(first), cells)(_step(first))
    cell = replace(first)  # a copy, so that the network is freed with it
    cell.make()
    return cell.plain()


def _first_cut(cells: list[Cell]) -> Cell:
    """The first network that is cut: its plain network is the unit of cost."""
    cut = [cell for cell in cells if not cell.method.static and not cell.method.members]
    return cut[0]  # reading.py has checked that there is one


def _step(cell: Cell) -> str:
    """The first step of a cell in words."""
    if cell.method.trained:
        return "training and recording"
    return "recording"


def _results(cell: Cell, unit: float, reference: Cell, say: Callable[[str], None]) -> list[Result]:
    """Make a network and measure it under all its gates. The model of `reference` is the unit of
    its times.
    """
    cell = replace(cell)  # a copy, so that the network is freed with it
    if not cell.done:
        say(_step(cell))
    cell.make()
    method = cell.method
    results = []
    for gate in method.scores:
        if cell.kept_figures(gate, unit) is None:
            name = gate
            if gate == OWN:
                name = "its own gate"
            say(f"figures under {name}")
        figures = cell.figures(gate, unit)
        # clocks are read once per network, under its first gate
        timed = None
        cost = None
        if gate == method.scores[0]:
            timed = cell.timed(unit)
            cost = cell.cost(replace(reference))
        results.append(
            Result(method.name, cell.seed, gate, method.static, figures, cell.seconds, timed, cost)
        )
    return results
