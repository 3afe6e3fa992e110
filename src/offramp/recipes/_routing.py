"""What recipes for forks share: one-hot choices with gradients, and what a row's path costs.

Shapes: b rows, K successors of a gate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

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

PRICES = "prices"  # the auxiliary module that holds them


def gumbel(ratings: Tensor, tau: float, *, noise: bool = True) -> Tensor:
    """One-hot choices [b, K], drawn by the softmax of the ratings, with the gradient of that
    softmax.

    h = onehot(argmax(log p + g)), g = -log(-log u); backward softmax((log p + g) / tau).
    """
    logits = ratings.log_softmax(1)
    if noise:
        uniform = torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)
        logits = logits - (-uniform.log()).log()
    soft = (logits / tau).softmax(1)
    hard = torch.zeros_like(soft).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return hard + soft - soft.detach()


def one_hot(ways: Tensor, count: int) -> Tensor:
    """Choices [b] as weights [b, count]."""
    return torch.nn.functional.one_hot(ways, count).float()


def best_way(gate: Gate, seen: Seen, count: int) -> Tensor:
    """The way [b] that a gate takes at thresholds of 0; of one that rates no ways the last."""
    if not isinstance(gate, Chooser):
        return torch.full((len(seen.features),), count - 1, device=seen.features.device)
    scores = grade(gate, seen, seen.own, count - 1).detach().reshape(-1, count - 1).cpu().numpy()
    ways = choose(scores, torch.zeros(count - 1).numpy())
    return torch.as_tensor(ways, device=seen.features.device)


class PathPrices(nn.Module):
    """What the nodes of a network cost, in shares of the plain network: the dearest arms of all
    forks, without gates.

    Args:
        costs: of each node, in the order of the topology.
        least: the cheapest path.
        most: the dearest path.
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
        return torch.stack([reach[name] for name in topology.names], 1) @ costs

    def over(self, cost: Tensor, budget: float) -> Tensor:
        """DRNet's hinge: by how much the mean cost exceeds a budget, in shares of the span of all
        paths.
        """
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

    Raises BadNetwork where there was none.
    """
    rows = trial_rows(network)
    if not rows:
        raise BadNetwork(
            "what the ways cost is counted on rows like an example; make the network with example="
        )
    parts = kind_of("torch")().open(network, full_schedule(network.topology), network.device())
    priced = costs_of(parts, rows, timed=False)
    found: dict[str, NodeCosts] = {}
    for name in network.topology.names:
        each = [
            float(priced[f"cost/{kind}/{name}"][0]) if f"cost/{kind}/{name}" in priced else 0.0
            for kind in KINDS
        ]
        found[name] = NodeCosts(*each)
    return found


KINDS = ("segment", "exit", "gate")


def prices_of(network: Network) -> PathPrices:
    """The prices of a network's paths. Raises BadNetwork where nothing can be counted."""
    topology = network.topology
    costs = measured(network)
    reference = topology.exits[-1]
    plain = costs[reference].segment + costs[reference].exit
    node = topology.node(reference)
    while node.after:
        node = topology.node(node.after[-1])
        plain += costs[node.name].segment
    if not plain > 0:
        raise BadNetwork(
            "no multiply-add was counted along the dearest path, so that costs cannot be compared"
        )
    shares = {name: (each.segment + each.exit + each.gate) / plain for name, each in costs.items()}
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    for node in reversed(topology.nodes):
        behind = [name for name in node.successors if name != LEAVE]
        ends = LEAVE in node.successors
        lows = [least[name] for name in behind] + [0.0] * ends
        highs = [most[name] for name in behind] + [0.0] * ends
        least[node.name] = shares[node.name] + min(lows)
        most[node.name] = shares[node.name] + max(highs)
    first = topology.names[0]
    return PathPrices([shares[name] for name in topology.names], least[first], most[first])


def require_choosers(network: Network, what: str) -> tuple[str, ...]:
    """The gates that rate ways. Raises BadNetwork where there is none."""
    if cut_members := [member.name for member in network.members if member.cuts]:
        raise BadNetwork(
            f"{what} trains networks of whole models (off.route), and {cut_members[0]!r} is cut"
        )
    if not any(True for _ in network.parameters()):
        raise BadNetwork("this network has no parameters to train")
    found = tuple(
        name for name in network.topology.gates if isinstance(network.gate_of(name), Chooser)
    )
    if not found:
        raise BadNetwork(
            f"{what} trains gates that rate their ways, and there is none; use gate='controller'"
        )
    return found


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Raise InvalidArgument for a number that does not lie in (low, high]."""
    if not low < value <= high:
        raise InvalidArgument(f"{name} must be above {low:g} and at most {high:g}, got {value!r}")


def models_of(
    network: Network, norm: str
) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Module, ...]]:
    """Parameters of the models that are trained, and the batch norms that stay as they are with
    norm="frozen".
    """
    norms = [
        part
        for part in network.backbone.modules()
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    ]
    still = tuple(norms) if norm == "frozen" else ()
    frozen = {
        id(value) for value in itertools.chain.from_iterable(part.parameters() for part in still)
    }
    return tuple(value for value in network.backbone.parameters() if id(value) not in frozen), still


def two_rates(
    parameters: Iterable[nn.Parameter],
    *,
    gates: tuple[nn.Parameter, ...],
    rate: float,
    gate_rate: float,
) -> Optimizer:
    """Adam with a rate of its own for the gates."""
    ours = {id(value) for value in gates}
    every = list(parameters)
    groups = [
        {"params": [value for value in every if id(value) not in ours], "lr": rate},
        {"params": [value for value in every if id(value) in ours], "lr": gate_rate},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])


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
        epochs: of each; the first is left out for 0 epochs, or where it has nothing to train.
        rates: of Adam, for models and exits, and for gates.
        models: False trains exits and gates alone.
        norm: of the models' batch norms, "moving" or "frozen".
    """
    parameters, still = models_of(network, norm)
    trained = (*(parameters if models else ()), *network.exits.parameters())
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
    """Cross-entropy of the answers, and of exits at which nobody leaves while this trains, but rows
    will later.
    """
    losses = {"answers": cross_entropy(done.logits, y)}
    for name, (rows, logits) in done.passed.items():
        fixed = name in network.gates and not isinstance(network.gate_of(name), Chooser)
        if fixed and len(rows):
            losses[name] = cross_entropy(logits, y[rows])
    return losses
