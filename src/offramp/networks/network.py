"""Segments, exits and gates under names.

Shapes: B samples, C classes. A network is a plain `nn.Module`: the user's own module(s), untouched,
as `backbone`, plus `fronts`, `exits` and `gates` by name. Segments (segmenting.py) only refer to
them and are never registered.
"""

from __future__ import annotations

import copy
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
from offramp.networks.members import BACKBONE, ModelSpec, Modules, digest, held, values_of
from offramp.networks.nodes import Exit, Gate, Seen, answers, grade
from offramp.networks.printing import chain_table
from offramp.networks.trained import rows_behind
from offramp.networks.walking import HANDED as HANDED
from offramp.networks.walking import ReferencePath, every_path
from offramp.networks.wrappers import unwrapped
from offramp.plans.drawing import tree
from offramp.plans.provenance import SeenRows, union
from offramp.plans.schedule import LOGITS as LOGITS
from offramp.plans.schedule import SCORE as SCORE
from offramp.plans.schedule import Stage
from offramp.plans.signature import example
from offramp.plans.topology import Node, Topology


@dataclass(frozen=True)
class Segment:
    """A piece of backbone between two decision points: named tensors in (`reads`), named tensors
    out (`writes`).

    Reading x means reading every input. `modules`: those whose change makes it stale, each of them
    listed.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    call: Callable[[State], State]


@dataclass(frozen=True)
class EngineStage:
    """A stage of a schedule as an engine runs it: its segments, and its exit and gate as far as the
    stage needs them.

    `functions` are called in order ("segment", "exit", "gate"; an engine may fuse them) and give
    `<node>`, `<node>/logits`, `<node>/score`, `<node>/handed` where an exit `Hands`, and what later
    segments continue from: `stage.writes`. `stage.reads` names what must be there before; `modules`
    are those whose change makes the part stale, each of them listed. `free`: of the tensors that it
    reads the dimensions beside the batch that follow the length of a text.
    """

    stage: Stage
    modules: tuple[nn.Module, ...]
    functions: Mapping[str, Callable[[State], State]]
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The node whose exit and gate stand here."""
        return self.stage.name

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors that must be there before."""
        return self.stage.reads

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors that it gives."""
        return self.stage.writes

    def call(self, state: State) -> None:
        """Run all pieces; the named tensors that they give are added to `state`."""
        for function in self.functions.values():
            state.update(function(state))


class Network(nn.Module):
    """Members, exits and gates in a chain; calling it gives the logits of every exit, shallow to
    deep.

    Build one with `offramp.cut` or `offramp.ladder`; of models in eval mode it is in eval mode
    itself. State-dict keys: `backbone.<your own keys>` (in a ladder
    `backbone.<member>.<your own keys>`), `exits.<node>.*`, `gates.<node>.*`, and
    `fronts.<member>.*` if preprocessing has any. `made` keeps a digest of each exit that was made
    for it: see `untrained`; `training_rows` the digests of rows that trained it: those promise
    nothing, see `training_rows`. `class_names` are those of these rows, if they have any: other
    rows are numbered by them, or refused. `auxiliary` holds what a recipe needs while it trains,
    such as adapters; it is no part of the network, never saved, and emptied when `fit` ends.
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
        # a plain dict: not among its modules, parameters and state
        self.auxiliary: dict[str, nn.Module] = {}
        self._require_names()
        for member in members:
            for node in member.nodes():
                if node in self.exits:
                    self.exit_of(node).belong_to(self.model_of(member))
        self.training = any(self.model_of(member).training for member in members)
        if not self.training:
            for ours in (self.fronts, self.exits, self.gates):
                ours.eval()
            backbone.training = False
        self.trained_on = rows_behind(self)  # a model that another network trained, say

    def _require_names(self) -> None:
        """Raise BadNetwork unless every node has its segment, and an exit and a gate where the
        topology has them.
        """
        members = tuple(member.name for member in self.members)
        several = isinstance(self.backbone, nn.ModuleDict)
        if several and members != (BACKBONE,):
            models = tuple(self.backbone._modules)
        else:
            models = (BACKBONE,)
        if set(models) != set(members) or not set(self.fronts) <= set(models):
            raise BadNetwork(
                f"there are models {models} and preprocessing of {tuple(self.fronts)}, expected "
                f"those of {members}"
            )
        nodes = tuple(node for member in self.members for node in member.nodes())
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
            raise BadNetwork(
                f"exits {tuple(self.made)} are said to be made, expected some of {nodes}"
            )

    def model_of(self, member: ModelSpec) -> nn.Module:
        """The user's module of a member."""
        if member.name == BACKBONE:
            return self.backbone
        assert isinstance(self.backbone, nn.ModuleDict)
        return self.backbone[member.name]

    def preprocess_of(self, member: ModelSpec) -> nn.Module | None:
        """What stands before a member."""
        return dict(self.fronts.items()).get(member.name)

    def untrained(self) -> tuple[str, ...]:
        """The exits that were made for this network and whose parameters nobody has changed
        since.
        """
        return tuple(
            name
            for name in self.topology.exits
            if name in self.made and self.made[name] == digest(self.exits[name])
        )

    def exit_of(self, name: str) -> Exit:
        """The exit of a node."""
        found = self.exits[name]
        assert isinstance(found, Exit)
        return found

    def gate_of(self, name: str) -> Gate:
        """The gate of a node."""
        gate = self.gates[name]
        assert isinstance(gate, Gate)
        return gate

    def with_exit(self, node: str, exit: Exit) -> Network:
        """This network with another exit at one node; nothing else differs, and this one stays as
        it is.

        Both share the models, the preprocessing, the gates and all other exits, so that training
        one trains the other.

        Args:
            node: the name of the node.
            exit: what answers there, where the weights are; what it `reads` must come before the
                node.

        Returns:
            A network whose chain says what the new exit reads.

        Raises:
            UnknownName: there is no such node.
            InvalidArgument: what is given is no Exit.
            BadNetwork: it reads what is no earlier node and no input.
        """
        found = self._again()
        found.hang_exit(node, exit)
        return found

    def with_gates(self, gates: Mapping[str, Gate]) -> Network:
        """This network with other gates at some nodes; nothing else differs, and this one stays as
        it is.

        Both share the models, the preprocessing, the exits and the gates that are not named.

        Args:
            gates: by node, but for the last, which has none.

        Returns:
            A network whose chain says what the new gates read.

        Raises:
            UnknownName: there is no such node, or it is the last.
            InvalidArgument: what is given is no Gate.
            BadNetwork: one reads what is no earlier node and no input.
        """
        found = self._again()
        found.hang_gates(gates)
        return found

    def hang_exit(self, node: str, exit: Exit) -> None:
        """Like `with_exit`, in place: for recipes, which prepare the network that they were given.

        What was opened, recorded or calibrated before is then about another network.
        """
        self.topology.exit_index(node)  # raises UnknownName
        if not isinstance(exit, Exit):
            raise InvalidArgument(
                f"what stands at {node!r} must be an Exit, got a {type(exit).__name__}"
            )
        nodes = (
            replace(each, exit_reads=exit.reads) if each.name == node else each
            for each in self.topology.nodes
        )
        # refuses what cannot be read, before anything is hung
        self.topology = replace(self.topology, nodes=tuple(nodes))
        self.exits.hang(node, exit if self.training else exit.eval())
        compiled_of(self).forget()

    def hang_gates(self, gates: Mapping[str, Gate]) -> None:
        """Like `with_gates`, in place: all of them are hung, or none."""
        for node, gate in gates.items():
            if node not in self.topology.gates:
                raise unknown(node, self.topology.gates, "gate of this network")
            if not isinstance(gate, Gate):
                raise InvalidArgument(
                    f"what scores at {node!r} must be a Gate, got a {type(gate).__name__}"
                )
        reads = {
            node.name: gates[node.name].reads if node.name in gates else node.gate_reads
            for node in self.topology.nodes
        }
        self.topology = replace(
            self.topology,
            nodes=tuple(replace(node, gate_reads=reads[node.name]) for node in self.topology.nodes),
        )
        for node, gate in gates.items():
            self.gates.hang(node, gate if self.training else gate.eval())
        compiled_of(self).forget()

    def _again(self) -> Network:
        """The same modules as another network, which says the same of itself."""
        found = Network(
            backbone=self.backbone,
            members=self.members,
            topology=self.topology,
            fronts=self.fronts,
            exits=self.exits,
            gates=self.gates,
            made=self.made,
        )
        found.trained_on = self.trained_on
        found.class_names = self.class_names
        return found

    def __str__(self) -> str:
        """The nodes in order, with exit, gate and cost; a network with forks as a tree."""
        if not self.topology.is_chain:
            return f"{self._size()}\n{tree(self.topology, self._told)}"
        rows = trial_rows(self) if self.backbone.training is False else {}
        return "\n".join([self._size(), *chain_table(self, rows)])

    def _size(self) -> str:
        """Segments, gates, exits and paths by number."""
        segments = len(self.topology.nodes)
        if not self.topology.is_chain:  # an empty arm computes nothing
            models = map(self.model_of, self.members)
            segments = sum(type(model) is not nn.Identity for model in models)
        counts = {
            "segment": segments,
            "gate": len(self.topology.gates),
            "exit": len(self.topology.exits),
        }
        told = [f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts.items()]
        return f"Network of {told[0]}, {told[1]} and {told[2]}"

    def _told(self, node: Node) -> str:
        """What is written behind a node of the tree."""
        if node.name not in self.gates:
            return "answers" if node.has_exit else ""
        gate = described(self.gate_of(node.name))["name"].lower()
        if len(node.successors) == 2 and node.has_exit:
            return f"leaves by {gate}"
        return f"chooses by {gate}"

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Logits [B, C] of every exit, shallow to deep; with forks of every exit on every path to
        it.
        """
        if self.topology.is_chain:
            return tuple(logits for _, logits, _ in self.walk(x))
        found = {label: seen.own for label, seen in self.look(x)}
        return tuple(
            logits for label in self.topology.exit_labels if (logits := found[label]) is not None
        )

    def walk(self, x: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Name, logits [B, C] and score [B] (None at the last) of every node, one after the other,
        for all rows.
        """
        self.topology.require_chain("a walk along all exits")
        for name, seen in self.look(x):
            assert seen.own is not None
            yield (
                name,
                seen.own,
                grade(self.gate_of(name), seen, seen.own) if name in self.gates else None,
            )

    def look(self, x: Any) -> Iterator[tuple[str, Seen]]:
        """Name of every node and what its gate sees there: tapped value, earlier logits, and its
        exit's own, [B, C].

        Models run eagerly, with hooks at their cuts that are gone afterwards: train mode, dropout,
        DDP and the user's own code stay as they are, and gradients reach exits and models. A
        member's nodes come when all of it has run. With forks every exit comes once for each path
        that leads there, under its label.
        """
        inputs = as_inputs(x)
        if not self.topology.is_chain:
            for label, node, seen in every_path(self, inputs):
                if node.has_exit:
                    yield label, seen
            return
        logits = dict[str, Tensor]()
        handed = dict[str, Tensor]()
        for member in self.members:
            for name, features in values_of(
                self.model_of(member), self.preprocess_of(member), member, inputs
            ).items():
                own, handed[name] = answers(
                    self.exit_of(name), Seen(features, handed, inputs=inputs), name
                )
                yield name, Seen(features, logits, own, inputs)
                logits[name] = own

    def training_rows(self) -> SeenRows | None:
        """The rows that trained any part of it, under this network or another one; they promise
        nothing.

        docs/concepts/promises.md says which training cannot be seen.
        """
        return union([self.trained_on, rows_behind(self)])

    def parts(self) -> dict[str, nn.Module]:
        """Models, preprocessing, exits and gates by the beginning of their state-dict keys."""
        parts: dict[str, nn.Module] = {}
        for member in self.members:
            parts["backbone" if member.name == BACKBONE else f"backbone.{member.name}"] = (
                self.model_of(member)
            )
        for kind, modules in (
            ("fronts", self.fronts),
            ("exits", self.exits),
            ("gates", self.gates),
        ):
            for name, module in modules.items():
                parts[f"{kind}.{name}"] = module
        return parts

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "rungs": [asdict(member) for member in self.members],
            "chain": self.topology.to_json(),
            "fronts": {name: described(preprocess) for name, preprocess in self.fronts.items()},
            "exits": {name: described(exit_) for name, exit_ in self.exits.items()},
            "gates": {name: described(gate) for name, gate in self.gates.items()},
        }

    def fingerprint(self) -> str:
        """Sixteen hex digits over weights and configuration of taps, preprocessing, exits and
        gates.
        """
        config = self.config()
        # how a model is built says nothing about what it computes; its cuts name the nodes
        del config["rungs"]
        mark = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            array = value.detach().cpu().contiguous()
            mark.update(f"{key}{array.dtype}{tuple(array.shape)}".encode())
            mark.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        return mark.hexdigest()[:16]

    def precision(self) -> str:
        """The floating-point type of the weights, such as `float32`, and settings of torch that
        change it.
        """
        kinds = {
            str(p.dtype).removeprefix("torch.") for p in self.parameters() if p.is_floating_point()
        }
        told = ambient.told()
        return ("+".join(sorted(kinds)) or "float32") + (f" ({told})" if told else "")

    def device(self) -> torch.device:
        """Where the weights are. Raises BadNetwork when they are spread over several devices."""
        places = {tensor.device for tensor in (*self.parameters(), *self.buffers())} or {
            torch.device("cpu")
        }
        if len(places) > 1:
            raise BadNetwork(
                f"the network lies on {sorted(map(str, places))}, expected one device; call "
                f"net.to(device)"
            )
        return places.pop()

    def require_eval(self) -> None:
        """Raise BadNetwork while any part is in training mode, where answers depend on
        batch-mates.
        """
        require_eval(self, "network", "net.eval()")

    def require_inputs(self, state: State, what: str) -> None:
        """Raise BadData for rows that are not like those that a model was cut with.

        Args:
            state: the inputs of some rows by name, each [B, ...].
            what: what the rows are called.
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
                # the length of a text may be another one
                free = 1 if expected.name in member.length else 0
                floats = value.is_floating_point()
                if shape[free:] != expected.shape[free:] or floats != expected.dtype.startswith(
                    "float"
                ):
                    kind = str(value.dtype).removeprefix("torch.")
                    raise BadData(
                        f"a row of {what} is {kind} {list(shape)}, expected {expected.dtype} "
                        f"{list(expected.shape)}, "
                        "with which the model was cut; give such rows, or cut it again with an "
                        "example of these"
                    )


def require_eval(module: nn.Module, what: str, remedy: str) -> None:
    """Raise BadNetwork while a module, or any within it, is in training mode, and name it."""
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
    """A network, also one that was wrapped by `torch.compile`. Raises InvalidArgument for anything
    else.
    """
    found = unwrapped(thing)[0] if isinstance(thing, nn.Module) else thing
    if not isinstance(found, Network):
        if isinstance(found, str):
            told = f"the text {found!r}: load it first"
        else:
            told = f"a {type(found).__name__}"
        raise InvalidArgument(
            f"the network must be a Network, made by cut, ladder or load; got {told}"
        )
    return found


def plain_network(
    model: nn.Module, member: ModelSpec, preprocess: nn.Module | None = None
) -> Network:
    """A model as a network of one node, cut nowhere: the plain network. `member` says its name and
    inputs.
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
    """Seeded rows like those on which a member (by default the first that was) was cut, where the
    network is now and in the precision that it has now; empty where all models are whole.
    """
    if member is None:
        member = next((each for each in network.members if each.inputs), None)
    else:
        member = member
    if member is None or not member.inputs:
        return {}
    rows = as_inputs(example(member.inputs, count), network.device())
    first = network.preprocess_of(member) or network.model_of(member)
    kinds = {
        value.dtype
        for value in (*first.parameters(), *first.buffers())
        if value.is_floating_point()
    }
    kind = kinds.pop() if len(kinds) == 1 else None
    return {
        name: value.to(kind) if value.is_floating_point() and kind else value
        for name, value in rows.items()
    }


def last_model(network: Network, *, copied: bool = False) -> Network:
    """The last model of a network alone, behind its preprocessing and cut nowhere; with weights of
    its own if `copied`.

    Of a network with forks it is the dearest path as one module.
    """
    member = network.members[-1]
    if not network.topology.is_chain:
        path = ReferencePath(network)
        return plain_network(copy.deepcopy(path) if copied else path, replace(member, name="plain"))
    arguments = network.model_of(member), member, network.preprocess_of(member)
    return plain_network(*(copy.deepcopy(arguments) if copied else arguments))


def described(module: nn.Module) -> dict[str, Any]:
    """The configuration of preprocessing, exit or gate; for a class without `config()` its name and
    its repr.
    """
    config = getattr(module, "config", None)
    if callable(config):
        found: dict[str, Any] = config()
        return found
    kind = type(module)
    return {"name": f"{kind.__module__}:{kind.__qualname__}", "repr": repr(module)}
