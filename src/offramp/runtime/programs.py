"""A stage as one exported program on positional tensors, for engines that compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.networks.taps import FIXED, FIXING, plain_attention
from offramp.plans.signature import INPUT


def read_by(engine_stage: EngineStage, state: Iterable[str]) -> tuple[str, ...]:
    """The names of the tensors that a stage reads.

    A stage may read x, which stands for all inputs. Here each input has its own name.

    Args:
        engine_stage: the stage.
        state: the names of the tensors at hand.

    Returns:
        The names, each once, in the order in which the stage reads them.
    """
    names = list[str]()
    for read in engine_stage.reads:
        if read == INPUT:
            names += [name for name in state if name == INPUT or name.startswith(INPUT + "/")]
        else:
            names.append(read)
    return tuple(dict.fromkeys(names))


def program_of(engine_stage: EngineStage, reads: Sequence[str], state: State) -> ExportedProgram:
    """Export a stage with `torch.export`: (*reads) -> (*writes), [B, ...] each.

    The batch dimension B is dynamic, and so are the dimensions in `engine_stage.free`. Call this
    outside of inference mode.

    Args:
        engine_stage: the stage.
        reads: names of the inputs, as `read_by` returns them.
        state: named tensors [B, ...] with the shapes to export for.

    Raises:
        BadNetwork: the stage fixes the batch size.
        Exception: whatever else the stage raises for rows that do not fit, and whatever
            torch.export raises for code that cannot be exported.
    """
    with plain_attention():
        rows = tuple(_some(state[name]) for name in reads)
        # A run before the export, so that rows that do not fit raise the stage's own error.
        copies = [row.clone() for row in rows]
        _StageModule(engine_stage, reads)(*copies)

        dynamic = list[dict[int, object]]()
        for name in reads:
            dims = (0, *engine_stage.free.get(name, ()))
            dynamic.append(dict.fromkeys(dims, torch.export.Dim.DYNAMIC))
        try:
            return torch.export.export(
                _StageModule(engine_stage, reads),
                rows,
                dynamic_shapes={"tensors": tuple(dynamic)},
                strict=False,
            )
        except Exception as problem:
            if FIXED not in str(problem) or engine_stage.free:
                raise
            raise BadNetwork(
                f"segment {engine_stage.name!r} cannot be exported: its code, or a forward hook, "
                f"fixes the batch size {FIXING}. Remove that, or use engine='torch'"
            ) from problem


class _StageModule(nn.Module):
    """A stage as a module of positional tensors.

    The modules of the stage are not registered. During an export torch puts fake tensors in place
    of the parameters of registered modules, and another thread may be serving with these modules.
    The parameters of other modules become constants of the program.
    """

    def __init__(self, engine_stage: EngineStage, reads: Sequence[str]) -> None:
        super().__init__()
        self.engine_stage = engine_stage
        self.reads = reads
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # The export must know that all tensors have the same number of rows.
        require: Callable[[bool], None] = torch._check
        for tensor in tensors[1:]:
            require(tensor.shape[0] == tensors[0].shape[0])
        state = dict(zip(self.reads, tensors, strict=True))
        self.engine_stage.call(state)
        return tuple(state[name] for name in self.engine_stage.writes)


def _some(value: Tensor) -> Tensor:
    """Two to four rows. With one row, torch.export would take the batch size for a constant."""
    few = value[:4].detach()
    if len(few) == 1:
        few = torch.cat([few, few])  # [1, ...] -> [2, ...]
    return few.clone()
