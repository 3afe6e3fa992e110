"""The network: the user's models with exits and gates under names.

A network is a plain `nn.Module`. It has the user's own modules, unchanged, as `backbone`, and
`fronts` (preprocessing), `exits` and `gates` by name. Segments (segmenting.py) refer to these
modules and are never registered. Shapes: B samples, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find, unknown
from offramp.errors import BadData, BadNetwork, InvalidArgument
from offramp.networks import ambient
from offramp.networks.compiled import compiled_of
from offramp.networks.inputs import State, as_inputs
from offramp.networks.members import (
    BACKBONE,
    ModelSpec,
    Modules,
    WholeModel,
    digest,
    held,
    values_of,
)
from offramp.networks.nodes import Exit, Gate, Seen, answers, grade
from offramp.networks.printing import chain_table
from offramp.networks.trained import rows_behind
from offramp.networks.walking import HANDED as HANDED
from offramp.networks.walking import ReferencePath, every_path
from offramp.networks.wrappers import deep_copy, unwrapped
from offramp.plans.drawing import tree
from offramp.plans.provenance import SeenRows, union
from offramp.plans.schedule import LOGITS as LOGITS
from offramp.plans.schedule import SCORE as SCORE
from offramp.plans.schedule import Stage
from offramp.plans.signature import example
from offramp.plans.topology import Node, Topology


@dataclass(frozen=True)
class Segment:
    """The part of a model between two decision points.

    Attributes:
        name: the node where it ends.
        reads: names of the tensors that it needs; x means every input.
        writes: names of the tensors that it gives.
        modules: those whose change makes it stale, also those inside others.
        call: runs it on named tensors.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    call: Callable[[State], State]


@dataclass(frozen=True)
class EngineStage:
    """A stage of a schedule as an engine runs it: its segments, and the exit and gate it needs.

    Attributes:
        stage: of the schedule. Its `reads` must exist before, its `writes` exist afterwards.
        modules: those whose change makes the stage stale, also those inside others.
        functions: "segment", "exit" and "gate", called in this order; an engine may fuse them. They
            give `<node>`, `<node>/logits`, `<node>/score`, `<node>/handed` if the exit `Hands`, and
            the tensors that later segments continue from.
        free: for each tensor that it reads, the dimensions that follow the length of a text.
    """

    stage: Stage
    modules: tuple[nn.Module, ...]
    functions: Mapping[str, Callable[[State], State]]
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The node of its exit and gate."""
        return self.stage.name

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors that must exist before."""
        return self.stage.reads

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors that it gives."""
        return self.stage.writes

    def call(self, state: State) -> None:
        """Run all functions, and add the tensors that they give to `state`."""
        for function in self.functions.values():
            state.update(function(state))


class Network(nn.Module):
    """The user's models with exits and gates. A call gives the logits of every exit, in order.

    Build one with `offramp.cut` or `offramp.ladder`. It is in eval mode if the models are.

    State-dict keys: `backbone.<your own keys>` (in a ladder `backbone.<member>.<your own keys>`),
    `exits.<node>.*`, `gates.<node>.*`, and `fronts.<member>.*` if preprocessing has tensors.

    Args:
        backbone: the model, or an `nn.ModuleDict` of the models by member.
        members: the models' names and cuts, in order.
        topology: which nodes follow each other.
        fronts: preprocessing by member, where a member has any.
        exits: by node.
        gates: by node.
        made: by node, a digest of each exit that was made for this network: see `untrained`.

    Attributes:
        trained_on: digests of the rows that trained it: see `training_rows`.
        class_names: of these rows, if they have any. Other rows are numbered by them, or refused.
        whole: the model of which all segments are pieces; None where there is none.
        auxiliary: modules that a recipe needs while it trains, such as adapters. They are not part
            of the network, are never saved, and are dropped when `fit` ends.

    Raises:
        BadNetwork: models, exits or gates do not fit the topology.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        members: tuple[ModelSpec, ...],
        topology: Topology,
        fronts: Modules,
        exits: Modules,
        gates: Modules,
        made: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fronts = held(fronts)
        self.exits = held(exits)
        self.gates = held(gates)
        self.members = members
        self.topology = topology
        self.made = dict(made or {})
        self.trained_on: SeenRows | None = None
        self.class_names: tuple[str, ...] | None = None
        self.whole: WholeModel | None = None
        # A plain dict, so that they are not among its modules, parameters and state.
        self.auxiliary: dict[str, nn.Module] = {}
        self._require_names()
        # An exit that is a part of the user's model finds that part.
        for member in members:
            for node in member.nodes():
                if node in self.exits:
                    self.exit_of(node).belong_to(self.model_of(member))
        self.training = any(self.model_of(member).training for member in members)
        if not self.training:
            for modules in (self.fronts, self.exits, self.gates):
                modules.eval()
            backbone.training = False
        self.trained_on = rows_behind(self)  # such as a model that was trained in another network

    def _require_names(self) -> None:
        """Raise BadNetwork unless models, exits and gates are those of the topology."""
        members = tuple(member.name for member in self.members)
        several = isinstance(self.backbone, nn.ModuleDict)
        # A ladder has one model for each member. A model that was cut may itself be a ModuleDict.
        if several and members != (BACKBONE,):
            models = tuple(self.backbone._modules)
        else:
            models = (BACKBONE,)
        if set(models) != set(members) or not set(self.fronts) <= set(models):
            raise BadNetwork(
                f"there are models {models} and preprocessing of {tuple(self.fronts)}, expected "
                f"those of {members}"
            )
        nodes: tuple[str, ...] = ()
        for member in self.members:
            nodes += member.nodes()
        exits = set(self.topology.exits)
        gates = set(self.topology.gates)
        if nodes != self.topology.names or set(self.exits) != exits or set(self.gates) != gates:
            raise BadNetwork(
                f"there are nodes {nodes}, exits {tuple(self.exits)} and gates "
                f"{tuple(self.gates)}, expected the nodes "
                f"{self.topology.names}, exits at {self.topology.exits} and gates at "
                f"{self.topology.gates}"
            )
        if not self.topology.is_chain and any(member.cuts for member in self.members):
            raise BadNetwork(
                "a network with forks is made of whole models, one a node; got one that is cut"
            )
        if not set(self.made) <= set(nodes):
            raise BadNetwork(f"made must name some of the nodes {nodes}, got {tuple(self.made)}")

    def model_of(self, member: ModelSpec) -> nn.Module:
        """The user's model of a member."""
        if member.name == BACKBONE:
            return self.backbone
        assert isinstance(self.backbone, nn.ModuleDict)
        return self.backbone[member.name]

    def preprocess_of(self, member: ModelSpec) -> nn.Module | None:
        """The preprocessing of a member; None without."""
        return dict(self.fronts.items()).get(member.name)

    def untrained(self) -> tuple[str, ...]:
        """The exits that were made for this network and whose parameters never changed since."""
        untrained = list[str]()
        for name in self.topology.exits:
            if name in self.made and self.made[name] == digest(self.exits[name]):
                untrained.append(name)
        return tuple(untrained)

    def exit_of(self, name: str) -> Exit:
        """The exit of a node."""
        exit_ = self.exits[name]
        assert isinstance(exit_, Exit)
        return exit_

    def gate_of(self, name: str) -> Gate:
        """The gate of a node."""
        gate = self.gates[name]
        assert isinstance(gate, Gate)
        return gate

    def with_exit(self, node: str, exit: Exit) -> Network:
        """Make a network with another exit at one node; this network stays as it is.

        Both share the models, the preprocessing, the gates and all other exits, so training one
        trains the other.

        Args:
            node: the name of the node.
            exit: the new exit, on the device of the weights. The nodes that it `reads` must come
                before this one.

        Returns:
            A network whose topology has the reads of the new exit.

        Raises:
            UnknownName: there is no such node.
            InvalidArgument: it is not an Exit.
            BadNetwork: it reads something that is neither an earlier node nor an input.
        """
        network = self._again()
        network.hang_exit(node, exit)
        return network

    def with_gates(self, gates: Mapping[str, Gate]) -> Network:
        """Make a network with other gates at some nodes; this network stays as it is.

        Both share the models, the preprocessing, the exits and all other gates.

        Args:
            gates: by node. The last node has no gate.

        Returns:
            A network whose topology has the reads of the new gates.

        Raises:
            UnknownName: there is no such node, or it has no gate.
            InvalidArgument: one of them is not a Gate.
            BadNetwork: one reads something that is neither an earlier node nor an input.
        """
        network = self._again()
        network.hang_gates(gates)
        return network

    def hang_exit(self, node: str, exit: Exit) -> None:
        """Like `with_exit`, in place: for recipes, which prepare the network that they train.

        Sessions, traces and plans from before no longer belong to the network.
        """
        self.topology.exit_index(node)  # raises UnknownName
        if not isinstance(exit, Exit):
            raise InvalidArgument(
                f"the exit of {node!r} must be an Exit, got a {type(exit).__name__}"
            )
        nodes = list[Node]()
        for old in self.topology.nodes:
            nodes.append(replace(old, exit_reads=exit.reads) if old.name == node else old)
        # The new topology refuses wrong reads before the exit is changed.
        self.topology = replace(self.topology, nodes=tuple(nodes))
        self.exits.hang(node, exit if self.training else exit.eval())
        compiled_of(self).forget()

    def hang_gates(self, gates: Mapping[str, Gate]) -> None:
        """Like `with_gates`, in place. If one of the gates is refused, none is changed."""
        # Check all of them before the first is changed.
        for node, gate in gates.items():
            if node not in self.topology.gates:
                raise unknown(node, self.topology.gates, "gate of this network")
            if not isinstance(gate, Gate):
                raise InvalidArgument(
                    f"the gate of {node!r} must be a Gate, got a {type(gate).__name__}"
                )
        nodes = list[Node]()
        for old in self.topology.nodes:
            reads = gates[old.name].reads if old.name in gates else old.gate_reads
            nodes.append(replace(old, gate_reads=reads))
        self.topology = replace(self.topology, nodes=tuple(nodes))
        for node, gate in gates.items():
            self.gates.hang(node, gate if self.training else gate.eval())
        compiled_of(self).forget()

    def _again(self) -> Network:
        """Another network of the same modules."""
        network = Network(
            backbone=self.backbone,
            members=self.members,
            topology=self.topology,
            fronts=self.fronts,
            exits=self.exits,
            gates=self.gates,
            made=self.made,
        )
        network.trained_on = self.trained_on
        network.class_names = self.class_names
        network.whole = self.whole
        return network

    def __str__(self) -> str:
        """The nodes in order, with exit, gate and cost; a network with forks as a tree."""
        if not self.topology.is_chain:
            return f"{self._size()}\n{tree(self.topology, self._label)}"
        # The costs come from a run on made-up rows, which a network in training mode would notice.
        rows = {} if self.backbone.training else trial_rows(self)
        return "\n".join([self._size(), *chain_table(self, rows)])

    def _size(self) -> str:
        """The numbers of segments, gates and exits in words."""
        segments = len(self.topology.nodes)
        if not self.topology.is_chain:
            segments = 0
            for member in self.members:
                if type(self.model_of(member)) is not nn.Identity:  # an empty arm computes nothing
                    segments += 1
        gates = _counted(len(self.topology.gates), "gate")
        exits = _counted(len(self.topology.exits), "exit")
        return f"Network of {_counted(segments, 'segment')}, {gates} and {exits}"

    def _label(self, node: Node) -> str:
        """The words after a node of the tree."""
        if node.name not in self.gates:
            return "answers" if node.has_exit else ""
        gate = described(self.gate_of(node.name))["name"].lower()
        if len(node.successors) == 2 and node.has_exit:
            return f"leaves by {gate}"
        return f"chooses by {gate}"

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Compute the logits of every exit, for all rows.

        Args:
            x: a batch: a tensor, a tuple of them, or a mapping of named ones.

        Returns:
            Logits [B, C] by exit, shallow to deep. With forks an exit comes once for every path
            that leads to it, in the order of the topology's `exit_labels`.

        Raises:
            BadNetwork: the network has more than sixteen paths.
        """
        if self.topology.is_chain:
            return tuple(logits for _, logits, _ in self.walk(x))
        _ = self.topology.paths  # raises BadNetwork
        by_label = {label: seen.own for label, seen in self.look(x)}
        outputs = list[Tensor]()
        for label in self.topology.exit_labels:
            logits = by_label[label]
            if logits is not None:
                outputs.append(logits)
        return tuple(outputs)

    def walk(self, x: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Iterate over the nodes of a chain, for all rows.

        Args:
            x: a batch: a tensor, a tuple of them, or a mapping of named ones.

        Yields:
            The name of the node, the logits [B, C] of its exit, and the score [B] of its gate (None
            at the last node).
        """
        self.topology.require_chain("a walk along all exits")
        for name, seen in self.look(x):
            assert seen.own is not None
            score: Tensor | None = None
            if name in self.gates:
                score = grade(self.gate_of(name), seen, seen.own)
            yield name, seen.own, score

    def look(self, x: Any) -> Iterator[tuple[str, Seen]]:
        """Iterate over the nodes, with everything that the gate of each node sees.

        Models run eagerly, with temporary hooks at their cuts. So train mode, dropout, DDP and the
        user's own code work as usual, and gradients reach exits and models. The nodes of a member
        come after all of it has run. With forks every exit comes once for each path that leads to
        it; of more than sixteen paths, along the most expensive one alone.

        Args:
            x: a batch: a tensor, a tuple of them, or a mapping of named ones.

        Yields:
            The name of the node (with forks the exit's label), and the tapped features, the logits
            [B, C] of earlier exits and those of its own exit.
        """
        inputs = as_inputs(x)
        if not self.topology.is_chain:
            for label, node, seen in every_path(self, inputs):
                if node.has_exit:
                    yield label, seen
            return
        logits = dict[str, Tensor]()  # by node, [B, C] each
        handed = dict[str, Tensor]()  # by node, what exits hand to later exits
        for member in self.members:
            model = self.model_of(member)
            values = values_of(model, self.preprocess_of(member), member, inputs)
            for name, features in values.items():
                # An exit sees what earlier exits hand on, a gate sees their logits.
                seen = Seen(features, handed, inputs=inputs)
                own, handed[name] = answers(self.exit_of(name), seen, name)
                yield name, Seen(features, logits, own, inputs)
                logits[name] = own

    def training_rows(self) -> SeenRows | None:
        """The rows that trained any part of it, in this network or in another one.

        A promise must not be based on these rows. docs/concepts/promises.md lists the training that
        cannot be noticed.
        """
        return union([self.trained_on, rows_behind(self)])

    def parts(self) -> dict[str, nn.Module]:
        """Models, preprocessing, exits and gates, by the prefix of their state-dict keys."""
        parts: dict[str, nn.Module] = {}
        for member in self.members:
            prefix = "backbone" if member.name == BACKBONE else f"backbone.{member.name}"
            parts[prefix] = self.model_of(member)
        by_kind = {"fronts": self.fronts, "exits": self.exits, "gates": self.gates}
        for kind, modules in by_kind.items():
            for name, module in modules.items():
                parts[f"{kind}.{name}"] = module
        return parts

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            # The keys "rungs" and "chain" are those of the file format.
            "rungs": [asdict(member) for member in self.members],
            "chain": self.topology.to_json(),
            "fronts": _all_described(self.fronts),
            "exits": _all_described(self.exits),
            "gates": _all_described(self.gates),
        }

    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the weights and the configuration.

        The configuration is that of taps, preprocessing, exits and gates.
        """
        config = self.config()
        # How a model is built does not matter for its results. Its cuts are the names of the nodes.
        del config["rungs"]
        mark = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            array = value.detach().cpu().contiguous()
            # Type and shape too: equal bytes can be different tensors.
            mark.update(f"{key}{array.dtype}{tuple(array.shape)}".encode())
            mark.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        return mark.hexdigest()[:16]

    def precision(self) -> str:
        """The floating-point type of the weights, such as `float32`.

        Settings of torch that change the results follow in brackets.
        """
        kinds = set[str]()
        for parameter in self.parameters():
            if parameter.is_floating_point():
                kinds.add(str(parameter.dtype).removeprefix("torch."))
        types = "+".join(sorted(kinds)) or "float32"
        settings = ambient.told()
        if not settings:
            return types
        return f"{types} ({settings})"

    def device(self) -> torch.device:
        """The device of the weights. Raises BadNetwork if they are on several devices."""
        devices = {tensor.device for tensor in (*self.parameters(), *self.buffers())}
        if not devices:
            return torch.device("cpu")
        if len(devices) > 1:
            raise BadNetwork(
                f"the network must be on one device, got {sorted(map(str, devices))}. Call "
                f"net.to(device)."
            )
        return devices.pop()

    def require_eval(self) -> None:
        """Raise BadNetwork while any part is in training mode.

        In training mode the result of a row depends on the other rows of the batch.
        """
        require_eval(self, "network", "net.eval()")

    def require_inputs(self, state: State, what: str) -> None:
        """Check that rows have the types and shapes of those that the models were cut with.

        Args:
            state: the inputs of some rows by name, each [B, ...].
            what: the rows in messages.

        Raises:
            BadData: an input is missing, or has another type or shape.
        """
        for member in self.members:
            for expected in member.inputs:
                value = state.get(expected.name)
                if value is None:
                    raise BadData(
                        f"{what} has the inputs {list(state)}, and the model was cut with "
                        f"{expected.name!r}"
                    )
                shape = tuple(value.shape[1:])
                # A text [T, ...] may have another length.
                first = 1 if expected.name in member.length else 0
                fits = shape[first:] == expected.shape[first:]
                if not fits or value.is_floating_point() != expected.dtype.startswith("float"):
                    kind = str(value.dtype).removeprefix("torch.")
                    raise BadData(
                        f"a row of {what} is {kind} {list(shape)}, expected {expected.dtype} "
                        f"{list(expected.shape)}, "
                        "as when the model was cut. Use rows of this kind, or cut the model again "
                        "with an example of these."
                    )


def _counted(count: int, noun: str) -> str:
    """A number with its noun: `1 exit`, `2 exits`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def require_eval(module: nn.Module, what: str, remedy: str) -> None:
    """Check that a module and all modules inside it are in eval mode.

    Args:
        module: to check.
        what: its name in messages.
        remedy: the call that puts it into eval mode.

    Raises:
        BadNetwork: one of them is in training mode; the message names it.
    """
    training = [name for name, child in module.named_modules() if child.training]
    if not training:
        return
    if "" in training:
        raise BadNetwork(f"the {what} is in training mode, expected eval mode; call {remedy} first")
    more = f" and {len(training) - 1} more" if len(training) > 1 else ""
    raise BadNetwork(
        f"{training[0]!r}{more} in the {what} is in training mode, expected eval mode everywhere; "
        f"call {remedy} first"
    )


def as_network(thing: object) -> Network:
    """Check that an argument is a network.

    Args:
        thing: a network, or one that was wrapped by `torch.compile`.

    Returns:
        The network itself.

    Raises:
        InvalidArgument: it is something else.
    """
    network = thing
    if isinstance(thing, nn.Module):
        network, _ = unwrapped(thing)
    if isinstance(network, Network):
        return network
    if isinstance(network, str):
        got = f"the text {network!r}: load it first"
    else:
        got = f"a {type(network).__name__}"
    raise InvalidArgument(f"the network must be a Network, made by cut, ladder or load; got {got}")


def plain_network(
    model: nn.Module, member: ModelSpec, preprocess: nn.Module | None = None
) -> Network:
    """Make a network of one node from a model without cuts.

    Args:
        model: the user's.
        member: its name and inputs.
        preprocess: makes the model's input; None where the input is ready.
    """
    return Network(
        backbone=model if member.name == BACKBONE else nn.ModuleDict({member.name: model}),
        members=(replace(member, cuts=()),),
        topology=Topology.chain([Node(member.name)]),
        fronts={} if preprocess is None else {member.name: preprocess},
        exits={member.name: find("exits", "Own")()},
        gates={},
    )


def trial_rows(network: Network, member: ModelSpec | None = None, count: int = 2) -> State:
    """Make seeded rows like those that a member was cut with.

    Args:
        network: its device and precision are used.
        member: one of its members; None for the first that was cut.
        count: number of rows.

    Returns:
        Inputs [count, ...] by name; empty if no member was cut.
    """
    if member is None:
        for candidate in network.members:
            if candidate.inputs:
                member = candidate
                break
    if member is None or not member.inputs:
        return {}
    rows = as_inputs(example(member.inputs, count), network.device())

    # Floats get the type of the first module that reads them, if all of its tensors have one type.
    first = network.preprocess_of(member) or network.model_of(member)
    kinds = set[torch.dtype]()
    for tensor in (*first.parameters(), *first.buffers()):
        if tensor.is_floating_point():
            kinds.add(tensor.dtype)
    if len(kinds) == 1:
        kind = kinds.pop()
        for name, value in rows.items():
            if value.is_floating_point():
                rows[name] = value.to(kind)
    return rows


def last_model(network: Network, *, copied: bool = False) -> Network:
    """Make a network of the last model alone, with its preprocessing and without cuts.

    Args:
        network: of a network with forks, the most expensive path is taken as one model.
        copied: whether to copy the weights; otherwise both share them.
    """
    member = network.members[-1]
    if not network.topology.is_chain:
        model: nn.Module = ReferencePath(network)
        preprocess = None
        member = replace(member, name="plain")
    else:
        model = network.model_of(member)
        preprocess = network.preprocess_of(member)
    if copied:  # together, because they may share tensors
        model, preprocess = deep_copy((model, preprocess))
    return plain_network(model, member, preprocess)


def _all_described(modules: nn.ModuleDict) -> dict[str, dict[str, Any]]:
    return {name: described(module) for name, module in modules.items()}


def described(module: nn.Module) -> dict[str, Any]:
    """The configuration of preprocessing, an exit or a gate.

    Args:
        module: if its class has no `config()`, then the name of the class and the repr count.

    Returns:
        Plain data with the key "name".
    """
    make_config = getattr(module, "config", None)
    if callable(make_config):
        config: dict[str, Any] = make_config()
        return config
    kind = type(module)
    return {"name": f"{kind.__module__}:{kind.__qualname__}", "repr": repr(module)}
