"""A model with stages of adaptive computation time as a network in which every unit is a stage of
the schedule.

Between two units a sample is one row of numbers: its state, the weighted sum so far, the sum of the
halting scores so far, and the score of the unit that has just run. A sample that leaves takes the
rest of the weight for its last state.
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
from offramp.networks.members import ModelSpec
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Gate
from offramp.partition import partition
from offramp.plans.signature import INPUT, Input
from offramp.plans.topology import LEAVE, Node, Topology

HEAD = "head"


@without_autocast()
def unrolled(model: nn.Module, example: Any, *, preprocess: nn.Module | None = None) -> Network:
    """A network in which samples really leave each stage of adaptive depth, after any of its units.

    The rows of a batch that go on are compacted at every unit, and those that have left a stage are
    put together again behind it, in the order of x. Its plan is a threshold for each unit:
    `1 - eps` is the rule of the paper, and `Plan.by_hand` takes it. Rows are recorded on every
    path, so that `calibrate` chooses thresholds and certifies them, where there are at most sixteen
    paths: one stage of up to sixteen units, or two of four.

    Args:
        model: from `halting(..., per="sample")`, trained, in eval mode. It is copied.
        example: a small batch of rows.
        preprocess: what stands before the model.

    Returns:
        Nodes `<stage>-<unit>`, from 0, and `head`, which answers.

    Raises:
        BadNetwork: the model has no such stage, one halts by position, or its stages do not follow
            each other.

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
    stages = {name: part for name, part in model.named_modules() if isinstance(part, kind)}
    if not stages:
        raise BadNetwork(
            "the model has no stage of adaptive depth; make one with halting(model, stages, "
            "per='sample')"
        )
    if bad := [name for name, stage in stages.items() if stage.per != "sample"]:
        raise BadNetwork(
            f"the stage {bad[0]!r} halts by position, expected per='sample': positions stay in "
            f"their image"
        )
    x = as_inputs(example)
    if [*x] != [INPUT]:
        raise BadNetwork(f"the model takes the inputs {[*x]}, expected a single one")
    given = x[INPUT] if preprocess is None else preprocess(x[INPUT])
    given = torch.cat([given, given]) if len(given) == 1 else given
    pieces = _pieces(model, stages, given)
    return _network(pieces, copy.deepcopy(stages), given, x[INPUT], preprocess)


def _pieces(model: nn.Module, stages: dict[str, Any], x: Tensor) -> list[nn.Module]:
    """What runs before each stage, its first unit included, and what runs after the last one."""
    plain = copy.deepcopy(model)
    cuts = list[str]()
    for name, stage in stages.items():
        units = copy.deepcopy(stage.units)
        above, _, last = name.rpartition(".")
        plain.get_submodule(above).register_module(last, nn.Sequential(*units).eval())
        cuts += [f"{name}.0", f"{name}.{len(units) - 1}"]
    parts = partition(plain.eval(), (x,), at=cuts)
    if [piece.name for piece in parts.pieces] != [*cuts, ""]:
        raise BadNetwork(f"the stages {[*stages]} do not run in this order, one after the other")
    for piece in parts.pieces:
        if len(piece.reads) != 1 or len(piece.writes) != 1:
            raise BadNetwork(
                f"between the stages {[*stages]} more is handed on than what a stage gives: "
                f"{piece.reads}; "
                "expected a model whose stages stand in one line"
            )
    return [piece.module for piece in parts.pieces[::2]]


def _network(
    pieces: Sequence[nn.Module],
    stages: dict[str, Any],
    x: Tensor,
    raw: Tensor,
    preprocess: nn.Module | None,
) -> Network:
    """The nodes, their modules and their gates."""
    models: dict[str, nn.Module] = {}
    nodes = list[Node]()
    gates: dict[str, Gate] = {}
    before: tuple[str, ...] = ()  # the nodes from which rows may arrive
    shape: tuple[int, ...] | None = None  # of a state of the stage before
    short = [name.replace(".", "_") for name in stages]
    behind = [*(f"{name}-0" for name in short[1:]), HEAD]
    with torch.no_grad():
        for piece, name, following, stage in zip(
            pieces, short, behind, stages.values(), strict=False
        ):
            units = [f"{name}-{number}" for number in range(len(stage.units))]
            x = _only(piece(x))
            models[units[0]] = First(piece, stage.halts[0], shape)
            nodes.append(Node(units[0], (following, units[1]), before))
            gates[units[0]] = find("gates", "Halting")(1)
            shape = tuple(x.shape[1:])
            for number, unit in enumerate(units[1:], 1):
                last = number == len(units) - 1
                halt = None if last else stage.halts[number]
                models[unit] = Next(stage.units[number], halt, shape)
                successors = (following,) if last else (following, units[number + 1])
                nodes.append(Node(unit, successors, (units[number - 1],)))
                if not last:
                    gates[unit] = find("gates", "Halting")(number + 1)
            before = tuple(units)
    assert shape is not None
    models[HEAD] = Last(pieces[-1], shape)
    nodes.append(Node(HEAD, (LEAVE,), before))
    known = (Input.of(INPUT, raw.detach().cpu().numpy()).settled(),)
    return Network(
        backbone=nn.ModuleDict(models).eval(),
        members=tuple(
            ModelSpec(name, inputs=known) if number == 0 else ModelSpec(name)
            for number, name in enumerate(models)
        ),
        topology=Topology(tuple(nodes)),
        fronts={} if preprocess is None else {nodes[0].name: preprocess},
        exits={HEAD: find("exits", "Own")()},
        gates=gates,
    )


class First(nn.Module):
    """All that runs before a stage, and its first unit; behind another stage it reads what that one
    hands on.
    """

    def __init__(self, piece: nn.Module, halt: nn.Module, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.piece = piece
        self.halt = halt
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """The input, or [n, 2 S + 2] with S numbers of a state -> [n, 2 S' + 2]."""
        given = row if self.shape is None else closed(row, self.shape)
        state = _only(self.piece(given))  # [n, C, ...]
        return packed(
            state,
            torch.zeros_like(state),
            state.new_zeros(len(state), 1),
            self.halt(state).flatten(1),
        )


class Next(nn.Module):
    """A further unit of a stage."""

    def __init__(self, unit: nn.Module, halt: nn.Module | None, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.unit = unit
        self.halt = halt
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """[n, 2 S + 2] -> [n, 2 S + 2]."""
        state, out, total, score = unpacked(row, self.shape)
        out = torch.addcmul(out, _spread(score, state), state)
        total = total + score
        state = self.unit(state)
        if self.halt is None:
            score = torch.ones_like(total)
        else:
            score = self.halt(state).flatten(1)
        return packed(state, out, total, score)


class Last(nn.Module):
    """All that runs behind the last stage."""

    def __init__(self, piece: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.piece = piece
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        """[n, 2 S + 2] -> logits [n, C]."""
        return _only(self.piece(closed(row, self.shape)))


def packed(state: Tensor, out: Tensor, total: Tensor, score: Tensor) -> Tensor:
    """A state and the sum so far, [n, C, ...] each, the scores so far and the latest one, [n, 1]:
    [n, 2 S + 2].
    """
    return torch.cat([state.flatten(1), out.flatten(1), total, score], 1)


def unpacked(row: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `packed` put together."""
    size = (row.shape[1] - 2) // 2
    # a convolution is slower on a part of a row
    state = row[:, :size].contiguous().view(-1, *shape)
    out = row[:, size : 2 * size].reshape(-1, *shape)
    return state, out, row[:, -2:-1], row[:, -1:]


def closed(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a stage gives for rows that leave it: the last state gets the rest of the weight, [n, C,
    ...].
    """
    state, out, total, _ = unpacked(row, shape)
    return torch.addcmul(out, _spread(1 - total, state), state)


def _spread(numbers: Tensor, like: Tensor) -> Tensor:
    """[n, 1] -> [n, 1, 1, ...]."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))


def _only(output: Any) -> Tensor:
    """The tensor that a piece gives, alone or in a tuple of one."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found
