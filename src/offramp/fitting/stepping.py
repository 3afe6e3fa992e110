"""From losses to a step of the optimizer: precision, gradients, clipping and schedule."""

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
    """The optimizer of a phase with its schedule. Accelerate handles the precision and the loss
    scaler of fp16.

    Accelerate's wrapper of the optimizer looks for installed packages at every step, which takes
    longer than a small step. So it is used only with a scaler, which may skip steps.

    Args:
        phase: supplies the optimizer, the schedule and the parameters.
        steps: of the phase, for the schedule.
        accelerator: of Hugging Face Accelerate.
        forward: runs the network on a batch.
        processes: that have a share of each batch.
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
        self.schedule: LRScheduler | None = None
        if phase.schedule is not None:
            self.schedule = phase.schedule(self.optimizer, steps)
        self.accelerator = accelerator
        self.scaler = accelerator.scaler
        self.parameters = phase.parameters
        self.processes = processes
        self.clip = phase.clip
        # evaluation_mode: Accelerate adds the precision and does not wrap the model for several
        # processes. `Processes.add_gradients` explains why.
        self.forward = accelerator.prepare_model(forward, evaluation_mode=True)
        # The optimizer as the scaler steps it; None without a scaler.
        self.scaled = None
        if self.scaler is not None:
            self.scaled = accelerator.prepare(self.optimizer)

    def look(self, state: State, pooled: bool) -> NodeTensors:
        """Run the network on a batch. Outputs in mixed precision are converted to float32."""
        tensors: NodeTensors = self.forward(state, pooled)
        return tensors

    def backward(self, losses: Losses, weight: float = 1.0) -> None:
        """Compute the gradients of the sum of the losses, over all processes.

        Args:
            losses: scalar tensors, each the mean over this process's rows of the batch.
            weight: the share of the batch's rows that this process has.
        """
        self.optimizer.zero_grad()
        if isinstance(losses, Tensor):
            loss = losses
        else:
            loss = torch.stack([*losses.values()]).sum()
        self.accelerator.backward(loss if weight == 1 else loss * weight)
        self.processes.add_gradients(self.parameters)

    def step(self) -> None:
        """Clip the gradients, then step the optimizer and the schedule."""
        if self.clip is not None:
            # With a scaler the gradients are too large by its factor. Divide it out before the norm
            # is taken.
            if self.scaled is not None:
                self.accelerator.unscale_gradients(self.scaled)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        (self.scaled or self.optimizer).step()
        self.step_schedule()

    def step_schedule(self) -> None:
        """Step the schedule, unless the scaler skipped the optimizer's step."""
        if self.schedule is None:
            return
        if self.scaled is not None and self.scaled.step_was_skipped:
            return
        self.schedule.step()

    def extra(self) -> dict[str, Any]:
        """The state of schedule and scaler, as plain data."""
        return {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, optimizer: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Continue from the state of a run that was stopped.

        Args:
            optimizer: the optimizer's state dict.
            extra: the result of `extra` in that run.
        """
        self.optimizer.load_state_dict(dict(optimizer))
        if self.schedule is not None:
            self.schedule.load_state_dict(dict(extra["schedule"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(extra["scaler"]))
