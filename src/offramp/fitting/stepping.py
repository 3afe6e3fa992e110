"""From losses to a step: in a precision, by an optimizer, under a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from offramp._support.processes import ALONE, Processes
from offramp.fitting.forward import NodeTensors, TrainingForward
from offramp.networks.inputs import State
from offramp.networks.recipe import Losses, Phase


class Stepping:
    """The optimizer of a phase, its schedule, and through Accelerate the precision and fp16's
    scaler.

    Accelerate's wrapper of the optimizer looks for installed packages at every step, more work than
    a small step: it is taken only where a scaler may leave steps out.
    """

    def __init__(
        self,
        phase: Phase,
        steps: int,
        accelerator: Any,
        forward: TrainingForward,
        processes: Processes = ALONE,
    ) -> None:
        self.optimizer: Optimizer = phase.optimizer(phase.parameters)
        self.schedule: LRScheduler | None = (
            None if phase.schedule is None else phase.schedule(self.optimizer, steps)
        )
        self.accelerator = accelerator
        self.scaler = accelerator.scaler
        self.parameters = phase.parameters
        self.processes = processes
        self.clip = phase.clip
        # For the precision alone, as in evaluation: `Processes.add_gradients` says why it is not
        # wrapped for several.
        self.forward = accelerator.prepare_model(forward, evaluation_mode=True)
        if self.scaler is None:
            self.scaled = None
        else:
            self.scaled = accelerator.prepare(self.optimizer)

    def look(self, state: State, pooled: bool) -> NodeTensors:
        """The forward; what mixed precision gave comes back as float32."""
        found: NodeTensors = self.forward(state, pooled)
        return found

    def step(self, losses: Losses, weight: float = 1.0) -> None:
        """Minimise the sum of the losses. weight: the share of the batch's rows of which this
        process has the means.
        """
        self.optimizer.zero_grad()
        if isinstance(losses, Tensor):
            loss = losses
        else:
            loss = torch.stack([*losses.values()]).sum()
        self.accelerator.backward(loss if weight == 1 else loss * weight)
        self.processes.add_gradients(self.parameters)
        if self.clip is not None:
            # gradients are too large by the scaler's factor, which Accelerate takes out
            if self.scaled is not None:
                self.accelerator.unscale_gradients(self.scaled)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        (self.scaled or self.optimizer).step()

    def end_step(self) -> None:
        """Move the schedule on; a step that the scaler left out does not count."""
        if self.schedule is not None and not (
            self.scaled is not None and self.scaled.step_was_skipped
        ):
            self.schedule.step()

    def extra(self) -> dict[str, Any]:
        """The state of schedule and scaler, as plain data."""
        return {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, optimizer: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Go on from the state of a run that was stopped."""
        self.optimizer.load_state_dict(dict(optimizer))
        if self.schedule is not None:
            self.schedule.load_state_dict(dict(extra["schedule"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(extra["scaler"]))
