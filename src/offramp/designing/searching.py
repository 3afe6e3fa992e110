"""`search`: train many networks that share weights, and find the best one within a budget.

The supernet, its training and the evolution are in `supernet`, `single_path` and `evolution`. This
file joins them into one call that takes a model, rows and a folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.arguments import require, require_count, require_flag, require_path
from offramp._support.find import find, unknown
from offramp._support.replacement import require_writable, restored
from offramp._support.sentences import first_line
from offramp.building.converting import conversions_of, matched, outermost, spec_with, split_spec
from offramp.building.factories import make_model
from offramp.data.rows import proposing, rows, rows_for
from offramp.designing.evolution import (
    UNITS,
    CostTable,
    Judged,
    Search,
    cost_table,
    evolve,
)
from offramp.designing.search_folder import FOLDER, SearchState, read_search, write_search
from offramp.designing.single_path import (
    Labelled,
    TrainingState,
    labelled,
    reestimate,
    train_supernet,
)
from offramp.designing.supernet import Option, Supernet, option_of
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError, UnknownName
from offramp.networks.members import BACKBONE, ModelSpec
from offramp.networks.network import Network, plain_network
from offramp.networks.taps import listening, logits_in
from offramp.networks.trained import remember
from offramp.networks.wrappers import require_plain, unwrapped
from offramp.plans.provenance import union

TASK = "task"  # the name of the task, if there is only one
EXAMPLE = 2  # rows on which options are tried
JUDGED_TOGETHER = 200  # rows of a batch when networks are judged
REPEATS = 9  # timings of each part; the median counts


@dataclass(frozen=True)
class SearchResult:
    """The networks that a search judged, best first, and the supernet that they are part of.

    Attributes:
        task: the task that was searched for.
        unit: of costs: "macs" or "ms", for one row.
        budget: the most that a row may cost on average.
        dense_cost: the cost of a row in the network of first options.
        candidates: the judged networks within the budget, the most accurate first. Accuracy is on
            the development rows, before the network is trained on.
        refused: how many networks were outside the budget.
    """

    task: str
    unit: str
    budget: float
    dense_cost: float
    candidates: tuple[Judged, ...]
    refused: int
    searcher: Searcher

    @property
    def best(self) -> Judged:
        """The most accurate network; the cheapest of several equal ones."""
        return self.candidates[0]

    @property
    def supernet(self) -> Supernet:
        """All networks with their shared weights."""
        return self.searcher.supernet

    def frontier(self) -> list[Judged]:
        """The Pareto front: networks that no other one beats in both accuracy and cost, from the
        cheapest on.
        """
        return Search(self.candidates, self.refused).frontier()

    def told(self, judged: Judged | None = None) -> str:
        """Describe a network in words: its options by place, and its exits.

        Args:
            judged: one of the candidates; None for the best.
        """
        return self.supernet.told((judged or self.best).subnet)

    def model(self, judged: Judged | None = None) -> nn.Module:
        """Make a separate model of a candidate, with copies of the weights. Its batch norms are
        estimated on this network alone. Exits are not part of it.

        Args:
            judged: one of the candidates; None for the best.

        Returns:
            A model in eval mode. It can be trained further, cut and exported like any other.
        """
        return self.searcher.extracted(judged or self.best, self.task)

    def network(self, judged: Judged | None = None, *, gate: str = "margin") -> Network:
        """Make a network of a candidate, with its exits and its preprocessing.

        Args:
            judged: one of the candidates; None for the best.
            gate: the gate of the exits, as `cut` takes it.

        Returns:
            A network in eval mode, to be trained further with `fit`. Without exits it has one node.
        """
        return self.searcher.network(judged or self.best, self.task, gate)

    def again(
        self,
        *,
        budget: float | None = None,
        limit: float | None = None,
        unit: str | None = None,
        task: str | None = None,
        exits: bool = True,
        development: object = None,
    ) -> SearchResult:
        """Search the same supernet once more. Nothing is trained.

        Args:
            budget: as for `search`.
            limit: as for `search`.
            unit: "macs" or "ms"; None for the unit of this search.
            task: the task to search for; None for the task of this search.
            exits: False searches networks without exits.
            development: labelled rows that judge; None for those of this search.
        """
        searcher = self.searcher
        if development is not None:
            searcher = replace(searcher, development=development)
        return searcher.run(task or self.task, unit or self.unit, budget, limit, exits=exits)

    def to_json(self) -> dict[str, Any]:
        """The Pareto front as plain data."""
        front = []
        for judged in self.frontier():
            threshold = None  # JSON has no infinity, the threshold of a network without exits
            if judged.subnet.exits:
                threshold = judged.threshold
            front.append(
                {
                    "options": list(judged.subnet.options),
                    "exits": list(judged.subnet.exits),
                    "network": self.told(judged),
                    "accuracy": judged.accuracy,
                    "cost": judged.cost,
                    "threshold": threshold,
                }
            )
        return {
            "task": self.task,
            "unit": self.unit,
            "budget": self.budget,
            "dense_cost": self.dense_cost,
            "networks": self.supernet.size,
            "judged": len(self.candidates) + self.refused,
            "best": self.told(),
            "accuracy": self.best.accuracy,
            "cost": self.best.cost,
            "front": front,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The texts of a table, one row per network of the Pareto front: cost of a row, share of
        the dense network's cost, accuracy, and the network in words.
        """
        texts = list[tuple[str, ...]]()
        for judged in self.frontier():
            share = judged.cost / self.dense_cost
            cost = f"{judged.cost:,.4g}"
            if self.unit == "macs":
                cost = f"{judged.cost / 1e6:,.4g} M"
            texts.append((cost, f"{share:.0%}", f"{judged.accuracy:.2%}", self.told(judged)))
        return texts

    def __str__(self) -> str:
        judged = len(self.candidates) + self.refused
        return (
            f"{judged:,} of {self.supernet.size:,} networks judged for {self.task!r}; the best "
            f"costs {self.best.cost / self.dense_cost:.0%} of the dense network's {self.unit} and "
            f"is right on {self.best.accuracy:.2%} of the development rows: {self.told()}"
        )


def search(
    model: nn.Module,
    choices: Mapping[str, Sequence[Option]],
    data: object,
    *,
    development: object,
    budget: float | None = None,
    limit: float | None = None,
    unit: str = "macs",
    task: str | None = None,
    at: Sequence[str] = (),
    exit: str = "linear",
    head: str | None = None,
    preprocess: nn.Module | None = None,
    spec: str | None = None,
    steps: int = 2000,
    paths: int = 2,
    batch_size: int = 128,
    rate: float = 0.02,
    augment: str | Callable[[Tensor], Tensor] | None = None,
    norm_rows: int = 1000,
    timing_rows: int = 64,
    population: int = 50,
    generations: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Find the best network within a budget among many that share weights (one-shot search).

    At some places of the model there is a choice of layers. All of them are trained at once: every
    step draws some networks at random and averages their gradients. Then an evolution finds the
    most accurate network within the budget. Train the final network further with `fit`. A promise
    about it needs fresh rows.

    Args:
        model: a trained classifier; it is not changed.
        choices: the options at each place. The key is the name of a module, or a pattern as
            `convert` takes it. An option is "dense" (the module itself), "skip" (nothing),
            "narrow?by=2" (a residual block with fewer channels inside), a method of `convert` for
            all convolutions and linear layers inside ("ghost?ratio=2", "low_rank?energy=0.8"), a
            mapping as `convert` takes it, a module, or a function of the module. Budgets are shares
            of the network of first options. If a pattern names several places, an option that does
            not fit at one of them is left out there.
        data: labelled training rows; or a mapping from the name of a task to its rows. The heads of
            all tasks share the rest of the network. The first task has the model's own head, others
            have new ones.
        development: held-out labelled rows that judge, for the task that is searched for; or a
            mapping from the name of a task to its rows.
        budget: the most that a row may cost on average, as a share of the dense network's cost.
        limit: the same in MACs or milliseconds, instead of a budget.
        unit: "macs", counted, or "ms", measured on this machine at a batch of `timing_rows`.
        task: the task that is searched for; None for the first one.
        at: modules that an exit may follow. The budget is then the mean cost over all rows, those
            that leave early and those that do not.
        exit: the kind of the exits, as `cut` takes it.
        head: the linear layer that gives the logits; None finds it.
        preprocess: turns the rows into the model's input.
        spec: how to build the model again, such as "offramp:resnet20". With it a saved network can
            be loaded without the model.
        steps: of training, over all tasks together.
        paths: networks that are drawn for a step.
        batch_size: rows of a step.
        rate: learning rate of SGD at the first step; it falls linearly to 0.
        augment: a name of the shelf `augments`, or a function of a batch.
        norm_rows: training rows from which a network's batch norms are estimated before it is
            judged.
        timing_rows: rows of a batch that is timed.
        population: networks of a generation.
        generations: of the evolution.
        clock: seconds, for "ms"; such as `time.process_time` for CPU time of one thread.
        seed: of everything that is drawn.
        folder: where the supernet and the judged networks are saved, every minute and at the end.
        resume: whether to go on from `folder`. With other budgets, tasks or units nothing is
            trained again.
        progress: whether to show progress.

    Returns:
        The judged networks; `result.network()` makes the best one.

    Raises:
        UnknownName: a module, a method, a task or an augmentation does not exist.
        InvalidArgument: an argument has a wrong value, or no network is within the budget.
        BadNetwork: an option does not fit at its place, or the model has no linear head.
        BadData: rows have no labels, or a label is not a class.
        Mismatch: `folder` belongs to a search with other inputs.
        Diverged: a loss is no longer finite.

    Example:
        >>> from offramp.layers.residual import Block
        >>> _ = torch.manual_seed(0)
        >>> body = nn.Sequential(Block(1, 8), Block(8, 8), Block(8, 8))
        >>> model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 1, 8, 8)
        >>> y = (x.mean((1, 2, 3)) > 0).long()
        >>> choices = {"0.1": ["dense", "ghost?ratio=2", "skip"], "0.2": ["dense", "narrow?by=2"]}
        >>> found = search(
        ...     model.eval(), choices, (x, y), development=(x, y), budget=0.7, steps=4,
        ...     batch_size=16, population=4, generations=2, progress=False,
        ... )
        >>> found.supernet.size, found.best.cost <= 0.7 * found.dense_cost
        (6, True)
    """
    # 1. Check the arguments, before anything is read or trained.
    model = unwrapped(model)[0]
    require_plain(model, "model")
    for name, value in (
        ("steps", steps),
        ("paths", paths),
        ("batch_size", batch_size),
        ("norm_rows", norm_rows),
        ("timing_rows", timing_rows),
        ("population", population),
        ("generations", generations),
    ):
        require_count(name, value, 1)
    require_count("seed", seed, 0)
    require("rate", rate, above=0)
    _require_budget(budget, limit, unit)
    home: Path | None = None
    if folder is not None:
        home = require_path("folder", folder)
        require_writable(home, folder=True)
        FOLDER.require_own(home)
    if require_flag("resume", resume) and home is None:
        raise InvalidArgument("folder must be the folder of the search for resume=True, got None")
    augment_function: Any = augment
    augment_name = getattr(augment, "__qualname__", None)
    if isinstance(augment, str):
        augment_function = find("augments", augment)
        augment_name = augment

    # 2. Read the rows, and build the supernet.
    with proposing([preprocess]):
        tasks = _tasks(model, data, progress=progress)
    first = next(iter(tasks))
    searched = first if task is None else task
    if searched not in tasks:
        raise unknown(searched, list(tasks), "task of this search")
    example = _some(tasks[first], np.arange(EXAMPLE))
    torch.manual_seed(seed)  # of new heads, exits and layers
    supernet = _supernet(model, choices, tasks, example, at, exit, head, preprocess)

    # 3. Continue from the folder, if it holds this search. The identity is everything that the
    # weights depend on.
    identity = {
        "model": _digest_of(model),
        "choices": [list(names) for names in supernet.names],
        "places": list(supernet.places),
        "exits": [*supernet.taps, exit],
        "rows": {name: read.seen.fingerprint for name, read in tasks.items()},
        "steps": steps,
        "paths": paths,
        "batch_size": batch_size,
        "rate": rate,
        "augment": augment_name,
        "seed": seed,
    }
    state = SearchState()
    if resume and home is not None and restored(home, FOLDER.require_own).is_dir():
        state = read_search(home, supernet, identity)

    # 4. Train the remaining steps.
    def keep(training: TrainingState) -> None:
        state.training = training
        if home is not None:
            write_search(home, supernet, identity, state)

    train_supernet(
        supernet,
        tasks,
        steps=steps,
        paths=paths,
        batch_size=batch_size,
        rate=rate,
        augment=augment_function,
        seed=seed,
        begin=state.training,
        keep=keep,
        progress=progress,
    )
    # Weights from a folder were trained in another process. Note again which rows trained them.
    for training_rows in tasks.values():
        remember(supernet, training_rows.seen)

    # 5. Search.
    searcher = Searcher(
        model=model,
        supernet=supernet,
        tasks=tasks,
        development=development,
        spec=spec,
        state=state,
        identity=identity,
        folder=home,
        norm_rows=norm_rows,
        timing_rows=timing_rows,
        population=population,
        generations=generations,
        clock=clock,
        seed=seed,
        progress=progress,
    )
    return searcher.run(searched, unit, budget, limit)


@dataclass(frozen=True)
class Searcher:
    """A trained supernet with everything that another search of it needs.

    Args: see `search`. tasks: the training rows by task. state: the progress so far. identity: the
    inputs of the training.
    """

    model: nn.Module
    supernet: Supernet
    tasks: Mapping[str, Labelled]
    development: object
    spec: str | None
    state: SearchState
    identity: Mapping[str, Any]
    folder: Path | None
    norm_rows: int
    timing_rows: int
    population: int
    generations: int
    clock: Callable[[], float]
    seed: int
    progress: bool

    def run(
        self,
        task: str,
        unit: str,
        budget: float | None,
        limit: float | None,
        *,
        exits: bool = True,
    ) -> SearchResult:
        """Search for the best network of a task within a budget. See `search`."""
        _require_budget(budget, limit, unit)
        if task not in self.tasks:
            raise unknown(task, list(self.tasks), "task of this search")
        judging = self._judging(task)
        table = self._table(unit)
        dense_cost = table.whole(self.supernet.dense, task)
        if limit is None:
            assert budget is not None
            limit = budget * dense_cost
        # Networks that were judged before need not be judged again, if the rows and the limit are
        # the same.
        key = json.dumps([task, unit, limit, judging.seen.fingerprint, self.norm_rows])
        memory = self.state.judged.setdefault(key, {})
        x = _some(judging, np.arange(len(judging.y)))
        y = torch.as_tensor(judging.y).long()
        device = next(self.supernet.parameters()).device
        evolution = evolve(
            self.supernet,
            task,
            (x.to(device), y.to(device)),
            self._norm_rows(task).to(device),
            costs=table,
            budget=limit,
            population=self.population,
            generations=self.generations,
            batch_size=JUDGED_TOGETHER,
            exits=require_flag("exits", exits),
            seed=self.seed,
            memory=memory,
            after=self._keep,
            progress=self.progress,
        )
        return SearchResult(
            task, unit, limit, dense_cost, evolution.candidates, evolution.refused, self
        )

    def extracted(self, judged: Judged, task: str) -> nn.Module:
        """The model of a candidate, with its batch norms estimated anew."""
        model = self.supernet.extract(judged.subnet, task)
        device = next(self.supernet.parameters()).device
        batches = torch.split(self._norm_rows(task).to(device), JUDGED_TOGETHER)
        reestimate(model, map(self.supernet.prepared, batches))
        # the development rows chose this network, so a promise about it needs other rows
        remember(model, self._judging(task).seen)
        return model

    def network(self, judged: Judged, task: str, gate: str) -> Network:
        """The network of a candidate, with its exits."""
        model = self.extracted(judged, task)
        spec = self._spec_of(model)
        if judged.subnet.exits:
            network = self.supernet.network(judged.subnet, task, model=model, gate=gate, spec=spec)
        else:
            network = plain_network(model, ModelSpec(BACKBONE, spec), self.supernet.preprocess)
            network = network.eval()
        # a calibration must not use the rows that trained or chose this network
        used_rows = [training_rows.seen for training_rows in self.tasks.values()]
        used_rows.append(self._judging(task).seen)
        network.trained_on = union(used_rows)
        network.class_names = self.tasks[task].source.class_names
        return network

    def _spec_of(self, model: nn.Module) -> str | None:
        """The text that builds an extracted model again; None if an option is not a method of
        `convert`.
        """
        if self.spec is None:
            return None
        # the differences to the plain model become the conversions in the text
        base = split_spec(self.spec)[0]
        plain = self.model
        if base != self.spec:
            plain = make_model(base, fetch=False)
        try:
            return spec_with(base, conversions_of(model, plain))
        except InvalidArgument:
            return None

    def _judging(self, task: str) -> Labelled:
        """The development rows of a task."""
        data = self.development
        if isinstance(data, Mapping):
            if task not in data:
                raise InvalidArgument(
                    f"development must have rows for the task {task!r}, got {sorted(data)}"
                )
            data = data[task]
        if isinstance(data, Labelled):
            return data
        with proposing([self.supernet.preprocess]):
            source = rows(data)
        # labels by name get the numbers that they have in training
        names = self.tasks[task].source.class_names
        if names is not None:
            source = source.numbered_as(names)
        judging = labelled(task, source)
        classes = self.supernet.classes[task]
        if judging.y.min() < 0 or judging.y.max() >= classes:
            raise BadData(
                f"labels of the development rows of {task!r} must be 0 to {classes - 1}, got "
                f"{judging.y.min()} to {judging.y.max()}"
            )
        return judging

    def _norm_rows(self, task: str) -> Tensor:
        """Training rows of a task, drawn once, [M, ...]."""
        count = len(self.tasks[task].y)
        picks = np.random.default_rng(self.seed).permutation(count)[: self.norm_rows]
        return _some(self.tasks[task], np.sort(picks))

    def _table(self, unit: str) -> CostTable:
        """The costs of all parts. Milliseconds are measured once and kept."""
        key = unit
        batch = EXAMPLE
        if unit == "ms":  # the time of a row depends on the size of its batch, the count does not
            key = f"{unit} at batch {self.timing_rows}"
            batch = self.timing_rows
        if key not in self.state.tables:
            self.state.tables[key] = cost_table(
                self.supernet, unit=unit, rows=batch, repeats=REPEATS, clock=self.clock
            )
        return self.state.tables[key]

    def _keep(self) -> None:
        if self.folder is not None:
            write_search(self.folder, self.supernet, self.identity, self.state)


def _require_budget(budget: float | None, limit: float | None, unit: str) -> None:
    """Raise InvalidArgument unless there is one budget, in a unit that exists."""
    if unit not in UNITS:
        raise InvalidArgument(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if (budget is None) == (limit is None):
        got = "neither" if budget is None else "both"
        raise InvalidArgument(
            f"exactly one of budget= and limit= must be given, got {got}. budget is a share of the "
            f"dense network's cost, limit a cost in the unit"
        )
    if budget is not None:
        require("budget", budget, above=0, high=1)
    if limit is not None:
        require("limit", limit, above=0)


def _tasks(model: nn.Module, data: object, *, progress: bool) -> dict[str, Labelled]:
    """The training rows of each task."""
    by_task: Mapping[Any, object] = {TASK: data}
    if isinstance(data, Mapping):
        by_task = data
    if not by_task:
        raise InvalidArgument("data must have rows for at least one task, got none")
    tasks = dict[str, Labelled]()
    for name, task_data in by_task.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise InvalidArgument(f"a task must be a name such as 'ten', got {name!r}")
        if not tasks:  # only the first task has the classes of the model itself
            source = rows_for(model, task_data)
        else:
            source = rows(task_data)
        tasks[name] = labelled(name, source, progress=progress)
    return tasks


def _supernet(
    model: nn.Module,
    choices: Mapping[str, Sequence[Option]],
    tasks: Mapping[str, Labelled],
    example: Tensor,
    at: Sequence[str],
    exit: str,
    head: str | None,
    preprocess: nn.Module | None,
) -> Supernet:
    """The supernet, with the model's own head for the first task and a new one for each other."""
    x = example
    if preprocess is not None:
        with torch.no_grad():
            x = preprocess(example)
    heads: dict[str, int | None] = {}
    for name, training_rows in tasks.items():
        heads[name] = None  # the model's own head, for the first task
        if len(heads) > 1:
            heads[name] = int(training_rows.y.max()) + 1
    return Supernet(
        model,
        _choices_at_places(model, choices, x),
        example,
        head=head or _head_of(model, x),
        heads=heads,
        exits=at,
        exit=exit,
        preprocess=preprocess,
    )


def _choices_at_places(
    model: nn.Module, choices: Mapping[str, Sequence[Option]], x: Tensor
) -> dict[str, Sequence[Option]]:
    """The options by place. If a pattern names several places, an option that does not fit at one
    of them is left out there.

    Args:
        model: the classifier.
        choices: as for `search`.
        x: a batch as the model itself takes it.
    """
    if not isinstance(choices, Mapping) or not choices:
        raise InvalidArgument(
            'choices must map modules to options, such as {"layer3.*": ["dense", "skip"]}, got '
            f"{choices!r}"
        )
    known = dict(model.named_modules())
    by_place: dict[str, Sequence[Option]] = {}
    for key, options in choices.items():
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise InvalidArgument(
                f"the options at {key!r} must be a list such as ['dense', 'skip'], got {options!r}"
            )
        if key in known:
            by_place[key] = options
            continue
        # a pattern: of the modules that it matches, those that are not within another one
        places = outermost(matched(model, key))
        fitting = _fitting(model, places, options, x)
        for place in places:
            by_place[place] = fitting[place]
    # in the order of the model, whatever the order of the keys
    return {name: by_place[name] for name in known if name in by_place}


def _fitting(
    model: nn.Module, places: Sequence[str], options: Sequence[Option], x: Tensor
) -> dict[str, list[Option]]:
    """The options that fit at each of some places. An option fits if its output has the same shape
    as that of the module.

    Raises:
        BadNetwork: an option fits nowhere, or a place never runs.
    """
    # 1. Run the model once, and record the input and the shape of the output at each place.
    inputs = dict[str, Tensor]()
    shapes = dict[str, torch.Size]()

    def note(name: str, arguments: tuple[Any, ...], output: object) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
            inputs[name] = arguments[0].clone()  # a later layer may change it in place
            shapes[name] = output.shape

    handles = []
    try:
        for place in places:
            module = model.get_submodule(place)
            handles.append(
                module.register_forward_hook(
                    lambda _module, arguments, output, place=place: note(place, arguments, output)
                )
            )
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()

    # 2. Try every option at every place. The reason of the last failure is for the message.
    fitting: dict[str, list[Option]] = {place: [] for place in places}
    for option in options:
        reason = ""
        fits_somewhere = False
        for place in places:
            if place not in inputs:
                raise BadNetwork(f"the place {place!r} must take and give one tensor in every run")
            try:
                candidate = option_of(model.get_submodule(place), place, option)
                with torch.no_grad():
                    shape = candidate(inputs[place]).shape
            except UnknownName:
                raise
            except (OfframpError, RuntimeError, ValueError, IndexError) as problem:
                reason = first_line(problem)
                continue
            if shape == shapes[place]:
                fitting[place].append(option)
                fits_somewhere = True
            else:
                reason = f"it gives {tuple(shape)} at {place!r} instead of {tuple(shapes[place])}"
        if not fits_somewhere:
            raise BadNetwork(f"the option {str(option)!r} fits at none of {places} ({reason})")
    return fitting


def _head_of(model: nn.Module, x: Tensor) -> str:
    """The name of the linear layer that gives the model's logits."""
    layers = dict[str, nn.Module]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = module
    outputs = dict[str, object]()
    with torch.no_grad(), listening(layers, lambda name, value: outputs.update({name: value})):
        logits = logits_in(model(x))
    for name, value in outputs.items():
        if value is logits:  # the same tensor, so that nothing is computed after this layer
            return name
    raise BadNetwork(
        "the model must end in a linear layer that gives the logits. Name it with head="
    )


def _some(read: Labelled, positions: np.ndarray) -> Tensor:
    """Some rows of a task as one tensor [M, ...]."""
    x = read.source.take_x(positions)
    if isinstance(x, Mapping):
        raise BadData(f"rows must have one input for search, got the inputs {', '.join(sorted(x))}")
    return torch.as_tensor(np.asarray(x))


def _digest_of(model: nn.Module) -> str:
    """Sixteen hex digits over the weights of a model."""
    sha256 = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        array = value.detach().cpu().contiguous()
        sha256.update(f"{name}{array.dtype}{tuple(array.shape)}".encode())
        sha256.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]
