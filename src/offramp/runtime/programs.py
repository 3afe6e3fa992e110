"""A part as one exported program on positional tensors, for what compiles it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.networks.taps import plain_attention
from offramp.plans.signature import INPUT


def read_by(engine_stage: EngineStage, state: Iterable[str]) -> tuple[str, ...]:
    """The tensors that a part reads, each input by its own name."""
    inputs = [name for name in state if name == INPUT or name.startswith(INPUT + "/")]
    return tuple(
        dict.fromkeys(
            key for name in engine_stage.reads for key in (inputs if name == INPUT else (name,))
        )
    )


def program_of(engine_stage: EngineStage, reads: Sequence[str], state: State) -> ExportedProgram:
    """One `torch.export` of a part: (*reads) -> (*writes), [B, ...] each, with B and what is `free`
    in it free.

    Call it outside of inference mode. Raises what the part says to rows that do not fit, and
    anything for what cannot be exported.
    """
    with plain_attention():
        rows = tuple(_some(state[name]) for name in reads)
        _StageModule(engine_stage, reads)(*(row.clone() for row in rows))
        free = torch.export.Dim.DYNAMIC
        dynamic = {
            "tensors": tuple(
                dict.fromkeys((0, *engine_stage.free.get(name, ())), free) for name in reads
            )
        }
        return torch.export.export(
            _StageModule(engine_stage, reads), rows, dynamic_shapes=dynamic, strict=False
        )


class _StageModule(nn.Module):
    """A part as a module of positional tensors."""

    def __init__(self, engine_stage: EngineStage, reads: Sequence[str]) -> None:
        super().__init__()
        self.engine_stage = engine_stage
        self.reads = reads
        self.held = nn.ModuleList(engine_stage.modules)  # so that the export finds their parameters
        self.training = self.held.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        require: Callable[[bool], None] = torch._check
        for tensor in tensors[1:]:
            require(tensor.shape[0] == tensors[0].shape[0])
        state = dict(zip(self.reads, tensors, strict=True))
        self.engine_stage.call(state)
        return tuple(state[name] for name in self.engine_stage.writes)


def _some(value: Tensor) -> Tensor:
    """Two rows at least: torch.export takes a batch of one for a constant."""
    few = value[:4].detach()
    return (torch.cat([few, few]) if len(few) == 1 else few).clone()
