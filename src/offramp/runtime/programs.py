"""A part as one exported program on positional tensors, for what compiles it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.networks.inputs import State
from offramp.networks.network import Part
from offramp.networks.taps import plain_attention
from offramp.plans.signature import INPUT


def read_by(part: Part, state: Iterable[str]) -> tuple[str, ...]:
    """The tensors that a part reads, each input by its own name."""
    inputs = [name for name in state if name == INPUT or name.startswith(INPUT + "/")]
    return tuple(dict.fromkeys(key for name in part.reads for key in (inputs if name == INPUT else (name,))))


def program_of(part: Part, reads: Sequence[str], state: State) -> ExportedProgram:
    """One `torch.export` of a part: (*reads) -> (*writes), [B, ...] each, with B and what is `free` in it free.

    Call it outside of inference mode. Raises what the part says to rows that do not fit, and anything for what cannot
    be exported.
    """
    with plain_attention():
        rows = tuple(_some(state[name]) for name in reads)
        _Node(part, reads)(*(row.clone() for row in rows))
        free = torch.export.Dim.DYNAMIC
        dynamic = {"tensors": tuple(dict.fromkeys((0, *part.free.get(name, ())), free) for name in reads)}
        return torch.export.export(_Node(part, reads), rows, dynamic_shapes=dynamic, strict=False)


class _Node(nn.Module):
    """A part as a module of positional tensors."""

    def __init__(self, part: Part, reads: Sequence[str]) -> None:
        super().__init__()
        self.part, self.reads = part, reads
        self.held = nn.ModuleList(part.modules)  # so that the export finds their parameters
        self.training = self.held.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        require: Callable[[bool], None] = torch._check
        for tensor in tensors[1:]:
            require(tensor.shape[0] == tensors[0].shape[0])
        state = dict(zip(self.reads, tensors, strict=True))
        self.part.call(state)
        return tuple(state[name] for name in self.part.writes)


def _some(value: Tensor) -> Tensor:
    """Two rows at least: torch.export takes a batch of one for a constant."""
    few = value[:4].detach()
    return (torch.cat([few, few]) if len(few) == 1 else few).clone()
