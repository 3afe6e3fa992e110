"""From trained models to a network: `cut` hangs exits on one, `ladder` stacks several, cheapest
first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from offramp._support.find import find
from offramp.building.factories import made_for_features, make_exit, make_gate
from offramp.building.placement.candidates import require_place, where
from offramp.building.placement.measure import Placement
from offramp.building.skipping import skippable
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.ambient import without_autocast
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.dependence import require_read
from offramp.networks.inputs import State, as_inputs, copies, given, remedy, texts_of
from offramp.networks.members import (
    BACKBONE,
    ModelSpec,
    digest,
    outside_torch,
    require_name,
    values_of,
)
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Exit, Gate, Seen
from offramp.networks.nodes import answer as logits_of
from offramp.networks.wrappers import require_plain, unwrapped
from offramp.partition.segmenting import segments_of
from offramp.plans.provenance import union
from offramp.plans.signature import Input, is_input, is_label
from offramp.plans.topology import Node, Topology
from offramp.runtime.code_marks import refuse_hidden

# a module, what `offramp.members` takes for a member, or a pair of such a model and its
# preprocessing
Model = Any
Named = tuple[nn.Module, nn.Module | None, Network | None]
GateLike = str | Gate | Callable[..., Any]
ExitLike = str | Exit | Callable[..., Exit]


@without_autocast()
def cut(
    model: nn.Module,
    example: Any,
    *,
    at: Sequence[str] | str | None = None,
    parts: int | None = None,
    exits: ExitLike | Mapping[str, ExitLike] = "linear_grid",
    gate: GateLike | Mapping[str, GateLike] = "margin",
    preprocess: nn.Module | None = None,
    spec: str | None = None,
    length: Sequence[str] | str = (),
    labelled: object = None,
    logits: int | str | None = None,
    skip: Sequence[str] | str | None = None,
) -> Network:
    """Add exits and gates to one trained model, after the modules named in `at` or in `n` parts.

    The model is neither copied nor changed. It is exported and checked once, which takes seconds.
    New exits know nothing until `fit`, or any loop of yours over `net(x)`, has trained them. The
    last node, `backbone`, is the model's own answer.

    Args:
        model: A classifier: logits [B, C], alone or in a tuple, dict or dataclass. It is taken out
            of torch.compile, DataParallel and AveragedModel.
        example: A batch as the model (or its `preprocess`) takes it: a tensor, a tuple, or a
            mapping to keyword arguments. `label` or `labels` in a mapping is the label and is left
            out.
        at: Names of modules, such as ["layer1", "layer2"]; or "auto", which puts exits where they
            save time on `labelled`.
        n: Into how many parts of about equal MACs, instead of `at`. With at="auto" the largest
            number of parts.
        exits: One for all cuts, or a mapping from cut to exit: a name on the shelf `exits`
            (linear_grid, linear, linear_masked, mlp, branch, cascade, ...), an Exit, or a function
            of (shape of one row's features, classes). A function with an argument `reads` also gets
            the names of the earlier exits.
        gate: One for all exits but the last, or a mapping: a name on the shelf `gates`, a Gate, or
            a function of logits [B, C] that gives scores [B].
        preprocess: A module that prepares the input (cast, resize, normalise), or None.
        spec: The text that names the model, such as "timm:resnet18", so that a saved network can be
            built again.
        length: Inputs [B, T, ...] whose T may differ between batches, such as ("input_ids",
            "attention_mask").
        probe: Labelled rows for at="auto". They count as training rows.
        skip: Instead of `at`, residual units that rows may skip ("layer3.*"): a fork with an empty
            arm before each of them, and no exits. The gate is a "controller" unless another one is
            given.
        logits: Which output of the model is its logits, if it gives several: an index or a key.

    Returns:
        A network with the nodes of `at` and `backbone`.

    Raises:
        UnknownName: No such module, exit or gate; the nearest name is offered.
        BadNetwork: The model mixes rows, cannot be exported, runs a tapped module twice, or carries
            something at a cut that cannot be compacted.
        InvalidArgument: An argument is not what it must be.
        BadData: The example does not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> cut(model, torch.randn(4, 8), at=["1"]).topology.exits
        ('1', 'backbone')
    """
    if skip is not None:
        if at is not None or parts is not None or labelled is not None:
            raise InvalidArgument(
                "skip= makes forks and no exits; give it without at, n and labelled"
            )
        _require_module(model, "model")
        plain, _ = unwrapped(model)
        _require_modules(plain, preprocess)
        chooses = "controller" if gate == "margin" else gate
        if isinstance(chooses, Mapping):
            raise InvalidArgument("skip= takes one gate for all units")
        return skippable(plain, example, skip, gate=chooses, preprocess=preprocess)
    return cut_and_placement(
        model,
        example,
        at=at,
        parts=parts,
        exits=exits,
        gate=gate,
        preprocess=preprocess,
        spec=spec,
        length=length,
        labelled=labelled,
        logits=logits,
    )[0]


@without_autocast()
def cut_and_placement(
    model: nn.Module,
    example: Any,
    *,
    at: Sequence[str] | str | None = None,
    parts: int | None = None,
    exits: ExitLike | Mapping[str, ExitLike] = "linear_grid",
    gate: GateLike | Mapping[str, GateLike] = "margin",
    preprocess: nn.Module | None = None,
    spec: str | None = None,
    length: Sequence[str] | str = (),
    labelled: object = None,
    logits: int | str | None = None,
) -> tuple[Network, Placement | None]:
    """As `cut`, and what was measured where at="auto" chose the exits (None for any other `at`)."""
    require_place(at, parts, labelled)
    _require_module(model, "model")
    model, prefix = unwrapped(model)
    at = _within(at, prefix, model)
    _require_modules(model, preprocess)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    _require_no_label(model, preprocess, example)
    tried = copies(as_inputs(example, device))
    free = texts_of(tried, length)
    names, placement = where(
        model, preprocess, tried, at=at, parts=parts, labelled=labelled, exits=exits, length=free
    )
    output = None if logits is None else f"y/{logits}"
    member = ModelSpec(BACKBONE, spec, names, _inputs(tried), free, output)
    features, layouts = _tried_out(model, preprocess, member, tried)
    member = replace(member, cuts=tuple(features)[:-1])  # in their order
    network = _hung(model, preprocess, member, features, layouts, exits, gate)
    if placement is not None:
        # by those its exits were placed: no promise
        network.trained_on = union([network.trained_on, placement.seen])
    refuse_hidden(network)
    segments_of(network, tried)
    check_classes(network, example)
    require_read(network, tried, "the example")
    return network, placement


@without_autocast()
def ladder(
    members: Sequence[Model] | Mapping[str, Model],
    *,
    gate: GateLike | Mapping[str, GateLike] = "margin",
    temperature: float | None = None,
    answer: str = "own",
    example: object = None,
    sources: Mapping[str, str] | None = None,
) -> Network:
    """Stack whole trained models into a cascade (a *ladder*), cheapest first.

    Each model reads the raw input through its own preprocessing. Nothing is trained and nothing is
    changed.

    Args:
        members: Models or (model, preprocess) pairs; a mapping names them, a sequence numbers them.
            A network made by `cut` may be one of them and keeps its exits and gates, at the nodes
            `<name>/<cut>`. A scikit-learn estimator, the path of an `.onnx` file and a function of
            NumPy arrays are taken too (see `offramp.members`).
        gate: One for all models but the last, or a mapping from name to gate: a name on the shelf
            `gates`, a Gate, or a function of logits [B, C] that gives scores [B].
        temperature: Divides the logits before a gate scores them, for one gate of all models. None
            leaves them.
        answer: "own" gives the logits of the model at which a row stops; "mean" the logarithm of
            the mean probabilities of all models that it visited.
        example: A small batch. If it is given, the models must agree on its classes, and engines
            that compile know its shape.
        specs: The text that names each model, so that a saved network can be built again.

    Returns:
        A network with a node for each model.

    Raises:
        BadNetwork: The models do not fit together.
        InvalidArgument: An argument is not what it must be.
        UnknownName: No such gate.

    Example:
        >>> net = ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
        >>> net.topology.exits
        ('small', 'large')
    """
    named = _named(members)
    for model, preprocess, _ in named.values():
        _require_no_label(model, preprocess, example)
    if temperature is not None:
        if isinstance(gate, Mapping):
            raise InvalidArgument(
                "temperature must be None where gate is a mapping; put gates.Tempered into the "
                "mapping"
            )
        gate = find("gates", "Tempered")(make_gate(gate), temperature)
    names = list(named)
    inner = {name: network for name, (_, _, network) in named.items() if network is not None}
    exits = {
        name: _exit(answer, names[index - 1] if index else None, index)
        for index, name in enumerate(names)
    }
    told = {
        name: getattr(model, "spec", None)
        for name, (model, _, _) in named.items()
        if outside_torch([model])
    }
    told = {
        **(sources or {}),
        **told,
    }  # a member that computes outside of torch knows itself how it is built again
    known = () if example is None else _inputs(as_inputs(example))
    stacked = [_member(name, inner.get(name), told.get(name), known) for name in names]
    nodes = [node for member in stacked for node in member.nodes()]
    asked = _each(gate, names[:-1], "gates")
    gates = {name: make_gate(one, nodes[: nodes.index(name)]) for name, one in asked.items()}
    hung = [
        (member.node(cut), inner[member.name], cut) for member in stacked for cut in member.cuts
    ]  # when a member was cut
    for node, network, cut in hung:
        exits[node], gates[node] = network.exit_of(cut), network.gate_of(cut)
    stack = Network(
        backbone=nn.ModuleDict({name: model for name, (model, _, _) in named.items()}),
        members=tuple(stacked),
        topology=_chain(stacked, exits, gates),
        fronts={
            name: preprocess for name, (_, preprocess, _) in named.items() if preprocess is not None
        },
        exits=exits,
        gates=gates,
        made={node: network.made[cut] for node, network, cut in hung if cut in network.made},
    )
    stack.trained_on = union(
        [stack.trained_on, *(network.trained_on for network in inner.values())]
    )
    stack.class_names = _class_names(inner)
    refuse_hidden(stack)
    if example is not None:
        check_classes(stack, example)
    return stack


def _class_names(networks: Mapping[str, Network]) -> tuple[str, ...] | None:
    """The class names that the members were trained with. Raises BadNetwork where they differ."""
    known = {
        name: network.class_names
        for name, network in networks.items()
        if network.class_names is not None
    }
    if len(set(known.values())) > 1:
        raise BadNetwork(
            f"the members {', '.join(known)} were trained with different class names; expected "
            f"one numbering: "
            "train them on rows of one data set"
        )
    return next(iter(known.values()), None)


def check_classes(network: Network, example: object) -> int:
    """The number of classes on an example batch. Raises BadNetwork when the exits differ."""
    inputs = as_inputs(example, network.device())
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            # in training mode a batch norm would learn from the example
            every = network.eval()(given(inputs))
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"a model fails on the example: {why}; {way}") from problem
    finally:
        for module, mode in modes.items():
            module.training = mode
    widths = {
        name: int(logits.shape[1])
        for name, logits in zip(network.topology.exits, every, strict=True)
    }
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"the exits answer with different numbers of classes ({widths}), expected one; check "
            f"the members"
        )
    return next(iter(widths.values()))


def _chain(
    members: Sequence[ModelSpec], exits: Mapping[str, Exit], gates: Mapping[str, Gate]
) -> Topology:
    """All nodes in order; within a member each segment continues from the one before it."""
    names = [node for member in members for node in member.nodes()]
    after = {node: (before,) for member in members for before, node in pairwise(member.nodes())}
    nodes = list[Node]()
    for name in names:
        gate_reads = gates[name].reads if name in gates else ()
        nodes.append(
            Node(
                name, after=after.get(name, ()), exit_reads=exits[name].reads, gate_reads=gate_reads
            )
        )
    return Topology.chain(nodes)


def _hung(
    model: nn.Module,
    preprocess: nn.Module | None,
    member: ModelSpec,
    features: Mapping[str, Any],
    layouts: Mapping[str, str | None],
    exits: ExitLike | Mapping[str, ExitLike],
    gate: GateLike | Mapping[str, GateLike],
) -> Network:
    """The network of a model that is cut, with its exits, on the device and in the type of what
    they read.
    """
    heads: dict[str, Exit] = {BACKBONE: find("exits", "Own")()}
    classes = logits_of(heads[BACKBONE], Seen(features[BACKBONE], {}), BACKBONE).shape[1]
    made = dict[str, str]()
    asked = _each(exits, member.cuts, "exits")
    for index, name in enumerate(member.cuts):
        value = features[name]
        given_exit = asked[name]
        shape = tuple(value.shape[1:])
        heads[name] = make_exit(given_exit, shape, classes, member.cuts[:index], layouts.get(name))
        if not isinstance(given_exit, Exit):
            heads[name].to(value.device, value.dtype if value.is_floating_point() else None)
            made |= {name: mark} if (mark := digest(heads[name])) else {}
    scorers = _each(gate, member.cuts, "gates")
    gates = dict[str, Gate]()
    for index, name in enumerate(member.cuts):
        shape = tuple(features[name].shape[1:])
        gates[name] = make_gate(scorers[name], member.cuts[:index], shape)
        if made_for_features(scorers[name]):
            gates[name].to(features[name].device)
    _require_inputs(member, heads)
    _require_inputs(member, gates)
    return Network(
        backbone=model,
        members=(member,),
        topology=_chain([member], heads, gates),
        fronts={} if preprocess is None else {BACKBONE: preprocess},
        exits=heads,
        gates=gates,
        made=made,
    )


def _require_inputs(member: ModelSpec, parts: Mapping[str, Exit] | Mapping[str, Gate]) -> None:
    """Raise InvalidArgument for an exit or a gate that reads an input which the model does not
    have.
    """
    known = [one.name for one in member.inputs]
    for node, part in parts.items():
        if missing := [name for name in part.reads if is_input(name) and name not in known]:
            raise InvalidArgument(
                f"{node!r} reads the input {missing[0]!r}, expected one of {known}; name one of "
                f"these"
            )


def _require_module(model: object, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise BadNetwork(
            f"the {what} is a {type(model).__name__}, expected a torch.nn.Module; wrap it in one"
        )


def _within(
    at: Sequence[str] | str | None, prefix: str, model: nn.Module
) -> Sequence[str] | str | None:
    """Names of modules as they are called inside of a wrapper."""
    if at is None or isinstance(at, str) or not prefix:
        return at
    known = dict(model.named_modules())
    return [name if name in known else name.removeprefix(prefix) for name in at]


def _require_modules(model: nn.Module, preprocess: nn.Module | None) -> None:
    """Raise BadNetwork unless the model is a module in eval mode, and the preprocessing one or
    None.
    """
    if preprocess is not None:
        _require_module(preprocess, "preprocess")
    require_plain(model, "model")
    require_eval(model, "model", "model.eval()")


def _require_no_label(model: nn.Module, preprocess: nn.Module | None, example: object) -> None:
    """Raise InvalidArgument for a model that cannot do without an input that is taken as the
    label.
    """
    if not isinstance(example, Mapping) or not any(map(is_label, example)):
        return
    needed = inspect.signature(
        (model if preprocess is None else preprocess).forward
    ).parameters.values()
    for one in needed:
        if is_label(one.name) and one.default is one.empty:
            raise InvalidArgument(
                f"the model needs an input called {one.name!r}, a name that is always taken as "
                f"the label of a row. "
                "Wrap the model in a module that calls it otherwise."
            )


def _tried_out(
    model: nn.Module, preprocess: nn.Module | None, member: ModelSpec, tried: State
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The values at each node for the example, and their layouts. One row is doubled, as for the
    export.

    Raises BadData where the model fails on the example.
    """
    two = {
        name: torch.cat([value, value]) if len(value) == 1 else value
        for name, value in tried.items()
    }
    try:
        with torch.no_grad(), ChannelTracker() as tracker:
            values = values_of(model, preprocess, member, two)
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        way = remedy(tried, problem, "give a batch of its shape and type")
        raise BadData(f"the model fails on the example: {why}; {way}") from problem
    return values, layouts_of(values, tracker, free=bool(member.length))


def _inputs(state: State) -> tuple[Input, ...]:
    """What a batch looks like."""
    found = []
    for name, value in state.items():
        numbers = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy has not
        found.append(Input.of(name, numbers.detach().cpu().numpy()).settled())
    return tuple(found)


def _each(given_for: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """One for all names, or a mapping with one per name."""
    if not isinstance(given_for, Mapping):
        return dict.fromkeys(names, given_for)
    if set(given_for) != set(names):
        raise InvalidArgument(
            f"{what} are given for {list(given_for)}, expected one for each of {list(names)} and "
            f"none for the last"
        )
    return dict(given_for)


def _exit(answer: str, before: str | None, visited: int) -> Exit:
    if answer not in ("own", "mean"):
        raise InvalidArgument(f"answer is {answer!r}, expected 'own' or 'mean'")
    kind = find("exits", "Own" if answer == "own" else "Mean")
    made: Exit = kind() if answer == "own" else kind(before, visited)
    return made


def _named(members: Sequence[Model] | Mapping[str, Model]) -> dict[str, Named]:
    """Model, preprocess, and the network as which it was cut (if it was), by name."""
    if isinstance(members, Mapping):
        pairs = list(members.items())
    else:
        pairs = [(f"member{i}", member) for i, member in enumerate(members, 1)]
    named: dict[str, Named] = {}
    for name, member in pairs:
        model, preprocess = member if isinstance(member, tuple) else (member, None)
        if not isinstance(model, nn.Module):
            model = find("members", "wrapped")(model)
        if not isinstance(model, nn.Module) or not (
            preprocess is None or isinstance(preprocess, nn.Module)
        ):
            raise BadNetwork(
                f"member {name!r} is {member!r}, expected a torch.nn.Module or (module, preprocess)"
            )
        require_name(name)
        model, _ = unwrapped(model)
        require_plain(model, f"member {name!r}")
        if isinstance(model, Network):
            _check_member(name, model, preprocess)
            named[name] = (model.backbone, model.preprocess_of(model.members[0]), model)
        else:
            named[name] = (model, preprocess, None)
    if len(named) < 2:
        raise BadNetwork(
            f"the ladder has {len(named)} member, expected at least two; give models cheapest first"
        )
    return named


def _check_member(name: str, network: Network, preprocess: nn.Module | None) -> None:
    """Raise BadNetwork for a network that cannot be a member."""
    if [member.name for member in network.members] != [BACKBONE]:
        raise BadNetwork(
            f"member {name!r} is a ladder itself, expected a model or a network made by cut; give "
            f"its members"
        )
    if preprocess is not None:
        raise BadNetwork(
            f"member {name!r} is a network with preprocessing, expected the network alone; "
            f"cut(..., preprocess=...)"
        )
    reads = {node.name: (*node.exit_reads, *node.gate_reads) for node in network.topology.nodes}
    if reading := [node for node, names in reads.items() if not all(map(is_input, names))]:
        raise BadNetwork(
            f"{reading[0]!r} in member {name!r} reads exits by names that a ladder changes; cut "
            f"it anew"
        )


def _member(
    name: str, network: Network | None, spec: str | None, known: tuple[Input, ...]
) -> ModelSpec:
    """known: the inputs of a whole model, where an example was given."""
    if network is None:
        return ModelSpec(name, spec, inputs=known)
    return replace(network.members[0], name=name, spec=spec or network.members[0].spec)
