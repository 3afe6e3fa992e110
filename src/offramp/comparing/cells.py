"""One network of a comparison, by the same verbs as by hand: cut, taught, recorded; each step a file, done once.

<folder>/<method>-<seed>/settings.json, run/ (checkpoints, metrics.csv), network/, calibration.npz, test.npz,
figures-<gate>.json, bench-<gate>.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.benching import bench
from offramp.comparing.figures import Figures, best_within, figures_of, figures_of_plain
from offramp.comparing.gating import regated, rescored
from offramp.comparing.settings import Method, Settings
from offramp.cutting import cut, ladder
from offramp.data.rows import Rows, rows
from offramp.errors import BadInput
from offramp.factories import OURS, front_of, make_front, make_model
from offramp.files import read_json, write_json
from offramp.fitting.arguments import arguments_of
from offramp.fitting.teaching import fit, recipe_of
from offramp.network import Network, plain_network
from offramp.plan import Plan
from offramp.recording import record
from offramp.rungs import BACKBONE, Rung
from offramp.storing import load, save
from offramp.trace import Trace

KIND, SCHEMA = "comparison", 1
OWN = "own"
EXAMPLE, TIMED = 8, 256  # rows


@dataclass(frozen=True)
class Cell:
    """A method and a seed, in a folder of its own. cache: where pooled features stay for all cells."""

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

    def sibling(self, method: str) -> Cell:
        """The cell of another method with this seed, or with its only one."""
        other = self.settings.method(method)
        seed = self.seed if self.seed in other.seeds else other.seeds[0]
        return Cell(other, seed, self.settings, self.folder, self.progress)

    def claim(self) -> None:
        """Note what this cell is made of. Raises BadInput where its folder holds one that was made otherwise."""
        asked, file = self.method.asked(self.seed), self.home / "settings.json"
        if not file.exists():
            write_json(file, KIND, SCHEMA, asked)
            return
        was = read_json(file, KIND, SCHEMA)[1]
        was = Method("").asked(self.seed) | was  # a flag that is newer than the folder had its default
        if other := [key for key in asked if asked[key] != was[key]]:
            key = other[0]
            raise BadInput(
                f"{self.home} was made with {key} = {was[key]!r}, and now it is {asked[key]!r}; remove that "
                "folder, or write to another one"
            )

    @property
    def done(self) -> bool:
        """Whether it was taught and recorded before."""
        return all((self.home / f"{name}.npz").exists() for name in self._needed)

    @property
    def _needed(self) -> tuple[str, ...]:
        return ("test",) if self.method.static else ("calibration", "test")

    def make(self) -> None:
        """Teach and record it, where that is not done."""
        for name in self._needed:
            self._trace(name, getattr(self.settings, name))

    def plain(self) -> float:
        """MACs per row of its plain network."""
        trace = self._trace("test", self.settings.test)
        return trace.price(Plan.never_leave(trace.chain)).plain

    @cached_property
    def network(self) -> Network:
        """The taught network: from its folder, else made now."""
        if self.method.rungs:
            cells = [self.sibling(rung) for rung in self.method.rungs]
            models = {cell.method.name: _rung(cell.network) for cell in cells}
            return ladder(models, gate=self.method.gate, example=self._example())
        place = self.home / "network"
        if place.exists():
            spec = self.method.model or ""
            return load(place, None if spec.startswith(OURS) else self._model())
        network = self._made()
        if self.method.recipe is not None:
            self._teach(network)
        save(network, place)
        return network

    @property
    def seconds(self) -> float | None:
        """What teaching took, as far as this run saw it; None where nothing was taught."""
        file = self.home / "taught.json"
        return float(read_json(file, KIND, SCHEMA)[1]["seconds"]) if file.exists() else None

    def _model(self) -> nn.Module:
        assert self.method.model is not None
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return make_model(self.method.model, self.method.weights)

    def _made(self) -> Network:
        """The network before it is taught; what is drawn for it depends on the seed alone."""
        method, model = self.method, self._model()
        assert method.model is not None
        front = front_of(method.model) if method.front == "auto" else make_front(method.front)
        if method.static:
            return plain_network(model, Rung(BACKBONE, method.model), front)
        names = None if method.at is None else [name.strip() for name in method.at.split(",")]
        options: dict[str, Any] = {"exits": method.exit, "gate": method.gate, "front": front, "spec": method.model}
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return cut(model, self._example(), at=names, n=method.parts, **options)

    def _example(self) -> Any:
        source = rows(self.method.example or self.settings.calibration)
        return source.take_x(np.arange(min(EXAMPLE, len(source))))

    def _teach(self, network: Network) -> None:
        method, run = self.method, self.home / "run"
        assert method.recipe is not None
        start = time.perf_counter()
        history = fit(
            network,
            method.train,
            recipe=recipe_of(method.recipe, **arguments_of(method.arguments)),
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
        told = {"seconds": history.seconds, "whole": time.perf_counter() - start, "notes": list(history.notes)}
        write_json(self.home / "taught.json", KIND, SCHEMA, told)

    def _trace(self, name: str, data: str) -> Trace:
        """All exits on some rows, recorded once, under the network's own gate."""
        file = self.home / f"{name}.npz"
        if file.exists():
            return Trace.load(file)
        options: dict[str, Any] = {"engine": self.settings.engine, "progress": self.progress}
        found = record(self.network, data, batch_size=self.method.batch_size, timed=False, **options)
        found.save(file)
        return found

    def traces(self, gate: str) -> tuple[Trace, Trace]:
        """The traces of calibration and test rows under a gate. Raises OverlappingRows where rows are in two roles."""
        asked = (("calibration", self.settings.calibration), ("test", self.settings.test))
        calibration, test = (self._trace(name, data) for name, data in asked)
        calibration.seen.refuse_overlap(test.columns["digest"], "test")
        if learned := self.network.learned:
            learned.refuse_overlap(test.columns["digest"], "test")
            learned.refuse_overlap(calibration.columns["digest"], "calibration")
        if gate == OWN:
            return calibration, test
        other = regated(self.network, gate)
        sources: list[Rows] = [rows(data) for _, data in asked]
        engine = self.settings.engine
        return rescored(calibration, other, sources[0], engine), rescored(test, other, sources[1], engine)

    def figures(self, gate: str, unit: float) -> Figures:
        """Its figures under a gate, from their file or computed now. unit: MACs of which budgets are shares."""
        file, splits = self.home / f"figures-{_file(gate)}.json", self.settings.splits if self._first else 0
        asked = self._asked(unit, splits)
        if file.exists() and (body := read_json(file, KIND, SCHEMA)[1])["asked"] == asked:
            return Figures.from_json(body["figures"])
        if self.method.static:
            found = figures_of_plain(self._trace("test", self.settings.test))
        else:
            calibration, test = self.traces(gate)
            found = figures_of(calibration, test, self.settings, unit, splits=splits)
        write_json(file, KIND, SCHEMA, {"asked": asked, "figures": found.to_json()})
        return found

    def _asked(self, unit: float, splits: int) -> dict[str, Any]:
        keys = ("calibration", "test", "budgets", "risk", "at_most", "confidence", "engine")
        told = {key: getattr(self.settings, key) for key in keys}
        return told | {"budgets": list(self.settings.budgets), "unit": unit, "splits": splits}

    @property
    def _first(self) -> bool:
        return self.seed == self.method.seeds[0]

    def timed(self, gate: str, unit: float) -> Mapping[str, Any] | None:
        """Wall-clock of the best plan within the settings' budget, of the first seed; None where none is asked for."""
        settings, file = self.settings, self.home / f"bench-{_file(gate)}.json"
        if not settings.wall_clock or self.method.static or not self._first:
            return None
        asked = [settings.wall_clock_budget, settings.repeats, settings.engine, unit]
        if file.exists() and (body := read_json(file, KIND, SCHEMA)[1])["asked"] == asked:
            return body["lines"]  # type: ignore[no-any-return]
        calibration, _ = self.traces(gate)
        plain = calibration.price(Plan.never_leave(calibration.chain)).plain
        plan = best_within(calibration, settings.wall_clock_budget * unit / plain)
        if plan is None:
            return None
        network = self.network if gate == OWN else regated(self.network, gate)
        x = next(rows(settings.test).batches(TIMED)).x
        batches = tuple(size for size in (1, 64) if size <= len(calibration))
        found = bench(network, plan, x, batches=batches, repeats=settings.repeats, engine=settings.engine)
        write_json(file, KIND, SCHEMA, {"asked": asked, "lines": found.to_json()})
        return found.to_json()


def _rung(network: Network) -> Any:
    """A network as a rung: one that is cut keeps its exits, of a plain one the model behind its front."""
    if network.rungs[0].cuts:
        return network
    return network.model_of(network.rungs[0]), network.front_of(network.rungs[0])


def _file(gate: str) -> str:
    return gate.replace(":", "-")
