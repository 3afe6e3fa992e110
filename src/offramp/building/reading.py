"""Sequences read chunk by chunk, with an exit after each chunk: a sample that is sure is read no
further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find
from offramp.building.cutting import ExitLike, GateLike, cut
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State, as_inputs
from offramp.networks.network import Network
from offramp.plans.signature import INPUT


class ByChunks(nn.Module):
    """A model that reads a sequence chunk by chunk; the chunks share one reader, and its state is
    carried on.

    Args:
        reader: (state [B, ...], chunk [B, c, ...], mask [B, c]) -> state. Where the mask is 0
            nothing is to be read.
        head: state -> logits [B, C].
        state: the shape of a row's state; it starts with zeros.
        length: T, a whole number of chunks.
        chunk: c.
        sequence: the name of the input, None where it is the only one.
        mask: the name of the input [B, T] that is 0 behind the end; None where all positions count.
    """

    zero: Tensor

    def __init__(
        self,
        reader: nn.Module,
        head: nn.Module,
        *,
        state: tuple[int, ...],
        length: int,
        chunk: int,
        sequence: str | None = None,
        mask: str | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.head = head
        self.state = state
        self.sequence = sequence
        self.mask = mask
        self.chunks = nn.ModuleList(
            Chunk(reader, start, start + chunk) for start in range(0, length, chunk)
        )
        # tells the device and the type of the state
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Sequences [B, T, ...], and their mask [B, T] if there is one -> logits [B, C] after all
        chunks.
        """
        sequence = args[0] if self.sequence is None else kwargs[self.sequence]
        if self.mask is None:
            mask = torch.ones_like(_flat(sequence))
        else:
            mask = kwargs[self.mask]
        state = self.zero.expand(sequence.shape[0], *self.state)
        for chunk in self.chunks:
            state = chunk(state, sequence, mask)
        logits: Tensor = self.head(state)
        return logits


class Chunk(nn.Module):
    """Positions `start` to `end` of a sequence. The reader belongs to the model around it."""

    def __init__(self, reader: nn.Module, start: int, end: int) -> None:
        super().__init__()
        self._reader = (reader,)  # in a tuple: its parameters are the model's, once
        self.start = start
        self.end = end

    def forward(self, state: Tensor, sequence: Tensor, mask: Tensor) -> Tensor:
        """The state behind this chunk."""
        found: Tensor = self._reader[0](
            state, sequence[:, self.start : self.end], mask[:, self.start : self.end]
        )
        return found


def along_time(
    reader: nn.Module,
    head: nn.Module,
    example: Any,
    *,
    state: int | tuple[int, ...],
    chunk: int,
    mask: str | None = None,
    exits: ExitLike | Mapping[str, ExitLike] | None = None,
    gate: GateLike = "margin",
) -> Network:
    """A network that reads a sequence chunk by chunk and has an exit after each chunk.

    A sample that leaves is read no further, and the rest of its batch goes on without it. Sequences
    of different lengths are padded to one length, as long as the longest: where the mask says that
    a sequence has ended, its gate gives it the largest score, so that every plan whose gates are
    open answers it there. All chunks share the reader.

    Args:
        reader: a recurrent or causal model: (state [B, ...], chunk [B, c, ...], mask [B, c]) -> the
            next state, in eval mode. It must keep the state of a row whose mask is 0 throughout.
        head: a module, state -> logits [B, C].
        example: a small batch: a tensor [B, T, ...], or by name the sequence and its mask. T is the
            length of all batches, a whole number of chunks.
        state: the numbers of a row's state, or its shape.
        chunk: positions of a chunk.
        mask: the name of the input [B, T] that is 0 behind the end of a sequence.
        exits: what answers after a chunk, as in `cut`; by default the head itself, of which an
            ended sequence gets the answer that it would get in the end.
        gate: scores what has not ended, as in `cut`.

    Returns:
        A network cut after every chunk, `chunks.0`, `chunks.1`, ...; `network.backbone` is the
        model.

    Raises:
        InvalidArgument: T is no whole number of chunks, or there are fewer than two; the mask is no
            input.
        BadNetwork: as in `cut`.

    Example:
        >>> class Sums(nn.Module):
        ...     def forward(self, state, chunk, mask):
        ...         return state + (chunk * mask[:, :, None]).sum(1)
        >>> reader, head = Sums().eval(), nn.Linear(3, 2).eval()
        >>> net = along_time(reader, head, torch.randn(4, 8, 3), state=3, chunk=4)
        >>> net.topology.exits
        ('chunks.0', 'backbone')
    """
    for name, module in (("reader", reader), ("head", head)):
        if not isinstance(module, nn.Module):
            raise BadNetwork(f"the {name} is a {type(module).__name__}, expected a torch.nn.Module")
    inputs = as_inputs(example)
    sequence, masked = _named(inputs, mask)
    length = inputs[sequence].shape[1] if inputs[sequence].dim() > 1 else 0
    if chunk < 1 or length % chunk or length < 2 * chunk:
        raise InvalidArgument(
            f"chunk must divide the length of the sequences at least in two, got chunk={chunk} "
            f"and sequences of "
            f"length {length}; pad them to a whole number of chunks"
        )
    model = ByChunks(
        reader,
        head,
        state=(state,) if isinstance(state, int) else tuple(state),
        length=length,
        chunk=chunk,
        sequence=_plain(sequence),
        mask=_plain(masked),
    )
    model.train(reader.training or head.training)
    like = next((value for value in model.parameters() if value.is_floating_point()), None)
    if like is not None:
        model.zero = model.zero.to(like)
    names = [f"chunks.{number}" for number in range(length // chunk - 1)]
    network = cut(
        model,
        example,
        at=names,
        exits=find("exits", "Shared")(head) if exits is None else exits,
        gate=gate,
    )
    if masked is None:
        return network
    gates = {name: network.gate_of(name) for name in names}
    ended = find("gates", "Ended")
    return network.with_gates(
        {name: ended(gates[name], masked, (at + 1) * chunk) for at, name in enumerate(names)}
    )


def _named(inputs: State, mask: str | None) -> tuple[str, str | None]:
    """Which input is the sequence, and which its mask."""
    if mask is None:
        if len(inputs) != 1:
            raise InvalidArgument(
                f"the example has the inputs {[*map(_plain, inputs)]}; name the one that is the "
                f"mask: mask="
            )
        return next(iter(inputs)), None
    masked = mask if mask.startswith(INPUT + "/") else f"{INPUT}/{mask}"
    others = [name for name in inputs if name != masked]
    if masked not in inputs or len(others) != 1 or inputs[masked].dim() != 2:
        raise InvalidArgument(
            f"mask must name one of two inputs, [B, T] beside the sequence; got {mask!r} and the "
            f"inputs "
            f"{[*map(_plain, inputs)]}"
        )
    return others[0], masked


def _plain(name: str | None) -> str | None:
    """The name of an input as the user has it; None for the only one."""
    return None if name is None or name == INPUT else name.removeprefix(INPUT + "/")


def _flat(sequence: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T]."""
    return sequence if sequence.dim() == 2 else sequence.flatten(2)[:, :, 0]
