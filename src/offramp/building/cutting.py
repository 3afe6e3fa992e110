"""From trained models to a network: `cut` hangs exits on one, `ladder` stacks several, cheapest first."""

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
from offramp.building.placement.asked import require_place, where
from offramp.building.skipping import skippable
from offramp.errors import BadData, BadInput, BadNetwork, OfframpError
from offramp.networks.ambient import without_autocast
from offramp.networks.channels import ChannelTracker, layouts_of
from offramp.networks.dependence import require_read
from offramp.networks.inputs import State, as_inputs, copies, given, remedy, texts_of
from offramp.networks.members import BACKBONE, Rung, digest, outside_torch, require_name, values_of
from offramp.networks.network import Network, require_eval
from offramp.networks.nodes import Exit, Gate, Seen
from offramp.networks.nodes import answer as logits_of
from offramp.networks.wrappers import require_plain, unwrapped
from offramp.partition.segmenting import segments_of
from offramp.plans.provenance import union
from offramp.plans.signature import Input, is_input, is_label
from offramp.plans.topology import Node, Topology

Model = Any  # a module, what `offramp.members` takes for a member, or a pair of such a model and its front
Named = tuple[nn.Module, nn.Module | None, Network | None]
GateLike = str | Gate | Callable[..., Any]
ExitLike = str | Exit | Callable[..., Exit]


@without_autocast()
def cut(
    model: nn.Module,
    example: Any,
    *,
    at: Sequence[str] | str | None = None,
    n: int | None = None,
    exits: ExitLike | Mapping[str, ExitLike] = "linear_grid",
    gate: GateLike | Mapping[str, GateLike] = "margin",
    front: nn.Module | None = None,
    spec: str | None = None,
    length: Sequence[str] | str = (),
    probe: object = None,
    skip: Sequence[str] | str | None = None,
) -> Network:
    """A network of one trained model, cut after the modules named in `at`, or into `n` parts of about equal MACs.

    at="auto": where exits pay on `probe`, labelled rows, and into at most `n` parts (see `offramp.building.placement`).

    example: a batch as the model (or its front) takes it: a tensor, a tuple, or a mapping to keyword arguments. What a
    mapping holds as `label` or `labels` is the label and left out; an input that the model does not read is refused.
    exits: one for all cuts or one per cut: a name on the shelf `exits` (linear, linear_grid, linear_masked, mlp,
    branch, cascade, ...), an Exit, or a function of (shape of one row's features, classes; and, if it has such an
    argument, `reads`: the names of the exits before). Those that are made here must be taught before they are of use:
    `fit`, or any loop over `net(x)`, the logits of every exit. gate: as in `ladder`.
    length: inputs [B, T, ...], such as ("input_ids", "attention_mask"), whose T may be another one in every batch.
    A model inside of torch.compile, DataParallel or AveragedModel is taken out of it, and its modules have the names
    that they have there. The last node, `backbone`, is the model's own answer. The model is neither copied nor changed;
    it is exported and checked once, which takes seconds.
    skip: instead of `at`, residual units that rows may skip ("layer3.*"): a fork with an empty arm before each, whose
    gate is a "controller" unless another is given, and no exits. See `offramp.building.skipping`.
    Raises UnknownName (the nearest module is offered), BadNetwork (a cut that cannot be compacted; a model that mixes
    rows, runs a tapped module twice, or cannot be exported), BadInput, BadData.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> cut(model, torch.randn(4, 8), at=["1"]).chain.exits
    ('1', 'backbone')
    """
    if skip is not None:
        if at is not None or n is not None or probe is not None:
            raise BadInput("skip= makes forks and no exits; give it without at, n and probe")
        _require_module(model, "model")
        plain, _ = unwrapped(model)
        _require_modules(plain, front)
        chooses = "controller" if gate == "margin" else gate
        if isinstance(chooses, Mapping):
            raise BadInput("skip= takes one gate for all units")
        return skippable(plain, example, skip, gate=chooses, preprocess=front)
    require_place(at, n, probe)
    _require_module(model, "model")
    model, prefix = unwrapped(model)
    at = _within(at, prefix, model)
    _require_modules(model, front)
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    _require_no_label(model, front, example)
    tried = copies(as_inputs(example, place))
    free = texts_of(tried, length)
    names, seen = where(model, front, tried, at=at, n=n, probe=probe, exits=exits, length=free)
    rung = Rung(BACKBONE, spec, names, _inputs(tried), free)
    features, layouts = _tried_out(model, front, rung, tried)
    rung = replace(rung, cuts=tuple(features)[:-1])  # in their order
    network = _hung(model, front, rung, features, layouts, exits, gate)
    network.learned = union([network.learned, seen])  # by those its exits were placed: they promise nothing
    segments_of(network, tried)
    check_classes(network, example)
    require_read(network, tried, "the example")
    return network


@without_autocast()
def ladder(
    rungs: Sequence[Model] | Mapping[str, Model],
    *,
    gate: GateLike | Mapping[str, GateLike] = "margin",
    answer: str = "own",
    example: object = None,
    specs: Mapping[str, str] | None = None,
) -> Network:
    """A network of whole trained models, cheapest first, each reading the raw input through its own front.

    rungs: models or (model, front) pairs; a mapping names them, else they are rung1, rung2, ... A network made by `cut`
    may be a rung: it keeps its exits and gates, at the nodes `<rung>/<cut>`. So may a scikit-learn estimator, the path
    of an `.onnx` file and a function of NumPy arrays (offramp.members has these, and models behind HTTP).
    gate: one for all rungs but the last, or one per rung name; a name, a Gate, a function of logits [B, C], or one of
    `reads`, the names of the exits before.
    answer: "own" (the rung's logits) or "mean" (log of the mean probabilities of the rungs visited). example: a small
    batch; if given, the rungs must agree on its classes, and engines that compile know its shape. A model inside of
    torch.compile, DataParallel or AveragedModel is taken out of it. Nothing is changed. Raises BadNetwork, BadInput,
    UnknownName.

    >>> net = ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
    >>> net.chain.exits
    ('small', 'large')
    """
    named = _named(rungs)
    for model, front, _ in named.values():
        _require_no_label(model, front, example)
    names, inner = list(named), {name: network for name, (_, _, network) in named.items() if network is not None}
    exits = {name: _exit(answer, names[place - 1] if place else None, place) for place, name in enumerate(names)}
    told = {name: getattr(model, "spec", None) for name, (model, _, _) in named.items() if outside_torch([model])}
    told = {**(specs or {}), **told}  # a member that computes outside of torch knows itself how it is built again
    known = () if example is None else _inputs(as_inputs(example))
    stacked = [_rung(name, inner.get(name), told.get(name), known) for name in names]
    nodes = [node for rung in stacked for node in rung.nodes()]
    asked = _each(gate, names[:-1], "gates")
    gates = {name: make_gate(one, nodes[: nodes.index(name)]) for name, one in asked.items()}
    hung = [(rung.node(cut), inner[rung.name], cut) for rung in stacked for cut in rung.cuts]  # when a rung was cut
    for node, network, cut in hung:
        exits[node], gates[node] = network.exit_of(cut), network.gate_of(cut)
    stack = Network(
        backbone=nn.ModuleDict({name: model for name, (model, _, _) in named.items()}),
        rungs=tuple(stacked),
        chain=_chain(stacked, exits, gates),
        fronts={name: front for name, (_, front, _) in named.items() if front is not None},
        exits=exits,
        gates=gates,
        made={node: network.made[cut] for node, network, cut in hung if cut in network.made},
    )
    stack.learned = union([stack.learned, *(network.learned for network in inner.values())])
    stack.class_names = _class_names(inner)
    if example is not None:
        check_classes(stack, example)
    return stack


def _class_names(networks: Mapping[str, Network]) -> tuple[str, ...] | None:
    """The class names that the rungs were taught with. Raises BadNetwork where they differ."""
    known = {name: network.class_names for name, network in networks.items() if network.class_names is not None}
    if len(set(known.values())) > 1:
        raise BadNetwork(
            f"the rungs {', '.join(known)} were taught with different class names; expected one numbering of classes: "
            "teach them on rows of one data set"
        )
    return next(iter(known.values()), None)


def check_classes(network: Network, example: object) -> int:
    """The number of classes on an example batch. Raises BadNetwork when the exits differ."""
    inputs = as_inputs(example, network.device())
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            every = network.eval()(given(inputs))  # in training mode a batch norm would learn from the example
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        way = remedy(inputs, problem, "give a batch of its shape and type")
        raise BadData(f"a model fails on the example: {why}; {way}") from problem
    finally:
        for module, mode in modes.items():
            module.training = mode
    widths = {name: int(logits.shape[1]) for name, logits in zip(network.chain.exits, every, strict=True)}
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"the exits answer with different numbers of classes ({widths}), expected one; check the rungs"
        )
    return next(iter(widths.values()))


def _chain(rungs: Sequence[Rung], exits: Mapping[str, Exit], gates: Mapping[str, Gate]) -> Topology:
    """All nodes in order; within a rung each segment continues from the one before it."""
    names = [node for rung in rungs for node in rung.nodes()]
    after = {node: (before,) for rung in rungs for before, node in pairwise(rung.nodes())}
    nodes = list[Node]()
    for name in names:
        gate_reads = gates[name].reads if name in gates else ()
        nodes.append(Node(name, after=after.get(name, ()), exit_reads=exits[name].reads, gate_reads=gate_reads))
    return Topology.chain(nodes)


def _hung(
    model: nn.Module,
    front: nn.Module | None,
    rung: Rung,
    features: Mapping[str, Any],
    layouts: Mapping[str, str | None],
    exits: ExitLike | Mapping[str, ExitLike],
    gate: GateLike | Mapping[str, GateLike],
) -> Network:
    """The network of a model that is cut, with its exits, on the device and in the type of what they read."""
    heads: dict[str, Exit] = {BACKBONE: find("exits", "Own")()}
    classes, made = logits_of(heads[BACKBONE], Seen(features[BACKBONE], {}), BACKBONE).shape[1], dict[str, str]()
    asked = _each(exits, rung.cuts, "exits")
    for place, name in enumerate(rung.cuts):
        value, given_exit = features[name], asked[name]
        shape = tuple(value.shape[1:])
        heads[name] = make_exit(given_exit, shape, classes, rung.cuts[:place], layouts.get(name))
        if not isinstance(given_exit, Exit):
            heads[name].to(value.device, value.dtype if value.is_floating_point() else None)
            made |= {name: mark} if (mark := digest(heads[name])) else {}
    scorers = _each(gate, rung.cuts, "gates")
    gates = dict[str, Gate]()
    for place, name in enumerate(rung.cuts):
        shape = tuple(features[name].shape[1:])
        gates[name] = make_gate(scorers[name], rung.cuts[:place], shape)
        if made_for_features(scorers[name]):
            gates[name].to(features[name].device)
    _require_inputs(rung, heads)
    _require_inputs(rung, gates)
    return Network(
        backbone=model,
        rungs=(rung,),
        chain=_chain([rung], heads, gates),
        fronts={} if front is None else {BACKBONE: front},
        exits=heads,
        gates=gates,
        made=made,
    )


def _require_inputs(rung: Rung, parts: Mapping[str, Exit] | Mapping[str, Gate]) -> None:
    """Raise BadInput for an exit or a gate that reads an input which the model does not have."""
    known = [one.name for one in rung.inputs]
    for node, part in parts.items():
        if missing := [name for name in part.reads if is_input(name) and name not in known]:
            raise BadInput(f"{node!r} reads the input {missing[0]!r}, expected one of {known}; name one of these")


def _require_module(model: object, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise BadNetwork(f"the {what} is a {type(model).__name__}, expected a torch.nn.Module; wrap it in one")


def _within(at: Sequence[str] | str | None, prefix: str, model: nn.Module) -> Sequence[str] | str | None:
    """Names of modules as they are called inside of a wrapper."""
    if at is None or isinstance(at, str) or not prefix:
        return at
    known = dict(model.named_modules())
    return [name if name in known else name.removeprefix(prefix) for name in at]


def _require_modules(model: nn.Module, front: nn.Module | None) -> None:
    """Raise BadNetwork unless the model is a module in eval mode, and the front one or None."""
    if front is not None:
        _require_module(front, "front")
    require_plain(model, "model")
    require_eval(model, "model", "model.eval()")


def _require_no_label(model: nn.Module, front: nn.Module | None, example: object) -> None:
    """Raise BadInput for a model that cannot do without an input that is taken as the label."""
    if not isinstance(example, Mapping) or not any(map(is_label, example)):
        return
    needed = inspect.signature((model if front is None else front).forward).parameters.values()
    for one in needed:
        if is_label(one.name) and one.default is one.empty:
            raise BadInput(
                f"the model needs an input called {one.name!r}, a name that is always taken as the label of a row. "
                "Wrap the model in a module that calls it otherwise."
            )


def _tried_out(
    model: nn.Module, front: nn.Module | None, rung: Rung, tried: State
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The values at each node for the example, and their layouts. One row is doubled, as for the export.

    Raises BadData where the model fails on the example.
    """
    two = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in tried.items()}
    try:
        with torch.no_grad(), ChannelTracker() as tracker:
            values = values_of(model, front, rung, two)
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        way = remedy(tried, problem, "give a batch of its shape and type")
        raise BadData(f"the model fails on the example: {why}; {way}") from problem
    return values, layouts_of(values, tracker, free=bool(rung.length))


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
        raise BadInput(
            f"{what} are given for {list(given_for)}, expected one for each of {list(names)} and none for the last"
        )
    return dict(given_for)


def _exit(answer: str, before: str | None, visited: int) -> Exit:
    if answer not in ("own", "mean"):
        raise BadInput(f"answer is {answer!r}, expected 'own' or 'mean'")
    kind = find("exits", "Own" if answer == "own" else "Mean")
    made: Exit = kind() if answer == "own" else kind(before, visited)
    return made


def _named(rungs: Sequence[Model] | Mapping[str, Model]) -> dict[str, Named]:
    """Model, front, and the network as which it was cut (if it was), by name."""
    pairs = rungs.items() if isinstance(rungs, Mapping) else ((f"rung{i}", rung) for i, rung in enumerate(rungs, 1))
    named: dict[str, Named] = {}
    for name, rung in pairs:
        model, front = rung if isinstance(rung, tuple) else (rung, None)
        if not isinstance(model, nn.Module):
            model = find("members", "wrapped")(model)
        if not isinstance(model, nn.Module) or not (front is None or isinstance(front, nn.Module)):
            raise BadNetwork(f"rung {name!r} is {rung!r}, expected a torch.nn.Module or (module, front)")
        require_name(name)
        model, _ = unwrapped(model)
        require_plain(model, f"rung {name!r}")
        if isinstance(model, Network):
            _check_rung(name, model, front)
            named[name] = (model.backbone, model.front_of(model.rungs[0]), model)
        else:
            named[name] = (model, front, None)
    if len(named) < 2:
        raise BadNetwork(f"the ladder has {len(named)} rung, expected at least two; give models cheapest first")
    return named


def _check_rung(name: str, network: Network, front: nn.Module | None) -> None:
    """Raise BadNetwork for a network that cannot be a rung."""
    if [rung.name for rung in network.rungs] != [BACKBONE]:
        raise BadNetwork(f"rung {name!r} is a ladder itself, expected a model or a network made by cut; give its rungs")
    if front is not None:
        raise BadNetwork(f"rung {name!r} is a network with a front, expected the network alone; cut(..., front=...)")
    reads = {node.name: (*node.exit_reads, *node.gate_reads) for node in network.chain.nodes}
    if reading := [node for node, names in reads.items() if not all(map(is_input, names))]:
        raise BadNetwork(f"{reading[0]!r} in rung {name!r} reads exits by names that a ladder changes; cut it anew")


def _rung(name: str, network: Network | None, spec: str | None, known: tuple[Input, ...]) -> Rung:
    """known: the inputs of a whole model, where an example was given."""
    if network is None:
        return Rung(name, spec, inputs=known)
    return replace(network.rungs[0], name=name, spec=spec or network.rungs[0].spec)
