"""Explicit stages as pieces: the way out for what cannot be exported."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.taps import filled, inputs_of, mould, tapped, tensors_of
from offramp.partition.pieces import Partition, Piece, caller, require_free, touched_by


def staged(
    stages: Iterable[nn.Module],
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    names: Sequence[str],
) -> Partition:
    """Explicit stages as pieces: the way out for what cannot be exported. `names`: one per stage
    but the last.

    The first stage takes the example's arguments, every other one what the stage before gave, as in
    `nn.Sequential`: a tensor [B, ...], or a tuple, list or dict of them (what is no tensor in it is
    fixed). Raises BadNetwork, BadData.
    """
    modules = tuple(stages)
    inputs = inputs_of(args, kwargs)
    if len(set(names)) != len(names) or len(names) != len(modules) - 1 or not modules:
        raise BadNetwork(
            f"{len(modules)} stages have the cuts {list(names)}, expected a name per stage but "
            f"the last"
        )
    require_free(names)
    if any(part.training for module in modules for part in module.modules()):
        raise BadNetwork("a stage is in training mode, expected eval mode; call eval() on it first")

    example = (tuple(args), dict(kwargs or {}))
    pieces = _stages(modules, names, inputs, example, [()] * len(modules))
    pieces = _stages(modules, names, inputs, example, touched_by(pieces, inputs))
    return Partition(
        pieces,
        tuple(inputs),
        pieces[-1].writes,
        {piece.name: piece.writes for piece in pieces[:-1]},
    )


def _stages(
    modules: Sequence[nn.Module],
    names: Sequence[str],
    inputs: Mapping[str, Tensor],
    example: object,
    touched: Sequence[Collection[str]],
) -> tuple[Piece, ...]:
    pieces = list[Piece]()
    state = dict(inputs)
    given = mould(example)
    for module, name, copied in zip(modules, [*names, ""], touched, strict=True):
        reads = tuple(state)
        stage = _DeclaredStage(module, given, [key in copied for key in reads], spread=not pieces)
        with torch.inference_mode(False), torch.no_grad():
            output = stage.output(*(tensor.clone() for tensor in state.values()))
        rows = len(state[reads[0]])
        state = tapped(output, name) if name else tensors_of(output, "y")
        if not state or any(not tensor.dim() or len(tensor) != rows for tensor in state.values()):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in state.values()) or "no tensor"
            raise BadNetwork(
                f"stage {name or 'the last'!r} gives {shapes} for {rows} rows, expected tensors "
                f"[B, ...]"
            )
        given = mould(output)
        pieces.append(
            Piece(name, reads, tuple(state), caller(stage.forward, reads, tuple(state)), stage)
        )
    return tuple(pieces)


class _DeclaredStage(nn.Module):
    """An explicit stage on positional tensors."""

    def __init__(
        self, stage: nn.Module, given: object, copied: Sequence[bool], *, spread: bool
    ) -> None:
        super().__init__()
        self.stage = stage
        self.given = given
        self.copied = tuple(copied)
        self.spread = spread
        self.training = False

    def output(self, *tensors: Tensor) -> object:
        """What the stage gives, as it gives it."""
        own = (
            tensor.clone() if copy else tensor
            for tensor, copy in zip(tensors, self.copied, strict=True)
        )
        given = filled(self.given, iter(own))
        if not self.spread:
            return self.stage(given)
        assert isinstance(given, tuple)
        return self.stage(*given[0], **given[1])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Its tensors, flat."""
        return tuple(tensors_of(self.output(*tensors), "y").values())
