"""The one loop. Recipes supply phases and losses; anyone may write a loop of their own, a Network being a Module."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from offramp.data.rows import Rows
from offramp.errors import BadData, Diverged
from offramp.fitting.checkpoint import Progress, Resumed, save_checkpoint
from offramp.fitting.history import Epoch, History
from offramp.fitting.interrupting import interruptible
from offramp.fitting.lessons import Array, Lessons, Roll
from offramp.fitting.looking import Looking, view_of
from offramp.fitting.pooling import Pooling
from offramp.network import Network
from offramp.progress import track
from offramp.recipe import Losses, Phase, Recipe, View, Whole

EVERY = 60.0  # seconds between checkpoints in the middle of an epoch
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
    batch_size: int
    seed: int
    folder: Path | None
    begun: Mapping[str, Any]
    progress: bool


class Loop:
    """One run through the phases of a recipe, from the start or from where a checkpoint left it."""

    def __init__(self, course: Course, resumed: Resumed | None) -> None:
        self.course, self.network = course, course.network
        self.at, self.resumed = (resumed.progress if resumed else Progress()), resumed
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
            self._save(None, None)
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
        """Epochs of steps: look, lose, step."""
        recipe, accelerator, pooled = self.course.recipe, self.course.accelerator, phase.reads == "pooled"
        lessons = self._lessons(number, phase)
        _require_rows(lessons, self.network)
        look, optimiser = accelerator.prepare(Looking(self.network), phase.optimiser(phase.parameters))
        schedule = None if phase.schedule is None else phase.schedule(optimiser.optimizer, phase.epochs * lessons.steps)
        self._restore(optimiser, schedule)
        with interruptible() as asked, phase.during():
            for epoch in range(self.at.epoch, phase.epochs):
                batches = lessons.epoch(epoch, self.at.step)
                what, left = f"{phase.name}, epoch {epoch + 1} of {phase.epochs}", lessons.steps - self.at.step
                start, tally = time.perf_counter() - self.at.seconds, dict(self.at.sums or {})
                for state, positions in track(batches, what=what, total=left, show=self.course.progress):
                    step = epoch * lessons.steps + self.at.step
                    lesson = lessons.lesson(positions, phase.name, step, phase.epochs * lessons.steps)
                    view = view_of(self.network, look(state, pooled), state, pooled)
                    if phase.by == "update":
                        losses = recipe.update(view, lesson, optimiser)
                        self._require_finite(losses, view, phase, step)
                    else:
                        losses = recipe.loss(view, lesson)
                        self._require_finite(losses, view, phase, step)
                        optimiser.zero_grad()
                        accelerator.backward(total(losses))
                        optimiser.step()
                    if schedule is not None and not accelerator.optimizer_step_was_skipped:
                        schedule.step()
                    add(tally, losses, len(positions))
                    self.at = replace(
                        self.at, epoch=epoch, step=self.at.step + 1, sums=tally, seconds=time.perf_counter() - start
                    )
                    if asked.is_set() or time.perf_counter() - self.saved > EVERY:
                        self._save(optimiser, schedule)
                    if asked.is_set():
                        raise KeyboardInterrupt
                self._end_epoch(phase, epoch, lessons, tally, optimiser)
                self._save(optimiser, schedule)

    def _solve(self, number: int, phase: Phase) -> None:
        """One stroke on all rows."""
        development = self.course.development
        whole, held = self._whole(self.course.taught, held=False), development and self._whole(development, held=True)
        start = time.perf_counter()  # pooling is not part of it
        figures = self.course.recipe.solve(phase, whole, held)
        seconds = time.perf_counter() - start
        taught, measured = {id(value) for value in phase.parameters}, self._accuracies(pooled=True)
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
        return Whole({name: self.network.exit_of(name) for name in columns}, features, y)

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
        )
        if phase.rows is not None:
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
        found: Array = np.concatenate(kept)
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

    def _restore(self, optimiser: Any, schedule: LRScheduler | None) -> None:
        """The state of a run that was stopped within this phase."""
        resumed, self.resumed = self.resumed, None
        if resumed is None or resumed.optimiser is None:
            return
        optimiser.load_state_dict(resumed.optimiser)
        if schedule is not None:
            schedule.load_state_dict(dict(resumed.extra["schedule"]))
        if self.course.accelerator.scaler is not None:
            self.course.accelerator.scaler.load_state_dict(dict(resumed.extra["scaler"]))

    def _end_epoch(
        self, phase: Phase, epoch: int, lessons: Lessons, tally: Mapping[str, float], optimiser: Optimizer
    ) -> None:
        figures = {name: value / len(lessons.keep) for name, value in tally.items()}
        seconds, rate = self.at.seconds, float(optimiser.param_groups[0]["lr"])
        figures |= self._accuracies(pooled=phase.reads == "pooled")
        self._mode(phase)
        self._note(Epoch(phase.name, epoch, (epoch + 1) * lessons.steps, seconds, rate, figures))
        self.at = replace(self.at, epoch=epoch + 1, step=0, sums=None, seconds=0.0)

    def _accuracies(self, *, pooled: bool) -> dict[str, float]:
        """The share of development rows that each exit answers right."""
        if self.course.development is None:
            return {}
        source, roll = self.course.development
        assert roll.y is not None
        y = torch.from_numpy(roll.y)
        cache = self.course.pooling.features(source, roll.seen.fingerprint, held=True) if pooled else None
        device, look, right = self.network.device(), Looking(self.network.eval()), dict[str, float]()
        lessons = Lessons(source, roll, batch_size=LOOKED, place=(0, 0), device=device, cache=cache)
        with torch.no_grad():
            for state, positions in lessons.in_order(LOOKED):
                for name, logits in look(state, pooled)["logits"].items():
                    hits = (logits.argmax(1).cpu() == y[positions]).sum().item()
                    right[name] = right.get(name, 0.0) + hits / len(y)
        return {f"accuracy/{name}": share for name, share in right.items()}

    def _note(self, epoch: Epoch) -> None:
        self.at = replace(self.at, epochs=(*self.at.epochs, epoch))
        if self.course.folder is not None:
            History(self.at.epochs).save_csv(self.course.folder / "metrics.csv")
        self.course.accelerator.log(
            {f"{epoch.phase}/{name}": value for name, value in epoch.figures.items()}, step=len(self.at.epochs)
        )

    def _save(self, optimiser: Any, schedule: LRScheduler | None) -> None:
        self.saved = time.perf_counter()
        if self.course.folder is None:
            return
        scaler = self.course.accelerator.scaler
        extra = {
            "schedule": None if schedule is None or optimiser is None else schedule.state_dict(),
            "scaler": None if scaler is None or optimiser is None else scaler.state_dict(),
        }
        own = None if optimiser is None else optimiser.optimizer
        save_checkpoint(self.course.folder / "checkpoint", self.network, self.course.begun, self.at, own, extra)

    def _require_finite(self, losses: Losses, view: View, phase: Phase, step: int) -> None:
        parts = {"loss": losses} if isinstance(losses, Tensor) else dict(losses)
        if all(math.isfinite(float(value.detach())) for value in parts.values()):
            return
        named = [name for name, value in parts.items() if name != "loss" and not value.isfinite().all()]
        named += [name for name, logits in view.logits.items() if not logits.isfinite().all()]
        where = f"at exit {named[0]!r}" if named else "over all exits"
        folder = self.course.folder and self.course.folder / "checkpoint"
        kept = "there is no checkpoint (give folder=)"
        if folder is not None and folder.is_dir():
            kept = f"the last good checkpoint is {folder}"
        raise Diverged(
            f"the loss {where} is not finite in phase {phase.name!r} at step {step}, expected a number; {kept}: lower "
            "the learning rate, or look for rows that are not finite",
            step=step,
        )


def total(losses: Losses) -> Tensor:
    """The sum of the summands."""
    return losses if isinstance(losses, Tensor) else torch.stack([*losses.values()]).sum()


def add(tally: dict[str, float], losses: Losses, rows: int) -> None:
    """Add a batch's losses, weighted by its rows."""
    parts = {} if isinstance(losses, Tensor) else {f"loss/{name}": value for name, value in losses.items()}
    for name, value in {"loss": total(losses), **parts}.items():
        tally[name] = tally.get(name, 0.0) + float(value.detach()) * rows


def _require_rows(lessons: Lessons, network: nn.Module) -> None:
    if lessons.smallest < 2 and any(isinstance(part, _BatchNorm) and part.training for part in network.modules()):
        raise BadData(
            "a batch would hold a single row while batch norm is in training mode, where it has no variance; give a "
            "batch_size of 2 or more and as many rows"
        )
