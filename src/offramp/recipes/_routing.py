"""Parts that the recipes for forks share: one-hot choices with gradients, and the cost of a path.

Shapes: b rows, K successors of a gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network, trial_rows
from offramp.networks.nodes import Chooser, Gate, Seen, grade
from offramp.networks.recipe import Phase
from offramp.networks.walking import Routed, reach_of
from offramp.plans.plan import choose
from offramp.plans.schedule import full_schedule
from offramp.plans.topology import LEAVE, Topology
from offramp.recipes._schedules import cosine
from offramp.runtime.engine import kind_of
from offramp.runtime.measuring import costs_of

PRICES = "prices"  # the name of the auxiliary module that holds the `PathPrices`
KINDS = ("segment", "exit", "gate")  # the parts of a node that cost something


def gumbel(ratings: Tensor, tau: float, *, noise: bool = True) -> Tensor:
    """One-hot choices [b, K], drawn by the softmax of the ratings, with the gradient of that
    softmax.

    h = onehot(argmax(log p + g)), g = -log(-log u); backward softmax((log p + g) / tau).
    """
    logits = ratings.log_softmax(1)
    if noise:
        # Clamped, so that neither logarithm is infinite.
        uniform = torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)
        logits = logits - (-uniform.log()).log()
    soft = (logits / tau).softmax(1)
    # [b, K] -> [b, 1] -> [b, K]
    hard = torch.zeros_like(soft).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    # Straight-through: the value is that of `hard`, the gradient that of `soft`.
    return hard + soft - soft.detach()


def one_hot(ways: Tensor, count: int) -> Tensor:
    """Choices [b] as weights [b, count]."""
    return torch.nn.functional.one_hot(ways, count).float()


def best_way(gate: Gate, seen: Seen, count: int) -> Tensor:
    """The way [b] that a gate takes at thresholds of 0.

    A gate that rates no ways takes the last one.
    """
    if not isinstance(gate, Chooser):
        return torch.full((len(seen.features),), count - 1, device=seen.features.device)
    # A gate has one score less than ways: the last way needs none.
    ratings = grade(gate, seen, seen.own, count - 1).detach()
    scores = ratings.reshape(-1, count - 1).cpu().numpy()  # [b, count - 1]
    thresholds = torch.zeros(count - 1).numpy()
    ways = choose(scores, thresholds)  # [b]
    return torch.as_tensor(ways, device=seen.features.device)


class PathPrices(nn.Module):
    """The costs of a network's nodes, as shares of the plain network.

    The plain network has the dearest arm of every fork, and no gates.

    Args:
        costs: of each node, in the order of the topology.
        least: the cost of the cheapest path.
        most: the cost of the dearest path.
    """

    def __init__(self, costs: list[float], least: float, most: float) -> None:
        super().__init__()
        self.register_buffer("costs", torch.tensor(costs, dtype=torch.float32))
        self.least = least
        self.most = most

    def of(self, topology: Topology, choices: Mapping[str, Tensor], rows: int) -> Tensor:
        """The cost [b] of each row's path, with gradients to the choices."""
        costs = self.get_buffer("costs")
        reach = reach_of(topology, choices, rows, costs)
        reached = torch.stack([reach[name] for name in topology.names], 1)  # [b, nodes]
        return reached @ costs  # [b, nodes] @ [nodes] -> [b]

    def over(self, cost: Tensor, budget: float) -> Tensor:
        """DRNet's hinge: by how much the mean cost exceeds a budget.

        The excess is a share of the span between the cheapest and the dearest path.
        """
        # With a single path the span is 0.
        span = max(self.most - self.least, 1e-9)
        return torch.relu(cost.mean() - budget) / span


@dataclass(frozen=True)
class NodeCosts:
    """MACs of each node: its segment, its exit, and its gate."""

    segment: float
    exit: float
    gate: float


def measured(network: Network) -> dict[str, NodeCosts]:
    """MACs of every node, counted on rows like the example that the network was made with.

    Args:
        network: with an example.

    Returns:
        The costs by node, in the order of the topology.

    Raises:
        BadNetwork: the network was made without an example.
    """
    rows = trial_rows(network)
    if not rows:
        raise BadNetwork(
            "This network has no example rows, so the cost of its paths cannot be counted. "
            "Make the network with example="
        )
    parts = kind_of("torch")().open(network, full_schedule(network.topology), network.device())
    priced = costs_of(parts, rows, timed=False)
    costs: dict[str, NodeCosts] = {}
    for name in network.topology.names:
        # A node without an exit or a gate has no entry for it.
        macs = dict.fromkeys(KINDS, 0.0)
        for kind in KINDS:
            key = f"cost/{kind}/{name}"
            if key in priced:
                macs[kind] = float(priced[key][0])
        costs[name] = NodeCosts(**macs)
    return costs


def prices_of(network: Network) -> PathPrices:
    """The prices of a network's paths. Raises BadNetwork where nothing can be counted."""
    topology = network.topology
    costs = measured(network)

    # The plain network: from the last exit back to the root, along the last predecessor of each
    # node (the dearest arm), without gates and without the exits on the way.
    reference = topology.exits[-1]
    plain = costs[reference].segment + costs[reference].exit
    node = topology.node(reference)
    while node.after:
        node = topology.node(node.after[-1])
        plain += costs[node.name].segment
    if not plain > 0:
        raise BadNetwork(
            "The dearest path of this network has no multiply-adds, so costs cannot be compared"
        )

    shares: dict[str, float] = {}
    for name in topology.names:
        macs = costs[name]
        shares[name] = (macs.segment + macs.exit + macs.gate) / plain

    # The cheapest and the dearest path from each node to its end. Walked from the last node to the
    # first, so that the successors of a node are known before it.
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    for node in reversed(topology.nodes):
        lows = list[float]()
        highs = list[float]()
        for successor in node.successors:
            if successor == LEAVE:  # the path ends here and costs nothing more
                lows.append(0.0)
                highs.append(0.0)
            else:
                lows.append(least[successor])
                highs.append(most[successor])
        least[node.name] = shares[node.name] + min(lows)
        most[node.name] = shares[node.name] + max(highs)

    first = topology.names[0]
    return PathPrices([shares[name] for name in topology.names], least[first], most[first])


def require_uncut(network: Network, what: str) -> None:
    """Raise BadNetwork if a member of the network is cut; `what` is the name of the recipe."""
    for member in network.members:
        if member.cuts:
            raise BadNetwork(
                f"{what} needs a network of whole models (off.route), but {member.name!r} is cut"
            )


def require_choosers(network: Network, what: str) -> tuple[str, ...]:
    """The gates that rate their ways.

    Args:
        network: of whole models.
        what: the name of the recipe, for the messages.

    Returns:
        The names of the nodes whose gates are `Chooser`s.

    Raises:
        BadNetwork: the network has a cut member, no parameters, or no gate that rates its ways.
    """
    require_uncut(network, what)
    if next(network.parameters(), None) is None:
        raise BadNetwork("This network has no parameters to train")
    choosers = list[str]()
    for name in network.topology.gates:
        if isinstance(network.gate_of(name), Chooser):
            choosers.append(name)
    if not choosers:
        raise BadNetwork(
            f"{what} needs gates that rate their ways, but this network has none. "
            "Use gate='controller'"
        )
    return tuple(choosers)


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raise InvalidArgument for a number outside (low, high]."""
    if not low < value <= high:
        raise InvalidArgument(f"{name} must be above {low:g} and at most {high:g}, got {value!r}")


def models_of(
    network: Network, norm: str
) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Module, ...]]:
    """The parameters of the models that are trained, and the modules that stay as they are.

    Args:
        network: whose models are trained.
        norm: "moving" trains everything; "frozen" leaves the batch norms out.

    Returns:
        The parameters that are trained, and the batch norms that are frozen.
    """
    if norm != "frozen":
        return tuple(network.backbone.parameters()), ()
    norms = list[nn.Module]()
    frozen = set[int]()  # ids, because == of tensors compares elementwise
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            norms.append(module)
            frozen.update(map(id, module.parameters()))
    trained = [value for value in network.backbone.parameters() if id(value) not in frozen]
    return tuple(trained), tuple(norms)


def two_rates(
    parameters: Iterable[nn.Parameter],
    *,
    gates: tuple[nn.Parameter, ...],
    rate: float,
    gate_rate: float,
) -> Optimizer:
    """Adam with a separate learning rate for the gates."""
    return torch.optim.Adam(rate_groups(parameters, gates=gates, rate=rate, gate_rate=gate_rate))


def rate_groups(
    parameters: Iterable[nn.Parameter],
    *,
    gates: tuple[nn.Parameter, ...],
    rate: float,
    gate_rate: float,
) -> list[dict[str, Any]]:
    """Parameter groups with a separate learning rate for the gates.

    Args:
        parameters: all that are trained.
        gates: those among them that belong to gates.
        rate: of the others.
        gate_rate: of the gates.

    Returns:
        The group of the others, then that of the gates. An empty group is left out.
    """
    gate_ids = set(map(id, gates))
    others = list[nn.Parameter]()
    of_gates = list[nn.Parameter]()
    for value in parameters:
        if id(value) in gate_ids:
            of_gates.append(value)
        else:
            others.append(value)
    groups = list[dict[str, Any]]()
    if others:
        groups.append({"params": others, "lr": rate})
    if of_gates:
        groups.append({"params": of_gates, "lr": gate_rate})
    return groups


def random_then_chosen(
    network: Network,
    *,
    names: tuple[str, str],
    epochs: tuple[int, int],
    rates: tuple[float, float],
    models: bool,
    norm: str,
) -> list[Phase]:
    """Two phases: models and exits along random ways, then the gates as well.

    Args:
        network: with forks.
        names: of the phases.
        epochs: of each phase. The first phase is left out if it has 0 epochs or nothing to train.
        rates: of Adam, for models and exits, and for gates.
        models: False trains exits and gates alone.
        norm: of the models' batch norms, "moving" or "frozen".

    Returns:
        One phase or two.
    """
    parameters, still = models_of(network, norm)
    trained = tuple(network.exits.parameters())
    if models:
        trained = (*parameters, *trained)
    gates = tuple(network.gates.parameters())
    phases = list[Phase]()
    if epochs[0] and trained:
        adam = partial(torch.optim.Adam, lr=rates[0])
        phases.append(Phase(names[0], trained, epochs[0], adam, still=still, looks=False))
    both = partial(two_rates, gates=gates, rate=rates[0], gate_rate=rates[1])
    phases.append(
        Phase(names[1], (*trained, *gates), epochs[1], both, cosine, still=still, looks=False)
    )
    return phases


def answer_losses(network: Network, done: Routed, y: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the final outputs, and of the exits that rows pass.

    An exit with a fixed gate lets no row leave in training. Rows will leave there later, so the
    exit learns from the rows that pass it.

    Args:
        network: with forks.
        done: the outputs of a batch, each row along its path.
        y: labels [b].

    Returns:
        The losses by name: "answers", and the nodes of such exits.
    """
    losses = {"answers": cross_entropy(done.logits, y)}
    for name, (rows, logits) in done.passed.items():
        # rows [r] are indices into the batch, logits [r, C]
        fixed = name in network.gates and not isinstance(network.gate_of(name), Chooser)
        if fixed and len(rows):
            losses[name] = cross_entropy(logits, y[rows])
    return losses
