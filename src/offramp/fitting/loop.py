"""The training loop of `fit`. `Loop._step` is one step of it: outputs, loss, backward, step.

A recipe supplies the phases and the losses. A Network is a torch Module, so you can also train it
with a loop of your own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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
from offramp.networks.recipe import FeatureTable, Phase, Recipe, TrainingBatch, TrainingOutputs

EVERY = 60.0  # seconds between checkpoints in the middle of an epoch
# Seconds in which a second Ctrl-C counts as the first: the terminal sends it to every process, and
# then the launcher forwards it to them again.
ECHO = 5.0
LOOKED = 256  # batch size where nothing is trained
# The outputs where the recipe runs the network itself.
UNSEEN: Mapping[str, Mapping[str, Tensor]] = {"logits": {}, "features": {}}

IndexedRows = tuple[Rows, RowIndex]


@dataclass(frozen=True)
class RunConfig:
    """The inputs of a run. They do not change while it trains.

    Attributes:
        network: the network to train, in place.
        recipe: supplies the losses.
        phases: the stretches of training, in order.
        training: rows that are trained on.
        development: rows that each epoch is measured on; None if there are none.
        pooling: supplies pooled features, computed once.
        accelerator: of Hugging Face Accelerate; handles the precision.
        log: called with each epoch and its number in the run.
        batch_size: rows of one step, over all processes.
        seed: of everything that is drawn.
        folder: where metrics.csv and checkpoints go; None writes nothing.
        identity: the inputs as plain data; a checkpoint resumes only a run with the same ones.
        progress: whether to show progress.
        processes: the processes that train together.
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
    identity: Mapping[str, Any]
    progress: bool
    processes: Processes


class Loop:
    """One run through the phases of a recipe, from the start or from a checkpoint.

    Args:
        config: the inputs of the run.
        resumed: the content of a checkpoint to continue from; None starts at the first phase.
    """

    def __init__(self, config: RunConfig, resumed: Resumed | None) -> None:
        self.config = config
        self.network = config.network
        self.at = resumed.progress if resumed else Progress()
        self.resumed = resumed
        self.ended: Optimizer | None = None  # of the phase that ended last
        self.saved = time.perf_counter()  # time of the last checkpoint

    def run(self) -> History:
        """Train all phases that are left.

        Returns:
            The history of all epochs, those before a resume included.
        """
        for number, phase in enumerate(self.config.phases):
            if number < self.at.phase:  # done before the run was resumed
                continue
            self._set_modes(phase)
            if phase.by == "solve":
                self._solve(phase)
            else:
                self._train(number, phase)
            self.at = replace(self.at, phase=number + 1, epoch=0, step=0, sums=None, seconds=0.0)
            self._save()
        return History(self.at.epochs, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """Which phases read pooled features, and how rows were augmented."""
        pooled = [phase.name for phase in self.config.phases if phase.reads == "pooled"]
        from_input = [phase.name for phase in self.config.phases if phase.reads == "input"]
        augmented = self.config.pooling.augment is not None
        notes = list[str]()
        if pooled:
            note = f"pooled features were computed once for {', '.join(pooled)}"
            if augmented:
                note += f"; {self.config.pooling.views} augmented copies of each row were kept"
            notes.append(note)
        if from_input and augmented:
            notes.append(f"rows were augmented anew in every epoch of {', '.join(from_input)}")
        return tuple(notes)

    # Training by steps

    def _train(self, number: int, phase: Phase) -> None:
        """Train one phase: epochs over the training rows."""
        teacher = self.network.auxiliary[phase.teacher] if phase.teacher else None
        forward = TrainingForward(self.network, teacher)
        loader = self._loader(number, phase)
        development = self._development(pooled=phase.reads == "pooled")
        require_rows(loader, self.network)
        steps = phase.epochs * loader.steps
        stepping = Stepping(phase, steps, self.config.accelerator, forward, loader.processes)
        self._restore(number, phase, stepping)
        echo = ECHO if self.config.processes.count > 1 else 0.0
        norms = shared_norms(self.network, loader.processes)
        with interruptible(echo) as interrupted, phase.during(), norms:
            for epoch in range(self.at.epoch, phase.epochs):
                totals = self._train_epoch(phase, epoch, stepping, loader, interrupted)
                self._end_epoch(phase, epoch, loader, development, totals, stepping.optimizer)
                self._pause(interrupted, stepping, loader, due=epoch + 1 < phase.epochs)
        self.ended = stepping.optimizer

    def _train_epoch(
        self,
        phase: Phase,
        epoch: int,
        stepping: Stepping,
        loader: BatchLoader,
        interrupted: Event,
    ) -> Mapping[str, float]:
        """One pass over the training rows, from the step where a checkpoint left it.

        Returns:
            The losses, summed over the rows of all processes.
        """
        first_step = self.at.step
        start = time.perf_counter() - self.at.seconds
        totals = dict(self.at.sums or {})
        batches = track(
            loader.epoch(epoch, first_step),
            what=f"{phase.name}, epoch {epoch + 1} of {phase.epochs}",
            total=loader.steps - first_step,
            show=self.config.progress,
        )
        for state, positions in batches:
            step = epoch * loader.steps + self.at.step
            size = loader.size(self.at.step)
            batch = loader.batch(positions, phase.name, step, phase.epochs * loader.steps)
            batch = replace(batch, share=len(positions) / size)
            if phase.by == "update":
                figures = self._update(phase, stepping, state, batch)
            else:
                figures = self._step(phase, stepping, state, batch)
            # a mean over the batch counts with its number of rows
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value * size
            seconds = time.perf_counter() - start
            self.at = replace(
                self.at, epoch=epoch, step=self.at.step + 1, sums=totals, seconds=seconds
            )
            due = time.perf_counter() - self.saved > EVERY
            self._pause(interrupted, stepping, loader, due=due)
        return totals

    def _step(
        self, phase: Phase, stepping: Stepping, state: State, batch: TrainingBatch
    ) -> Mapping[str, float]:
        """One step of training: outputs, loss, backward, step.

        Returns:
            The losses as numbers, the mean over all processes.
        """
        outputs = self._outputs(phase, stepping, state)
        losses = self.config.recipe.loss(outputs, batch)
        figures = stepping.processes.mean(numbers_of(losses), batch.share)
        require_finite(figures, outputs, phase, batch.step, self.config.folder)
        stepping.backward(losses, batch.share)
        stepping.step()
        return figures

    def _update(
        self, phase: Phase, stepping: Stepping, state: State, batch: TrainingBatch
    ) -> Mapping[str, float]:
        """One step of a recipe that has its own backward pass and steps the optimizer itself."""
        outputs = self._outputs(phase, stepping, state)
        figures = numbers_of(self.config.recipe.update(outputs, batch, stepping.optimizer))
        require_finite(figures, outputs, phase, batch.step, self.config.folder)
        stepping.step_schedule()
        return figures

    def _outputs(self, phase: Phase, stepping: Stepping, state: State) -> TrainingOutputs:
        """The outputs of the network for a batch, as the recipe sees them."""
        pooled = phase.reads == "pooled"
        computed = stepping.look(state, pooled) if phase.looks else UNSEEN
        return outputs_of(self.network, computed, state, pooled)

    def _end_epoch(
        self,
        phase: Phase,
        epoch: int,
        loader: BatchLoader,
        development: BatchLoader | None,
        totals: Mapping[str, float],
        optimizer: Optimizer,
    ) -> None:
        """Measure an epoch, note it, and move on to the next."""
        figures = {name: value / len(loader.keep) for name, value in totals.items()}
        seconds = self.at.seconds
        rate = float(optimizer.param_groups[0]["lr"])
        self._even_out(phase, optimizer)
        figures |= self._accuracies(development, pooled=phase.reads == "pooled")
        self._set_modes(phase)  # measuring puts the network into eval mode
        self._note(Epoch(phase.name, epoch, (epoch + 1) * loader.steps, seconds, rate, figures))
        self.at = replace(self.at, epoch=epoch + 1, step=0, sums=None, seconds=0.0)

    def _pause(
        self, interrupted: Event, stepping: Stepping, loader: BatchLoader, *, due: bool
    ) -> None:
        """Write a checkpoint if one is due or the user pressed Ctrl-C. After Ctrl-C the run ends
        here, in all processes.
        """
        processes = self.config.processes
        # The main process decides whether a checkpoint is due, because the clocks differ.
        due, stop = processes.either(due and processes.main, interrupted.is_set())
        if due or stop:
            self._save(stepping, loader)
        if stop:
            raise KeyboardInterrupt

    # Training at once

    def _solve(self, phase: Phase) -> None:
        """Train one phase by one call of the recipe's solver on all rows."""
        table = self._feature_table(self.config.training, held=False)
        development = None
        if self.config.development is not None:
            development = self._feature_table(self.config.development, held=True)
        start = time.perf_counter()  # pooling is not part of the seconds
        # The main process solves; the others receive its parameters.
        processes = self.config.processes
        recipe = self.config.recipe
        figures = processes.alone(lambda: dict(recipe.solve(phase, table, development)))
        processes.spread(phase.parameters)
        seconds = time.perf_counter() - start
        # Report the accuracy of the exits that this phase trained, and not of the other ones.
        accuracies = self._accuracies(self._development(pooled=True), pooled=True)
        trained = _ids(phase.parameters)
        for name, exit_ in table.exits.items():
            if not _holds_any(exit_, trained):
                accuracies.pop(f"accuracy/{name}", None)
        self._note(Epoch(phase.name, 0, 0, seconds, None, {**figures, **accuracies}))

    def _feature_table(self, rows: IndexedRows, *, held: bool) -> FeatureTable:
        """The pooled features and labels of all rows, as a solver reads them."""
        source, index = rows
        assert index.y is not None
        columns = self.config.pooling.features(source, index.seen.fingerprint, held=held)
        features = {name: torch.from_numpy(column) for name, column in columns.items()}
        exits = {name: self.network.exit_of(name) for name in columns}
        # A column is [V N, F]: V copies of the N rows, one after the other.
        copies = len(next(iter(columns.values()))) // len(index.row)
        y = torch.from_numpy(index.y).repeat(copies)  # [N] -> [V N]
        return FeatureTable(exits, features, y, copies)

    # Rows

    def _loader(self, number: int, phase: Phase) -> BatchLoader:
        """The training batches of a phase."""
        source, index = self.config.training
        cache = None
        if phase.reads == "pooled":
            cache = self.config.pooling.features(source, index.seen.fingerprint)
        # If a recipe makes its own steps, its loss may not be a mean over rows (halves of a batch,
        # trial steps). Then every process makes the same steps of complete batches: exact, but not
        # faster than one process.
        processes = ALONE if phase.by == "update" else self.config.processes
        loader = BatchLoader(
            source,
            index,
            batch_size=self.config.batch_size,
            draws=(self.config.seed, number),
            device=self.network.device(),
            cache=cache,
            augment=self.config.pooling.augment,
            processes=processes,
        )
        if self.resumed is not None and self.resumed.keep is not None:
            loader.keep = self.resumed.keep.numpy()
        elif phase.rows is not None:
            loader.keep = self._chosen_rows(phase, loader)
            self._set_modes(phase)  # choosing puts the network into eval mode
        return loader

    def _chosen_rows(self, phase: Phase, loader: BatchLoader) -> Array:
        """The positions of the rows that a phase trains on. Raises BadData if it chooses none."""
        assert phase.rows is not None
        pooled = phase.reads == "pooled"
        forward = TrainingForward(self.network.eval())
        chosen = list[Array]()
        with torch.no_grad():
            for state, positions in loader.in_order(LOOKED):
                outputs = outputs_of(self.network, forward(state, pooled), state, pooled)
                mask = phase.rows(outputs, loader.batch(positions, phase.name))  # [b]
                chosen.append(positions[mask.cpu().numpy()])
        rows: Array = np.concatenate(loader.processes.woven(chosen))
        if not len(rows):
            raise BadData(
                f"the phase {phase.name!r} must train on at least 1 of the {len(loader.keep)} "
                f"rows, got 0"
            )
        return rows

    def _development(self, *, pooled: bool) -> BatchLoader | None:
        """The development batches of a phase; None without development rows."""
        if self.config.development is None:
            return None
        source, index = self.config.development
        cache = None
        if pooled:
            cache = self.config.pooling.features(source, index.seen.fingerprint, held=True)
        return BatchLoader(
            source,
            index,
            batch_size=LOOKED,
            draws=(0, 0),
            device=self.network.device(),
            cache=cache,
            processes=self.config.processes,
        )

    def _accuracies(self, development: BatchLoader | None, *, pooled: bool) -> dict[str, float]:
        """The accuracy of each exit on the development rows; empty without them."""
        if development is None:
            return {}
        forward = TrainingForward(self.network.eval())
        correct = Counter[str]()
        with torch.no_grad():
            for state, positions in development.in_order(LOOKED):
                y = development.batch(positions, "").labels()
                for name, logits in forward(state, pooled)["logits"].items():
                    correct[name] += int((logits.argmax(1) == y).sum())  # [b, C] -> [b] -> count
        # A process without a batch has no counts; a Counter gives 0 for it. The main process always
        # has one.
        counts = development.processes.gathered(correct)
        accuracies = dict[str, float]()
        for name in counts[0]:
            total = sum(count[name] for count in counts)
            accuracies[f"accuracy/{name}"] = total / len(development.index.row)
        return accuracies

    # The network's state

    def _set_modes(self, phase: Phase) -> None:
        """Turn on gradients for the trained parameters only, and training mode for their modules
        only.
        """
        network = self.network.eval()
        auxiliary = [*network.auxiliary.values()]
        trained = _ids(phase.parameters)
        parameters = [*network.parameters()]
        for module in auxiliary:
            parameters += module.parameters()
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in trained)

        modules: list[nn.Module] = [network.model_of(member) for member in network.members]
        modules += network.fronts.children()
        modules += network.exits.children()
        modules += network.gates.children()
        modules += auxiliary
        for module in modules:
            module.train(_holds_any(module, trained))
        for module in phase.still:
            module.eval()

    def _restore(self, number: int, phase: Phase, stepping: Stepping) -> None:
        """Restore the optimizer of a run that was stopped within this phase. At the start of a
        phase, take over the state of the parameters that `phase.continues` names.
        """
        resumed = self.resumed
        self.resumed = None  # a checkpoint is restored once
        state = None if resumed is None else resumed.optimizer
        if resumed is not None and state is not None:
            within_phase = resumed.progress.epoch or resumed.progress.step
            if within_phase:
                stepping.restore(state, resumed.extra)
                return
        before: Mapping[Tensor, Any] = {} if self.ended is None else self.ended.state
        if state is not None:
            # The run was stopped between two phases, so the state is that of the phase before. A
            # checkpoint knows its parameters by their index.
            parameters = self.config.phases[number - 1].parameters
            before = {parameters[index]: values for index, values in state["state"].items()}
        for parameter in phase.continues:
            if parameter in before:
                stepping.optimizer.state[parameter] = dict(before[parameter])

    def _even_out(self, phase: Phase, optimizer: Optimizer) -> None:
        """Give all processes the buffers of the main one, because theirs may differ in the last
        bits. If the recipe makes its own steps, that holds for weights and optimizer state too.
        """
        values = [*self.network.buffers()]
        for module in self.network.auxiliary.values():
            values += module.buffers()
        if phase.by == "update":
            values += phase.parameters
            for state in optimizer.state.values():
                values += [value for value in state.values() if isinstance(value, Tensor)]
        self.config.processes.spread(values)

    # Files

    def _note(self, epoch: Epoch) -> None:
        """Add an epoch to the history, to metrics.csv and to the log."""
        self.at = replace(self.at, epochs=(*self.at.epochs, epoch))
        if self.config.folder is not None:
            table = self.config.folder / "metrics.csv"
            history = History(self.at.epochs)
            self.config.processes.alone(lambda: history.save_csv(table))
        self.config.log(epoch, len(self.at.epochs))

    def _save(self, stepping: Stepping | None = None, loader: BatchLoader | None = None) -> None:
        """Write a checkpoint if there is a folder. Without arguments: the one at a phase's end."""
        self.saved = time.perf_counter()
        if self.config.folder is None:
            return
        folder = self.config.folder / "checkpoint"
        keep = None if loader is None else torch.from_numpy(loader.keep)
        if stepping is None:
            optimizer = self._optimizer_to_continue()
            extra = dict[str, Any]()
        else:
            optimizer = stepping.optimizer
            extra = stepping.extra()
        run = (self.network, self.config.identity, self.at, keep, optimizer, extra)
        self.config.processes.alone(lambda: save_checkpoint(folder, *run))

    def _optimizer_to_continue(self) -> Optimizer | None:
        """The optimizer of the phase that has ended, if the next phase continues from it."""
        if self.at.phase < len(self.config.phases):
            next_phase = self.config.phases[self.at.phase]
            if next_phase.continues:
                return self.ended
        return None


def _ids(parameters: Sequence[Tensor]) -> set[int]:
    """The identities of parameters: tensors compare by value, so a set of them would not do."""
    return {id(parameter) for parameter in parameters}


def _holds_any(module: nn.Module, ids: Collection[int]) -> bool:
    """Whether any parameter of a module is among these."""
    for parameter in module.parameters():
        if id(parameter) in ids:
            return True
    return False
