"""From trained models to a network: `ladder` stacks whole models, cheapest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from offramp.chain import Chain, Node
from offramp.errors import BadInput, BadNetwork
from offramp.factories import make_gate
from offramp.find import find
from offramp.inputs import as_inputs, given
from offramp.network import Exit, Gate, Network, Rung
from offramp.signature import INPUT
from offramp.trace import BACKBONE

RESERVED = (INPUT, BACKBONE, "last")  # the raw input, and what `against` may name

Model = nn.Module | tuple[nn.Module, nn.Module | None]
GateLike = str | Gate | Callable[[Tensor], Tensor]


def ladder(
    rungs: Sequence[Model] | Mapping[str, Model],
    *,
    gate: GateLike | Mapping[str, GateLike] = "margin",
    answer: str = "own",
    example: object = None,
    specs: Mapping[str, str] | None = None,
) -> Network:
    """A network of whole trained models, cheapest first, each reading the raw input through its own front.

    rungs: models or (model, front) pairs; a mapping names them, else they are rung1, rung2, ...
    gate: one for all rungs but the last, or one per rung name; a name, a Gate, or a function of logits [B, C].
    answer: "own" (the rung's logits) or "mean" (log of the mean probabilities of the rungs visited).
    example: a small input batch; when given, the rungs are tried on it and must agree on the classes.
    Nothing is copied, trained or changed. Raises BadNetwork, BadInput, UnknownName.

    >>> net = ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
    >>> net.chain.exits
    ('small', 'large')
    """
    named = _named(rungs)
    if answer not in ("own", "mean"):
        raise BadInput(f"answer is {answer!r}, expected 'own' or 'mean'")
    names = list(named)
    exits = {name: _exit(answer, names[place - 1] if place else None, place) for place, name in enumerate(names)}
    gates = _gates(gate, names[:-1])
    nodes = tuple(
        Node(name, after, None, exits[name].reads, gates[name].reads if name in gates else ())
        for name, after in zip(names, [*names[1:], None], strict=True)
    )
    network = Network(
        backbone=nn.ModuleDict({name: model for name, (model, _) in named.items()}),
        rungs=tuple(Rung(name, (specs or {}).get(name)) for name in names),
        chain=Chain(nodes),
        fronts=nn.ModuleDict({name: front for name, (_, front) in named.items() if front is not None}),
        exits=nn.ModuleDict(exits),
        gates=nn.ModuleDict(gates),
    )
    if example is not None:
        check_classes(network, example)
    return network


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


def _gates(gate: GateLike | Mapping[str, GateLike], names: list[str]) -> dict[str, Gate]:
    if not isinstance(gate, Mapping):
        return {name: make_gate(gate) for name in names}
    if set(gate) != set(names):
        raise BadInput(f"gates are given for {list(gate)}, expected one for each of {names} and none for the last")
    return {name: make_gate(gate[name]) for name in names}


def _exit(answer: str, before: str | None, visited: int) -> Exit:
    kind = find("exits", "Own" if answer == "own" else "Mean")
    made: Exit = kind() if answer == "own" else kind(before, visited)
    return made


def _named(rungs: Sequence[Model] | Mapping[str, Model]) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    pairs = rungs.items() if isinstance(rungs, Mapping) else ((f"rung{i}", rung) for i, rung in enumerate(rungs, 1))
    named: dict[str, tuple[nn.Module, nn.Module | None]] = {}
    for name, rung in pairs:
        model, front = rung if isinstance(rung, tuple) else (rung, None)
        if not isinstance(model, nn.Module) or not (front is None or isinstance(front, nn.Module)):
            raise BadNetwork(f"rung {name!r} is {rung!r}, expected a torch.nn.Module or (module, front)")
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
            raise BadInput(f"a rung is called {name!r}, expected letters, digits, - and _; name it otherwise")
        if name in RESERVED:
            raise BadInput(f"a rung is called {name!r}, which has a meaning of its own here; name it otherwise")
        if hasattr(nn.ModuleDict, name):
            raise BadInput(f"a rung is called {name!r}, which is a method of every torch module; name it otherwise")
        named[name] = (model, front)
    if len(named) < 2:
        raise BadNetwork(f"the ladder has {len(named)} rung, expected at least two; give models cheapest first")
    return named
