"""The one loop. Recipes supply phases and losses; anyone may write a loop of their own, a Network
being a Module.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from offramp._support.processes import ALONE, Processes
from offramp._support.progress import track
from offramp.data.rows import Rows
from offramp.errors import BadData
from offramp.fitting.accelerating import Log
from offramp.fitting.checkpoint import Progress, Resumed, save_checkpoint
from offramp.fitting.forward import TrainingForward, outputs_of
from offramp.fitting.history import Epoch, History
from offramp.fitting.interrupting import interruptible
from offramp.fitting.loader import Array, BatchLoader, RowIndex
from offramp.fitting.metrics import numbers_of, require_finite, require_rows
from offramp.fitting.norms import shared_norms
from offramp.fitting.pooling import Pooling
from offramp.fitting.stepping import Stepping
from offramp.networks.inputs import State
from offramp.networks.network import Network
from offramp.networks.recipe import FeatureTable, Phase, Recipe, TrainingBatch

EVERY = 60.0  # seconds between checkpoints in the middle of an epoch
# seconds in which a launcher passes a Ctrl-C on that the terminal told its processes too
ECHO = 5.0
UNSEEN: Mapping[str, Mapping[str, Tensor]] = {
    "logits": {},
    "features": {},
}  # where nobody has looked
LOOKED = 256  # rows that are looked at together where nothing is trained

IndexedRows = tuple[Rows, RowIndex]


@dataclass(frozen=True)
class RunConfig:
    """What a run is given and never changes. begun: as plain data, for checkpoints; folder: None
    keeps nothing.
    """

    network: Network
    recipe: Recipe
    phases: tuple[Phase, ...]
    training: IndexedRows
    development: IndexedRows | None
    pooling: Pooling
    accelerator: Any
    log: Log
    batch_size: int
    seed: int
    folder: Path | None
    begun: Mapping[str, Any]
    progress: bool
    processes: Processes


class Loop:
    """One run through the phases of a recipe, from the start or from where a checkpoint left it."""

    def __init__(self, config: RunConfig, resumed: Resumed | None) -> None:
        self.config = config
        self.network = config.network
        self.at = resumed.progress if resumed else Progress()
        self.resumed = resumed
        self.ended: Optimizer | None = None  # that of the phase that ended last
        self.saved = time.perf_counter()

    def run(self) -> History:
        """Train all phases that are left."""
        for number, phase in enumerate(self.config.phases):
            if number < self.at.phase:
                continue
            self._mode(phase)
            if phase.by == "solve":
                self._solve(number, phase)
            else:
                self._train(number, phase)
            self.at = replace(self.at, phase=number + 1, epoch=0, step=0, sums=None, seconds=0.0)
            self._save()
        return History(self.at.epochs, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """Which phases read what was computed once, and how rows were augmented."""
        once = [phase.name for phase in self.config.phases if phase.reads == "pooled"]
        anew = [phase.name for phase in self.config.phases if phase.reads == "input"]
        copies = self.config.pooling.views
        augmented = self.config.pooling.augment is not None
        if augmented:
            views = f"; {copies} augmented copies of each row were kept"
        else:
            views = ""
        if once:
            notes = [f"pooled features were computed once for {', '.join(once)}{views}"]
        else:
            notes = []
        return (
            *notes,
            *(
                [f"rows were augmented anew in every epoch of {', '.join(anew)}"]
                if anew and augmented
                else []
            ),
        )

    def _train(self, number: int, phase: Phase) -> None:
        """Epochs over the training rows, a batch at a time."""
        pooled = phase.reads == "pooled"
        forward = TrainingForward(
            self.network, self.network.auxiliary[phase.teacher] if phase.teacher else None
        )
        loader = self._loader(number, phase)
        held = self._development(pooled=pooled)
        require_rows(loader, self.network)
        steps = phase.epochs * loader.steps
        stepping = Stepping(phase, steps, self.config.accelerator, forward, loader.processes)
        self._restore(number, phase, stepping)
        echo = ECHO if self.config.processes.count > 1 else 0.0
        with (
            interruptible(echo) as asked,
            phase.during(),
            shared_norms(self.network, loader.processes),
        ):
            for epoch in range(self.at.epoch, phase.epochs):
                batches = loader.epoch(epoch, self.at.step)
                what = f"{phase.name}, epoch {epoch + 1} of {phase.epochs}"
                left = loader.steps - self.at.step
                start = time.perf_counter() - self.at.seconds
                tally = dict(self.at.sums or {})
                for state, positions in track(
                    batches, what=what, total=left, show=self.config.progress
                ):
                    step = epoch * loader.steps + self.at.step
                    size = loader.size(self.at.step)
                    batch = loader.batch(positions, phase.name, step, steps)
                    batch = replace(batch, share=len(positions) / size)
                    figures = self._step(phase, stepping, state, batch, loader.processes)
                    for name, value in figures.items():
                        tally[name] = tally.get(name, 0.0) + value * size
                    seconds = time.perf_counter() - start
                    self.at = replace(
                        self.at, epoch=epoch, step=self.at.step + 1, sums=tally, seconds=seconds
                    )
                    self._pause(
                        asked, stepping, loader, due=time.perf_counter() - self.saved > EVERY
                    )
                self._end_epoch(phase, epoch, loader, held, tally, stepping.optimizer)
                self._pause(asked, stepping, loader, due=epoch + 1 < phase.epochs)
        self.ended = stepping.optimizer

    def _step(
        self,
        phase: Phase,
        stepping: Stepping,
        state: State,
        batch: TrainingBatch,
        shared: Processes,
    ) -> Mapping[str, float]:
        """One batch: outputs, loss, backward, step.

        Returns:
            The losses as numbers, the mean over all processes.
        """
        recipe = self.config.recipe
        pooled = phase.reads == "pooled"
        computed = stepping.look(state, pooled) if phase.looks else UNSEEN
        outputs = outputs_of(self.network, computed, state, pooled)
        if phase.by == "update":  # the recipe has a backward pass and a step of its own
            figures = numbers_of(recipe.update(outputs, batch, stepping.optimizer))
            require_finite(figures, outputs, phase, batch.step, self.config.folder)
        else:
            losses = recipe.loss(outputs, batch)
            figures = shared.mean(numbers_of(losses), batch.share)
            require_finite(figures, outputs, phase, batch.step, self.config.folder)
            stepping.step(losses, batch.share)  # backward, clip, optimizer step
        stepping.end_step()
        return figures

    def _pause(self, asked: Event, stepping: Stepping, loader: BatchLoader, *, due: bool) -> None:
        """A checkpoint when it is due, or when somebody has asked to stop: then the run ends here,
        in all processes.
        """
        many = self.config.processes
        due, stop = many.either(due and many.main, asked.is_set())  # their clocks differ
        if due or stop:
            self._save(stepping, loader)
        if stop:
            raise KeyboardInterrupt

    def _solve(self, number: int, phase: Phase) -> None:
        """One stroke on all rows."""
        development = self.config.development
        table = self._feature_table(self.config.training, held=False)
        held = development and self._feature_table(development, held=True)
        start = time.perf_counter()  # pooling is not part of it
        many = self.config.processes
        figures = many.alone(lambda: dict(self.config.recipe.solve(phase, table, held)))
        many.spread(phase.parameters)
        seconds = time.perf_counter() - start
        trained = {id(value) for value in phase.parameters}
        measured = self._accuracies(self._development(pooled=True), pooled=True)
        for name in table.exits:
            if all(id(value) not in trained for value in table.exits[name].parameters()):
                measured.pop(f"accuracy/{name}", None)
        self._note(Epoch(phase.name, 0, 0, seconds, None, {**figures, **measured}))

    def _feature_table(self, rows: IndexedRows, *, held: bool) -> FeatureTable:
        source, index = rows
        assert index.y is not None
        columns = self.config.pooling.features(source, index.seen.fingerprint, held=held)
        copies = len(next(iter(columns.values()))) // len(index.row)
        features = {name: torch.from_numpy(column) for name, column in columns.items()}
        y = torch.from_numpy(index.y).repeat(copies)
        return FeatureTable(
            {name: self.network.exit_of(name) for name in columns}, features, y, copies
        )

    def _loader(self, number: int, phase: Phase) -> BatchLoader:
        source, index = self.config.training
        if phase.reads == "pooled":
            cache = self.config.pooling.features(source, index.seen.fingerprint)
        else:
            cache = None
        loader = BatchLoader(
            source,
            index,
            batch_size=self.config.batch_size,
            draws=(self.config.seed, number),
            device=self.network.device(),
            cache=cache,
            augment=self.config.pooling.augment,
            # A recipe that steps by itself is no mean over rows (halves of a batch, trial steps):
            # every process makes the same steps of whole batches, which is exact, and no faster
            # than one.
            processes=ALONE if phase.by == "update" else self.config.processes,
        )
        if self.resumed is not None and self.resumed.keep is not None:
            loader.keep = self.resumed.keep.numpy()
        elif phase.rows is not None:
            loader.keep = self._chosen(phase, loader)
            self._mode(phase)
        return loader

    def _chosen(self, phase: Phase, loader: BatchLoader) -> Array:
        """The positions of the rows that a phase trains on. Raises BadData when there are none."""
        assert phase.rows is not None
        kept = []
        pooled = phase.reads == "pooled"
        look = TrainingForward(self.network.eval())
        with torch.no_grad():
            for state, positions in loader.in_order(LOOKED):
                outputs = outputs_of(self.network, look(state, pooled), state, pooled)
                kept.append(
                    positions[
                        phase.rows(outputs, loader.batch(positions, phase.name)).cpu().numpy()
                    ]
                )
        found: Array = np.concatenate(loader.processes.woven(kept))
        if not len(found):
            raise BadData(
                f"the phase {phase.name!r} chose none of the {len(loader.keep)} rows; nothing is "
                f"left to train"
            )
        return found

    def _mode(self, phase: Phase) -> None:
        """Gradients for what is trained and nothing else; training mode for the modules that it
        stands in.
        """
        network = self.network.eval()
        trained = {id(value) for value in phase.parameters}
        auxiliary = network.auxiliary.values()
        models = [network.model_of(member) for member in network.members]
        for value in (
            *network.parameters(),
            *(value for aux in auxiliary for value in aux.parameters()),
        ):
            value.requires_grad_(id(value) in trained)
        children = (
            *network.fronts.children(),
            *network.exits.children(),
            *network.gates.children(),
        )
        for part in (*models, *children, *auxiliary):
            part.train(any(id(value) in trained for value in part.parameters()))
        for module in phase.still:
            module.eval()

    def _restore(self, number: int, phase: Phase, stepping: Stepping) -> None:
        """The state of a run that was stopped within this phase, or what this phase keeps of the
        one before.
        """
        resumed = self.resumed
        self.resumed = None
        state = None if resumed is None else resumed.optimizer
        if (
            resumed is not None
            and state is not None
            and (resumed.progress.epoch or resumed.progress.step)
        ):
            stepping.restore(state, resumed.extra)
            return
        known: Mapping[Tensor, Any] = {} if self.ended is None else self.ended.state
        # stopped between the two phases: the state is that of the phase before
        if state is not None:
            before = self.config.phases[number - 1].parameters
            known = {before[index]: values for index, values in state["state"].items()}
        for value in phase.continues:
            if value in known:
                stepping.optimizer.state[value] = dict(known[value])

    def _end_epoch(
        self,
        phase: Phase,
        epoch: int,
        loader: BatchLoader,
        held: BatchLoader | None,
        tally: Mapping[str, float],
        optimizer: Optimizer,
    ) -> None:
        figures = {name: value / len(loader.keep) for name, value in tally.items()}
        seconds = self.at.seconds
        rate = float(optimizer.param_groups[0]["lr"])
        self._even_out(phase, optimizer)
        figures |= self._accuracies(held, pooled=phase.reads == "pooled")
        self._mode(phase)
        self._note(Epoch(phase.name, epoch, (epoch + 1) * loader.steps, seconds, rate, figures))
        self.at = replace(self.at, epoch=epoch + 1, step=0, sums=None, seconds=0.0)

    def _even_out(self, phase: Phase, optimizer: Optimizer) -> None:
        """Give all processes the main one's buffers, and after own steps weights too: those may
        differ in last bits.
        """
        values = [
            *self.network.buffers(),
            *(value for aux in self.network.auxiliary.values() for value in aux.buffers()),
        ]
        if phase.by == "update":
            states = (value for state in optimizer.state.values() for value in state.values())
            values += [*phase.parameters, *(value for value in states if isinstance(value, Tensor))]
        self.config.processes.spread(values)

    def _development(self, *, pooled: bool) -> BatchLoader | None:
        """The development rows, as they are looked at after every epoch of a phase."""
        if self.config.development is None:
            return None
        source, index = self.config.development
        if pooled:
            cache = self.config.pooling.features(source, index.seen.fingerprint, held=True)
        else:
            cache = None
        device = self.network.device()
        many = self.config.processes
        return BatchLoader(
            source,
            index,
            batch_size=LOOKED,
            draws=(0, 0),
            device=device,
            cache=cache,
            processes=many,
        )

    def _accuracies(self, held: BatchLoader | None, *, pooled: bool) -> dict[str, float]:
        """The share of development rows that each exit answers right."""
        if held is None:
            return {}
        forward = TrainingForward(self.network.eval())
        right = Counter[str]()
        with torch.no_grad():
            for state, positions in held.in_order(LOOKED):
                y = held.batch(positions, "").labels()
                for name, logits in forward(state, pooled)["logits"].items():
                    right[name] += int((logits.argmax(1) == y).sum())
        # a process whose turn never came has counted nothing
        counts = held.processes.gathered(right)
        return {
            f"accuracy/{name}": sum(each[name] for each in counts) / len(held.index.row)
            for name in counts[0]
        }

    def _note(self, epoch: Epoch) -> None:
        self.at = replace(self.at, epochs=(*self.at.epochs, epoch))
        if self.config.folder is not None:
            table = self.config.folder / "metrics.csv"
            history = History(self.at.epochs)
            self.config.processes.alone(lambda: history.save_csv(table))
        self.config.log(epoch, len(self.at.epochs))

    def _save(self, stepping: Stepping | None = None, loader: BatchLoader | None = None) -> None:
        """A checkpoint, if there is a folder: within a phase, or without arguments at its end."""
        self.saved = time.perf_counter()
        if self.config.folder is None:
            return
        folder = self.config.folder / "checkpoint"
        keep = None if loader is None else torch.from_numpy(loader.keep)
        optimizer, extra = (
            (self._kept(), {}) if stepping is None else (stepping.optimizer, stepping.extra())
        )
        run = (self.network, self.config.begun, self.at, keep, optimizer, extra)
        self.config.processes.alone(lambda: save_checkpoint(folder, *run))

    def _kept(self) -> Optimizer | None:
        """At the end of a phase its optimizer, where the next phase continues from that."""
        phases = self.config.phases[self.at.phase : self.at.phase + 1]
        return self.ended if any(phase.continues for phase in phases) else None
