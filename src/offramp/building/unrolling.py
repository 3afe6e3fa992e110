"""`unrolled`: a model with adaptive computation time as a network in which every unit is a node.

Between two units a sample is one row of numbers: its state, the weighted sum so far, the sum of the
halting scores so far, and the score of the unit that has just run. If a sample leaves, its last
state gets the rest of the weight.

Shapes: n samples, S = C * ... numbers of a state.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find
from offramp.errors import BadNetwork
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import as_inputs
from offramp.networks.members import UNROLLED, ModelSpec, WholeModel
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Gate
from offramp.networks.wrappers import deep_copy
from offramp.partition import partition
from offramp.plans.signature import INPUT, Input
from offramp.plans.topology import LEAVE, Node, Topology

HEAD = "head"


@without_autocast()
def unrolled(
    model: nn.Module,
    example: Any,
    *,
    preprocess: nn.Module | None = None,
    spec: str | None = None,
) -> Network:
    """Make a network in which samples can leave each stage of adaptive depth after any of its
    units.

    The rows of a batch that go on are compacted at every unit. Behind a stage all rows are joined
    again, in the order of x. The plan has a threshold for each unit: `1 - eps` is the rule of the
    paper, for `Plan.by_hand`. If there are at most sixteen paths (one stage of up to sixteen units,
    or two of four), rows are recorded on every path, and `calibrate` can choose and certify
    thresholds.

    Args:
        model: from `halting(..., per="sample")`, trained, in eval mode. It is copied.
        example: a small batch of rows.
        preprocess: the preprocessing of the model.
        spec: the text that names the model, so that a saved network can be built again.

    Returns:
        A network with the nodes `<stage>-<unit>`, units counted from 0, and `head`, which answers.

    Raises:
        BadNetwork: the model has no such stage, a stage halts by position, or the stages do not
            follow each other.

    Example:
        >>> from offramp.building.halting import halting
        >>> from offramp.models.cifar_resnet import resnet20
        >>> from offramp.plans.plan import Plan
        >>> adaptive = halting(resnet20().eval(), ["layer3"], per="sample")
        >>> net = unrolled(adaptive, torch.randn(2, 3, 32, 32))
        >>> net.topology.names
        ('layer3-0', 'layer3-1', 'layer3-2', 'head')
        >>> plan = Plan.by_hand(dict.fromkeys(net.topology.gates, 0.99))
    """
    require_eval(model, "model", "model.eval()")
    kind = find("layers", "AdaptiveDepth")
    stages = dict[str, Any]()
    for name, module in model.named_modules():
        if isinstance(module, kind):
            stages[name] = module
    if not stages:
        raise BadNetwork(
            "the model has no stage of adaptive depth. Make one with halting(model, stages, "
            "per='sample')"
        )
    for name, stage in stages.items():
        if stage.per != "sample":
            raise BadNetwork(
                f"the stage {name!r} halts by position, and must halt per='sample': positions stay "
                f"in their image"
            )
    inputs = as_inputs(example)
    if [*inputs] != [INPUT]:
        raise BadNetwork(f"the model must have a single input, got {[*inputs]}")
    raw = inputs[INPUT]
    x = raw if preprocess is None else preprocess(raw)
    if len(x) == 1:  # a dimension of 1 could be the batch or not
        x = torch.cat([x, x])
    pieces = _pieces(model, stages, x)
    network = _network(pieces, copy.deepcopy(stages), x, raw, preprocess)
    network.whole = WholeModel(spec, UNROLLED)
    return network


def _pieces(model: nn.Module, stages: dict[str, Any], x: Tensor) -> list[nn.Module]:
    """Split a model at its stages.

    Returns:
        For each stage the part that runs before it, with its first unit; then the part that runs
        after the last stage.
    """
    # Replace each stage by its plain units, then cut after its first and its last unit.
    plain = deep_copy(model)
    cuts = list[str]()
    for name, stage in stages.items():
        units = copy.deepcopy(stage.units)
        parent, _, last = name.rpartition(".")
        plain.get_submodule(parent).register_module(last, nn.Sequential(*units).eval())
        cuts += [f"{name}.0", f"{name}.{len(units) - 1}"]
    parts = partition(plain.eval(), (x,), at=cuts)
    if [piece.name for piece in parts.pieces] != [*cuts, ""]:
        raise BadNetwork(f"the stages {[*stages]} do not run in this order, one after the other")
    for piece in parts.pieces:
        if len(piece.reads) != 1 or len(piece.writes) != 1:
            raise BadNetwork(
                f"only the output of a stage may be carried on between the stages {[*stages]}, got "
                f"{piece.reads}"
            )
    # Every second piece is the further units of a stage, which become nodes of their own.
    return [piece.module for piece in parts.pieces[::2]]


def _network(
    pieces: Sequence[nn.Module],
    stages: dict[str, Any],
    x: Tensor,
    raw: Tensor,
    preprocess: nn.Module | None,
) -> Network:
    """The nodes, their modules and their gates.

    Args:
        pieces: from `_pieces`.
        stages: by name.
        x: the preprocessed example.
        raw: the example.
        preprocess: the preprocessing of the model.
    """
    halting_gate = find("gates", "Halting")
    models: dict[str, nn.Module] = {}
    nodes = list[Node]()
    gates: dict[str, Gate] = {}
    before: tuple[str, ...] = ()  # the nodes from which rows may arrive
    shape: tuple[int, ...] | None = None  # of a state of the stage before
    names = [name.replace(".", "_") for name in stages]
    next_nodes = [*(f"{name}-0" for name in names[1:]), HEAD]  # behind each stage
    with torch.no_grad():
        for index, stage in enumerate(stages.values()):
            piece = pieces[index]
            behind = next_nodes[index]
            units = [f"{names[index]}-{number}" for number in range(len(stage.units))]

            # The first unit. From here rows leave the stage, or go on to the second unit.
            x = _only(piece(x))
            models[units[0]] = First(piece, stage.halts[0], shape)
            nodes.append(Node(units[0], (behind, units[1]), before))
            gates[units[0]] = halting_gate(1)
            shape = tuple(x.shape[1:])

            # The further units. From the last one all rows leave, without a gate.
            for number, unit in enumerate(units[1:], 1):
                after = (units[number - 1],)
                if number == len(units) - 1:
                    models[unit] = Next(stage.units[number], None, shape)
                    nodes.append(Node(unit, (behind,), after))
                else:
                    models[unit] = Next(stage.units[number], stage.halts[number], shape)
                    nodes.append(Node(unit, (behind, units[number + 1]), after))
                    gates[unit] = halting_gate(number + 1)
            before = tuple(units)
    assert shape is not None
    models[HEAD] = Last(pieces[-1], shape)
    nodes.append(Node(HEAD, (LEAVE,), before))

    known = (Input.of(INPUT, raw.detach().cpu().numpy()).settled(),)
    members = list[ModelSpec]()
    for number, name in enumerate(models):
        members.append(ModelSpec(name, inputs=known if number == 0 else ()))
    return Network(
        backbone=nn.ModuleDict(models).eval(),
        members=tuple(members),
        topology=Topology(tuple(nodes)),
        fronts={} if preprocess is None else {nodes[0].name: preprocess},
        exits={HEAD: find("exits", "Own")()},
        gates=gates,
    )


class First(nn.Module):
    """The part of a model before a stage, and the first unit of the stage.

    Args:
        piece: the part with the unit.
        halt: the halting score of the unit.
        shape: of a state of the stage before; None if there is none.
    """

    def __init__(self, piece: nn.Module, halt: nn.Module, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.piece = piece
        self.halt = halt
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """The input, or rows [n, 2 S + 2] of the stage before -> rows [n, 2 S' + 2]."""
        x = row if self.shape is None else closed(row, self.shape)
        state = _only(self.piece(x))  # [n, C, ...]
        out = torch.zeros_like(state)
        total = state.new_zeros(state.shape[0], 1)  # `len` fixes the batch in an export
        score = self.halt(state).flatten(1)  # [n, 1]
        return packed(state, out, total, score)


class Next(nn.Module):
    """A further unit of a stage.

    Args:
        unit: the unit.
        halt: its halting score; None for the last unit, where all rows stop.
        shape: of a state.
    """

    def __init__(self, unit: nn.Module, halt: nn.Module | None, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.unit = unit
        self.halt = halt
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """Rows [n, 2 S + 2] -> rows [n, 2 S + 2]."""
        state, out, total, score = unpacked(row, self.shape)
        # add the state of the unit before, weighted with its score
        out = torch.addcmul(out, _spread(score, state), state)
        total = total + score
        state = self.unit(state)
        if self.halt is None:
            score = torch.ones_like(total)
        else:
            score = self.halt(state).flatten(1)  # [n, 1]
        return packed(state, out, total, score)


class Last(nn.Module):
    """The part of a model behind its last stage.

    Args:
        piece: the part.
        shape: of a state of the last stage.
    """

    def __init__(self, piece: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.piece = piece
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """Rows [n, 2 S + 2] -> logits [n, C]."""
        return _only(self.piece(closed(row, self.shape)))


def packed(state: Tensor, out: Tensor, total: Tensor, score: Tensor) -> Tensor:
    """Put the numbers between two units into one row per sample.

    Args:
        state: of the last unit [n, C, ...].
        out: the weighted sum of states so far [n, C, ...].
        total: the sum of scores so far [n, 1].
        score: of the last unit [n, 1].

    Returns:
        Rows [n, 2 S + 2].
    """
    return torch.cat([state.flatten(1), out.flatten(1), total, score], 1)


def unpacked(row: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `packed`.

    Args:
        row: [n, 2 S + 2].
        shape: of a state.

    Returns:
        State, weighted sum, sum of scores, and score.
    """
    size = (row.shape[1] - 2) // 2  # S
    # contiguous, because a convolution is slower on a slice of a row
    state = row[:, :size].contiguous().view(-1, *shape)  # [n, S] -> [n, C, ...]
    out = row[:, size : 2 * size].reshape(-1, *shape)  # [n, S] -> [n, C, ...]
    return state, out, row[:, -2:-1], row[:, -1:]


def closed(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The output of a stage for rows that leave it: the last state gets the rest of the weight.

    Args:
        row: [n, 2 S + 2].
        shape: of a state.

    Returns:
        [n, C, ...].
    """
    state, out, total, _ = unpacked(row, shape)
    return torch.addcmul(out, _spread(1 - total, state), state)


def _spread(numbers: Tensor, like: Tensor) -> Tensor:
    """[n, 1] -> [n, 1, 1, ...], with the dimensions of `like`."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))


def _only(output: Any) -> Tensor:
    """The tensor that a piece gives, alone or in a tuple of one."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor
