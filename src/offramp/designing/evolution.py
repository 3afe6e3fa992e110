"""Evolutionary search over the networks of a supernet, within a budget of multiply-adds or
milliseconds.

Guo et al., 2020, arXiv 1904.00420: the best networks so far are the parents of the next generation.
Half of it are crossovers of two parents, half are mutants of one. A network is judged by its
accuracy on held-out rows, after its batch norms have been estimated anew. Ours: the search also
chooses the exits. The budget then holds for the mean cost over the rows, and all exits share one
threshold on the largest probability. The threshold is chosen on the rows that judge, so it promises
nothing. Calibrate the final network on other rows.
Shapes: N rows, E exits and the head, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp._support.arguments import require, require_count
from offramp._support.progress import track
from offramp.designing.single_path import reestimate
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import InvalidArgument
from offramp.networks.nodes import Seen
from offramp.networks.taps import listening, logits_in
from offramp.runtime.measuring import interleaved, macs

UNITS = ("macs", "ms")
LEVELS = 200  # thresholds that are tried for a network with exits
TRIES = 20  # draws for one new network of a generation, before the search gives it up

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CostTable:
    """The cost of one row in every part of a supernet. The costs of parts add up.

    Args:
        unit: "macs" or "ms".
        options: by place, the cost of each option.
        rest: by task, the cost of everything that is at no place, including the head.
        before: by tap, the part of that rest which has been computed there.
        exits: by tap and task, the cost of an exit.
        order: places and taps in the order in which they run.
    """

    unit: str
    options: Mapping[str, tuple[float, ...]]
    rest: Mapping[str, float]
    before: Mapping[str, float]
    exits: Mapping[tuple[str, str], float]
    order: tuple[str, ...]

    def leaving(self, subnet: Subnet, task: str) -> Floats:
        """The cost of a row by the exit at which it leaves.

        Returns:
            Costs [E], the head last.
        """
        places = list(self.options)
        # Walk through the network as a row does, and add up what it pays: the option at each
        # place, and every exit that it passes. At an exit, the part of the network that is at no
        # place and has run by then is added.
        spent = 0.0
        costs = []
        for name in self.order:
            if name in self.options:
                option = subnet.options[places.index(name)]
                spent += self.options[name][option]
            if name in subnet.exits:
                spent += self.exits[name, task]
                costs.append(self.before[name] + spent)
        costs.append(self.rest[task] + spent)  # the head, where all other rows leave
        return np.array(costs)

    def whole(self, subnet: Subnet, task: str) -> float:
        """The cost of a row that leaves at no exit."""
        return float(self.leaving(subnet, task)[-1])


@dataclass(frozen=True)
class Judged:
    """The accuracy and cost of one network.

    Args:
        subnet: the network.
        accuracy: on the judging rows, within the budget.
        cost: mean cost of a row, in the unit of the table.
        threshold: on the largest probability, at which rows leave; infinity if none do.
    """

    subnet: Subnet
    accuracy: float
    cost: float
    threshold: float


@dataclass(frozen=True)
class Search:
    """All judged networks, best first, and the number of networks that were outside the budget."""

    candidates: tuple[Judged, ...]
    refused: int

    @property
    def best(self) -> Judged:
        """The most accurate network; the cheapest of several equal ones."""
        return self.candidates[0]

    def frontier(self) -> list[Judged]:
        """The Pareto front: networks that no other one beats in both accuracy and cost.

        Returns:
            From the cheapest on, with rising accuracy.
        """
        by_cost = sorted(self.candidates, key=lambda judged: (judged.cost, -judged.accuracy))
        front: list[Judged] = []
        for judged in by_cost:
            # everything on the front so far is cheaper, so this network has to be more accurate
            if not front or judged.accuracy > front[-1].accuracy:
                front.append(judged)
        return front


def cost_table(
    supernet: Supernet,
    *,
    unit: str = "macs",
    rows: int = 2,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Count or measure the cost of every part of a supernet once.

    Args:
        supernet: the supernet; it ends in eval mode.
        unit: "macs" or "ms" (for one row of a batch).
        rows: size of the batch.
        repeats: how often each part is timed; its median counts.
        clock: seconds, for "ms".

    Returns:
        The costs, from which the cost of every network of the supernet can be added up.

    Raises:
        InvalidArgument: `unit` is another one.
    """
    if unit not in UNITS:
        raise InvalidArgument(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    supernet.eval()

    # 1. Repeat the example rows until the batch is full. x: [rows, ...]
    picks = torch.arange(rows) % len(supernet.example)
    x = supernet.example[picks]

    # 2. Run the dense network, and record the inputs of all places and the values at all taps.
    first = next(iter(supernet.heads))
    with supernet.along(supernet.dense, first) as model, torch.no_grad():
        watched = {name: model.get_submodule(name) for name in supernet.places}
        inputs = _inputs_of(model, watched, supernet.prepared(x))
        taps = dict[str, Any]()
        tapped = {name: model.get_submodule(name) for name in supernet.taps}
        with listening(tapped, taps.__setitem__):
            model(supernet.prepared(x))

    # 3. Make a call for every part, and count or time the calls.
    calls: dict[tuple[str, ...], Callable[[], object]] = {}
    for place, choices in zip(supernet.places, supernet.options, strict=True):
        assert isinstance(choices, nn.ModuleList)
        for number, option in enumerate(choices):
            calls["option", place, str(number)] = _bound(option, inputs[place])
    for task in supernet.heads:
        calls["whole", task] = _along(supernet, x, task, None)
        for tap in supernet.taps:
            calls["exit", tap, task] = _bound(supernet.exit_of(tap, task), Seen(taps[tap], {}))
    for tap in supernet.taps:
        calls["until", tap] = _along(supernet, x, first, tap)
    figures = _figures(calls, unit, rows, repeats, clock)
    options: dict[str, tuple[float, ...]] = {}
    for place, names in zip(supernet.places, supernet.names, strict=True):
        costs = [figures["option", place, str(number)] for number in range(len(names))]
        options[place] = tuple(costs)

    # 4. Separate the places from the rest of the network. The dense network runs option 0 at every
    # place. Its cost less that of these options is the cost of the rest, up to a tap and in total.
    # Timings are noisy, so the difference can be negative; then it counts as 0.
    before: dict[str, float] = {}
    for tap in supernet.taps:
        run_so_far = supernet.order[: supernet.order.index(tap) + 1]
        at_places = 0.0
        for place in supernet.places:
            if place in run_so_far:
                at_places += options[place][0]
        before[tap] = max(0.0, figures["until", tap] - at_places)
    at_all_places = sum(costs_of_place[0] for costs_of_place in options.values())
    rest: dict[str, float] = {}
    exits: dict[tuple[str, str], float] = {}
    for task in supernet.heads:
        rest[task] = max(0.0, figures["whole", task] - at_all_places)
        for tap in supernet.taps:
            exits[tap, task] = figures["exit", tap, task]
    return CostTable(unit, options, rest, before, exits, supernet.order)


def evolve(
    supernet: Supernet,
    task: str,
    judging: tuple[Tensor, Tensor],
    norm_rows: Tensor,
    *,
    costs: CostTable,
    budget: float,
    population: int = 50,
    generations: int = 20,
    parents: int = 10,
    mutation: float = 0.1,
    batch_size: int = 200,
    exits: bool = True,
    seed: int = 0,
    memory: dict[Subnet, Judged | None] | None = None,
    after: Callable[[], None] | None = None,
    progress: bool = True,
) -> Search:
    """Find the most accurate network for a task within a budget.

    Args:
        supernet: a trained supernet.
        task: one of its tasks.
        judging: held-out rows x [N, ...] and labels y [N], which promise nothing afterwards.
        norm_rows: rows [M, ...] for the batch norms, such as some training rows.
        costs: the table from `cost_table`.
        budget: the most that a row may cost, in the unit of the table. With exits it holds for the
            mean over the rows.
        population: number of networks in a generation.
        generations: number of generations, the first included.
        parents: how many of the best networks so far have children.
        mutation: probability that an option or an exit is drawn anew in a mutant.
        batch_size: rows that are computed together.
        exits: whether networks may have exits.
        seed: of all draws.
        memory: networks that were judged before on the same rows within the same budget; None for
            those outside of it. They are not judged again, and new ones are added.
        after: called after every generation, also after one that was interrupted.
        progress: whether to show progress.

    Returns:
        All judged networks within the budget.

    Raises:
        InvalidArgument: a number is out of range, or every network that was drawn is outside the
            budget.
        UnknownName: the supernet does not have this task.
    """
    require_count("population", population)
    require_count("generations", generations)
    require_count("parents", parents)
    require("mutation", mutation, low=0, high=1)
    supernet.require(supernet.dense, task)
    rng = np.random.default_rng(seed)
    if memory is None:
        memory = {}
    # `known` begins empty also if there is a memory: the same draws then lead to the same networks.
    known = dict[Subnet, Judged | None]()
    for generation in track(
        range(generations), what="generations", total=generations, show=progress
    ):
        best = _ranked(known)[:parents]
        children = _generation(
            supernet,
            task,
            costs,
            budget,
            best,
            known,
            population,
            mutation,
            rng,
            generation,
            exits=exits,
        )
        try:
            for subnet in children:
                if subnet not in memory:
                    memory[subnet] = judge(
                        supernet,
                        subnet,
                        task,
                        judging,
                        norm_rows,
                        costs=costs,
                        budget=budget,
                        batch_size=batch_size,
                    )
                known[subnet] = memory[subnet]
        finally:
            if after is not None:
                after()
    ranked = _ranked(known)
    if not ranked:
        cheapest = ""
        if known:
            cost = min(costs.whole(subnet, task) for subnet in known)
            cheapest = f". The cheapest network that was drawn costs {cost:g}"
        raise InvalidArgument(
            f"no network is within the budget of {budget:g} {costs.unit}{cheapest}"
        )
    return Search(tuple(ranked), refused=len(known) - len(ranked))


@torch.no_grad()
def judge(
    supernet: Supernet,
    subnet: Subnet,
    task: str,
    judging: tuple[Tensor, Tensor],
    norm_rows: Tensor,
    *,
    costs: CostTable,
    budget: float = float("inf"),
    batch_size: int = 200,
) -> Judged | None:
    """Measure the accuracy of one network within a budget, with its batch norms estimated anew.

    Args:
        supernet: a trained supernet.
        subnet: the network.
        task: one of the tasks of the supernet.
        judging: held-out rows x [N, ...] and labels y [N].
        norm_rows: rows [M, ...] for batch norms.
        costs: the table from `cost_table`.
        budget: mean cost of a row, in the unit of the table.
        batch_size: of the rows that are computed together.

    Returns:
        None if the network is outside the budget.
    """
    leaving = costs.leaving(subnet, task)
    if leaving.min() > budget:  # even if all rows left at the cheapest exit
        return None
    model = supernet.extract(subnet, task)
    reestimate(model, map(supernet.prepared, torch.split(norm_rows, batch_size)))
    x, y = judging
    logits = _logits(supernet, model, subnet, task, x, batch_size)  # [E, N, C]
    sure = logits.softmax(-1).amax(-1).numpy().astype(np.float64)  # [E, N]
    right = (logits.argmax(-1) == y.cpu()).numpy()  # [E, N]
    accuracy, cost, threshold = along_thresholds(sure, right, leaving, budget)
    if accuracy < 0:  # every threshold exceeds the budget
        return None
    return Judged(subnet, accuracy, cost, threshold)


def along_thresholds(
    sure: Floats, right: NDArray[np.bool_], leaving: Floats, budget: float
) -> tuple[float, float, float]:
    """Find the threshold, shared by all exits, that is most accurate within a budget.

    Args:
        sure: [E, N], the largest probability at each exit and, last, at the head, where all
            remaining rows leave.
        right: [E, N], whether an answer is right.
        leaving: [E], the cost of leaving there.
        budget: of the mean cost.

    Returns:
        Accuracy, mean cost and threshold. The accuracy is -1 if every threshold exceeds the budget.
    """
    exits = sure[:-1]  # [E - 1, N]
    # Quantiles of the probabilities, so that the thresholds lie where the rows are. At infinity no
    # row leaves early.
    levels = np.array([np.inf])
    if exits.size:
        levels = np.append(np.quantile(exits, np.linspace(0, 1, LEVELS)), np.inf)
    best = (-1.0, float("inf"), float("inf"))
    rows = np.arange(sure.shape[1])
    at_head = np.ones((1, sure.shape[1]), bool)  # every remaining row leaves at the head
    for level in levels:
        leaves = np.concatenate([exits >= level, at_head])  # [E, N]
        index = leaves.argmax(0)  # [N], the first exit that is sure, or the head
        accuracy = float(right[index, rows].mean())
        cost = float(leaving[index].mean())
        # a higher accuracy wins; of equal accuracies the lower cost
        if cost <= budget and (accuracy, -cost) > (best[0], -best[1]):
            best = (accuracy, cost, float(level))
    return best


def _generation(
    supernet: Supernet,
    task: str,
    costs: CostTable,
    budget: float,
    best: Sequence[Judged],
    known: Mapping[Subnet, Judged | None],
    population: int,
    mutation: float,
    rng: np.random.Generator,
    number: int,
    *,
    exits: bool,
) -> list[Subnet]:
    """New and different networks, each with at least one exit that is within the budget. The first
    generation begins with the networks of one option everywhere.
    """
    subnets: dict[Subnet, None] = {}  # used as a set that keeps the order
    if number == 0:
        for subnet in uniform(supernet):
            if costs.leaving(subnet, task).min() <= budget and len(subnets) < population:
                subnets[subnet] = None
    for turn in range(len(subnets), population):
        # Many draws are known already or too expensive. After TRIES of them the generation stays
        # one network smaller.
        for _ in range(TRIES):
            # at random without parents, otherwise mutants and crossovers in turn
            if number == 0 or not best:
                subnet = _some_exits(supernet, supernet.drawn(rng), rng, 0.5)
            elif turn % 2:
                subnet = mutated(supernet, _one_of(best, rng), mutation, rng)
            else:
                subnet = crossed(supernet, _one_of(best, rng), _one_of(best, rng), rng)
            if not exits:
                subnet = Subnet(subnet.options)
            if subnet in known or subnet in subnets:
                continue
            if costs.leaving(subnet, task).min() <= budget:
                subnets[subnet] = None
                break
    return list(subnets)


def uniform(supernet: Supernet) -> list[Subnet]:
    """List the networks that have the same option at every place, without exits. A place that does
    not have this option has its first one.
    """
    all_options: dict[str, None] = {}  # used as a set that keeps the order
    for names in supernet.names:
        all_options |= dict.fromkeys(names)
    subnets: dict[Subnet, None] = {}
    for option in all_options:
        numbers = []
        for names in supernet.names:
            number = 0
            if option in names:
                number = names.index(option)
            numbers.append(number)
        subnets[Subnet(tuple(numbers))] = None
    return list(subnets)


def mutated(supernet: Supernet, subnet: Subnet, chance: float, rng: np.random.Generator) -> Subnet:
    """Mutate a network: draw some of its options anew, and add or remove some exits.

    Args:
        supernet: of the network.
        subnet: the parent.
        chance: probability of a change, for each option and each exit.
        rng: of all draws.
    """
    fresh = supernet.drawn(rng).options
    changes = rng.random(len(fresh)) < chance
    mutated_options = np.where(changes, fresh, subnet.options)
    options = [int(option) for option in mutated_options]
    exits = []
    for tap in supernet.taps:
        present = tap in subnet.exits
        if rng.random() < chance:
            present = not present
        if present:
            exits.append(tap)
    return Subnet(tuple(options), tuple(exits))


def crossed(supernet: Supernet, one: Subnet, other: Subnet, rng: np.random.Generator) -> Subnet:
    """Cross two networks: take each option and each exit from one of them at random."""
    from_one = rng.random(len(one.options)) < 0.5
    crossed_options = np.where(from_one, one.options, other.options)
    options = [int(option) for option in crossed_options]
    exits = []
    for tap in supernet.taps:
        parent = other
        if rng.random() < 0.5:
            parent = one
        if tap in parent.exits:
            exits.append(tap)
    return Subnet(tuple(options), tuple(exits))


def _one_of(best: Sequence[Judged], rng: np.random.Generator) -> Subnet:
    """A parent, drawn from the best networks."""
    return best[int(rng.integers(len(best)))].subnet


def _some_exits(
    supernet: Supernet, subnet: Subnet, rng: np.random.Generator, chance: float
) -> Subnet:
    """The network with exits drawn at random."""
    exits = [tap for tap in supernet.taps if rng.random() < chance]
    return Subnet(subnet.options, tuple(exits))


def _ranked(known: Mapping[Subnet, Judged | None]) -> list[Judged]:
    """The networks within the budget, the most accurate first; of equals the cheapest."""
    within = [judged for judged in known.values() if judged is not None]
    return sorted(within, key=lambda judged: (-judged.accuracy, judged.cost))


def _logits(
    supernet: Supernet, model: nn.Module, subnet: Subnet, task: str, x: Tensor, batch_size: int
) -> Tensor:
    """Logits [E, N, C] of the exits and the head of an extracted network."""
    batches: list[Tensor] = []
    taps = {name: model.get_submodule(name) for name in subnet.exits}
    for batch in torch.split(x, batch_size):
        # the run through the model records the values at its taps, and the exits read them
        tapped = dict[str, Any]()
        with listening(taps, tapped.__setitem__):
            last = logits_in(model(supernet.prepared(batch)))
        logits = []
        for name in subnet.exits:
            exit = supernet.exit_of(name, task)
            logits.append(exit(Seen(tapped[name], {})))
        batches.append(torch.stack([*logits, last]))  # [E, B, C]
    return torch.cat(batches, 1).cpu()  # [E, N, C]


class _Reached(Exception):
    """Raised at a tap to skip everything that comes after it."""


def _along(supernet: Supernet, x: Tensor, task: str, tap: str | None) -> Callable[[], object]:
    """A call of the dense network that ends at a tap, or runs all of it if `tap` is None."""

    def call() -> None:
        with supernet.along(supernet.dense, task) as model, torch.no_grad():
            if tap is None:
                model(supernet.prepared(x))
                return
            with listening({tap: model.get_submodule(tap)}, _stop):
                try:
                    model(supernet.prepared(x))
                except _Reached:
                    return

    return call


def _stop(_name: str, _value: object) -> None:
    raise _Reached


def _bound(module: nn.Module, value: object) -> Callable[[], object]:
    """A call of a module on one value."""

    def call() -> object:
        with torch.no_grad():
            return module(value)

    return call


def _inputs_of(model: nn.Module, watched: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """The inputs of some modules when the model runs on x."""
    inputs = dict[str, Tensor]()
    handles = []
    for name, module in watched.items():

        def note(_module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = arguments[0]

        handles.append(module.register_forward_pre_hook(note))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _figures(
    calls: Mapping[tuple[str, ...], Callable[[], object]],
    unit: str,
    rows: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[tuple[str, ...], float]:
    """The cost of each call for one row: multiply-adds, or the median of the timings."""
    if unit == "macs":
        return {key: macs(call) / rows for key, call in calls.items()}
    # `interleaved` times all calls in turn, so that a busy moment does not fall on one of them
    named = {"/".join(key): call for key, call in calls.items()}
    times = interleaved(named, repeats=repeats, warmup=1, clock=clock)
    return {key: float(np.median(times["/".join(key)])) / rows for key in calls}
