"""The one loop. Recipes supply phases and losses; anyone may write a loop of their own, a Network being a Module."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from offramp.data.rows import Rows
from offramp.errors import BadData, Diverged
from offramp.fitting.accelerating import Log
from offramp.fitting.checkpoint import Progress, Resumed, save_checkpoint
from offramp.fitting.history import Epoch, History
from offramp.fitting.interrupting import interruptible
from offramp.fitting.lessons import Array, Lessons, Roll
from offramp.fitting.looking import Looking, view_of
from offramp.fitting.pooling import Pooling
from offramp.fitting.stepping import Stepping
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
    log: Log
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
        """Epochs of steps: look, lose, step."""
        recipe, looking, pooled = self.course.recipe, Looking(self.network), phase.reads == "pooled"
        lessons, held = self._lessons(number, phase), self._development(pooled=pooled)
        _require_rows(lessons, self.network)
        steps = phase.epochs * lessons.steps
        stepping = Stepping(phase, steps, self.course.accelerator, looking)
        self._restore(stepping)
        with interruptible() as asked, phase.during():
            for epoch in range(self.at.epoch, phase.epochs):
                batches = lessons.epoch(epoch, self.at.step)
                what, left = f"{phase.name}, epoch {epoch + 1} of {phase.epochs}", lessons.steps - self.at.step
                start, tally = time.perf_counter() - self.at.seconds, dict(self.at.sums or {})
                for state, positions in track(batches, what=what, total=left, show=self.course.progress):
                    step = epoch * lessons.steps + self.at.step
                    lesson = lessons.lesson(positions, phase.name, step, steps)
                    view = view_of(self.network, stepping.look(state, pooled), state, pooled)
                    if phase.by == "update":
                        losses = recipe.update(view, lesson, stepping.optimiser)
                        figures = self._finite(losses, view, phase, step)
                    else:
                        losses = recipe.loss(view, lesson)
                        figures = self._finite(losses, view, phase, step)
                        stepping.step(losses)
                    stepping.end_step()
                    for name, value in figures.items():
                        tally[name] = tally.get(name, 0.0) + value * len(positions)
                    self.at = replace(
                        self.at, epoch=epoch, step=self.at.step + 1, sums=tally, seconds=time.perf_counter() - start
                    )
                    self._pause(asked, stepping, lessons, due=time.perf_counter() - self.saved > EVERY)
                self._end_epoch(phase, epoch, lessons, held, tally, stepping.optimiser)
                self._pause(asked, stepping, lessons, due=epoch + 1 < phase.epochs)

    def _pause(self, asked: Event, stepping: Stepping, lessons: Lessons, *, due: bool) -> None:
        """A checkpoint when it is due, or when somebody has asked to stop: then the run ends here."""
        if due or asked.is_set():
            self._save(stepping, lessons)
        if asked.is_set():
            raise KeyboardInterrupt

    def _solve(self, number: int, phase: Phase) -> None:
        """One stroke on all rows."""
        development = self.course.development
        whole, held = self._whole(self.course.taught, held=False), development and self._whole(development, held=True)
        start = time.perf_counter()  # pooling is not part of it
        figures = self.course.recipe.solve(phase, whole, held)
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

    def _restore(self, stepping: Stepping) -> None:
        """The state of a run that was stopped within this phase."""
        resumed, self.resumed = self.resumed, None
        if resumed is not None and resumed.optimiser is not None:
            stepping.restore(resumed.optimiser, resumed.extra)

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
        figures |= self._accuracies(held, pooled=phase.reads == "pooled")
        self._mode(phase)
        self._note(Epoch(phase.name, epoch, (epoch + 1) * lessons.steps, seconds, rate, figures))
        self.at = replace(self.at, epoch=epoch + 1, step=0, sums=None, seconds=0.0)

    def _development(self, *, pooled: bool) -> Lessons | None:
        """The development rows, as they are looked at after every epoch of a phase."""
        if self.course.development is None:
            return None
        source, roll = self.course.development
        cache = self.course.pooling.features(source, roll.seen.fingerprint, held=True) if pooled else None
        device = self.network.device()
        return Lessons(source, roll, batch_size=LOOKED, place=(0, 0), device=device, cache=cache)

    def _accuracies(self, held: Lessons | None, *, pooled: bool) -> dict[str, float]:
        """The share of development rows that each exit answers right."""
        if held is None:
            return {}
        looking, right = Looking(self.network.eval()), dict[str, int]()
        with torch.no_grad():
            for state, positions in held.in_order(LOOKED):
                y = held.lesson(positions, "").labels()
                for name, logits in looking(state, pooled)["logits"].items():
                    right[name] = right.get(name, 0) + int((logits.argmax(1) == y).sum())
        return {f"accuracy/{name}": count / len(held.roll.row) for name, count in right.items()}

    def _note(self, epoch: Epoch) -> None:
        self.at = replace(self.at, epochs=(*self.at.epochs, epoch))
        if self.course.folder is not None:
            History(self.at.epochs).save_csv(self.course.folder / "metrics.csv")
        self.course.log(epoch, len(self.at.epochs))

    def _save(self, stepping: Stepping | None = None, lessons: Lessons | None = None) -> None:
        """A checkpoint, if there is a folder: within a phase, or without arguments at its end."""
        self.saved = time.perf_counter()
        if self.course.folder is None:
            return
        folder, keep = self.course.folder / "checkpoint", None if lessons is None else torch.from_numpy(lessons.keep)
        optimiser, extra = (None, {}) if stepping is None else (stepping.optimiser, stepping.extra())
        save_checkpoint(folder, self.network, self.course.begun, self.at, keep, optimiser, extra)

    def _finite(self, losses: Losses, view: View, phase: Phase, step: int) -> dict[str, float]:
        """The losses as numbers. Raises Diverged when one is none."""
        figures = numbers_of(losses)
        if all(map(math.isfinite, figures.values())):
            return figures
        named = [n.removeprefix("loss/") for n, value in figures.items() if n != "loss" and not math.isfinite(value)]
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


def numbers_of(losses: Losses) -> dict[str, float]:
    """`loss`, and its summands as `loss/<exit>`: read at once, because every read waits for the device."""
    if isinstance(losses, Tensor):
        return {"loss": float(losses.detach())}
    numbers: list[float] = torch.stack([value.detach() for value in losses.values()]).tolist()
    return {"loss": sum(numbers), **{f"loss/{name}": value for name, value in zip(losses, numbers, strict=True)}}


def _require_rows(lessons: Lessons, network: nn.Module) -> None:
    if lessons.smallest < 2 and any(isinstance(part, _BatchNorm) and part.training for part in network.modules()):
        raise BadData(
            "a batch would hold a single row while batch norm is in training mode, where it has no variance; give a "
            "batch_size of 2 or more and as many rows"
        )
