"""Runs explicit stages as pieces, for models that cannot be exported."""

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
    """Make pieces of explicit stages, for a model that cannot be exported.

    The first stage takes the arguments of the example. Every other stage takes the output of the
    stage before it, as in `nn.Sequential`: a tensor [B, ...], or a tuple, list or dict of tensors.
    Values in it that are not tensors are fixed.

    Args:
        stages: modules in eval mode, in order.
        args: positional arguments of an example call.
        kwargs: keyword arguments of the same call.
        names: of the cuts, one per stage but the last.

    Returns:
        The pieces, one per stage.

    Raises:
        BadNetwork: the names do not fit, a stage is in training mode, or its output has no rows.
        BadData: the example has no tensors, or their numbers of rows differ.
    """
    modules = tuple(stages)
    inputs = inputs_of(args, kwargs)
    if len(set(names)) != len(names) or len(names) != len(modules) - 1 or not modules:
        raise BadNetwork(
            f"names must have a different name for each of the {len(modules)} stages but the last, "
            f"got {list(names)}"
        )
    require_free(names)
    for module in modules:
        if any(part.training for part in module.modules()):
            raise BadNetwork("all stages must be in eval mode, got training mode. Call eval().")

    # The first pieces copy no input. They show which inputs a stage changes in place, and the
    # second ones copy those.
    example = (tuple(args), dict(kwargs or {}))
    uncopied = _stages(modules, names, inputs, example, [()] * len(modules))
    touched = touched_by(uncopied, inputs)
    pieces = _stages(modules, names, inputs, example, touched)
    # A stage is cut at its end, so a tap is everything that the stage writes.
    taps = {piece.name: piece.writes for piece in pieces[:-1]}
    return Partition(pieces, tuple(inputs), pieces[-1].writes, taps)


def _stages(
    modules: Sequence[nn.Module],
    names: Sequence[str],
    inputs: Mapping[str, Tensor],
    example: object,
    touched: Sequence[Collection[str]],
) -> tuple[Piece, ...]:
    """The pieces, found by running one stage after the other; each copies its `touched` inputs."""
    pieces = list[Piece]()
    state = dict(inputs)
    given = mould(example)
    for module, name, copied in zip(modules, [*names, ""], touched, strict=True):
        reads = tuple(state)
        copies = [key in copied for key in reads]
        stage = _DeclaredStage(module, given, copies, spread=not pieces)
        with torch.inference_mode(False), torch.no_grad():
            example_rows = [tensor.clone() for tensor in state.values()]
            output = stage.output(*example_rows)
        rows = len(state[reads[0]])
        state = tapped(output, name) if name else tensors_of(output, "y")
        _require_rows(state, name, rows)
        given = mould(output)
        writes = tuple(state)
        pieces.append(Piece(name, reads, writes, caller(stage.forward, reads, writes), stage))
    return tuple(pieces)


def _require_rows(state: Mapping[str, Tensor], name: str, rows: int) -> None:
    """Raise BadNetwork unless a stage gives tensors, all of them with one row per sample."""
    wrong = not state
    for tensor in state.values():
        if not tensor.dim() or len(tensor) != rows:
            wrong = True
    if wrong:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in state.values()) or "no tensor"
        raise BadNetwork(
            f"stage {name or 'the last'!r} must give tensors [B, ...], but gives {shapes} for "
            f"{rows} rows"
        )


class _DeclaredStage(nn.Module):
    """An explicit stage as a module of positional tensors.

    Args:
        stage: the user's.
        given: its input, with holes for the tensors (see `mould`).
        copied: for each tensor, whether to copy it first, because the stage changes it in place.
        spread: whether `given` is (args, kwargs), as for the first stage; otherwise it is the only
            argument.
    """

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
        """The output of the stage, with its own structure."""
        copies = list[Tensor]()
        for tensor, copy in zip(tensors, self.copied, strict=True):
            copies.append(tensor.clone() if copy else tensor)
        given = filled(self.given, iter(copies))
        if not self.spread:
            return self.stage(given)
        assert isinstance(given, tuple)
        return self.stage(*given[0], **given[1])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output, in order."""
        return tuple(tensors_of(self.output(*tensors), "y").values())
