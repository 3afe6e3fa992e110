"""One network of a comparison, by the same verbs as by hand: cut, trained, recorded; each step a
file, done once.

<folder>/<method>-<seed>/
    settings.json                  what the network is made of; another one is not taken for it
    run/                           of fit: checkpoints, metrics.csv
    trained.json, network/          seconds and notes of training; the network
    calibration.npz, test.npz      traces under the network's own gate
    figures-<gate>.json            see figures.py
    bench-<gate>.json              see bench
    cost.json                      size, operations and times of the model, see costing.py
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp._support.arguments import arguments_of, words
from offramp._support.files import read_json, write_json
from offramp.building.cutting import cut, ladder
from offramp.building.factories import FROM_FILES, make_model, make_preprocess, preprocess_of
from offramp.building.resolving import resolutions
from offramp.building.saving import load, save
from offramp.building.unrolling import unrolled
from offramp.calibration.rows import unseen_rows
from offramp.comparing.converted import converted, spec_of
from offramp.comparing.costing import ModelCost, size_of, times_of
from offramp.comparing.figures import Figures, best_within, figures_of, figures_of_plain, plain_of
from offramp.comparing.forked import figures_of_forks
from offramp.comparing.gating import regated, rescored
from offramp.comparing.placement import example_of, free_of, places_of
from offramp.comparing.settings import OWN, Method, Settings
from offramp.data.rows import rows
from offramp.errors import BetterExit, InvalidArgument
from offramp.fitting.training import fit, recipe_of
from offramp.networks.inputs import as_inputs, count_of
from offramp.networks.members import BACKBONE, ModelSpec
from offramp.networks.network import Network, plain_network
from offramp.networks.nodes import Exit, Gate
from offramp.plans.provenance import union
from offramp.plans.trace import Trace
from offramp.runtime.benching import bench
from offramp.runtime.engine import engine_of
from offramp.runtime.recording import record

KIND = "comparison"
SCHEMA = 1
RECOVER = "recover"  # the recipe that learns from the model before it was converted
TIMED = 256  # rows
SIZED = 8  # rows on which multiply-adds are counted
BATCHES = (1, 64)


@dataclass(frozen=True)
class Cell:
    """A method and a seed, in a folder of its own below `folder`, where pooled features stay for
    all cells.
    """

    method: Method
    seed: int
    settings: Settings
    folder: Path
    progress: bool

    @property
    def name(self) -> str:
        """Method and seed, as the folder is called."""
        return f"{self.method.name}-{self.seed}"

    @property
    def home(self) -> Path:
        """Where its files lie."""
        return self.folder / self.name

    @property
    def first(self) -> bool:
        """Whether this is the first seed of its method."""
        return self.seed == self.method.seeds[0]

    def members(self) -> list[Cell]:
        """Of a ladder, the cells that it is made of: of the same seed, or of their own first."""
        return [self._beside(name) for name in self.method.members]

    def _beside(self, name: str) -> Cell:
        """The cell of another method with the same seed, or with its own first."""
        other = self.settings.method(name)
        seed = self.seed if self.seed in other.seeds else other.seeds[0]
        return Cell(other, seed, self.settings, self.folder, self.progress)

    @cached_property
    def _start(self) -> Network | None:
        """The trained network whose model this cell begins with, if it does."""
        if self.method.start is None:
            return None
        return self._beside(self.method.start).network

    def asked(self) -> dict[str, Any]:
        """What its network is made of, as plain data."""
        others = [
            *self.members(),
            *([] if self.method.start is None else [self._beside(self.method.start)]),
        ]
        return self.method.asked(self.seed) | (
            {"of": [cell.asked() for cell in others]} if others else {}
        )

    def claim(self) -> None:
        """Note what this cell is made of. Raises InvalidArgument where its folder holds one that
        was made otherwise.
        """
        file = self.home / "settings.json"
        asked = self.asked()
        if not file.exists():
            write_json(file, KIND, SCHEMA, asked)
            return
        # A flag that is newer than the folder had its default.
        was = (
            Method("").flags(self.seed) | {"of": asked.get("of")} | read_json(file, KIND, SCHEMA)[1]
        )
        for key in asked:
            if asked[key] != was[key]:
                raise InvalidArgument(
                    f"{self.home} was made with {key.replace('_', '-')} = {was[key]!r}, and now "
                    f"it is {asked[key]!r}; "
                    "remove that folder, or write to another one"
                )

    @property
    def done(self) -> bool:
        """Whether it was trained and recorded before."""
        return all((self.home / f"{role}.npz").exists() for role in self._roles)

    @property
    def _roles(self) -> tuple[str, ...]:
        return ("test",) if self.method.static else ("calibration", "test")

    def make(self) -> None:
        """Train and record it, where that is not done."""
        for role in self._roles:
            self.trace(role)

    @cached_property
    def network(self) -> Network:
        """The trained network: from its folder, else made now."""
        if self.method.members:
            stacked = {cell.method.name: cell.network for cell in self.members()}
            models = {name: _member(each) for name, each in stacked.items()}
            network = ladder(
                models, gate=self.method.gate, example=example_of(self.method, self.settings)
            )
            network.trained_on = union(each.trained_on for each in stacked.values())
            return network
        path = self.home / "network"
        if path.exists():
            return self._loaded(path)
        network = self._made()
        network.trained_on = union(
            [network.trained_on, None if self._start is None else self._start.trained_on]
        )
        if self.method.trained:
            self._train(network)
        if self.method.unrolled:
            network = self._unrolled(network)
        save(network, path)
        return network

    def _unrolled(self, network: Network) -> Network:
        """A trained network of one model with adaptive depth, unit by unit."""
        member = network.members[0]
        x = example_of(self.method, self.settings)
        before = network.preprocess_of(member)
        taken_apart = unrolled(
            network.model_of(member), x, preprocess=before, spec=self.method.model
        )
        taken_apart.trained_on = network.trained_on
        taken_apart.class_names = network.class_names
        return taken_apart

    def _loaded(self, path: Path) -> Network:
        """The network from its folder. What only its user can build is built once more, as it was
        the first time.
        """
        method = self.method
        if method.sizes and not (method.model or "").startswith(FROM_FILES):
            arms = self._made()
            return load(path, {each.name: arms.model_of(each) for each in arms.members})
        words = (method.preprocess, method.gate, *_each_exit(method.exits))
        if not any(":" in word for word in words):
            is_known = (method.model or "").startswith(FROM_FILES) and not self._is_converted
            return load(path, None if is_known else self._model())
        made = self._made()
        member = made.members[0]
        given = (made.model_of(member), made.preprocess_of(member))
        exits = {
            name: made.exit_of(name) for name in member.cuts if _named_code(made.exit_of(name))
        }
        gates = {
            name: made.gate_of(name) for name in member.cuts if _named_code(made.gate_of(name))
        }
        return load(path, given, exits=exits, gates=gates)

    @property
    def seconds(self) -> float | None:
        """What all epochs of training took, also those of a run that was stopped; None where
        nothing was trained.
        """
        file = self.home / "trained.json"
        if file.exists():
            return float(read_json(file, KIND, SCHEMA)[1]["seconds"])
        return None

    def _model(self) -> nn.Module:
        """The model before it is trained, with its cheaper layers."""
        model = self._before()
        if not self.method.layer:
            return model
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)  # layers such as ghosts draw weights
            return converted(model, self.method, self.settings, self._preprocess())

    def _before(self) -> nn.Module:
        """The model before anything is replaced: that of `start`, or the one that is named."""
        if self._start is not None:
            return copy.deepcopy(self._start.model_of(self._start.members[0]))
        assert self.method.model is not None
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return make_model(self.method.model, self.method.weights)

    def _original(self) -> nn.Module:
        """The model before it was converted: by this method, or by the one that it starts with."""
        if not self.method.layer and self.method.start is not None:
            return self._beside(self.method.start)._original()
        return self._before()

    def _preprocess(self) -> nn.Module | None:
        assert self.method.model is not None
        if self.method.preprocess == "auto":
            return preprocess_of(self.method.model)
        return make_preprocess(self.method.preprocess)

    @property
    def _is_converted(self) -> bool:
        """Whether its model has cheaper layers, of its own or from its start."""
        if self.method.layer:
            return True
        return self.method.start is not None and self._beside(self.method.start)._is_converted

    def _spec(self, model: nn.Module) -> str | None:
        """The name of its model, if it has one."""
        assert self.method.model is not None
        if not self._is_converted:
            return self.method.model
        return spec_of(model, self.method.model)

    def _made(self) -> Network:
        """The network before it is trained; what is drawn for it depends on the seed alone."""
        method = self.method
        model = self._model()
        preprocess = self._preprocess()
        spec = self._spec(model)
        if method.static or method.unrolled:
            return plain_network(model, ModelSpec(BACKBONE, spec), preprocess).eval()
        x = example_of(method, self.settings)
        if method.forks:
            return self._forked(model, spec, preprocess, x)
        free = free_of(method, self.settings)
        first = replace(self, seed=method.seeds[0])
        begun = first.asked().get("of")
        names, seen = places_of(
            method, self.settings, self.folder / "places", first._model, preprocess, begun
        )
        options: dict[str, Any] = {
            "exits": method.exits,
            "gate": method.gate,
            "preprocess": preprocess,
            "spec": spec,
        }
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = cut(
                model, x, at=names, parts=None if names else method.parts, length=free, **options
            )
        network.trained_on = union([network.trained_on, seen])
        return network

    def _forked(
        self, model: nn.Module, spec: str | None, preprocess: nn.Module | None, x: Any
    ) -> Network:
        """The network before it is trained, with units that rows skip or sizes that they choose."""
        method = self.method
        gate = None if method.gate == Method("").gate else method.gate
        options: dict[str, Any] = {"preprocess": preprocess, "spec": spec}
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            if method.sizes is not None:
                sizes = list(map(int, words(method.sizes) or ()))
                return resolutions(model, x, sizes, gate=gate or "predictor", **options)
            return cut(
                model, x, skip=words(method.skip) or (), gate=gate or "controller", **options
            )

    def _train(self, network: Network) -> None:
        method = self.method
        run = self.home / "run"
        assert method.recipe is not None
        arguments = arguments_of(method.arguments)
        if method.recipe.partition("?")[0] == RECOVER:
            arguments["original"] = self._original()
        history = fit(
            network,
            method.train,
            recipe=recipe_of(method.recipe, **arguments),
            development=method.development,
            batch_size=method.batch_size,
            seed=self.seed,
            augment=method.augment,
            views=method.views,
            precision=method.precision,
            folder=run,
            cache=self.folder / "pooled",
            resume=(run / "checkpoint").is_dir(),
            progress=self.progress,
        )
        told = {"seconds": history.seconds, "notes": list(history.notes)}
        write_json(self.home / "trained.json", KIND, SCHEMA, told)

    def trace(self, role: str) -> Trace:
        """All exits on the rows of a role (calibration or test) under the network's own gate.

        Recorded once, and again where the settings name other rows or another engine than those of
        the file.
        """
        file = self.home / f"{role}.npz"
        data = str(getattr(self.settings, role))
        engine = self.settings.engine
        if file.exists():
            kept = Trace.load(file)
            same = kept.header.data in (data, data.strip()) or kept.header.data == rows(data).name
            if same and kept.header.origin.engine == engine_of(engine)[1]:
                return kept
        options: dict[str, Any] = {"engine": engine, "progress": self.progress}
        if self.method.settings:
            options["settings"] = list(self.method.settings)
        with warnings.catch_warnings():
            # `Comparison.doubts` says it once for all seeds
            warnings.simplefilter("ignore", BetterExit)
            found = record(
                self.network, data, batch_size=self.method.batch_size, timed=False, **options
            )
        found.save(file)
        return found

    def plain(self) -> float:
        """MACs per row of its plain network."""
        return plain_of(self.trace("test"))

    def traces(self, gate: str) -> tuple[Trace, Trace]:
        """The traces of calibration and test rows under a gate. Raises OverlappingRows where rows
        are in two roles.
        """
        calibration = self.trace("calibration")
        test = self.trace("test")
        apart = self._apart(calibration, test)
        if gate == OWN:
            return apart
        other = self._under(gate)
        engine = self.settings.engine
        sources = rows(self.settings.calibration), rows(self.settings.test)
        return self._apart(
            rescored(calibration, other, sources[0], engine),
            rescored(test, other, sources[1], engine),
        )

    def _apart(self, calibration: Trace, test: Trace) -> tuple[Trace, Trace]:
        """Both without rows that have another role too, if the file says drop-seen. Raises
        OverlappingRows else.
        """
        drop = self.settings.drop_seen
        kept, _ = unseen_rows(calibration, drop_seen=drop, what="calibration")
        rest, _ = unseen_rows(test, drop_seen=drop, what="test", seen=calibration.seen)
        return kept, rest

    def _under(self, gate: str) -> Network:
        return self.network if gate == OWN else regated(self.network, gate)

    def kept_figures(self, gate: str, unit: float) -> Figures | None:
        """Its figures under a gate, if they were computed before for these settings."""
        file = self._file("figures", gate)
        if not file.exists():
            return None
        body = read_json(file, KIND, SCHEMA)[1]
        if body["asked"] == self._asked(unit):
            return Figures.from_json(body["figures"])
        return None

    def figures(self, gate: str, unit: float) -> Figures:
        """Its figures under a gate, computed once. unit: MACs of which budgets are shares."""
        if (kept := self.kept_figures(gate, unit)) is not None:
            return kept
        asked = self._asked(unit)
        if self.method.static:
            test, _ = unseen_rows(
                self.trace("test"), drop_seen=self.settings.drop_seen, what="test"
            )
            figures = figures_of_plain(test)
        elif self.method.forks:
            traces = self.traces(gate)
            figures = figures_of_forks(*traces, self.settings, unit, splits=asked["splits"])
        else:
            figures = figures_of(*self.traces(gate), self.settings, unit, splits=asked["splits"])
        write_json(
            self._file("figures", gate),
            KIND,
            SCHEMA,
            {"asked": asked, "figures": figures.to_json()},
        )
        return figures

    def _asked(self, unit: float) -> dict[str, Any]:
        """What figures are computed for, as plain data; random splits are drawn for the first seed
        alone.
        """
        keys = ("calibration", "test", "budgets", "risk", "at_most", "confidence")
        told = {key: getattr(self.settings, key) for key in keys}
        told |= {
            key: value
            for key in ("repeated_rows", "drop_seen")
            if (value := getattr(self.settings, key))
        }
        splits = self.settings.splits if self.first else 0
        engine = engine_of(self.settings.engine)[1]
        budgets = list(self.settings.budgets)
        return told | {"budgets": budgets, "engine": engine, "unit": unit, "splits": splits}

    def _file(self, what: str, gate: str) -> Path:
        return self.home / f"{what}-{gate.replace(':', '-')}.json"

    def timed(self, unit: float) -> Mapping[str, Any] | None:
        """What `bench` says of the best plan under the first gate, within the budget that is shown.

        None where nothing is to be timed: of static networks, of later seeds, and where no plan
        fits the budget.
        """
        settings = self.settings
        gate = self.method.gates[0]
        if not settings.wall_clock or self.method.static or not self.first:
            return None
        budget = settings.budgets[settings.shown]
        file = self._file("bench", gate)
        its = (settings.calibration, settings.test, engine_of(settings.engine)[1])
        asked = [budget, settings.repeats, *its, unit]
        if file.exists() and (body := read_json(file, KIND, SCHEMA)[1])["asked"] == asked:
            lines: Mapping[str, Any] = body["lines"]
            return lines
        calibration, test = self.traces(gate)
        plan = best_within(calibration, budget * unit / plain_of(calibration))
        if plan is None:
            return None
        x = next(rows(settings.test).batches(TIMED)).x
        batches = [size for size in BATCHES if size <= len(test)]
        found = bench(
            self._under(gate),
            plan,
            x,
            batches=batches,
            repeats=settings.repeats,
            engine=settings.engine,
        )
        write_json(file, KIND, SCHEMA, {"asked": asked, "lines": found.to_json()})
        return self.timed(unit)  # as the file has it

    def cost(self, reference: Cell) -> ModelCost | None:
        """What its model costs, counted once; and timed beside that of `reference` if the settings
        ask for times.

        None for ladders and later seeds, and where no method is static or converted: then all have
        one model.
        """
        settings = self.settings
        different = any(each.static or each.layer for each in settings.methods)
        if self.method.members or not self.first or not different:
            return None
        file = self.home / "cost.json"
        asked = [settings.test, settings.wall_clock, settings.repeats, reference.asked()]
        asked.append(engine_of(settings.engine)[1])
        if file.exists():
            body = read_json(file, KIND, SCHEMA)[1]
            if body["asked"] == asked:
                return ModelCost.from_json(body["cost"])
        x = next(iter(rows(settings.test).batches(max(BATCHES)))).x
        network = self.network
        found = size_of(network, _first_rows(x, SIZED))
        if settings.wall_clock:
            unit = network if reference.name == self.name else reference.network
            batches = tuple(size for size in BATCHES if size <= count_of(as_inputs(x)))
            times = times_of(
                network,
                unit,
                x,
                batches=batches,
                repeats=settings.repeats,
                engine=settings.engine,
                clock=time.perf_counter,
            )
            found = replace(found, times=times)
        write_json(file, KIND, SCHEMA, {"asked": asked, "cost": found.to_json()})
        return found


def _first_rows(x: Any, count: int) -> Any:
    """The first rows of a batch, as one array or as named ones."""
    if isinstance(x, Mapping):
        return {name: value[:count] for name, value in x.items()}
    return x[:count]


def _each_exit(exits: str | Mapping[str, str]) -> list[str]:
    return [exits] if isinstance(exits, str) else [*exits.values()]


def _named_code(part: Exit | Gate) -> bool:
    """Whether a saved exit or gate names code of the user's, which no file may run."""
    return ":" in str(part.config().get("name", ""))


def _member(network: Network) -> Any:
    """A network as a member: one that is cut keeps its exits, of a plain one the model behind its
    preprocessing.
    """
    if network.members[0].cuts:
        return network
    return network.model_of(network.members[0]), network.preprocess_of(network.members[0])
