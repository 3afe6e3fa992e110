"""`along_time`: read sequences chunk by chunk, with an exit after each chunk.

A sample that leaves is read no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require_count
from offramp._support.find import find
from offramp.building.cutting import ExitLike, GateLike, cut
from offramp.building.routing import reason_of
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State, as_inputs
from offramp.networks.network import Network
from offramp.networks.nodes import Gate
from offramp.plans.signature import INPUT


class ByChunks(nn.Module):
    """A model that reads a sequence chunk by chunk. The chunks share one reader, which hands its
    state from chunk to chunk.

    Args:
        reader: (state [B, ...], chunk [B, c, ...], mask [B, c]) -> state. It ignores positions
            whose mask is 0.
        head: state -> logits [B, C].
        state: the shape of a row's state; it starts with zeros.
        length: T, the length of the sequences, a whole number of chunks.
        chunk: c, the length of a chunk.
        sequence: the name of the input; None if it is the only one.
        mask: the name of the input [B, T] that is 0 behind the end of a sequence; None if all
            positions count.
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
        self.chunks = nn.ModuleList()
        for start in range(0, length, chunk):
            self.chunks.append(Chunk(reader, start, start + chunk))
        # has the device and the type of the state
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Read all chunks.

        Args:
            args: the sequences [B, T, ...], if they are the only input.
            kwargs: the sequences and the mask [B, T] by name otherwise.

        Returns:
            Logits [B, C].
        """
        if self.sequence is None:
            sequence = args[0]
        else:
            sequence = kwargs[self.sequence]
        if self.mask is None:
            mask = torch.ones_like(_flat(sequence))  # [B, T]
        else:
            mask = kwargs[self.mask]
        state = self.zero.expand(sequence.shape[0], *self.state)  # [] -> [B, ...]
        for chunk in self.chunks:
            state = chunk(state, sequence, mask)
        logits: Tensor = self.head(state)
        return logits


class Chunk(nn.Module):
    """The positions `start` to `end` of a sequence.

    Args:
        reader: of the model around it, which owns its parameters.
        start: the first position.
        end: the position behind the last one.
    """

    def __init__(self, reader: nn.Module, start: int, end: int) -> None:
        super().__init__()
        self._reader = (reader,)  # torch does not look into a tuple for parameters
        self.start = start
        self.end = end

    def forward(self, state: Tensor, sequence: Tensor, mask: Tensor) -> Tensor:
        """The state after this chunk.

        Args:
            state: before it [B, ...].
            sequence: complete, [B, T, ...].
            mask: complete, [B, T].
        """
        chunk = sequence[:, self.start : self.end]  # [B, T, ...] -> [B, c, ...]
        chunk_mask = mask[:, self.start : self.end]  # [B, T] -> [B, c]
        next_state: Tensor = self._reader[0](state, chunk, chunk_mask)
        return next_state


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
    """Make a network that reads a sequence chunk by chunk and has an exit after each chunk.

    A sample that leaves is read no further, and the rest of its batch goes on without it. Sequences
    of different lengths are padded to the longest one. A sequence that has ended, by its mask, gets
    the largest score from its gate, so every plan with an open gate answers it there. All chunks
    share the reader.

    Args:
        reader: a recurrent or causal model: (state [B, ...], chunk [B, c, ...], mask [B, c]) -> the
            next state, in eval mode. It must keep the state of a row whose mask is 0 throughout.
        head: a module, state -> logits [B, C].
        example: a small batch: a tensor [B, T, ...], or the sequence and its mask by name. T is the
            length of all batches, a whole number of chunks.
        state: the number of values of a row's state, or its shape.
        chunk: the number of positions of a chunk.
        mask: the name of the input [B, T] that is 0 behind the end of a sequence.
        exits: the exits after the chunks, as in `cut`. By default the head itself; then a sequence
            that has ended gets the answer that it would get at the end.
        gate: scores the sequences that have not ended, as in `cut`.

    Returns:
        A network cut after every chunk, `chunks.0`, `chunks.1`, ...; `network.backbone` is the
        model.

    Raises:
        InvalidArgument: T is not a whole number of chunks, or there are fewer than two; the mask is
            not an input; or the state has no such shape.
        BadNetwork: the reader or the head does not fit the state, the reader changes the state of a
            row whose mask is 0, or as in `cut`.

    Example:
        >>> class Sums(nn.Module):
        ...     def forward(self, state, chunk, mask):
        ...         return state + (chunk * mask[:, :, None]).sum(1)
        >>> reader, head = Sums().eval(), nn.Linear(3, 2).eval()
        >>> net = along_time(reader, head, torch.randn(4, 8, 3), state=3, chunk=4)
        >>> net.topology.exits
        ('chunks.0', 'backbone')
    """
    for role, module in (("reader", reader), ("head", head)):
        if not isinstance(module, nn.Module):
            raise BadNetwork(f"the {role} must be a torch.nn.Module, got a {type(module).__name__}")
    state_shape = _shape_of(state)
    inputs = as_inputs(example)
    sequence, mask_input = _named(inputs, mask)
    length = inputs[sequence].shape[1] if inputs[sequence].dim() > 1 else 0
    chunk = require_count("chunk", chunk)
    if length % chunk or length < 2 * chunk:
        raise InvalidArgument(
            f"chunk must divide the length of the sequences into at least two parts, got {chunk} "
            f"for sequences of length {length}. Pad them to a whole number of chunks"
        )
    model = ByChunks(
        reader,
        head,
        state=state_shape,
        length=length,
        chunk=chunk,
        sequence=_plain(sequence),
        mask=_plain(mask_input),
    )
    model.train(reader.training or head.training)
    # the state starts on the device and in the type of the weights
    for parameter in model.parameters():
        if parameter.is_floating_point():
            model.zero = model.zero.to(parameter)
            break
    if not model.training:  # `cut` refuses a model in training mode
        _require_states(model, inputs[sequence], chunk, masked=mask_input is not None)
    names = [f"chunks.{number}" for number in range(length // chunk - 1)]
    network = cut(
        model,
        example,
        at=names,
        exits=find("exits", "Shared")(head) if exits is None else exits,
        gate=gate,
    )
    if mask_input is None:
        return network
    # With a mask, a gate also lets go the sequences that end within its chunk.
    ended = find("gates", "Ended")
    gates = dict[str, Gate]()
    for number, name in enumerate(names):
        gates[name] = ended(network.gate_of(name), mask_input, (number + 1) * chunk)
    return network.with_gates(gates)


def _shape_of(state: object) -> tuple[int, ...]:
    """The shape of a row's state. Raises InvalidArgument."""
    if isinstance(state, (tuple, list)) and state:
        return tuple(require_count("each size in state", size) for size in state)
    if isinstance(state, (tuple, list)):
        raise InvalidArgument("state must be a whole number or a shape, got an empty shape")
    return (require_count("state", state),)


def _require_states(model: ByChunks, sequence: Tensor, chunk: int, *, masked: bool) -> None:
    """Raise BadNetwork unless the reader gives states, the head takes them, and a row whose mask is
    0 keeps its state.

    Args:
        model: in eval mode.
        sequence: of the example, [B, T, ...].
        chunk: the length of a chunk.
        masked: whether sequences can end, so that there are masks with 0.
    """
    rows = sequence.to(model.zero.device)
    first = rows[:, :chunk]  # [B, T, ...] -> [B, c, ...]
    mask = torch.ones_like(_flat(first))  # [B, c]
    with torch.no_grad():
        zeros = model.zero.expand(len(rows), *model.state)  # [] -> [B, ...]
        state = _called(model.reader, "reader", state=zeros, chunk=first, mask=mask)
        if not isinstance(state, Tensor) or state.shape != zeros.shape:
            got = list(state.shape) if isinstance(state, Tensor) else f"a {type(state).__name__}"
            raise BadNetwork(
                f"reader must give the next state, a tensor {list(zeros.shape)}, got {got}"
            )
        _called(model.head, "head", state=state)
        if not masked:
            return
        # The sequences of every second row have ended.
        mask[::2] = 0
        second = rows[:, chunk : 2 * chunk]
        later = _called(model.reader, "reader", state=state, chunk=second, mask=mask)
    if not torch.allclose(later[::2], state[::2], rtol=1e-4, atol=1e-5, equal_nan=True):
        difference = (later[::2] - state[::2]).abs().max().item()
        raise BadNetwork(
            f"reader must keep the state of a row whose mask is 0 throughout, got a state that "
            f"differs by {difference:.2g}. A sequence that has ended must not be read further"
        )


def _called(module: nn.Module, role: str, **tensors: Tensor) -> Any:
    """What a module gives for some tensors. Raises BadNetwork where it fails."""
    try:
        return module(*tensors.values())
    except Exception as problem:  # the user's code can raise anything
        shapes = list[str]()
        for name, tensor in tensors.items():
            shapes.append(f"{name} {list(tensor.shape)}")
        raise BadNetwork(
            f"{role} must take {', '.join(shapes)}, got {type(problem).__name__}: "
            f"{reason_of(problem)}"
        ) from problem


def _named(inputs: State, mask: str | None) -> tuple[str, str | None]:
    """The names of the sequence and of its mask among the inputs."""
    names = [*map(_plain, inputs)]
    if mask is not None and not isinstance(mask, str):
        raise InvalidArgument(f"mask must be the name of an input, got {mask!r}")
    if mask is None:
        if len(inputs) != 1:
            raise InvalidArgument(f"mask must name one of the inputs {names}, got None")
        return next(iter(inputs)), None
    mask_input = mask if mask.startswith(INPUT + "/") else f"{INPUT}/{mask}"
    others = [name for name in inputs if name != mask_input]
    if mask_input not in inputs or len(others) != 1 or inputs[mask_input].dim() != 2:
        raise InvalidArgument(
            f"mask must name one of two inputs, with the shape [B, T], got {mask!r} and the "
            f"inputs {names}"
        )
    return others[0], mask_input


def _plain(name: str | None) -> str | None:
    """The name of an input as the user has it; None for the only one."""
    return None if name is None or name == INPUT else name.removeprefix(INPUT + "/")


def _flat(sequence: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T]."""
    return sequence if sequence.dim() == 2 else sequence.flatten(2)[:, :, 0]
