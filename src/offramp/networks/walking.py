"""A network with forks, run eagerly on the user's own modules: for training, and for a call of the
network itself.

`every_path` runs all rows along every path. `routed` sends each row along one: what a gate decides
is a one-hot weight for every way, through which gradients reach the gate. Rows are either bucketed
(each node runs on its own rows) or mixed (each node runs on all rows, and where arms meet their
outputs are summed under the weights). Both give the same answers where the weights are one-hot.

Shapes: B rows, n rows that arrive somewhere, K successors of a gate, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.inputs import State, call_model, copies, count_of
from offramp.networks.nodes import Gate, Hands, Seen, answers
from offramp.networks.taps import logits_in
from offramp.plans.schedule import LOGITS
from offramp.plans.signature import is_input
from offramp.plans.topology import LEAVE, Node, Path, Topology

if TYPE_CHECKING:
    from offramp.networks.network import Network

HANDED = "/handed"  # what an exit hands to later exits where that is not its answer: see `Hands`

# the name of a gate, the gate and what it sees -> one-hot weights [n, K]
Decide = Callable[[str, Gate, Seen], Tensor]


def with_defaults(topology: Topology, inputs: State) -> State:
    """Inputs [B, ...], and what stands for the logits or outputs of nodes until they have run for a
    row.
    """
    if not topology.defaults:
        return inputs
    like = next(iter(inputs.values()))
    state = dict(inputs)
    for one in topology.defaults:
        name = one.exit if one.output else one.exit + LOGITS
        value = torch.full((1, *one.shape), one.value, dtype=torch.float32, device=like.device)
        state[name] = value.expand(count_of(inputs), *one.shape)
    return state


def segment_call(network: Network, name: str) -> Callable[[State], State]:
    """The segment of a node that is a whole model, as a call on named tensors.

    It gives its output under its own name and under those that it shares with other arms.
    """
    node = network.topology.node(name)
    member = next(member for member in network.members if member.name == name)
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    names = network.topology.written_by(name)
    hands_on = type(model) is nn.Identity and preprocess is None

    def output(state: State) -> Tensor:
        # a fork or an exit between two segments: nothing is computed, and nothing copied
        if hands_on:
            if node.source is not None:
                return state[node.source]
            return _first_input(state)
        if node.source is None:
            more = [state[other] for other in node.reads]
            if not more:
                found: Tensor = logits_in(
                    call_model(model, preprocess, copies(state)), member.output
                )
                return found
            first = _first_input(state).clone()
            return _tensor(name, model(first if preprocess is None else preprocess(first), *more))
        # it may work in place
        taken = [state[other].clone() for other in (node.source, *node.reads)]
        return _tensor(name, model(*taken))

    def call(state: State) -> State:
        return dict.fromkeys(names, output(state))

    return call


def _tensor(name: str, output: object) -> Tensor:
    """What a segment gave. Raises BadNetwork unless it is one tensor, or logits among others."""
    found = logits_in(output)
    if not isinstance(found, Tensor):
        raise BadNetwork(
            f"segment {name!r} must give one tensor [B, ...], got a {type(output).__name__}"
        )
    return found


def _first_input(state: State) -> Tensor:
    return next(value for name, value in state.items() if is_input(name))


class ReferencePath(nn.Module):
    """The dearest arms of all forks as one module: the plain network behind a network with forks.

    Args:
        network: whose segments are called, one after the other, and its last exit.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        topology = network.topology
        path = topology.reference_path(topology.exits[-1])
        self.nodes = [topology.node(name) for name in path]
        self.written = {name: topology.written_by(name) for name in path}
        self.defaults = [one for one in topology.defaults if one.output and one.exit not in path]
        members = {member.name: member for member in network.members}
        self.models = nn.ModuleDict({name: network.model_of(members[name]) for name in path})
        fronts = {name: network.preprocess_of(members[name]) for name in path}
        self.fronts = nn.ModuleDict(
            {name: preprocess for name, preprocess in fronts.items() if preprocess is not None}
        )
        self.last = network.exit_of(path[-1])
        self.training = False

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Logits [B, C]."""
        first = next(iter((*args, *kwargs.values())))
        values: dict[str, Tensor] = {}
        for one in self.defaults:
            value = torch.full((1, *one.shape), one.value, dtype=torch.float32, device=first.device)
            values[one.exit] = value.expand(len(first), *one.shape)
        found = first
        for node in self.nodes:
            model = self.models[node.name]
            more = [values[other] for other in node.reads]
            if node.source is not None:
                if type(model) is nn.Identity:
                    found = values[node.source]
                else:
                    found = model(values[node.source], *more)
            elif type(model) is not nn.Identity:
                inputs = args
                named = kwargs
                if node.name in self.fronts:
                    inputs = (self.fronts[node.name](*args, **kwargs),)
                    named = {}
                found = model(*inputs, *more, **named)
            found = logits_in(found)
            values.update(dict.fromkeys(self.written[node.name], found))
        logits: Tensor = self.last(Seen(found, {}))
        return logits


class Nodes:
    """The segments, exits and gates of a network, called one by one on named tensors."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.topology = network.topology
        self._calls = {name: segment_call(network, name) for name in self.topology.names}

    def run(self, node: Node, state: State) -> None:
        """Run a node's segment, and its exit where there is one; their tensors are added to
        `state`.
        """
        state.update(self._calls[node.name](state))
        if node.has_exit:
            exit_ = self.network.exit_of(node.name)
            logits, handed = answers(
                exit_, self.seen(node, node.exit_reads, state, handed=True), node.name
            )
            state[node.name + LOGITS] = logits
            state[node.name + HANDED] = handed

    def seen(self, node: Node, reads: Sequence[str], state: State, *, handed: bool = False) -> Seen:
        """What an exit (handed=True) or a gate at a node sees."""
        logits: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        for name in reads:
            if is_input(name):
                inputs[name] = state[name]
            elif handed and isinstance(self.network.exit_of(name), Hands):
                logits[name] = state.get(name + HANDED, state[name + LOGITS])
            else:
                logits[name] = state[name + LOGITS]
        own = None if handed or not node.has_exit else state[node.name + LOGITS]
        return Seen(state[node.name], logits, own, inputs)


def every_path(network: Network, inputs: State) -> Iterator[tuple[str, Node, Seen]]:
    """Every exit and gate on every path, for all rows: its label, its node, and what the gate there
    sees.

    Raises BadNetwork in a network with more than sixteen paths.
    """
    topology = network.topology
    if topology.has_many_paths:
        _ = topology.paths  # which says so
    labels = {*topology.exit_labels, *topology.gate_labels}
    nodes = Nodes(network)
    waiting: list[tuple[Path, State]] = [((topology.names[0],), with_defaults(topology, inputs))]
    while waiting:
        path, before = waiting.pop()
        node = topology.node(path[-1])
        state = dict(before)
        nodes.run(node, state)
        label = topology.label(path)
        if label in labels:
            yield label, node, nodes.seen(node, node.gate_reads, state)
        for successor in reversed(node.successors):
            if successor != LEAVE:
                waiting.append(((*path, successor), state))


@dataclass(frozen=True)
class Routed:
    """What became of a batch that was sent through a network with forks.

    Attributes:
        logits: the answers [B, C]; gradients reach the gates that decided.
        exits: which exit answered [B], an index into the topology's `exits`.
        choices: by gate the one-hot weights [B, K]. A row that did not arrive has the last way.
        arrived: by gate bool [B].
        passed: by exit the numbers [n] of the rows that came there, and its logits [n, C] for them.
    """

    logits: Tensor
    exits: Tensor
    choices: Mapping[str, Tensor]
    arrived: Mapping[str, Tensor]
    passed: Mapping[str, tuple[Tensor, Tensor]]


def routed(network: Network, inputs: State, decide: Decide, *, mixed: bool = False) -> Routed:
    """Send every row along one path.

    Args:
        network: a network with forks.
        inputs: named tensors [B, ...].
        decide: gives the one-hot weights [n, K] of the rows that arrive at a gate.
        mixed: run every node on all rows and sum under the weights, so that a gate learns from all
            of its ways; else every node runs on its own rows alone.
    """
    if mixed:
        return _MergedArms(network, inputs, decide).done()
    return _Bucketed(network, inputs, decide).done()


def reach_of(
    topology: Topology, choices: Mapping[str, Tensor], rows: int, like: Tensor
) -> dict[str, Tensor]:
    """By node how surely every row passes it, [B]: 0 or 1 for one-hot choices, with their
    gradients.

    Args:
        topology: whose nodes are meant.
        choices: by gate the weights [B, K] of its successors.
        rows: B.
        like: a tensor of the wanted type, where the choices are.
    """
    reach = {name: like.new_zeros(rows) for name in topology.names}
    reach[topology.names[0]] = like.new_ones(rows)
    for node in topology.nodes:
        for number, successor in enumerate(node.successors):
            if successor == LEAVE:
                continue
            if node.name in choices:
                share = choices[node.name][:, number]
            else:
                share = like.new_ones(rows)
            reach[successor] = reach[successor] + reach[node.name] * share
    return reach


class _Bucketed:
    """Each node runs on its own rows, as the Runner does it, with weights that carry gradients."""

    def __init__(self, network: Network, inputs: State, decide: Decide) -> None:
        self.network = network
        self.topology = network.topology
        self.decide = decide
        self.nodes = Nodes(network)
        self.inputs = tuple(inputs)
        self.rows = count_of(inputs)
        device = next(iter(inputs.values())).device
        every = torch.arange(self.rows, device=device)
        start = with_defaults(self.topology, inputs)
        # By node the groups that wait for it: row numbers [n], named tensors, and the weight [n] of
        # the ways taken since arms last met (None where no gate decided).
        self.waiting: dict[str, list[tuple[Tensor, State, Tensor | None]]] = {
            self.topology.names[0]: []
        }
        self.waiting[self.topology.names[0]].append((every, start, None))
        self.answers: list[tuple[Tensor, Tensor, int]] = []
        self.choices: dict[str, Tensor] = {}
        self.arrived: dict[str, Tensor] = {}
        self.passed: dict[str, tuple[Tensor, Tensor]] = {}

    def done(self) -> Routed:
        """All rows, answered."""
        for node in self.topology.nodes:
            groups = self.waiting.pop(node.name, [])
            if groups:
                self._run(node, *self._merged(node, groups))
        order = torch.cat([rows for rows, _, _ in self.answers]).argsort()
        logits = torch.cat([each for _, each, _ in self.answers])[order]
        exits = torch.cat([torch.full_like(rows, number) for rows, _, number in self.answers])[
            order
        ]
        return Routed(logits, exits, self.choices, self.arrived, self.passed)

    def _merged(
        self, node: Node, groups: Sequence[tuple[Tensor, State, Tensor | None]]
    ) -> tuple[Tensor, State, Tensor | None]:
        """Groups as one in the order of the rows. Where arms meet, the weight goes into what they
        gave.
        """
        if len(groups) == 1 and len(node.after) < 2:
            return groups[0]
        names = [name for name in groups[0][1] if all(name in state for _, state, _ in groups)]
        rows = torch.cat([numbers for numbers, _, _ in groups])
        order = rows.argsort()
        state: State = {}
        for name in names:
            parts = list[Tensor]()
            for _, own, weight in groups:
                value = own[name]
                if weight is not None and name == node.source:
                    value = _scaled(value, weight)
                parts.append(value)
            shapes = {tuple(part.shape[1:]) for part in parts}
            if len(shapes) > 1:
                told = " and ".join(str(list(shape)) for shape in sorted(shapes))
                raise BadNetwork(
                    f"arms that meet at {node.name!r} give rows of shapes {told}; they must give "
                    f"one"
                )
            state[name] = torch.cat(parts)[order]
        return rows[order], state, None

    def _run(self, node: Node, rows: Tensor, state: State, weight: Tensor | None) -> None:
        state = dict(state)
        self.nodes.run(node, state)
        if node.has_exit:
            self.passed[node.name] = (rows, state[node.name + LOGITS])
        if len(node.successors) == 1:
            self._send(node, node.successors[0], rows, state, weight)
            return
        gate = self.network.gate_of(node.name)
        # [n, K]
        chosen = self.decide(node.name, gate, self.nodes.seen(node, node.gate_reads, state))
        whole = chosen.new_zeros(self.rows, chosen.shape[1])
        whole[:, -1] = 1.0
        self.choices[node.name] = whole.index_copy(0, rows, chosen)
        arrived = torch.zeros(self.rows, dtype=torch.bool, device=rows.device)
        arrived[rows] = True
        self.arrived[node.name] = arrived
        way = chosen.argmax(1)
        for number, successor in enumerate(node.successors):
            here = (way == number).nonzero()[:, 0]
            if not len(here):
                continue
            share = chosen[here, number]
            share = share if weight is None else share * weight[here]
            some = {name: value[here] for name, value in state.items()}
            self._send(node, successor, rows[here], some, share)

    def _send(
        self, node: Node, successor: str, rows: Tensor, state: State, weight: Tensor | None
    ) -> None:
        if successor != LEAVE:
            self.waiting.setdefault(successor, []).append((rows, state, weight))
            return
        logits = state[node.name + LOGITS]
        logits = logits if weight is None else _scaled(logits, weight)
        self.answers.append((rows, logits, self.topology.exit_index(node.name)))


class _MergedArms:
    """Each node runs once on all rows, and arms are summed where they meet."""

    def __init__(self, network: Network, inputs: State, decide: Decide) -> None:
        self.network = network
        self.topology = network.topology
        self.decide = decide
        self.nodes = Nodes(network)
        self.rows = count_of(inputs)
        self.start = with_defaults(self.topology, inputs)

    def done(self) -> Routed:
        """All rows, answered."""
        device = next(iter(self.start.values())).device
        one = torch.ones(self.rows, device=device)
        waiting: dict[str, list[tuple[Tensor, State]]] = {
            self.topology.names[0]: [(one, self.start)]
        }
        logits: Tensor | None = None
        # the weight of every exit's answer
        taken = torch.zeros(self.rows, len(self.topology.exits), device=device)
        choices: dict[str, Tensor] = {}
        arrived: dict[str, Tensor] = {}
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        for node in self.topology.nodes:
            weight, state = self._mixed(node, waiting.pop(node.name))
            self.nodes.run(node, state)
            if node.has_exit:
                rows = (weight.detach() > 0).nonzero()[:, 0]
                passed[node.name] = (rows, state[node.name + LOGITS][rows])
            ways = one[:, None]
            if len(node.successors) > 1:
                gate = self.network.gate_of(node.name)
                # [B, K]
                ways = self.decide(node.name, gate, self.nodes.seen(node, node.gate_reads, state))
                here = weight.detach() > 0
                last = torch.zeros_like(ways)
                last[:, -1] = 1.0
                choices[node.name] = torch.where(here[:, None], ways, last)
                arrived[node.name] = here
            for number, successor in enumerate(node.successors):
                share = weight * ways[:, number]
                if successor != LEAVE:
                    waiting.setdefault(successor, []).append((share, state))
                    continue
                own = _scaled(state[node.name + LOGITS], share)
                logits = own if logits is None else logits + own
                taken[:, self.topology.exit_index(node.name)] += share.detach()
        assert logits is not None
        return Routed(logits, taken.argmax(1), choices, arrived, passed)

    def _mixed(self, node: Node, groups: Sequence[tuple[Tensor, State]]) -> tuple[Tensor, State]:
        """The weight [B] with which rows arrive, and the tensors that they bring."""
        if len(groups) == 1:
            return groups[0][0], dict(groups[0][1])
        total = torch.stack([weight for weight, _ in groups]).sum(0)
        elsewhere = (
            1 - total
        ).detach()  # rows on other paths: they bring what the last arm gave, and count nothing
        state: State = {}
        for name, last in groups[-1][1].items():
            several = [own[name] for _, own in groups if name in own]
            if len(several) < len(groups):
                continue
            if all(value is last for value in several):
                state[name] = last
                continue
            shapes = {tuple(value.shape[1:]) for value in several}
            if len(shapes) > 1:
                told = " and ".join(str(list(shape)) for shape in sorted(shapes))
                raise BadNetwork(
                    f"arms that meet at {node.name!r} give rows of shapes {told}; they must give "
                    f"one"
                )
            mixed = _scaled(last, elsewhere)
            for (weight, _), value in zip(groups, several, strict=True):
                mixed = mixed + _scaled(value, weight)
            state[name] = mixed
        return total, state


def _scaled(value: Tensor, weight: Tensor) -> Tensor:
    """Rows [n, ...] times their weights [n]."""
    return value * weight.reshape(-1, *[1] * (value.dim() - 1)).to(value.dtype)
