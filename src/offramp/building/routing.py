"""`route`: make a network from nested lists of segments, forks and exits.

    off.route([
        ("stem", stem),
        off.Fork("size", {"small": a, "large": b}, gate="controller"),
        ("head", head),
    ], example=x)

The arms of a fork meet again behind it. An arm is a module, a list like the outer one, or an empty
list, which skips. If the last step of the list is a fork, every arm answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find, unknown
from offramp.building.factories import made_for_features, make_exit, make_gate
from offramp.building.pieces import pieces_after
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import State, as_inputs, count_of, remedy
from offramp.networks.members import ModelSpec, digest, require_name
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Exit, Gate
from offramp.networks.walking import Nodes, segment_call, with_defaults
from offramp.networks.wrappers import require_plain
from offramp.plans.signature import Input
from offramp.plans.signature import example as rows_like
from offramp.plans.topology import LEAVE, Default, Node, Topology

NOTHING = "offramp:nothing"
ROWS = 4  # rows on which a network that was cut is split

GateLike = str | Gate | Callable[..., Any]
ExitLike = str | Exit | Callable[..., Exit]
Step = Any  # (name, module), (name, module, {node: default}), Fork, or Leave
Arm = Any  # a module, a list of steps, or nothing


@dataclass(frozen=True)
class Fork:
    """A step at which every row takes one of several arms.

    Attributes:
        name: of the fork; a plan has thresholds under this name.
        arms: the arms by name, cheap ones first. An arm is a module, a list of steps, or an empty
            list, which skips.
        gate: scores the arms: the name of a gate that is made for the features at the fork
            ("controller", "predictor"), or a Gate with one score for each arm but the last.
    """

    name: str
    arms: Mapping[str, Arm]
    gate: GateLike = "controller"


@dataclass(frozen=True)
class Leave:
    """A step at which rows may leave with an answer.

    Attributes:
        name: of the exit.
        exit: the exit, as in `cut`.
        gate: scores the rows; a row with a high score leaves. None answers every row, as the last
            step of an arm.
    """

    name: str
    exit: ExitLike = "linear_grid"
    gate: GateLike | None = "margin"


@without_autocast()
def route(
    steps: Sequence[Step],
    *,
    example: Any = None,
    sources: Mapping[str, str] | None = None,
) -> Network:
    """Make a network with forks from steps.

    Args:
        steps: in the order in which rows pass them; each one is (name, module), a `Fork`, or a
            `Leave`. A module reads the output of the step before it; the first one reads the input,
            and may be a pair (module, preprocess). A network made by `cut` may take the place of a
            module, and brings its exits. A third entry, {name: default}, names earlier
            segments whose outputs the module takes as further arguments. The default replaces an
            output in rows whose path skipped that segment; use None if every path runs it. The last
            step answers: logits [B, C].
        example: a batch to try the network on. Exits and gates that are given by name are made for
            the shapes seen there.
        sources: by the name of a segment, how its model is built again, such as "offramp:resnet20".

    Returns:
        A network in the mode of its modules. Nothing is copied or changed.

    Raises:
        InvalidArgument: two steps have one name, a name is invalid, or a step is none of these.
        BadNetwork: arms that meet give rows of different shapes; a segment reads an output that a
            path does not run, without a default; or a gate has a wrong number of scores.
        BadData: a module fails on the example.
    """
    layout = _Layout(dict(sources or {}))
    layout.steps(steps, (), "the list")
    if not layout.nodes:
        raise InvalidArgument("steps must have at least one (name, module), got an empty list")
    layout.end()
    return layout.network(None if example is None else as_inputs(example))


@dataclass
class _Layout:
    """The nodes of a network while the steps are read, in topological order.

    A step adds one node. It also becomes the successor of the open nodes: the ends of the step
    before it, of which a fork has one for each arm.

    Attributes:
        sources: as in `route`.
        nodes: so far. A successor is "" until it is known.
        models: by node.
        fronts: preprocessing by node.
        forks: by node.
        exits: by node.
        open: the open nodes, each with the index of the successor that is missing.
        defaults: by the name of a segment, the default of its output, and the first segment that
            reads it.
        within: identities of the lists that are being read, the outermost first.
        marks: by exit, its digest in a network that was cut, where it is not trained yet.
    """

    sources: dict[str, str]
    nodes: list[Node] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)
    fronts: dict[str, nn.Module] = field(default_factory=dict)
    forks: dict[str, Fork] = field(default_factory=dict)
    exits: dict[str, Leave] = field(default_factory=dict)
    open: list[tuple[str, int]] = field(default_factory=list)
    defaults: dict[str, tuple[float, str]] = field(default_factory=dict)
    within: list[int] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)

    def steps(self, steps: object, ends: tuple[str, ...], where: str) -> tuple[str, ...]:
        """Add the nodes of some steps.

        Args:
            steps: in order.
            ends: the nodes whose output the first step reads; empty for the input.
            where: the list of these steps, for messages.

        Returns:
            The nodes whose output the step behind them reads.
        """
        # A list inside itself would be read for ever.
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
            elif _network_in(step) is not None:
                ends = self._network_step(step, ends, f"step {number + 1} of {where}")
            else:
                ends = self._segment(step, ends, f"step {number + 1} of {where}")
        self.within.pop()
        return ends

    def end(self) -> None:
        """Let the nodes that are open at the end answer."""
        for name, number in self.open:
            if name in self.exits:
                raise BadNetwork(
                    f"nothing follows the exit {name!r}. Add the step that its other rows go on "
                    f"to, or use gate=None"
                )
            if name in self.forks:
                arm = [*self.forks[name].arms][number]
                raise BadNetwork(
                    f"the arm {arm!r} of the last fork {name!r} is empty, so its rows get no "
                    f"answer. Use off.Leave, or add a step behind the fork"
                )
            self.exits[name] = Leave(name, find("exits", "Own")(), None)
            self._set_successor(name, number, LEAVE)

    def _segment(self, step: object, ends: tuple[str, ...], where: str) -> tuple[str, ...]:
        """Add a segment."""
        name, model, reads = _entries(step, where)
        self._require_new(name)
        preprocess = None
        if isinstance(model, (tuple, list)) and len(model) == 2:
            model, preprocess = model
        is_preprocess = preprocess is None or isinstance(preprocess, nn.Module)
        if not isinstance(model, nn.Module) or not is_preprocess:
            raise InvalidArgument(
                f"the segment {name!r} must be a torch.nn.Module, got a {type(model).__name__}"
            )
        if preprocess is not None and ends:
            raise InvalidArgument(
                f"the segment {name!r} has preprocessing, but it does not read the input"
            )
        require_plain(model, f"segment {name!r}")
        # Further arguments: outputs of earlier segments, with their defaults.
        for other, default in reads.items():
            if other not in self.models:
                raise unknown(other, [*self.models], f"segment before {name!r}")
            if default is not None:
                self._add_default(other, float(default), name)
        if preprocess is not None:
            self.fronts[name] = preprocess
        self._add(Node(name, ("",), ends, reads=tuple(reads)), model)
        self.open = [(name, 0)]
        return (name,)

    def _network_step(self, step: object, ends: tuple[str, ...], where: str) -> tuple[str, ...]:
        """Add the segments and exits of a network that was cut."""
        name, _, reads = _entries(step, where)
        network = _network_in(step)
        assert network is not None
        if reads:
            raise InvalidArgument(
                f"{name!r} is a network, whose first segment reads the step before it alone; got "
                f"further reads {[*reads]}"
            )
        steps = _steps_of(str(name), network, reads_input=not ends)
        for cut in network.untrained():
            self.marks[_exit_name(str(name), cut)] = network.made[cut]
        return self.steps(steps, ends, f"the network {name!r}")

    def _add_default(self, name: str, default: float, reader: str) -> None:
        """Note the default of a segment's output. All its readers must name the same one."""
        known, first_reader = self.defaults.setdefault(name, (default, reader))
        if known != default:
            raise InvalidArgument(
                f"{reader!r} and {first_reader!r} declare different defaults of {name!r}: "
                f"{default:g} and {known:g}"
            )

    def _fork(self, fork: Fork, ends: tuple[str, ...]) -> tuple[str, ...]:
        """Add a fork and the nodes of its arms."""
        self._require_new(fork.name)
        arms = fork.arms
        if not isinstance(arms, Mapping) or len(arms) < 2:
            raise InvalidArgument(
                f"the fork {fork.name!r} must have at least two arms by name, got {arms!r}"
            )
        empty = [name for name, arm in arms.items() if _is_empty(arm)]
        if len(empty) > 1:
            raise InvalidArgument(
                f"the arms {empty[0]!r} and {empty[1]!r} of {fork.name!r} are both empty; only one "
                f"may skip"
            )
        self.forks[fork.name] = fork
        self._add(Node(fork.name, ("",) * len(arms), ends), nn.Identity().eval())
        # Arms read the fork, which hands on its input. A fork at the entrance has no input to hand
        # on: its arms read the network's input themselves.
        arm_ends = (fork.name,) if ends else ()
        last_nodes = list[str]()
        still_open = list[tuple[str, int]]()
        for number, (name, arm) in enumerate(arms.items()):
            self.open = [(fork.name, number)]
            if _is_empty(arm):
                last_nodes.append(fork.name)
                still_open += self.open
                continue
            steps = arm
            if isinstance(arm, nn.Module) or _is_pair(arm):  # also a network
                steps = [(name, arm)]
            nodes = self.steps(steps, arm_ends, f"the arm {name!r} of {fork.name!r}")
            if self.open:  # otherwise every row of this arm was answered
                last_nodes += nodes
                still_open += self.open
        self.open = still_open
        return tuple(dict.fromkeys(last_nodes))  # each one once

    def _leave(self, step: Leave, ends: tuple[str, ...]) -> tuple[str, ...]:
        """Add an exit."""
        self._require_new(step.name)
        self.exits[step.name] = step
        if step.gate is None:  # all rows leave, so nothing follows
            self._add(Node(step.name, (LEAVE,), ends), nn.Identity().eval())
            self.open = []
            return ()
        self._add(Node(step.name, (LEAVE, ""), ends), nn.Identity().eval())
        self.open = [(step.name, 1)]
        return (step.name,)

    def _add(self, node: Node, model: nn.Module) -> None:
        """Add a node as the successor of all open nodes."""
        for name, number in self.open:
            self._set_successor(name, number, node.name)
        self.nodes.append(node)
        self.models[node.name] = model

    def _set_successor(self, name: str, number: int, successor: str) -> None:
        """Fill in a successor of a node that is laid out already."""
        for index, node in enumerate(self.nodes):
            if node.name == name:
                successors = list(node.successors)
                successors[number] = successor
                self.nodes[index] = replace(node, successors=tuple(successors))
                return

    def _require_new(self, name: object) -> None:
        """Raise InvalidArgument for a name that is invalid or taken."""
        require_name(name)
        if name in self.models:
            raise InvalidArgument(
                f"each segment, fork and exit must have its own name, got {name!r} twice"
            )

    def network(self, inputs: State | None) -> Network:
        """The network of all steps, tried on an example if there is one."""
        if inputs is not None:
            self._require_eval()
        declared = list[Default]()
        for name, (default, _) in self.defaults.items():
            declared.append(Default(name, default, (), True))  # the shape is not known yet
        topology = Topology(tuple(self.nodes), tuple(declared))

        # Run every segment on the example: exits, gates and defaults need the shapes.
        seen = None
        classes = 0
        if inputs is not None:
            seen = _ExampleRun(self, topology, inputs)
            classes = seen.classes(topology)
        defaults = tuple(self._default(name, seen) for name in self.defaults)

        exits: dict[str, Exit] = {}
        gates: dict[str, Gate] = {}
        made: dict[str, str] = {}
        for node in self.nodes:
            name = node.name
            # exits and gates may read the exits that every path to this node runs
            earlier = [other for other in exits if other in topology._always_before[name]]
            if name in self.exits:
                wanted = self.exits[name].exit
                exits[name] = self._exit(name, wanted, seen, classes, earlier)
                mark = digest(exits[name])
                if not isinstance(wanted, Exit) and mark is not None:
                    made[name] = mark
                elif name in self.marks:  # of a network that was cut
                    made[name] = self.marks[name]
            if len(node.successors) > 1:
                gates[name] = self._gate(node, seen, earlier)

        # The nodes learn what their exits and gates read, and every segment becomes a member.
        nodes = list[Node]()
        members = list[ModelSpec]()
        for laid_out in self.nodes:
            node = laid_out
            if node.name in exits:
                node = replace(node, exit_reads=exits[node.name].reads)
            if node.name in gates:
                node = replace(node, gate_reads=gates[node.name].reads)
            nodes.append(node)
            member = ModelSpec(node.name, self.sources.get(node.name))
            if member.spec is None and type(self.models[node.name]) is nn.Identity:
                member = replace(member, spec=NOTHING)
            if inputs is not None and not node.after:  # it reads the network's input
                member = replace(member, inputs=example_inputs(inputs))
            members.append(member)
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
            _require_working(network, inputs)
        return network

    def _require_eval(self) -> None:
        """Raise BadNetwork if any module is in training mode."""
        for name, model in self.models.items():
            require_eval(model, f"segment {name!r}", "eval()")

    def _default(self, name: str, seen: _ExampleRun | None) -> Default:
        """A default with its shape."""
        default, reader = self.defaults[name]
        if seen is None:
            raise InvalidArgument(
                f"example must be a batch, because {reader!r} reads {name!r} with a default whose "
                f"shape must be known, got None"
            )
        return Default(name, default, seen.shape(name), True)

    def _exit(
        self,
        name: str,
        wanted: ExitLike,
        seen: _ExampleRun | None,
        classes: int,
        earlier: Sequence[str],
    ) -> Exit:
        """An exit, on the device and in the type of the features there."""
        if isinstance(wanted, Exit):
            return wanted
        if seen is None:
            raise InvalidArgument(
                f"example must be a batch, because the exit {name!r} is made for the features "
                f"there, got None. Use an Exit without an example"
            )
        features = seen.values[name]  # [B, ...]; [B, C, H, W] for maps
        layout = "channels_first" if features.dim() == 4 else None
        exit_ = make_exit(wanted, seen.shape(name), classes, earlier, layout)
        return exit_.to(features.device, features.dtype if features.is_floating_point() else None)

    def _gate(self, node: Node, seen: _ExampleRun | None, earlier: Sequence[str]) -> Gate:
        """The gate of a fork or an exit, on the device of the features there."""
        name = node.name
        leave = self.exits.get(name)
        wanted = leave.gate if leave else self.forks[name].gate
        assert wanted is not None  # a node with one successor has no gate
        if not made_for_features(wanted):
            return make_gate(wanted, earlier)
        if seen is None:
            raise InvalidArgument(
                f"example must be a batch, because the gate of {name!r} is made for the features "
                f"there, got None. Use a Gate without an example"
            )
        gate = make_gate(wanted, earlier, seen.shape(name), len(node.successors))
        return gate.to(seen.values[name].device)


class _Segments:
    """The part of a network that a segment's call needs, before there are exits and gates."""

    def __init__(self, layout: _Layout, topology: Topology) -> None:
        self.topology = topology
        self.members = tuple(ModelSpec(node.name) for node in topology.nodes)
        self.layout = layout

    def model_of(self, member: ModelSpec) -> nn.Module:
        """The module of a segment."""
        return self.layout.models[member.name]

    def preprocess_of(self, member: ModelSpec) -> nn.Module | None:
        """The preprocessing of a segment."""
        return self.layout.fronts.get(member.name)


class _ExampleRun:
    """The output of every segment for an example. All segments run once; where arms meet, the
    output of the last arm goes on.
    """

    def __init__(self, layout: _Layout, topology: Topology, inputs: State) -> None:
        self.values: dict[str, Tensor] = {}
        state = dict(inputs)
        if count_of(inputs) == 1:
            # a single row is doubled: a dimension of 1 could be the batch or not
            state = {name: torch.cat([value, value]) for name, value in inputs.items()}
        segments: Any = _Segments(layout, topology)
        with torch.no_grad():
            for node in topology.nodes:
                self._require_one_shape(node)
                try:
                    outputs = segment_call(segments, node.name)(state)
                except OfframpError:
                    raise
                except Exception as problem:  # the user's code can raise anything
                    raise self._failure(node, inputs, problem) from problem
                state.update(outputs)
                self.values[node.name] = outputs[node.name]

    def _failure(self, node: Node, inputs: State, problem: Exception) -> BadData:
        """The error for a segment that fails."""
        rows = "the example"
        if node.after:
            rows = str([*self.values[node.after[-1]].shape])
        way = remedy(inputs, problem, "check the output of the steps before it")
        return BadData(f"the segment {node.name!r} fails on {rows}: {reason_of(problem)}; {way}")

    def _require_one_shape(self, node: Node) -> None:
        """Raise BadNetwork if the arms that meet at a node give rows of different shapes."""
        shapes = {name: self.shape(name) for name in node.after}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BadNetwork(
                f"the arms that meet at {node.name!r} must give rows of one shape, got rows of "
                f"different shapes ({listed})"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a row of a segment's output."""
        return tuple(self.values[name].shape[1:])

    def classes(self, topology: Topology) -> int:
        """The number of classes of the last answer. Raises BadNetwork unless it is [B, C]."""
        ends = [node.name for node in topology.nodes if node.successors == (LEAVE,)]
        shape = self.shape(ends[-1])
        if len(shape) != 1 or shape[0] < 2:
            raise BadNetwork(
                f"the last step must give logits [B, C] of at least two classes, got rows of "
                f"{list(shape)}"
            )
        return shape[0]


def _require_working(network: Network, inputs: State) -> None:
    """Run all nodes on the example. Raises BadNetwork if exits differ in the number of classes, or
    a gate gives a wrong number of scores.
    """
    state = dict(with_defaults(network.topology, inputs))
    nodes = Nodes(network)
    classes: dict[str, int] = {}
    with torch.no_grad():
        for node in network.topology.nodes:
            nodes.run(node, state)
            if node.has_exit:
                classes[node.name] = int(state[f"{node.name}/logits"].shape[1])
            arms = len(node.successors)
            if arms == 1:
                continue
            # scores are [B] for two arms, [B, K - 1] for K
            scores = network.gate_of(node.name).score(nodes.seen(node, node.gate_reads, state))
            if not isinstance(scores, Tensor) or scores.dim() not in (1, 2):
                raise BadNetwork(
                    f"the gate of {node.name!r} must give scores [B] or [B, K - 1], got "
                    f"{_short(scores)}"
                )
            count = 1 if scores.dim() == 1 else int(scores.shape[1])
            if count != arms - 1:
                raise BadNetwork(
                    f"the gate of {node.name!r} must give {arms - 1} score(s) a row, one for each "
                    f"of its {arms} arms but the last, got {count}"
                )
    if len(set(classes.values())) > 1:
        raise BadNetwork(
            f"the exits must have one number of classes, got different numbers of classes "
            f"({classes})"
        )


def example_inputs(state: State) -> tuple[Input, ...]:
    """Describe the inputs of a batch: names, shapes, types and ranges.

    Args:
        state: the inputs by name, each [B, ...].
    """
    inputs = list[Input]()
    for name, value in state.items():
        numbers = value.detach().cpu()
        if numbers.dtype == torch.bfloat16:  # NumPy has no such type
            numbers = numbers.float()
        inputs.append(Input.of(name, numbers.numpy()).settled())
    return tuple(inputs)


def reason_of(problem: Exception) -> str:
    """The first line of an error of the user's code; its class if it has no text.

    Args:
        problem: the error.
    """
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".;") if lines else type(problem).__name__


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


def _network_in(step: object) -> Network | None:
    """The network of a step (name, network); None for any other step."""
    if isinstance(step, (tuple, list)) and len(step) in (2, 3) and isinstance(step[1], Network):
        return step[1]
    return None


def _exit_name(name: str, cut: str) -> str:
    """The node of an exit of a network that is a step."""
    return f"{name}-{cut.replace('.', '-')}-exit"


def _steps_of(name: str, network: Network, *, reads_input: bool) -> list[Step]:
    """The steps of a network that was cut: a segment and an exit for each cut.

    Args:
        name: of the step; nodes are called `<name>-<cut>` and `<name>-<cut>-exit`, the last one as
            the step itself.
        network: made by `cut`.
        reads_input: whether the step reads the input, and not the step before it.

    Raises:
        BadNetwork: it is a ladder or has forks, or its exits or gates read earlier ones.
    """
    (member, *others) = network.members
    if others or not network.topology.is_chain:
        kind = "a ladder" if network.topology.is_chain else "a network with forks"
        raise BadNetwork(
            f"the step {name!r} must be a module or a network made by cut, got {kind}. Use its "
            f"models as steps"
        )
    _require_own_exits(name, network)
    rows = as_inputs(rows_like(member.inputs, ROWS), network.device())
    if len(rows) != 1:
        raise BadNetwork(f"the network {name!r} must have one input, got {', '.join(rows)}")
    (x,) = rows.values()
    preprocess = network.preprocess_of(member)
    with torch.no_grad():
        floats = x if preprocess is None else preprocess(x)
    model = network.model_of(member)
    consequence = f"so the network {name!r} cannot be a step"
    steps = list[Step]()
    for end, piece in pieces_after(model, floats, member.cuts, consequence=consequence):
        segment: Any = piece
        if not steps and preprocess is not None:
            segment = nn.Sequential(preprocess, piece).eval()
            if reads_input:
                segment = (piece, preprocess)
        if not end:
            steps.append((name, segment))
            continue
        steps.append((f"{name}-{end.replace('.', '-')}", segment))
        steps.append(Leave(_exit_name(name, end), network.exit_of(end), network.gate_of(end)))
    return steps


def _require_own_exits(name: str, network: Network) -> None:
    """Raise BadNetwork if an exit needs more than the features at its cut."""
    for node in network.topology.nodes:
        reading = [*node.exit_reads, *node.gate_reads]
        if reading:
            raise BadNetwork(
                f"the exit {node.name!r} of the network {name!r} reads {', '.join(reading)}, and "
                f"within route exits read their own features alone"
            )
        # such an exit finds its module in the model of its network
        if type(network.exit_of(node.name)).belong_to is not Exit.belong_to:
            raise BadNetwork(
                f"the exit {node.name!r} of the network {name!r} is a part of its model, which "
                f"route splits. Use the parts of the model as steps"
            )


def _short(thing: object) -> str:
    """A value as it is printed in a message."""
    if isinstance(thing, (str, int, float, type(None))):
        return repr(thing)
    return f"a {type(thing).__name__}"


def _is_empty(arm: object) -> bool:
    return arm is None or (isinstance(arm, (list, tuple)) and not arm)


def _is_pair(arm: object) -> bool:
    """Whether an arm is a module with its preprocessing."""
    if not isinstance(arm, tuple) or len(arm) != 2:
        return False
    return isinstance(arm[0], nn.Module) and isinstance(arm[1], nn.Module)
