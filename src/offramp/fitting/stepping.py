"""From losses to a step: in a precision, by an optimiser, under a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from offramp.errors import BadInput
from offramp.fitting.looking import Looked, Looking
from offramp.inputs import State
from offramp.recipe import Losses, Phase

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepping:
    """The optimiser of a phase, its schedule, and the scaler that keeps fp16's small gradients above 0.

    Torch's own autocast and scaler: those of Accelerate hang on a state of the whole process, so that a second run in
    another precision is refused there; and its optimiser looks for installed packages at every step.
    """

    def __init__(self, phase: Phase, steps: int, precision: str, device: torch.device) -> None:
        self.optimiser: Optimizer = phase.optimiser(phase.parameters)
        self.schedule: LRScheduler | None = None if phase.schedule is None else phase.schedule(self.optimiser, steps)
        self.kind, self.device = PRECISIONS[precision], device
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def look(self, looking: Looking, state: State, pooled: bool) -> Looked:
        """The forward; what mixed precision gave comes back as float32."""
        if self.kind is None:
            return looking(state, pooled)  # type: ignore[no-any-return]
        with torch.autocast(self.device.type, self.kind):
            found: Looked = looking(state, pooled)
        return {what: {name: _wide(value) for name, value in some.items()} for what, some in found.items()}

    def step(self, losses: Losses) -> None:
        """Minimise the sum of the losses."""
        loss = losses if isinstance(losses, Tensor) else torch.stack([*losses.values()]).sum()
        self.optimiser.zero_grad()
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimiser)

    def end_step(self) -> None:
        """Move scaler and schedule on; a step that the scaler left out does not count for the schedule."""
        done = True
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.update()
            done = self.scaler.get_scale() >= before
        if self.schedule is not None and done:
            self.schedule.step()

    def extra(self) -> dict[str, Any]:
        """The state of schedule and scaler, as plain data."""
        return {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, optimiser: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Go on from the state of a run that was stopped."""
        self.optimiser.load_state_dict(dict(optimiser))
        if self.schedule is not None:
            self.schedule.load_state_dict(dict(extra["schedule"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(extra["scaler"]))


def require_precision(precision: str, phases: tuple[Phase, ...], device: torch.device) -> None:
    """Raise BadInput for a precision in which these phases cannot be taught on this device."""
    if precision not in PRECISIONS:
        raise BadInput(f"got precision={precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision != "fp16":
        return
    if device.type != "cuda":
        raise BadInput(f"precision 'fp16' needs a CUDA device and the network lies on {device}; take 'bf16' or 'no'")
    if own := [phase.name for phase in phases if phase.by == "update"]:
        raise BadInput(
            f"the recipe steps by itself in phase {own[0]!r}, where nothing scales fp16's gradients; take "
            "'bf16' or 'no'"
        )


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
