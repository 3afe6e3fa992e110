"""One network of a comparison. It is cut, trained and recorded by the same verbs as by hand; each
step is done once and kept in a file.

<folder>/<method>-<seed>/
    settings.json                  the flags of the network, so that no other is taken for it
    run/                           of fit: checkpoints, metrics.csv
    trained.json, network/          seconds and notes of training; the network
    calibration.npz, test.npz      traces under the network's own gate
    figures-<gate>.json            see figures.py
    bench-<gate>.json              see bench
    cost.json                      size, operations and times of the model, see costing.py
"""

from __future__ import annotations

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
from offramp.networks.wrappers import deep_copy
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
BATCHES = (1, 64)  # sizes that are timed
# The settings that figures depend on. Those of the second list count only if they are set, so that
# files of earlier editions stay valid.
FIGURES = ("calibration", "test", "budgets", "risk", "at_most", "confidence")
FIGURES_IF_SET = ("repeated_rows", "drop_seen")


@dataclass(frozen=True)
class Cell:
    """The network of one method and one seed.

    Attributes:
        method: how the network is made.
        seed: of its weights and its training.
        settings: of the comparison.
        folder: of the comparison. The cell has its own folder below it; pooled features are shared.
        progress: True to show progress bars.
    """

    method: Method
    seed: int
    settings: Settings
    folder: Path
    progress: bool

    @property
    def name(self) -> str:
        """Method and seed, which name its folder."""
        return f"{self.method.name}-{self.seed}"

    @property
    def home(self) -> Path:
        """The folder of its files."""
        return self.folder / self.name

    @property
    def first(self) -> bool:
        """Whether this is the first seed of its method."""
        return self.seed == self.method.seeds[0]

    def members(self) -> list[Cell]:
        """The cells of a ladder's members: of the same seed, or else of their first seed."""
        return [self._cell_of(name) for name in self.method.members]

    def _cell_of(self, name: str) -> Cell:
        """The cell of another method with the same seed, or else with its first seed."""
        other = self.settings.method(name)
        seed = other.seeds[0]
        if self.seed in other.seeds:
            seed = self.seed
        return Cell(other, seed, self.settings, self.folder, self.progress)

    @cached_property
    def _start(self) -> Network | None:
        """The trained network whose model this cell begins with, or None."""
        if self.method.start is None:
            return None
        return self._cell_of(self.method.start).network

    def asked(self) -> dict[str, Any]:
        """The flags of its network as plain data, with those of the networks that it is made of."""
        sources = self.members()
        if self.method.start is not None:
            sources.append(self._cell_of(self.method.start))
        asked = self.method.asked(self.seed)
        if sources:
            asked["of"] = [cell.asked() for cell in sources]
        return asked

    def claim(self) -> None:
        """Write the flags of this cell into its folder.

        Raises InvalidArgument if the folder has a network with other flags.
        """
        file = self.home / "settings.json"
        asked = self.asked()
        if not file.exists():
            write_json(file, KIND, SCHEMA, asked)
            return
        # A flag that is newer than the folder had its default.
        earlier = Method("").flags(self.seed)
        earlier["of"] = asked.get("of")
        earlier.update(read_json(file, KIND, SCHEMA)[1])
        for key, value in asked.items():
            if value != earlier[key]:
                raise InvalidArgument(
                    f"{self.home} was made with {key.replace('_', '-')} = {earlier[key]!r}, but "
                    f"now it is {value!r}. Remove that folder, or write to another one"
                )

    @property
    def done(self) -> bool:
        """Whether it was trained and recorded before."""
        for role in self._roles:
            if not (self.home / f"{role}.npz").exists():
                return False
        return True

    @property
    def _roles(self) -> tuple[str, ...]:
        """The roles of rows that it is recorded on."""
        if self.method.static:  # it has no thresholds
            return ("test",)
        return ("calibration", "test")

    def make(self) -> None:
        """Train and record it, unless that is done."""
        for role in self._roles:
            self.trace(role)

    @cached_property
    def network(self) -> Network:
        """The trained network: from its folder, or made now."""
        if self.method.members:
            return self._stacked()
        path = self.home / "network"
        if path.exists():
            return self._loaded(path)
        network = self._untrained()
        if self._start is not None:
            network.trained_on = union([network.trained_on, self._start.trained_on])
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

    def _stacked(self) -> Network:
        """The network of a ladder, from those of its members."""
        networks = {cell.method.name: cell.network for cell in self.members()}
        models = {name: _member(network) for name, network in networks.items()}
        example = example_of(self.method, self.settings)
        stacked = ladder(models, gate=self.method.gate, example=example)
        stacked.trained_on = union([network.trained_on for network in networks.values()])
        return stacked

    def _loaded(self, path: Path) -> Network:
        """The network from its folder.

        Parts that are not in its files, such as the user's own code, are built again, as the first
        time.
        """
        method = self.method
        from_files = (method.model or "").startswith(FROM_FILES)
        if method.sizes and not from_files:
            arms = self._untrained()
            return load(path, {member.name: arms.model_of(member) for member in arms.members})
        specs = [method.preprocess, method.gate, *_exit_specs(method.exits)]
        own_code = [spec for spec in specs if ":" in spec]
        if not own_code:
            if from_files and not self._is_converted:
                return load(path, None)
            return load(path, self._model())
        built = self._untrained()
        member = built.members[0]
        exits = dict[str, Exit]()
        gates = dict[str, Gate]()
        for name in member.cuts:
            if _is_own_code(built.exit_of(name)):
                exits[name] = built.exit_of(name)
            if _is_own_code(built.gate_of(name)):
                gates[name] = built.gate_of(name)
        model = (built.model_of(member), built.preprocess_of(member))
        return load(path, model, exits=exits, gates=gates)

    @property
    def seconds(self) -> float | None:
        """Seconds of all epochs of training, or None if nothing was trained.

        The epochs of a run that was stopped count too.
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
        """The model before anything is replaced: that of `start`, or of `model`."""
        if self._start is not None:
            return deep_copy(self._start.model_of(self._start.members[0]))
        assert self.method.model is not None
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return make_model(self.method.model, self.method.weights)

    def _original(self) -> nn.Module:
        """The model before it was converted: by this method, or by the one that it starts with."""
        if not self.method.layer and self.method.start is not None:
            return self._cell_of(self.method.start)._original()
        return self._before()

    def _preprocess(self) -> nn.Module | None:
        """The preprocessing of its model."""
        assert self.method.model is not None
        if self.method.preprocess == "auto":
            return preprocess_of(self.method.model)
        return make_preprocess(self.method.preprocess)

    @property
    def _is_converted(self) -> bool:
        """Whether its model has cheaper layers, of its own or from its start."""
        if self.method.layer:
            return True
        return self.method.start is not None and self._cell_of(self.method.start)._is_converted

    def _spec(self, model: nn.Module) -> str | None:
        """The name of its model, if it has one."""
        assert self.method.model is not None
        if not self._is_converted:
            return self.method.model
        return spec_of(model, self.method.model)

    def _untrained(self) -> Network:
        """The network before it is trained. Random numbers depend only on the seed."""
        method = self.method
        model = self._model()
        preprocess = self._preprocess()
        spec = self._spec(model)
        if method.static or method.unrolled:
            return plain_network(model, ModelSpec(BACKBONE, spec), preprocess).eval()
        x = example_of(method, self.settings)
        if method.forks:
            return self._forked(model, spec, preprocess, x)
        # All seeds have the places of the first one.
        first = replace(self, seed=method.seeds[0])
        begun = first.asked().get("of")
        names, seen = places_of(
            method, self.settings, self.folder / "places", first._model, preprocess, begun
        )
        parts = method.parts
        if names:
            parts = None
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            network = cut(
                model,
                x,
                at=names,
                parts=parts,
                length=free_of(method, self.settings),
                exits=method.exits,
                gate=method.gate,
                preprocess=preprocess,
                spec=spec,
            )
        network.trained_on = union([network.trained_on, seen])
        return network

    def _forked(
        self, model: nn.Module, spec: str | None, preprocess: nn.Module | None, x: Any
    ) -> Network:
        """The network before it is trained, with units that rows skip or sizes that they choose."""
        method = self.method
        # The default gate is for exits. Forks have defaults of their own.
        gate: str | None = method.gate
        if gate == Method("").gate:
            gate = None
        options: dict[str, Any] = {"preprocess": preprocess, "spec": spec}
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            if method.sizes is not None:
                sizes = list(map(int, words(method.sizes) or ()))
                return resolutions(model, x, sizes, gate=gate or "predictor", **options)
            units = words(method.skip) or ()
            return cut(model, x, skip=units, gate=gate or "controller", **options)

    def _train(self, network: Network) -> None:
        """Train the network in place, and write trained.json."""
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
        record = {"seconds": history.seconds, "notes": list(history.notes)}
        write_json(self.home / "trained.json", KIND, SCHEMA, record)

    def trace(self, role: str) -> Trace:
        """All exits on the rows of a role (calibration or test) under the network's own gate.

        They are recorded once, and again if the settings name other rows or another engine than the
        file has.
        """
        file = self.home / f"{role}.npz"
        data = str(getattr(self.settings, role))
        engine = self.settings.engine
        if file.exists():
            saved = Trace.load(file)
            name = saved.header.data
            has_same_rows = name in (data, data.strip()) or name == rows(data).name
            if has_same_rows and saved.header.origin.engine == engine_of(engine)[1]:
                return saved
        options: dict[str, Any] = {"engine": engine, "progress": self.progress}
        if self.method.settings:
            options["settings"] = list(self.method.settings)
        with warnings.catch_warnings():
            # `Comparison.doubts` reports it once for all seeds.
            warnings.simplefilter("ignore", BetterExit)
            trace = record(
                self.network, data, batch_size=self.method.batch_size, timed=False, **options
            )
        trace.save(file)
        return trace

    def plain(self) -> float:
        """MACs per row of the plain network."""
        return plain_of(self.trace("test"))

    def traces(self, gate: str) -> tuple[Trace, Trace]:
        """The traces of calibration and test rows under a gate.

        Raises OverlappingRows if rows are in two roles.
        """
        calibration = self.trace("calibration")
        test = self.trace("test")
        apart = self._apart(calibration, test)
        if gate == OWN:
            return apart
        other = self._under(gate)
        engine = self.settings.engine
        calibration = rescored(calibration, other, rows(self.settings.calibration), engine)
        test = rescored(test, other, rows(self.settings.test), engine)
        return self._apart(calibration, test)

    def _apart(self, calibration: Trace, test: Trace) -> tuple[Trace, Trace]:
        """Both traces without rows that have another role too, with drop-seen.

        Without drop-seen it raises OverlappingRows if there are such rows.
        """
        drop = self.settings.drop_seen
        unseen_calibration, _ = unseen_rows(calibration, drop_seen=drop, what="calibration")
        unseen_test, _ = unseen_rows(test, drop_seen=drop, what="test", seen=calibration.seen)
        return unseen_calibration, unseen_test

    def _under(self, gate: str) -> Network:
        """The network with a gate."""
        if gate == OWN:
            return self.network
        return regated(self.network, gate)

    def kept_figures(self, gate: str, unit: float) -> Figures | None:
        """Its figures under a gate, or None if they were not computed for these settings."""
        file = self._file("figures", gate)
        if not file.exists():
            return None
        body = read_json(file, KIND, SCHEMA)[1]
        if body["asked"] == self._asked(unit):
            return Figures.from_json(body["figures"])
        return None

    def figures(self, gate: str, unit: float) -> Figures:
        """Its figures under a gate, computed once. Budgets are shares of `unit` MACs."""
        saved = self.kept_figures(gate, unit)
        if saved is not None:
            return saved
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
        """The settings that figures depend on, as plain data."""
        asked = {key: getattr(self.settings, key) for key in FIGURES}
        for key in FIGURES_IF_SET:
            if getattr(self.settings, key):
                asked[key] = getattr(self.settings, key)
        asked["budgets"] = list(self.settings.budgets)  # as JSON has it
        asked["engine"] = engine_of(self.settings.engine)[1]
        asked["unit"] = unit
        asked["splits"] = 0
        if self.first:  # random splits take time, so only the first seed has them
            asked["splits"] = self.settings.splits
        return asked

    def _file(self, what: str, gate: str) -> Path:
        """The file of a gate's figures or times."""
        return self.home / f"{what}-{gate.replace(':', '-')}.json"

    def timed(self, unit: float) -> Mapping[str, Any] | None:
        """The report of `bench` for the best plan under the first gate, within the shown budget.

        None for static networks, for later seeds, and if no plan fits the budget.
        """
        settings = self.settings
        gate = self.method.gates[0]
        if not settings.wall_clock or self.method.static or not self.first:
            return None
        budget = settings.budgets[settings.shown]
        file = self._file("bench", gate)
        engine = engine_of(settings.engine)[1]
        asked = [budget, settings.repeats, settings.calibration, settings.test, engine, unit]
        if file.exists():
            body = read_json(file, KIND, SCHEMA)[1]
            if body["asked"] == asked:
                lines: Mapping[str, Any] = body["lines"]
                return lines
        calibration, test = self.traces(gate)
        plan = best_within(calibration, budget * unit / plain_of(calibration))
        if plan is None:
            return None
        # A batch that is larger than the test set cannot be timed.
        x = next(rows(settings.test).batches(TIMED)).x
        batches = [size for size in BATCHES if size <= len(test)]
        report = bench(
            self._under(gate),
            plan,
            x,
            batches=batches,
            repeats=settings.repeats,
            engine=settings.engine,
        )
        write_json(file, KIND, SCHEMA, {"asked": asked, "lines": report.to_json()})
        return self.timed(unit)  # as the file has it

    def cost(self, reference: Cell) -> ModelCost | None:
        """The cost of its model, counted once.

        With wall-clock it is also timed, in turn with the model of `reference`.

        Returns:
            The cost. None for ladders and later seeds, and if no method is static or converted,
            because all methods then have the same model.
        """
        settings = self.settings
        other_models = [method for method in settings.methods if method.static or method.layer]
        if self.method.members or not self.first or not other_models:
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
        cost = size_of(network, _first_rows(x, SIZED))
        if settings.wall_clock:
            unit = network
            if reference.name != self.name:
                unit = reference.network
            count = count_of(as_inputs(x))
            batches = tuple([size for size in BATCHES if size <= count])
            times = times_of(
                network,
                unit,
                x,
                batches=batches,
                repeats=settings.repeats,
                engine=settings.engine,
                clock=time.perf_counter,
            )
            cost = replace(cost, times=times)
        write_json(file, KIND, SCHEMA, {"asked": asked, "cost": cost.to_json()})
        return cost


def _first_rows(x: Any, count: int) -> Any:
    """The first rows of a batch, as one array or as named ones."""
    if isinstance(x, Mapping):
        return {name: value[:count] for name, value in x.items()}
    return x[:count]


def _exit_specs(exits: str | Mapping[str, str]) -> list[str]:
    """The specs of all exits of a method."""
    if isinstance(exits, str):
        return [exits]
    return list(exits.values())


def _is_own_code(part: Exit | Gate) -> bool:
    """Whether an exit or a gate is the user's own code, which is never run from a file."""
    return ":" in str(part.config().get("name", ""))


def _member(network: Network) -> Any:
    """A network as a member of a ladder.

    A network that is cut keeps its exits. A plain one becomes its model and its preprocessing.
    """
    if network.members[0].cuts:
        return network
    return network.model_of(network.members[0]), network.preprocess_of(network.members[0])
