"""Runs a network with forks eagerly, for training and for a call of the network itself.

`every_path` runs all rows along every path. `routed` sends each row along one path. There the
decision of a gate is a one-hot weight for every successor, and gradients reach the gate through
these weights. Rows are either bucketed (each node runs on its own rows) or mixed (each node runs on
all rows, and where arms meet, their outputs are summed under the weights). Both give the same
results if the weights are one-hot.

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
from offramp.plans.topology import LEAVE, Default, Node, Path, Topology

if TYPE_CHECKING:
    from offramp.networks.network import Network

HANDED = "/handed"  # after a node's name: what its exit hands to later exits, see `Hands`

# (name of a gate, the gate, what it sees) -> one-hot weights [n, K]
Decide = Callable[[str, Gate, Seen], Tensor]


def with_defaults(topology: Topology, inputs: State) -> State:
    """Add default tensors to the inputs.

    A node may read the logits or the output of a node that some rows never pass. For these rows the
    default stands in.

    Args:
        topology: with the defaults.
        inputs: [B, ...] by name.

    Returns:
        The inputs and the defaults, expanded to B rows.
    """
    if not topology.defaults:
        return inputs
    like = next(iter(inputs.values()))
    state = dict(inputs)
    for default in topology.defaults:
        name = default.exit if default.output else default.exit + LOGITS
        state[name] = _default_rows(default, count_of(inputs), like.device)
    return state


def _default_rows(default: Default, rows: int, device: torch.device) -> Tensor:
    """The default value for every row, [rows, ...], without copies."""
    value = torch.full((1, *default.shape), default.value, dtype=torch.float32, device=device)
    return value.expand(rows, *default.shape)


def segment_call(network: Network, name: str) -> Callable[[State], State]:
    """Make the segment of a node that is a model without cuts, as a call on named tensors.

    Args:
        network: with the model.
        name: of the node.

    Returns:
        A function from named tensors to the output, under the name of the node and under the names
        that it shares with other arms.
    """
    node = network.topology.node(name)
    members = {member.name: member for member in network.members}
    member = members[name]
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    names = network.topology.written_by(name)
    computes_nothing = type(model) is nn.Identity and preprocess is None

    def output(state: State) -> Tensor:
        # A fork or an exit between two segments: nothing is computed, and nothing copied.
        if computes_nothing:
            if node.source is not None:
                return state[node.source]
            return _first_input(state)
        # The outputs of other nodes, copied because the model may change them in place.
        if node.source is not None:
            tensors = [state[other].clone() for other in (node.source, *node.reads)]
            return _tensor(name, model(*tensors))
        # The inputs of the network alone.
        if not node.reads:
            logits: Tensor = logits_in(call_model(model, preprocess, copies(state)), member.output)
            return logits
        # The input and the outputs of other nodes.
        others = [state[other] for other in node.reads]
        first = _first_input(state).clone()
        if preprocess is not None:
            first = preprocess(first)
        return _tensor(name, model(first, *others))

    def call(state: State) -> State:
        return dict.fromkeys(names, output(state))

    return call


def _tensor(name: str, output: object) -> Tensor:
    """The output of a segment. Raises BadNetwork unless it is a tensor, or has logits."""
    tensor = logits_in(output)
    if not isinstance(tensor, Tensor):
        raise BadNetwork(
            f"segment {name!r} must give one tensor [B, ...], got a {type(output).__name__}"
        )
    return tensor


def _first_input(state: State) -> Tensor:
    first = next(filter(is_input, state))
    return state[first]


class ReferencePath(nn.Module):
    """The most expensive arms of all forks as one module, without gates.

    Args:
        network: with forks. Its segments on this path are called in turn, then its last exit.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        topology = network.topology
        path = topology.reference_path(topology.exits[-1])
        self.nodes = [topology.node(name) for name in path]
        self.written = {name: topology.written_by(name) for name in path}
        # Outputs of nodes on other arms, which nodes on this path read.
        self.defaults = list[Default]()
        for default in topology.defaults:
            if default.output and default.exit not in path:
                self.defaults.append(default)
        members = {member.name: member for member in network.members}
        self.models = nn.ModuleDict()
        self.fronts = nn.ModuleDict()
        for name in path:
            self.models[name] = network.model_of(members[name])
            preprocess = network.preprocess_of(members[name])
            if preprocess is not None:
                self.fronts[name] = preprocess
        self.last = network.exit_of(path[-1])
        self.training = False

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Logits [B, C] of the last exit."""
        first = next(iter((*args, *kwargs.values())))
        values: dict[str, Tensor] = {}  # outputs by node
        for default in self.defaults:
            values[default.exit] = _default_rows(default, len(first), first.device)
        output = first
        for node in self.nodes:
            model = self.models[node.name]
            others = [values[other] for other in node.reads]
            if node.source is not None:
                if type(model) is nn.Identity:
                    output = values[node.source]
                else:
                    output = model(values[node.source], *others)
            elif type(model) is not nn.Identity:
                inputs = args
                named = kwargs
                if node.name in self.fronts:
                    inputs = (self.fronts[node.name](*args, **kwargs),)
                    named = {}
                output = model(*inputs, *others, **named)
            output = logits_in(output)
            values.update(dict.fromkeys(self.written[node.name], output))
        logits: Tensor = self.last(Seen(output, {}))
        return logits


class Nodes:
    """The segments, exits and gates of a network, called one by one on named tensors."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.topology = network.topology
        self._calls = {name: segment_call(network, name) for name in self.topology.names}

    def run(self, node: Node, state: State) -> None:
        """Run a node's segment, and its exit if there is one; `state` gets their tensors."""
        state.update(self._calls[node.name](state))
        if node.has_exit:
            exit_ = self.network.exit_of(node.name)
            seen = self.seen(node, node.exit_reads, state, handed=True)
            logits, handed = answers(exit_, seen, node.name)
            state[node.name + LOGITS] = logits
            state[node.name + HANDED] = handed

    def seen(self, node: Node, reads: Sequence[str], state: State, *, handed: bool = False) -> Seen:
        """What an exit or a gate at a node sees.

        Args:
            node: whose output they see.
            reads: names of earlier exits and of inputs.
            state: the tensors so far.
            handed: whether it is for an exit, which sees what earlier exits hand on; a gate sees
                their logits, and those of its own exit.
        """
        logits: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        for name in reads:
            if is_input(name):
                inputs[name] = state[name]
            elif handed and isinstance(self.network.exit_of(name), Hands):
                logits[name] = state.get(name + HANDED, state[name + LOGITS])
            else:
                logits[name] = state[name + LOGITS]
        own: Tensor | None = None
        if node.has_exit and not handed:
            own = state[node.name + LOGITS]
        return Seen(state[node.name], logits, own, inputs)


def every_path(network: Network, inputs: State) -> Iterator[tuple[str, Node, Seen]]:
    """Iterate over every exit and gate on every path, for all rows.

    The paths form a tree, which is walked depth first. Tensors are shared where paths are. Of more
    than sixteen paths only the most expensive one is followed, as in a trace.

    Args:
        network: with forks.
        inputs: [B, ...] by name.

    Yields:
        The label of the exit or gate, its node, and what the gate there sees.
    """
    topology = network.topology
    labels = {*topology.exit_labels, *topology.gate_labels}
    nodes = Nodes(network)
    waiting: list[tuple[Path, State]] = [((topology.names[0],), with_defaults(topology, inputs))]
    while waiting:
        path, before = waiting.pop()
        node = topology.node(path[-1])
        # A copy, because other paths continue from the same tensors.
        state = dict(before)
        nodes.run(node, state)
        label = topology.label(path)
        if label in labels:
            yield label, node, nodes.seen(node, node.gate_reads, state)
        successors = node.successors
        if topology.has_many_paths:
            successors = successors[-1:]
        for successor in reversed(successors):
            if successor != LEAVE:
                waiting.append(((*path, successor), state))


@dataclass(frozen=True)
class Routed:
    """The result of sending a batch through a network with forks.

    Attributes:
        logits: of the exit where each row left, [B, C]; gradients reach the gates that decided.
        exits: where each row left, [B]: an index into the topology's `exits`.
        choices: by gate, the one-hot weights [B, K]. Rows that did not arrive have the last
            successor.
        arrived: by gate, which rows arrived, bool [B].
        passed: by exit, the numbers [n] of the rows that arrived, and its logits [n, C] for them.
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
            of its successors. Otherwise every node runs on its own rows only.
    """
    if mixed:
        return _MergedArms(network, inputs, decide).done()
    return _Bucketed(network, inputs, decide).done()


def reach_of(
    topology: Topology, choices: Mapping[str, Tensor], rows: int, like: Tensor
) -> dict[str, Tensor]:
    """Compute how surely every row passes each node.

    The reach of a node is the sum over its predecessors: their reach, times the weight of the way
    from there. Nodes come in topological order, so one pass is enough.

    Args:
        topology: of the network.
        choices: by gate, the weights [B, K] of its successors.
        rows: B.
        like: a tensor of the wanted type, on the device of the choices.

    Returns:
        By node, [B]: 0 or 1 for one-hot choices. Gradients reach the choices.
    """
    reach = {name: like.new_zeros(rows) for name in topology.names}
    reach[topology.names[0]] = like.new_ones(rows)
    for node in topology.nodes:
        for number, successor in enumerate(node.successors):
            if successor == LEAVE:
                continue
            if node.name in choices:
                share = choices[node.name][:, number]  # [B, K] -> [B]
            else:
                share = like.new_ones(rows)
            reach[successor] = reach[successor] + reach[node.name] * share
    return reach


class _Bucketed:
    """Each node runs on its own rows, as in the Runner, with weights that carry gradients."""

    def __init__(self, network: Network, inputs: State, decide: Decide) -> None:
        self.network = network
        self.topology = network.topology
        self.decide = decide
        self.nodes = Nodes(network)
        self.inputs = tuple(inputs)
        self.rows = count_of(inputs)
        device = next(iter(inputs.values())).device
        all_rows = torch.arange(self.rows, device=device)
        start = with_defaults(self.topology, inputs)
        # By node, the groups of rows that wait for it: row numbers [n], named tensors, and the
        # weight [n] of the ways taken since arms last met (None where no gate decided).
        self.waiting: dict[str, list[tuple[Tensor, State, Tensor | None]]] = {}
        self.waiting[self.topology.names[0]] = [(all_rows, start, None)]
        # Rows that have left: their numbers [n], logits [n, C], and the index of the exit.
        self.answers: list[tuple[Tensor, Tensor, int]] = []
        self.choices: dict[str, Tensor] = {}
        self.arrived: dict[str, Tensor] = {}
        self.passed: dict[str, tuple[Tensor, Tensor]] = {}

    def done(self) -> Routed:
        """Run all nodes, and put the results in the order of the rows."""
        for node in self.topology.nodes:
            groups = self.waiting.pop(node.name, [])
            if groups:
                rows, state, weight = self._merged(node, groups)
                self._run(node, rows, state, weight)
        numbers = list[Tensor]()
        logits = list[Tensor]()
        exits = list[Tensor]()
        for rows, answer, index in self.answers:
            numbers.append(rows)
            logits.append(answer)
            exits.append(torch.full_like(rows, index))
        order = torch.cat(numbers).argsort()  # [B]
        return Routed(
            torch.cat(logits)[order],
            torch.cat(exits)[order],
            self.choices,
            self.arrived,
            self.passed,
        )

    def _merged(
        self, node: Node, groups: Sequence[tuple[Tensor, State, Tensor | None]]
    ) -> tuple[Tensor, State, Tensor | None]:
        """Groups as one, in the order of the rows.

        Where arms meet, their outputs are multiplied by the weights, which then start anew.
        """
        if len(groups) == 1 and len(node.after) < 2:
            return groups[0]
        rows = torch.cat([numbers for numbers, _, _ in groups])  # [n]
        order = rows.argsort()
        merged: State = {}
        for name in groups[0][1]:
            parts = list[Tensor]()
            for _, state, weight in groups:
                if name not in state:
                    continue
                value = state[name]
                if weight is not None and name == node.source:
                    value = _scaled(value, weight)
                parts.append(value)
            if len(parts) < len(groups):
                continue  # only some of the arms have this tensor
            _require_one_shape(parts, node)
            merged[name] = torch.cat(parts)[order]
        return rows[order], merged, None

    def _run(self, node: Node, rows: Tensor, state: State, weight: Tensor | None) -> None:
        """Run a node on the rows that arrived, and send each row to its successor."""
        state = dict(state)
        self.nodes.run(node, state)
        if node.has_exit:
            self.passed[node.name] = (rows, state[node.name + LOGITS])
        if len(node.successors) == 1:
            self._send(node, node.successors[0], rows, state, weight)
            return
        gate = self.network.gate_of(node.name)
        seen = self.nodes.seen(node, node.gate_reads, state)
        chosen = self.decide(node.name, gate, seen)  # [n, K]
        # [n, K] -> [B, K]; rows that did not arrive have the last successor.
        choices = chosen.new_zeros(self.rows, chosen.shape[1])
        choices[:, -1] = 1.0
        self.choices[node.name] = choices.index_copy(0, rows, chosen)
        arrived = torch.zeros(self.rows, dtype=torch.bool, device=rows.device)
        arrived[rows] = True
        self.arrived[node.name] = arrived
        way = chosen.argmax(1)  # [n]
        for number, successor in enumerate(node.successors):
            here = (way == number).nonzero()[:, 0]  # positions among the n rows
            if not len(here):
                continue
            new_weight = chosen[here, number]
            if weight is not None:
                new_weight = new_weight * weight[here]
            selected = {name: value[here] for name, value in state.items()}
            self._send(node, successor, rows[here], selected, new_weight)

    def _send(
        self, node: Node, successor: str, rows: Tensor, state: State, weight: Tensor | None
    ) -> None:
        """Let rows wait for the successor, or leave with the logits of the exit here."""
        if successor != LEAVE:
            self.waiting.setdefault(successor, []).append((rows, state, weight))
            return
        logits = state[node.name + LOGITS]
        if weight is not None:
            logits = _scaled(logits, weight)
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
        """Run all nodes on all rows, and sum the logits under the weights."""
        device = next(iter(self.start.values())).device
        one = torch.ones(self.rows, device=device)
        # By node, for every arm that leads to it: the weights [B] of the rows, and their tensors.
        waiting: dict[str, list[tuple[Tensor, State]]] = {}
        waiting[self.topology.names[0]] = [(one, self.start)]
        logits: Tensor | None = None
        # The weight with which every exit answers a row, [B, exits].
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
            ways = one[:, None]  # [B, 1]: a single successor
            if len(node.successors) > 1:
                gate = self.network.gate_of(node.name)
                seen = self.nodes.seen(node, node.gate_reads, state)
                ways = self.decide(node.name, gate, seen)  # [B, K]
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
                weighted = _scaled(state[node.name + LOGITS], share)
                logits = weighted if logits is None else logits + weighted
                taken[:, self.topology.exit_index(node.name)] += share.detach()
        assert logits is not None
        return Routed(logits, taken.argmax(1), choices, arrived, passed)

    def _mixed(self, node: Node, groups: Sequence[tuple[Tensor, State]]) -> tuple[Tensor, State]:
        """The weight [B] with which rows arrive at a node, and their tensors.

        Where arms meet, a tensor is the sum over the arms, each times its weight.
        """
        weights = [weight for weight, _ in groups]
        states = [state for _, state in groups]
        if len(groups) == 1:
            return weights[0], dict(states[0])
        total = torch.stack(weights).sum(0)  # [arms, B] -> [B]
        # Rows on other paths have the output of the last arm, and do not count.
        elsewhere = (1 - total).detach()
        merged: State = {}
        for name, last in states[-1].items():
            values = [state[name] for state in states if name in state]
            if len(values) < len(states):
                continue  # only some of the arms have this tensor
            if all(value is last for value in values):
                merged[name] = last  # it was made before the arms parted
                continue
            _require_one_shape(values, node)
            mixed = _scaled(last, elsewhere)
            for weight, value in zip(weights, values, strict=True):
                mixed = mixed + _scaled(value, weight)
            merged[name] = mixed
        return total, merged


def _require_one_shape(values: Sequence[Tensor], node: Node) -> None:
    """Raise BadNetwork unless arms that meet at a node give rows of the same shape."""
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        several = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise BadNetwork(
            f"arms that meet at {node.name!r} give rows of shapes {several}; they must give one"
        )


def _scaled(value: Tensor, weight: Tensor) -> Tensor:
    """Rows [n, ...] times their weights [n]."""
    ones = [1] * (value.dim() - 1)
    return value * weight.reshape(-1, *ones).to(value.dtype)  # [n] -> [n, 1, ...]
