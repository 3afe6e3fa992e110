"""`route`: a network from nested lists of segments, forks and exits.

    off.route([
        ("stem", stem),
        off.Fork("size", {"small": a, "large": b}, gate="controller"),
        ("head", head),
    ], example=x)

A fork's arms meet again behind it. An arm is a module, a list like the outer one, or an empty list,
which skips. Where the last step of the list is a fork, every arm answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find, unknown
from offramp.building.factories import made_for_features, make_exit, make_gate
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import State, as_inputs, count_of, remedy
from offramp.networks.members import ModelSpec, digest, require_name
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Exit, Gate
from offramp.networks.walking import Nodes, segment_call, with_defaults
from offramp.networks.wrappers import require_plain
from offramp.plans.signature import Input
from offramp.plans.topology import LEAVE, Default, Node, Topology

NOTHING = "offramp:nothing"

GateLike = str | Gate | Callable[..., Any]
ExitLike = str | Exit | Callable[..., Exit]
Step = Any  # (name, module), (name, module, {node: default}), Fork, or Leave
Arm = Any  # a module, a list of steps, or nothing


@dataclass(frozen=True)
class Fork:
    """A step at which every row takes one of several ways.

    Attributes:
        name: of the decision; plans name its thresholds so.
        arms: by name the ways, the cheap ones first. A module, a list of steps, or an empty list,
            which skips.
        gate: rates the ways: the name of a gate that is made for the features there ("controller",
            "predictor"), or a Gate with one score for each way but the last.
    """

    name: str
    arms: Mapping[str, Arm]
    gate: GateLike = "controller"


@dataclass(frozen=True)
class Leave:
    """A step at which rows may be answered.

    Attributes:
        name: of the exit.
        exit: what answers there, as in `cut`.
        gate: scores the rows; higher leaves. None answers every row that comes, as the last step of
            an arm.
    """

    name: str
    exit: ExitLike = "linear_grid"
    gate: GateLike | None = "margin"


@without_autocast()
def route(
    steps: Sequence[Step],
    *,
    example: Any = None,
    specs: Mapping[str, str] | None = None,
) -> Network:
    """A network with forks, from steps in the order in which rows pass them.

    Args:
        steps: each of them (name, module), a `Fork`, or a `Leave`. A module reads what the step
            before gave; the first one the input, and it may be a pair of a module and its
            preprocessing. A third entry, {name: value}, names earlier segments whose output the
            module takes as well, as further arguments, with the value that stands for it in rows
            whose path did not run it; None where every path does. The last step answers: [B, C]
            logits.
        example: a batch, on which the network is tried. Exits and gates that are given by name are
            made for the shapes that are seen there.
        specs: by the name of a segment how its model is built again, such as "offramp:resnet20".

    Returns:
        A network in the mode of its modules. Nothing is copied, and the modules stay as they are.

    Raises:
        InvalidArgument: two steps have one name, a name is none, or a step is none of these.
        BadNetwork: arms that meet give rows of different shapes, an output is read that a path does
            not give and no default is declared, or a gate has another number of scores than its
            fork has ways.
        BadData: a module fails on the example.
    """
    layout = _Layout(dict(specs or {}))
    layout.steps(steps, (), "the list")
    if not layout.nodes:
        raise InvalidArgument(
            "route needs at least one step, such as (name, module); got an empty list"
        )
    layout.end()
    return layout.network(None if example is None else as_inputs(example))


@dataclass
class _Layout:
    """Nodes being laid out, in topological order.

    Attributes:
        specs: as `route` was given them.
        nodes: so far. `successors` of the last ones are filled in when their successor is known.
        models: by node.
        fronts: preprocessing by node.
        forks: by node the fork that stands there; exits likewise.
        open: the nodes whose next node is not known yet, each with the number of that successor.
        defaults: by the name of a node, the value that is read where it did not run, and who reads
            it.
        within: the lists that are being laid out, the outermost first.
    """

    specs: dict[str, str]
    nodes: list[Node] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)
    fronts: dict[str, nn.Module] = field(default_factory=dict)
    forks: dict[str, Fork] = field(default_factory=dict)
    exits: dict[str, Leave] = field(default_factory=dict)
    open: list[tuple[str, int]] = field(default_factory=list)
    defaults: dict[str, tuple[float, str]] = field(default_factory=dict)
    within: list[int] = field(default_factory=list)

    def steps(self, steps: object, ends: tuple[str, ...], where: str) -> tuple[str, ...]:
        """Lay out some steps.

        Args:
            steps: in order.
            ends: the nodes whose output the first of them reads; empty for the input.
            where: these steps stand, for messages.

        Returns:
            The nodes whose output the step behind them reads.
        """
        if not isinstance(steps, (list, tuple)):
            raise InvalidArgument(f"{where} must be a list of steps, got a {type(steps).__name__}")
        if id(steps) in self.within:
            raise InvalidArgument(f"{where} contains itself: rows would go in a circle")
        self.within.append(id(steps))
        for number, step in enumerate(steps):
            if self.nodes and not self.open:
                raise InvalidArgument(
                    f"no row comes to step {number + 1} of {where}: every row was answered before"
                )
            if isinstance(step, Fork):
                ends = self._fork(step, ends)
            elif isinstance(step, Leave):
                ends = self._leave(step, ends)
            else:
                ends = self._segment(step, ends, f"step {number + 1} of {where}")
        self.within.pop()
        return ends

    def end(self) -> None:
        """What stands open at the end answers."""
        for name, number in self.open:
            if name in self.exits:
                raise BadNetwork(
                    f"nothing stands behind the exit {name!r}; give the step that its other rows "
                    f"go on to, or gate=None"
                )
            if name in self.forks:
                arm = [*self.forks[name].arms][number]
                raise BadNetwork(
                    f"the arm {arm!r} of the last fork {name!r} is empty, and nothing answers "
                    f"there; use off.Leave, or "
                    "put a step behind the fork"
                )
            self.exits[name] = Leave(name, find("exits", "Own")(), None)
            self._put(name, number, LEAVE)

    def _segment(self, step: object, ends: tuple[str, ...], where: str) -> tuple[str, ...]:
        name, model, reads = _entries(step, where)
        self._require_new(name)
        preprocess = None
        if isinstance(model, (tuple, list)) and len(model) == 2:
            model, preprocess = model
        if not isinstance(model, nn.Module) or not (
            preprocess is None or isinstance(preprocess, nn.Module)
        ):
            raise InvalidArgument(
                f"the segment {name!r} must be a torch.nn.Module, got a {type(model).__name__}"
            )
        if preprocess is not None and ends:
            raise InvalidArgument(
                f"the segment {name!r} has preprocessing, but it does not read the input"
            )
        require_plain(model, f"segment {name!r}")
        for other, value in reads.items():
            if other not in self.models:
                raise unknown(other, [*self.models], f"segment before {name!r}")
            if value is not None:
                known = self.defaults.get(other, (float(value), name))
                if known[0] != float(value):
                    raise InvalidArgument(
                        f"{name!r} and {known[1]!r} declare different defaults of {other!r}: "
                        f"{value:g} and {known[0]:g}"
                    )
                self.defaults[other] = known
        if preprocess is not None:
            self.fronts[name] = preprocess
        self._add(Node(name, ("",), ends, reads=tuple(reads)), model)
        self.open = [(name, 0)]
        return (name,)

    def _fork(self, fork: Fork, ends: tuple[str, ...]) -> tuple[str, ...]:
        self._require_new(fork.name)
        arms = fork.arms
        if not isinstance(arms, Mapping) or len(arms) < 2:
            raise InvalidArgument(
                f"the fork {fork.name!r} must have at least two arms by name, got {arms!r}"
            )
        empty = [name for name, arm in arms.items() if _is_empty(arm)]
        if len(empty) > 1:
            raise InvalidArgument(
                f"the arms {empty[0]!r} and {empty[1]!r} of {fork.name!r} are both empty; one can "
                f"skip"
            )
        self.forks[fork.name] = fork
        self._add(Node(fork.name, ("",) * len(arms), ends), nn.Identity().eval())
        inside = ends and (fork.name,)  # at the entrance arms read the input itself
        last: tuple[str, ...] = ()
        left: list[tuple[str, int]] = []
        for number, (name, arm) in enumerate(arms.items()):
            self.open = [(fork.name, number)]
            if _is_empty(arm):
                last = (*last, fork.name)
                left += self.open
                continue
            if isinstance(arm, nn.Module) or _is_pair(arm):
                steps = [(name, arm)]
            else:
                steps = arm
            own = self.steps(steps, inside, f"the arm {name!r} of {fork.name!r}")
            if self.open:
                last = (*last, *own)
                left += self.open
        self.open = left
        return tuple(dict.fromkeys(last))

    def _leave(self, step: Leave, ends: tuple[str, ...]) -> tuple[str, ...]:
        self._require_new(step.name)
        self.exits[step.name] = step
        if step.gate is None:
            self._add(Node(step.name, (LEAVE,), ends), nn.Identity().eval())
            self.open = []
            return ()
        self._add(Node(step.name, (LEAVE, ""), ends), nn.Identity().eval())
        self.open = [(step.name, 1)]
        return (step.name,)

    def _add(self, node: Node, model: nn.Module) -> None:
        for name, number in self.open:
            self._put(name, number, node.name)
        self.nodes.append(node)
        self.models[node.name] = model

    def _put(self, name: str, number: int, successor: str) -> None:
        index = next(index for index, node in enumerate(self.nodes) if node.name == name)
        successors = list(self.nodes[index].successors)
        successors[number] = successor
        self.nodes[index] = replace(self.nodes[index], successors=tuple(successors))

    def _require_new(self, name: object) -> None:
        require_name(name)
        if name in self.models:
            raise InvalidArgument(
                f"two steps are called {name!r}; give each segment, fork and exit a name of its own"
            )

    def network(self, inputs: State | None) -> Network:
        """The network of what was laid out, tried on an example."""
        modes = {part for model in self.models.values() for part in model.modules()}
        if inputs is not None and any(part.training for part in modes):
            for name, model in self.models.items():
                require_eval(model, f"segment {name!r}", "eval()")
        declared = tuple(
            Default(name, value, (), True) for name, (value, _) in self.defaults.items()
        )
        bare = Topology(tuple(self.nodes), declared)
        seen = _ExampleRun(self, bare, inputs) if inputs is not None else None
        defaults = tuple(self._default(name, seen) for name in self.defaults)
        classes = 0 if seen is None else seen.classes(bare)
        exits: dict[str, Exit] = {}
        gates: dict[str, Gate] = {}
        made: dict[str, str] = {}
        for node in self.nodes:
            name = node.name
            earlier = [other for other in exits if other in bare._always_before[name]]
            if name in self.exits:
                asked = self.exits[name].exit
                exits[name] = self._exit(name, asked, seen, classes, earlier)
                mark = digest(exits[name])
                if not isinstance(asked, Exit) and mark is not None:
                    made[name] = mark
            if len(node.successors) > 1:
                gates[name] = self._gate(node, seen, earlier)
        nodes = list[Node]()
        for node in self.nodes:
            exit_reads = exits[node.name].reads if node.name in exits else ()
            gate_reads = gates[node.name].reads if node.name in gates else ()
            nodes.append(replace(node, exit_reads=exit_reads, gate_reads=gate_reads))
        known = () if inputs is None else _inputs(inputs)
        members = list[ModelSpec]()
        for node in self.nodes:
            nothing = type(self.models[node.name]) is nn.Identity
            spec = self.specs.get(node.name, NOTHING if nothing else None)
            members.append(ModelSpec(node.name, spec, inputs=() if node.after else known))
        network = Network(
            backbone=nn.ModuleDict(self.models),
            members=tuple(members),
            topology=Topology(tuple(nodes), defaults),
            fronts=self.fronts,
            exits=exits,
            gates=gates,
            made=made,
        )
        if inputs is not None:
            _try(network, inputs)
        return network

    def _default(self, name: str, seen: _ExampleRun | None) -> Default:
        value, reader = self.defaults[name]
        if seen is None:
            raise InvalidArgument(
                f"{reader!r} reads {name!r} with a default, whose shape must be known; give "
                f"example="
            )
        return Default(name, value, seen.shape(name), True)

    def _exit(
        self,
        name: str,
        asked: ExitLike,
        seen: _ExampleRun | None,
        classes: int,
        earlier: Sequence[str],
    ) -> Exit:
        if isinstance(asked, Exit):
            return asked
        if seen is None:
            raise InvalidArgument(
                f"the exit {name!r} is made for the features there; give example=, or an Exit"
            )
        features = seen.values[name]
        layout = "channels_first" if features.dim() == 4 else None
        made = make_exit(asked, seen.shape(name), classes, earlier, layout)
        return made.to(features.device, features.dtype if features.is_floating_point() else None)

    def _gate(self, node: Node, seen: _ExampleRun | None, earlier: Sequence[str]) -> Gate:
        name = node.name
        asked = self.exits[name].gate if name in self.exits else self.forks[name].gate
        assert asked is not None  # a node with one successor has no gate
        if not made_for_features(asked):
            return make_gate(asked, earlier)
        if seen is None:
            raise InvalidArgument(
                f"the gate of {name!r} is made for the features there; give example=, or a Gate"
            )
        gate = make_gate(asked, earlier, seen.shape(name), len(node.successors))
        return gate.to(seen.values[name].device)


class _Laid:
    """What a segment is called with, before there are exits and gates: the part of a network that
    it looks at.
    """

    def __init__(self, layout: _Layout, topology: Topology) -> None:
        self.topology = topology
        self.members = tuple(ModelSpec(node.name) for node in topology.nodes)
        self.layout = layout

    def model_of(self, member: ModelSpec) -> nn.Module:
        """The module of a segment."""
        return self.layout.models[member.name]

    def preprocess_of(self, member: ModelSpec) -> nn.Module | None:
        """Its preprocessing."""
        return self.layout.fronts.get(member.name)


class _ExampleRun:
    """What every segment gives for an example: all of them run once, and where arms meet the last
    one counts.
    """

    def __init__(self, layout: _Layout, topology: Topology, inputs: State) -> None:
        self.values: dict[str, Tensor] = {}
        state = dict(inputs)
        if count_of(inputs) == 1:
            state = {name: torch.cat([value, value]) for name, value in inputs.items()}
        laid: Any = _Laid(layout, topology)
        with torch.no_grad():
            for node in topology.nodes:
                self._require_one_shape(node)
                try:
                    found = segment_call(laid, node.name)(state)
                except OfframpError:
                    raise
                except Exception as problem:  # whatever the user's code raises
                    why = next(
                        iter(str(problem).strip().splitlines()), type(problem).__name__
                    ).rstrip(".;")
                    if not node.after:
                        shape = "the example"
                    else:
                        shape = str([*self.values[node.after[-1]].shape])
                    way = remedy(inputs, problem, "check what the steps before it give")
                    raise BadData(
                        f"the segment {node.name!r} fails on {shape}: {why}; {way}"
                    ) from problem
                state.update(found)
                self.values[node.name] = found[node.name]

    def _require_one_shape(self, node: Node) -> None:
        shapes = {name: self.shape(name) for name in node.after}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BadNetwork(
                f"the arms that meet at {node.name!r} give rows of different shapes ({told}); "
                f"give one"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a row of what a segment gave."""
        return tuple(self.values[name].shape[1:])

    def classes(self, topology: Topology) -> int:
        """How many there are, by the last answer. Raises BadNetwork where ends give different
        shapes.
        """
        ends = [node.name for node in topology.nodes if node.successors == (LEAVE,)]
        shapes = {name: self.shape(name) for name in ends}
        last = next(reversed(shapes.values()))
        if len(last) != 1 or last[0] < 2:
            raise BadNetwork(
                f"the last step must give logits [B, C] of at least two classes, got rows of "
                f"{list(last)}"
            )
        return last[0]


def _try(network: Network, inputs: State) -> None:
    """Run all paths on the example. Raises BadNetwork where exits have other classes, or gates
    other scores.
    """
    state = dict(with_defaults(network.topology, inputs))
    nodes = Nodes(network)
    widths: dict[str, int] = {}
    with torch.no_grad():
        for node in network.topology.nodes:
            nodes.run(node, state)
            if node.has_exit:
                widths[node.name] = int(state[f"{node.name}/logits"].shape[1])
            if len(node.successors) > 1:
                scores = network.gate_of(node.name).score(nodes.seen(node, node.gate_reads, state))
                got = 1 if scores.dim() == 1 else int(scores.shape[1])
                ways = len(node.successors)
                if got != ways - 1:
                    raise BadNetwork(
                        f"the gate of {node.name!r} gives {got} score{'s' if got > 1 else ''} a "
                        f"row, expected "
                        f"{ways - 1} for its {ways} ways"
                    )
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"the exits answer with different numbers of classes ({widths}), expected one"
        )


def _inputs(state: State) -> tuple[Input, ...]:
    found = list[Input]()
    for name, value in state.items():
        numbers = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy has not
        found.append(Input.of(name, numbers.detach().cpu().numpy()).settled())
    return tuple(found)


def _entries(step: object, where: str) -> tuple[str, object, Mapping[str, float | None]]:
    """Name, module and further reads of a step."""
    if not isinstance(step, (tuple, list)) or len(step) not in (2, 3):
        raise InvalidArgument(
            f"{where} must be (name, module), a Fork or a Leave, got {_short(step)}"
        )
    reads = step[2] if len(step) == 3 else {}
    if not isinstance(reads, Mapping):
        raise InvalidArgument(
            f"the third entry of {where} must be a mapping of earlier names to defaults, got "
            f"{reads!r}"
        )
    return step[0], step[1], reads


def _short(thing: object) -> str:
    if isinstance(thing, (str, int, float, type(None))):
        return repr(thing)
    return f"a {type(thing).__name__}"


def _is_empty(arm: object) -> bool:
    return arm is None or (isinstance(arm, (list, tuple)) and not arm)


def _is_pair(arm: object) -> bool:
    """Whether an arm is a module with its preprocessing."""
    return (
        isinstance(arm, tuple)
        and len(arm) == 2
        and all(isinstance(part, nn.Module) for part in arm)
    )
