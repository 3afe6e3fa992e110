"""The one loop. Recipes supply phases and losses; anyone may write a loop of their own, a Network being a Module."""

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
from offramp.fitting.history import Epoch, History
from offramp.fitting.interrupting import interruptible
from offramp.fitting.lessons import Array, Lessons, Roll
from offramp.fitting.looking import Looking, view_of
from offramp.fitting.norms import shared_norms
from offramp.fitting.pooling import Pooling
from offramp.fitting.stepping import Stepping
from offramp.fitting.tallying import numbers_of, require_finite, require_rows
from offramp.networks.inputs import State
from offramp.networks.network import Network
from offramp.networks.recipe import Lesson, Phase, Recipe, Whole

EVERY = 60.0  # seconds between checkpoints in the middle of an epoch
ECHO = 5.0  # seconds in which a launcher passes a Ctrl-C on that the terminal told its processes too
UNSEEN: Mapping[str, Mapping[str, Tensor]] = {"logits": {}, "features": {}}  # where nobody has looked
LOOKED = 256  # rows that are looked at together where nothing is taught

Held = tuple[Rows, Roll]


@dataclass(frozen=True)
class Course:
    """What a run is given and never changes. begun: as plain data, for checkpoints; folder: None keeps nothing."""

    network: Network
    recipe: Recipe
    phases: tuple[Phase, ...]
    taught: Held
    development: Held | None
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

    def __init__(self, course: Course, resumed: Resumed | None) -> None:
        self.course, self.network = course, course.network
        self.at, self.resumed = (resumed.progress if resumed else Progress()), resumed
        self.ended: Optimizer | None = None  # that of the phase that ended last
        self.saved = time.perf_counter()

    def run(self) -> History:
        """Teach all phases that are left."""
        for number, phase in enumerate(self.course.phases):
            if number < self.at.phase:
                continue
            self._mode(phase)
            if phase.by == "solve":
                self._solve(number, phase)
            else:
                self._teach(number, phase)
            self.at = replace(self.at, phase=number + 1, epoch=0, step=0, sums=None, seconds=0.0)
            self._save()
        return History(self.at.epochs, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """Which phases read what was computed once, and how rows were augmented."""
        once = [phase.name for phase in self.course.phases if phase.reads == "pooled"]
        anew = [phase.name for phase in self.course.phases if phase.reads == "input"]
        copies, augmented = self.course.pooling.views, self.course.pooling.augment is not None
        views = f"; {copies} augmented copies of each row were kept" if augmented else ""
        notes = [f"pooled features were computed once for {', '.join(once)}{views}"] if once else []
        return (
            *notes,
            *([f"rows were augmented anew in every epoch of {', '.join(anew)}"] if anew and augmented else []),
        )

    def _teach(self, number: int, phase: Phase) -> None:
        """Epochs over the training rows, a batch at a time."""
        pooled = phase.reads == "pooled"
        looking = Looking(self.network, self.network.aids[phase.teacher] if phase.teacher else None)
        lessons = self._lessons(number, phase)
        held = self._development(pooled=pooled)
        require_rows(lessons, self.network)
        steps = phase.epochs * lessons.steps
        stepping = Stepping(phase, steps, self.course.accelerator, looking, lessons.processes)
        self._restore(number, phase, stepping)
        echo = ECHO if self.course.processes.count > 1 else 0.0
        with interruptible(echo) as asked, phase.during(), shared_norms(self.network, lessons.processes):
            for epoch in range(self.at.epoch, phase.epochs):
                batches = lessons.epoch(epoch, self.at.step)
                what = f"{phase.name}, epoch {epoch + 1} of {phase.epochs}"
                left = lessons.steps - self.at.step
                start = time.perf_counter() - self.at.seconds
                tally = dict(self.at.sums or {})
                for state, positions in track(batches, what=what, total=left, show=self.course.progress):
                    step = epoch * lessons.steps + self.at.step
                    size = lessons.size(self.at.step)
                    lesson = lessons.lesson(positions, phase.name, step, steps)
                    lesson = replace(lesson, share=len(positions) / size)
                    figures = self._step(phase, stepping, state, lesson, lessons.processes)
                    for name, value in figures.items():
                        tally[name] = tally.get(name, 0.0) + value * size
                    seconds = time.perf_counter() - start
                    self.at = replace(self.at, epoch=epoch, step=self.at.step + 1, sums=tally, seconds=seconds)
                    self._pause(asked, stepping, lessons, due=time.perf_counter() - self.saved > EVERY)
                self._end_epoch(phase, epoch, lessons, held, tally, stepping.optimiser)
                self._pause(asked, stepping, lessons, due=epoch + 1 < phase.epochs)
        self.ended = stepping.optimiser

    def _step(
        self, phase: Phase, stepping: Stepping, state: State, lesson: Lesson, shared: Processes
    ) -> Mapping[str, float]:
        """One batch: outputs, loss, backward, step.

        Returns:
            The losses as numbers, the mean over all processes.
        """
        recipe = self.course.recipe
        pooled = phase.reads == "pooled"
        outputs = stepping.look(state, pooled) if phase.looks else UNSEEN
        view = view_of(self.network, outputs, state, pooled)
        if phase.by == "update":  # the recipe has a backward pass and a step of its own
            figures = numbers_of(recipe.update(view, lesson, stepping.optimiser))
            require_finite(figures, view, phase, lesson.step, self.course.folder)
        else:
            losses = recipe.loss(view, lesson)
            figures = shared.mean(numbers_of(losses), lesson.share)
            require_finite(figures, view, phase, lesson.step, self.course.folder)
            stepping.step(losses, lesson.share)  # backward, clip, optimizer step
        stepping.end_step()
        return figures

    def _pause(self, asked: Event, stepping: Stepping, lessons: Lessons, *, due: bool) -> None:
        """A checkpoint when it is due, or when somebody has asked to stop: then the run ends here, in all processes."""
        many = self.course.processes
        due, stop = many.either(due and many.main, asked.is_set())  # their clocks differ
        if due or stop:
            self._save(stepping, lessons)
        if stop:
            raise KeyboardInterrupt

    def _solve(self, number: int, phase: Phase) -> None:
        """One stroke on all rows."""
        development = self.course.development
        whole, held = self._whole(self.course.taught, held=False), development and self._whole(development, held=True)
        start = time.perf_counter()  # pooling is not part of it
        many = self.course.processes
        figures = many.alone(lambda: dict(self.course.recipe.solve(phase, whole, held)))
        many.spread(phase.parameters)
        seconds = time.perf_counter() - start
        taught = {id(value) for value in phase.parameters}
        measured = self._accuracies(self._development(pooled=True), pooled=True)
        for name in whole.exits:
            if all(id(value) not in taught for value in whole.exits[name].parameters()):
                measured.pop(f"accuracy/{name}", None)
        self._note(Epoch(phase.name, 0, 0, seconds, None, {**figures, **measured}))

    def _whole(self, rows: Held, *, held: bool) -> Whole:
        source, roll = rows
        assert roll.y is not None
        columns = self.course.pooling.features(source, roll.seen.fingerprint, held=held)
        copies = len(next(iter(columns.values()))) // len(roll.row)
        features = {name: torch.from_numpy(column) for name, column in columns.items()}
        y = torch.from_numpy(roll.y).repeat(copies)
        return Whole({name: self.network.exit_of(name) for name in columns}, features, y, copies)

    def _lessons(self, number: int, phase: Phase) -> Lessons:
        source, roll = self.course.taught
        cache = self.course.pooling.features(source, roll.seen.fingerprint) if phase.reads == "pooled" else None
        lessons = Lessons(
            source,
            roll,
            batch_size=self.course.batch_size,
            place=(self.course.seed, number),
            device=self.network.device(),
            cache=cache,
            augment=self.course.pooling.augment,
            # A recipe that steps by itself is no mean over rows (halves of a batch, trial steps): every process makes
            # the same steps of whole batches, which is exact, and no faster than one.
            processes=ALONE if phase.by == "update" else self.course.processes,
        )
        if self.resumed is not None and self.resumed.keep is not None:
            lessons.keep = self.resumed.keep.numpy()
        elif phase.rows is not None:
            lessons.keep = self._chosen(phase, lessons)
            self._mode(phase)
        return lessons

    def _chosen(self, phase: Phase, lessons: Lessons) -> Array:
        """The positions of the rows that a phase teaches on. Raises BadData when there are none."""
        assert phase.rows is not None
        kept, pooled, look = [], phase.reads == "pooled", Looking(self.network.eval())
        with torch.no_grad():
            for state, positions in lessons.in_order(LOOKED):
                view = view_of(self.network, look(state, pooled), state, pooled)
                kept.append(positions[phase.rows(view, lessons.lesson(positions, phase.name)).cpu().numpy()])
        found: Array = np.concatenate(lessons.processes.woven(kept))
        if not len(found):
            raise BadData(
                f"the phase {phase.name!r} chose none of the {len(lessons.keep)} rows; nothing is left to teach"
            )
        return found

    def _mode(self, phase: Phase) -> None:
        """Gradients for what is taught and nothing else; training mode for the models, exits and gates it stands in."""
        network, taught = self.network.eval(), {id(value) for value in phase.parameters}
        aids, models = network.aids.values(), [network.model_of(rung) for rung in network.rungs]
        for value in (*network.parameters(), *(value for aid in aids for value in aid.parameters())):
            value.requires_grad_(id(value) in taught)
        children = (*network.fronts.children(), *network.exits.children(), *network.gates.children())
        for part in (*models, *children, *aids):
            part.train(any(id(value) in taught for value in part.parameters()))
        for module in phase.still:
            module.eval()

    def _restore(self, number: int, phase: Phase, stepping: Stepping) -> None:
        """The state of a run that was stopped within this phase, or what this phase keeps of the one before."""
        resumed, self.resumed = self.resumed, None
        state = None if resumed is None else resumed.optimiser
        if resumed is not None and state is not None and (resumed.progress.epoch or resumed.progress.step):
            stepping.restore(state, resumed.extra)
            return
        known: Mapping[Tensor, Any] = {} if self.ended is None else self.ended.state
        if state is not None:  # stopped between the two phases: the state is that of the phase before
            before = self.course.phases[number - 1].parameters
            known = {before[place]: values for place, values in state["state"].items()}
        for value in phase.continues:
            if value in known:
                stepping.optimiser.state[value] = dict(known[value])

    def _end_epoch(
        self,
        phase: Phase,
        epoch: int,
        lessons: Lessons,
        held: Lessons | None,
        tally: Mapping[str, float],
        optimiser: Optimizer,
    ) -> None:
        figures = {name: value / len(lessons.keep) for name, value in tally.items()}
        seconds, rate = self.at.seconds, float(optimiser.param_groups[0]["lr"])
        self._even_out(phase, optimiser)
        figures |= self._accuracies(held, pooled=phase.reads == "pooled")
        self._mode(phase)
        self._note(Epoch(phase.name, epoch, (epoch + 1) * lessons.steps, seconds, rate, figures))
        self.at = replace(self.at, epoch=epoch + 1, step=0, sums=None, seconds=0.0)

    def _even_out(self, phase: Phase, optimiser: Optimizer) -> None:
        """Give all processes the main one's buffers, and after own steps weights too: those may differ in last bits."""
        values = [*self.network.buffers(), *(value for aid in self.network.aids.values() for value in aid.buffers())]
        if phase.by == "update":
            states = (value for state in optimiser.state.values() for value in state.values())
            values += [*phase.parameters, *(value for value in states if isinstance(value, Tensor))]
        self.course.processes.spread(values)

    def _development(self, *, pooled: bool) -> Lessons | None:
        """The development rows, as they are looked at after every epoch of a phase."""
        if self.course.development is None:
            return None
        source, roll = self.course.development
        cache = self.course.pooling.features(source, roll.seen.fingerprint, held=True) if pooled else None
        device = self.network.device()
        many = self.course.processes
        return Lessons(source, roll, batch_size=LOOKED, place=(0, 0), device=device, cache=cache, processes=many)

    def _accuracies(self, held: Lessons | None, *, pooled: bool) -> dict[str, float]:
        """The share of development rows that each exit answers right."""
        if held is None:
            return {}
        looking, right = Looking(self.network.eval()), Counter[str]()
        with torch.no_grad():
            for state, positions in held.in_order(LOOKED):
                y = held.lesson(positions, "").labels()
                for name, logits in looking(state, pooled)["logits"].items():
                    right[name] += int((logits.argmax(1) == y).sum())
        counts = held.processes.gathered(right)  # a process whose turn never came has counted nothing
        return {f"accuracy/{name}": sum(each[name] for each in counts) / len(held.roll.row) for name in counts[0]}

    def _note(self, epoch: Epoch) -> None:
        self.at = replace(self.at, epochs=(*self.at.epochs, epoch))
        if self.course.folder is not None:
            table, history = self.course.folder / "metrics.csv", History(self.at.epochs)
            self.course.processes.alone(lambda: history.save_csv(table))
        self.course.log(epoch, len(self.at.epochs))

    def _save(self, stepping: Stepping | None = None, lessons: Lessons | None = None) -> None:
        """A checkpoint, if there is a folder: within a phase, or without arguments at its end."""
        self.saved = time.perf_counter()
        if self.course.folder is None:
            return
        folder, keep = self.course.folder / "checkpoint", None if lessons is None else torch.from_numpy(lessons.keep)
        optimiser, extra = (self._kept(), {}) if stepping is None else (stepping.optimiser, stepping.extra())
        run = (self.network, self.course.begun, self.at, keep, optimiser, extra)
        self.course.processes.alone(lambda: save_checkpoint(folder, *run))

    def _kept(self) -> Optimizer | None:
        """At the end of a phase its optimiser, where the next phase continues from that."""
        phases = self.course.phases[self.at.phase : self.at.phase + 1]
        return self.ended if any(phase.continues for phase in phases) else None
