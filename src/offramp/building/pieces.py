"""A trained model as pieces that each take one tensor and give one, for networks with forks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.partition import Piece, partition, self_check


class UnitPiece(nn.Module):
    """A piece of a model that takes one tensor and gives one. It shares the model's parameters.

    Args:
        module: the exported piece. It always stays in eval mode, so its batch norms keep their
            statistics while it is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = False

    def train(self, mode: bool = True) -> UnitPiece:
        """Do nothing: a piece that was exported in eval mode stays in it."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run the piece, which gives a tuple of one tensor."""
        y: Tensor = self.module(x)[0]
        return y


def pieces_after(
    model: nn.Module, x: Tensor, cuts: Sequence[str], *, consequence: str
) -> list[tuple[str, UnitPiece]]:
    """Split a model after some modules.

    Args:
        model: in eval mode; it is not changed.
        x: a batch as the model takes it.
        cuts: names of modules.
        consequence: the end of the sentence if more than one tensor is needed behind a cut.

    Returns:
        The pieces in order, each with the name of the module at whose end it stops; "" for the
        last.

    Raises:
        BadNetwork: more than one tensor is needed behind a cut, or the model cannot be split.
    """
    parts = partition(model, (x,), at=[*cuts])
    self_check(model, parts, (x,), {})
    pieces = list[tuple[str, UnitPiece]]()
    for piece in parts.pieces:
        _require_one_tensor(piece, consequence)
        pieces.append((piece.name, UnitPiece(piece.module)))
    return pieces


def _require_one_tensor(piece: Piece, consequence: str) -> None:
    """Raise BadNetwork unless a piece reads one tensor and hands on one. The last piece may give
    more, as models have several outputs.
    """
    too_many = list[str]()
    if len(piece.reads) != 1:
        too_many = [*piece.reads]
    elif not piece.writes or (piece.name and len(piece.writes) != 1):
        too_many = [*piece.writes]
    else:
        return
    raise BadNetwork(
        f"only one tensor may be carried past {piece.name or 'the last unit'!r}, got "
        f"{len(too_many)} ({', '.join(too_many)}), {consequence}"
    )
