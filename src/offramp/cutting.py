"""From trained models to a network: `cut` hangs exits on one, `ladder` stacks several, cheapest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp.chain import Chain, Node
from offramp.errors import BadData, BadInput, BadNetwork, OfframpError
from offramp.factories import make_exit, make_gate
from offramp.find import find
from offramp.inputs import State, as_inputs, copies, given, texts_of
from offramp.network import Network
from offramp.nodes import Exit, Gate, Seen
from offramp.nodes import answer as logits_of
from offramp.placing.asked import require_place, where
from offramp.provenance import all_of
from offramp.rungs import BACKBONE, RESERVED, Rung, digest, outside_torch, values_of
from offramp.segmenting import segments_of
from offramp.signature import Input, is_input

Model = Any  # a module, what `offramp.members` takes for a member, or a pair of such a model and its front
Named = tuple[nn.Module, nn.Module | None, Network | None]
GateLike = str | Gate | Callable[..., Any]
ExitLike = str | Exit | Callable[..., Exit]


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
) -> Network:
    """A network of one trained model, cut after the modules named in `at`, or into `n` parts of about equal MACs.

    at="auto": where exits pay on `probe`, labelled rows, and into at most `n` parts; offramp.placing tells the rule.

    example: a batch as the model (or its front) takes it: a tensor, a tuple, or a mapping to keyword arguments.
    exits: one for all cuts or one per cut: a name on the shelf `exits` (linear, linear_grid, linear_masked, mlp,
    branch, cascade, ...), an Exit, or a function of (shape of one row's features, classes; and, if it has such an
    argument, `reads`: the names of the exits before). Those that are made here must be taught before they are of use:
    `fit`, or any loop over `net(x)`, the logits of every exit. gate: as in `ladder`.
    length: inputs [B, T, ...], such as ("input_ids", "attention_mask"), whose T may be another one in every batch.
    The last node, `backbone`, is the model's own answer. The model is neither copied nor changed; it is exported and
    checked once, which takes seconds. Raises UnknownName (the nearest module is offered), BadNetwork (a cut that cannot
    be compacted; a model that mixes rows, runs a tapped module twice, or cannot be exported), BadInput, BadData.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> cut(model, torch.randn(4, 8), at=["1"]).chain.exits
    ('1', 'backbone')
    """
    require_place(at, n, probe)
    _require_modules(model, front)
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    tried = copies(as_inputs(example, place))
    free = texts_of(tried, length)
    names, seen = where(model, front, tried, at=at, n=n, probe=probe, exits=exits, length=free)
    rung = Rung(BACKBONE, spec, names, tuple(_input(name, value) for name, value in tried.items()), free)
    features = _tried_out(model, front, rung, tried)
    network = _hung(model, front, replace(rung, cuts=tuple(features)[:-1]), features, exits, gate)  # in their order
    network.learned = seen  # by which its exits were placed: they promise nothing
    segments_of(network, tried)
    check_classes(network, example)
    return network


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
    batch; if given, the rungs must agree on its classes. Nothing is changed. Raises BadNetwork, BadInput, UnknownName.

    >>> net = ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
    >>> net.chain.exits
    ('small', 'large')
    """
    named = _named(rungs)
    names, inner = list(named), {name: network for name, (_, _, network) in named.items() if network is not None}
    exits = {name: _exit(answer, names[place - 1] if place else None, place) for place, name in enumerate(names)}
    told = {name: getattr(model, "spec", None) for name, (model, _, _) in named.items() if outside_torch([model])}
    told = {**(specs or {}), **told}  # a member that computes outside of torch knows itself how it is built again
    stacked = [_rung(name, inner.get(name), told.get(name)) for name in names]
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
    stack.learned = all_of(network.learned for network in inner.values())
    if example is not None:
        check_classes(stack, example)
    return stack


def check_classes(network: Network, example: object) -> int:
    """The number of classes on an example batch. Raises BadNetwork when the exits differ."""
    x, modes = given(as_inputs(example, network.device())), {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            every = network.eval()(x)  # in training mode a batch norm would learn from the example
    finally:
        for module, mode in modes.items():
            module.training = mode
    widths = {name: int(logits.shape[1]) for name, logits in zip(network.chain.exits, every, strict=True)}
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"the exits answer with different numbers of classes ({widths}), expected one; check the rungs"
        )
    return next(iter(widths.values()))


def _chain(rungs: Sequence[Rung], exits: Mapping[str, Exit], gates: Mapping[str, Gate]) -> Chain:
    """All nodes in order; within a rung each segment continues from the one before it."""
    names = [node for rung in rungs for node in rung.nodes()]
    after = {node: before for rung in rungs for before, node in pairwise(rung.nodes())}
    return Chain(
        tuple(
            Node(name, successor, after.get(name), exits[name].reads, gates[name].reads if name in gates else ())
            for name, successor in zip(names, [*names[1:], None], strict=True)
        )
    )


def _hung(
    model: nn.Module,
    front: nn.Module | None,
    rung: Rung,
    features: Mapping[str, Any],
    exits: ExitLike | Mapping[str, ExitLike],
    gate: GateLike | Mapping[str, GateLike],
) -> Network:
    """The network of a model that is cut, with its exits, on the device and in the type of what they read."""
    heads: dict[str, Exit] = {BACKBONE: find("exits", "Own")()}
    classes, made = logits_of(heads[BACKBONE], Seen(features[BACKBONE], {}), BACKBONE).shape[1], dict[str, str]()
    asked = _each(exits, rung.cuts, "exits")
    for place, name in enumerate(rung.cuts):
        value, given_exit = features[name], asked[name]
        heads[name] = make_exit(given_exit, tuple(value.shape[1:]), classes, rung.cuts[:place])
        if not isinstance(given_exit, Exit):
            heads[name].to(value.device, value.dtype if value.is_floating_point() else None)
            made |= {name: mark} if (mark := digest(heads[name])) else {}
    scorers = _each(gate, rung.cuts, "gates")
    gates = {name: make_gate(scorers[name], rung.cuts[:place]) for place, name in enumerate(rung.cuts)}
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


def _require_modules(model: nn.Module, front: nn.Module | None) -> None:
    """Raise BadNetwork unless the model is a module in eval mode, and the front one or None."""
    for what, given_for in (("model", model), ("front", front)):
        if not isinstance(given_for, nn.Module) and not (what == "front" and given_for is None):
            raise BadNetwork(f"the {what} is a {type(given_for).__name__}, expected a torch.nn.Module; wrap it in one")
    if any(module.training for module in model.modules()):
        raise BadNetwork("the model is in training mode, expected eval mode; call model.eval() first")


def _tried_out(model: nn.Module, front: nn.Module | None, rung: Rung, tried: State) -> dict[str, Any]:
    """What stands at each node for the example; one row is doubled, as it is for the export. Raises BadData."""
    two = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in tried.items()}
    try:
        with torch.no_grad():
            return values_of(model, front, rung, two)
    except OfframpError:
        raise
    except Exception as problem:  # whatever the user's code raises
        why = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")
        raise BadData(f"the model fails on the example: {why}; give a batch of its shape and type") from problem


def _input(name: str, value: Tensor) -> Input:
    numbers = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy has not
    return Input.of(name, numbers.detach().cpu().numpy())


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
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
            raise BadInput(f"a rung is called {name!r}, expected letters, digits, - and _; name it otherwise")
        if name in RESERVED:
            raise BadInput(f"a rung is called {name!r}, which has a meaning of its own here; name it otherwise")
        if hasattr(nn.ModuleDict, name):
            raise BadInput(f"a rung is called {name!r}, which is a method of every torch module; name it otherwise")
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


def _rung(name: str, network: Network | None, spec: str | None) -> Rung:
    if network is None:
        return Rung(name, spec)
    return replace(network.rungs[0], name=name, spec=spec or network.rungs[0].spec)
