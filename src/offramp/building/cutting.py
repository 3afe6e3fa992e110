"""Make a network from trained models: `cut` adds exits to one model, `ladder` stacks several models
into a cascade.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import find
from offramp.building.factories import made_for_features, make_exit, make_gate
from offramp.building.placement.candidates import require_place, where
from offramp.building.placement.measure import Placement
from offramp.building.routing import example_inputs, reason_of
from offramp.building.skipping import skippable
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError
from offramp.networks.ambient import without_autocast
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.code_marks import refuse_hidden
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

# A module, an object that `offramp.members` can wrap, or a pair (model, preprocess).
Model = Any
# A member's model, its preprocessing, and its network if it was cut before.
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
    """Add exits and gates to one trained model, after the modules named in `at` or between `parts`
    parts.

    The model is neither copied nor changed. It is exported and checked once, which takes seconds.
    New exits are untrained: train them with `fit`, or with any loop of yours over `net(x)`. The
    last node, `backbone`, is the model's own answer.

    Args:
        model: A classifier: logits [B, C], alone or in a tuple, dict or dataclass. It is taken out
            of torch.compile, DataParallel and AveragedModel.
        example: A batch as the model (or its `preprocess`) takes it: a tensor, a tuple, or a
            mapping to keyword arguments. `label` or `labels` in a mapping is the label and is left
            out.
        at: Names of modules, such as ["layer1", "layer2"]; or "auto", which puts exits where they
            save time on the `labelled` rows.
        parts: Number of parts with about equal MACs, instead of `at`. With at="auto" the largest
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
        labelled: Labelled rows for at="auto". They count as training rows.
        logits: The output of the model that is its logits, if it has several: an index or a key.
        skip: Instead of `at`, residual units that rows may skip ("layer3.*"): a fork with an empty
            arm before each of them, and no exits. The gate is a "controller" by default.

    Returns:
        A network with the nodes of `at` and `backbone`.

    Raises:
        UnknownName: There is no module, exit or gate with this name; the message offers the nearest
            name.
        BadNetwork: The model mixes rows, cannot be exported, runs a module of `at` twice, or needs
            a tensor behind a cut that cannot be compacted.
        InvalidArgument: An argument has a wrong value.
        BadData: The example does not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> cut(model, torch.randn(4, 8), at=["1"]).topology.exits
        ('1', 'backbone')
    """
    if skip is not None:
        for name, value in (("at", at), ("parts", parts), ("labelled", labelled)):
            if value is not None:
                raise InvalidArgument(f"{name} must be None with skip=, which makes no exits")
        _require_module(model, "model")
        plain, _ = unwrapped(model)
        _require_modules(plain, preprocess)
        if isinstance(gate, Mapping):
            raise InvalidArgument("gate must be one gate for all units with skip=, got a mapping")
        if gate == "margin":  # the default of cut, which cannot choose between ways
            gate = "controller"
        return skippable(plain, example, skip, gate=gate, preprocess=preprocess, spec=spec)
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
    """Cut a model as `cut` does, and return the measurements of at="auto" too.

    All arguments are those of `cut`.

    Returns:
        The network, and the measured candidates if at="auto" chose the exits; None otherwise.
    """
    require_place(at, parts, labelled)
    _require_module(model, "model")
    model, prefix = unwrapped(model)
    at = _inside_wrapper(at, prefix, model)
    _require_modules(model, preprocess)
    _require_no_label(model, preprocess, example)

    # 1. Decide where to cut.
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    inputs = copies(as_inputs(example, device))
    free = texts_of(inputs, length)
    names, placement = where(
        model, preprocess, inputs, at=at, parts=parts, labelled=labelled, exits=exits, length=free
    )

    # 2. Run the example once. It gives the shapes for exits and gates, and the order of the cuts.
    output = None if logits is None else f"y/{logits}"
    member = ModelSpec(BACKBONE, spec, names, example_inputs(inputs), free, output)
    features, layouts = _features(model, preprocess, member, inputs)
    member = replace(member, cuts=tuple(features)[:-1])  # the last one is the end of the model
    network = _with_exits(model, preprocess, member, features, layouts, exits, gate)
    if placement is not None:
        # The exits were placed by these rows, so no promise may rest on them.
        network.trained_on = union([network.trained_on, placement.seen])

    # 3. Check that rows can leave at these cuts, and that the exits agree on the classes.
    refuse_hidden(network)
    segments_of(network, inputs)
    check_classes(network, example)
    require_read(network, inputs, "the example")
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
    """Stack trained models into a cascade of models (a *ladder*), cheapest first.

    Each model reads the raw input through its own preprocessing. Nothing is trained or changed.

    Args:
        members: Models or (model, preprocess) pairs; a mapping names them, a sequence numbers them.
            A network made by `cut` may be one of them and keeps its exits and gates, at the nodes
            `<name>/<cut>`. A scikit-learn estimator, the path of an `.onnx` file and a function of
            NumPy arrays work too (see `offramp.members`).
        gate: One for all models but the last, or a mapping from name to gate: a name on the shelf
            `gates`, a Gate, or a function of logits [B, C] that gives scores [B].
        temperature: Divides the logits before a gate scores them; only with one gate for all
            models. None leaves the logits as they are.
        answer: "own" gives the logits of the model at which a row stops; "mean" the logarithm of
            the mean probabilities of all models that it visited.
        example: A small batch. With it, the number of classes of all models is compared, and
            engines that compile know the shape.
        sources: The text that names each model, so that a saved network can be built again.

    Returns:
        A network with a node for each model.

    Raises:
        BadNetwork: The models do not fit together.
        InvalidArgument: An argument has a wrong value.
        UnknownName: There is no gate with this name.

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
                f"temperature must be None if gate is a mapping, got {temperature!r}. Put "
                f"gates.Tempered into the mapping"
            )
        gate = find("gates", "Tempered")(make_gate(gate), temperature)

    # 1. What each member is: its model, its preprocessing, its source, and its network if it was
    # cut before.
    models = dict[str, nn.Module]()
    fronts = dict[str, nn.Module]()
    networks = dict[str, Network]()
    specs: dict[str, str | None] = dict(sources or {})
    for name, (model, preprocess, network) in named.items():
        models[name] = model
        if preprocess is not None:
            fronts[name] = preprocess
        if network is not None:
            networks[name] = network
        if outside_torch([model]):
            # a wrapped model (scikit-learn, ONNX) knows its own source
            specs[name] = getattr(model, "spec", None)
    known: tuple[Input, ...] = ()
    if example is not None:
        known = example_inputs(as_inputs(example))
    members = list[ModelSpec]()
    for name in named:
        members.append(_member(name, networks.get(name), specs.get(name), known))

    # 2. An exit at the end of every model, and a gate at all ends but the last.
    names = list(named)
    nodes = _nodes(members)
    exits = dict[str, Exit]()
    gates = dict[str, Gate]()
    for index, name in enumerate(names):
        before = names[index - 1] if index else None
        exits[name] = _end_exit(answer, before, index)
    for name, wanted in _one_each(gate, names[:-1], "gates").items():
        gates[name] = make_gate(wanted, nodes[: nodes.index(name)])

    # 3. A member that was cut keeps its inner exits and gates.
    made = dict[str, str]()
    for member in members:
        for cut_name in member.cuts:
            node = member.node(cut_name)
            network = networks[member.name]
            exits[node] = network.exit_of(cut_name)
            gates[node] = network.gate_of(cut_name)
            if cut_name in network.made:
                made[node] = network.made[cut_name]

    stack = Network(
        backbone=nn.ModuleDict(models),
        members=tuple(members),
        topology=_chain(members, exits, gates),
        fronts=fronts,
        exits=exits,
        gates=gates,
        made=made,
    )
    training_rows = [network.trained_on for network in networks.values()]
    stack.trained_on = union([stack.trained_on, *training_rows])
    stack.class_names = _class_names(networks)
    refuse_hidden(stack)
    if example is not None:
        check_classes(stack, example)
    return stack


def _class_names(networks: Mapping[str, Network]) -> tuple[str, ...] | None:
    """The class names that the members were trained with. Raises BadNetwork if they differ."""
    known = dict[str, tuple[str, ...]]()
    for name, network in networks.items():
        if network.class_names is not None:
            known[name] = network.class_names
    if len(set(known.values())) > 1:
        raise BadNetwork(
            f"the members {', '.join(known)} were trained with different class names, and must "
            f"have the same ones. Train them on rows of one data set"
        )
    return next(iter(known.values()), None)


def check_classes(network: Network, example: object) -> int:
    """Run a network on an example batch and compare the number of classes of its exits.

    Args:
        network: the network. It runs in eval mode; afterwards its modules are in their own modes
            again.
        example: a batch as the network takes it.

    Returns:
        The number of classes C.

    Raises:
        BadNetwork: The exits differ in the number of classes.
        BadData: A model fails on the example.
    """
    inputs = as_inputs(example, network.device())
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            # in training mode a batch norm would learn from the example
            logits = network.eval()(given(inputs))
    except OfframpError:
        raise
    except Exception as problem:  # the user's code can raise anything
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"a model fails on the example: {reason_of(problem)}; {way}") from problem
    finally:
        for module, mode in modes.items():
            module.training = mode
    classes = dict[str, int]()
    for name, value in zip(network.topology.exits, logits, strict=True):
        classes[name] = int(value.shape[1])
    if len(set(classes.values())) > 1:
        raise BadNetwork(
            f"the exits must have one number of classes, got different numbers of classes "
            f"({classes})"
        )
    return next(iter(classes.values()))


def _nodes(members: Sequence[ModelSpec]) -> list[str]:
    """The names of all nodes, in order."""
    names = list[str]()
    for member in members:
        names += member.nodes()
    return names


def _chain(
    members: Sequence[ModelSpec], exits: Mapping[str, Exit], gates: Mapping[str, Gate]
) -> Topology:
    """All nodes in order. Within a member each segment continues from the one before it; the first
    one reads the input.
    """
    after = dict[str, tuple[str, ...]]()
    for member in members:
        for before, name in pairwise(member.nodes()):
            after[name] = (before,)
    nodes = list[Node]()
    for name in _nodes(members):
        node = Node(name, after=after.get(name, ()), exit_reads=exits[name].reads)
        if name in gates:  # all but the last
            node = replace(node, gate_reads=gates[name].reads)
        nodes.append(node)
    return Topology.chain(nodes)


def _with_exits(
    model: nn.Module,
    preprocess: nn.Module | None,
    member: ModelSpec,
    features: Mapping[str, Any],
    layouts: Mapping[str, str | None],
    exits: ExitLike | Mapping[str, ExitLike],
    gate: GateLike | Mapping[str, GateLike],
) -> Network:
    """The network of a cut model. New exits and gates get the device of the features that they
    read; new exits get their type too.
    """
    network_exits: dict[str, Exit] = {BACKBONE: find("exits", "Own")()}
    own_logits = logits_of(network_exits[BACKBONE], Seen(features[BACKBONE], {}), BACKBONE)
    classes = own_logits.shape[1]
    made = dict[str, str]()  # digests of new exits, to know later whether they were trained
    wanted_exits = _one_each(exits, member.cuts, "exits")
    for index, name in enumerate(member.cuts):
        value = features[name]
        wanted = wanted_exits[name]
        shape = tuple(value.shape[1:])
        exit_ = make_exit(wanted, shape, classes, member.cuts[:index], layouts.get(name))
        network_exits[name] = exit_
        if isinstance(wanted, Exit):  # the user's own object
            continue
        exit_.to(value.device, value.dtype if value.is_floating_point() else None)
        mark = digest(exit_)
        if mark is not None:
            made[name] = mark

    wanted_gates = _one_each(gate, member.cuts, "gates")
    gates = dict[str, Gate]()
    for index, name in enumerate(member.cuts):
        shape = tuple(features[name].shape[1:])
        gates[name] = make_gate(wanted_gates[name], member.cuts[:index], shape)
        if made_for_features(wanted_gates[name]):
            gates[name].to(features[name].device)
    _require_inputs(member, network_exits)
    _require_inputs(member, gates)
    return Network(
        backbone=model,
        members=(member,),
        topology=_chain([member], network_exits, gates),
        fronts={} if preprocess is None else {BACKBONE: preprocess},
        exits=network_exits,
        gates=gates,
        made=made,
    )


def _require_inputs(member: ModelSpec, parts: Mapping[str, Exit] | Mapping[str, Gate]) -> None:
    """Raise InvalidArgument if an exit or a gate reads an input that the model does not have."""
    known = [model_input.name for model_input in member.inputs]
    for node, part in parts.items():
        for name in part.reads:
            if is_input(name) and name not in known:
                raise InvalidArgument(
                    f"{node!r} must read inputs of the model, which are {known}, got {name!r}"
                )


def _require_module(model: object, what: str) -> None:
    """Raise BadNetwork for anything but a module."""
    if not isinstance(model, nn.Module):
        raise BadNetwork(f"the {what} must be a torch.nn.Module, got a {type(model).__name__}")


def _inside_wrapper(
    at: Sequence[str] | str | None, prefix: str, model: nn.Module
) -> Sequence[str] | str | None:
    """The names of modules as the unwrapped model has them: `module.layer1` -> `layer1`."""
    if at is None or isinstance(at, str) or not prefix:
        return at
    known = dict(model.named_modules())
    return [name if name in known else name.removeprefix(prefix) for name in at]


def _require_modules(model: nn.Module, preprocess: nn.Module | None) -> None:
    """Raise BadNetwork unless the model is a plain module in eval mode, and the preprocessing a
    module or None.
    """
    if preprocess is not None:
        _require_module(preprocess, "preprocess")
    require_plain(model, "model")
    require_eval(model, "model", "model.eval()")


def _require_no_label(model: nn.Module, preprocess: nn.Module | None, example: object) -> None:
    """Raise InvalidArgument if a model needs an input whose name is always taken as the label."""
    if not isinstance(example, Mapping) or not any(map(is_label, example)):
        return
    first = model if preprocess is None else preprocess
    for parameter in inspect.signature(first.forward).parameters.values():
        if is_label(parameter.name) and parameter.default is parameter.empty:
            raise InvalidArgument(
                f"the model needs an input called {parameter.name!r}, a name that is always taken "
                f"as the label of a row. Wrap the model in a module that gives it another name."
            )


def _features(
    model: nn.Module, preprocess: nn.Module | None, member: ModelSpec, inputs: State
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The values at each node for the example, in the order in which they run, and their channel
    layouts. Raises BadData if the model fails on the example.
    """
    # A single row is doubled, as for the export: a dimension of 1 could be the batch or not.
    rows = dict[str, Tensor]()
    for name, value in inputs.items():
        rows[name] = value
        if len(value) == 1:
            rows[name] = torch.cat([value, value])  # [1, ...] -> [2, ...]
    try:
        with torch.no_grad(), ChannelTracker() as tracker:
            values = values_of(model, preprocess, member, rows)
    except OfframpError:
        raise
    except Exception as problem:  # the user's code can raise anything
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"the model fails on the example: {reason_of(problem)}; {way}") from problem
    return values, layouts_of(values, tracker, free=bool(member.length))


def _one_each(wanted: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """One object for all names, or a mapping with one for each name."""
    if not isinstance(wanted, Mapping):
        return dict.fromkeys(names, wanted)
    if set(wanted) != set(names):
        raise InvalidArgument(
            f"{what} must have one for each of {list(names)} and none for the last node, got "
            f"{list(wanted)}"
        )
    return dict(wanted)


def _end_exit(answer: str, before: str | None, visited: int) -> Exit:
    """The exit at the end of a member.

    Args:
        answer: "own" or "mean".
        before: the exit at the end of the member before; None for the first one.
        visited: number of members before this one.
    """
    if answer not in ("own", "mean"):
        raise InvalidArgument(f"answer must be 'own' or 'mean', got {answer!r}")
    exit_: Exit
    if answer == "own":
        exit_ = find("exits", "Own")()
    else:
        exit_ = find("exits", "Mean")(before, visited)
    return exit_


def _named(members: Sequence[Model] | Mapping[str, Model]) -> dict[str, Named]:
    """Model, preprocessing and network (if the member was cut before), by name."""
    if isinstance(members, Mapping):
        pairs = list(members.items())
    else:
        pairs = [(f"member{number}", member) for number, member in enumerate(members, 1)]
    named: dict[str, Named] = {}
    for name, member in pairs:
        model = member
        preprocess = None
        if isinstance(member, tuple):
            model, preprocess = member
        if not isinstance(model, nn.Module):  # such as a scikit-learn estimator
            model = find("members", "wrapped")(model)
        is_preprocess = preprocess is None or isinstance(preprocess, nn.Module)
        if not isinstance(model, nn.Module) or not is_preprocess:
            raise BadNetwork(
                f"member {name!r} must be a torch.nn.Module or (module, preprocess), got {member!r}"
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
        raise BadNetwork(f"a ladder must have at least two members, got {len(named)}")
    return named


def _check_member(name: str, network: Network, preprocess: nn.Module | None) -> None:
    """Raise BadNetwork for a network that cannot be a member."""
    if [member.name for member in network.members] != [BACKBONE]:
        kind = "a ladder" if network.topology.is_chain else "a network with forks"
        raise BadNetwork(
            f"member {name!r} must be a model or a network made by cut, got {kind}. Use its "
            f"models as members"
        )
    if preprocess is not None:
        raise BadNetwork(
            f"member {name!r} must not come with preprocessing, because it is a network. Use "
            f"cut(..., preprocess=...)"
        )
    for node in network.topology.nodes:
        if not all(map(is_input, (*node.exit_reads, *node.gate_reads))):
            raise BadNetwork(
                f"{node.name!r} in member {name!r} reads exits by names, which a ladder changes. "
                f"Cut it again without such exits"
            )


def _member(
    name: str, network: Network | None, spec: str | None, known: tuple[Input, ...]
) -> ModelSpec:
    """The member of a ladder. known: the inputs of an uncut model, if there is an example."""
    if network is None:
        return ModelSpec(name, spec, inputs=known)
    return replace(network.members[0], name=name, spec=spec or network.members[0].spec)
