"""The contracts as a test kit, for gates, exits, layers, engines and recipes: of this package and
of other people.

    from offramp.testing import check_gate, example_seen
    check_gate(MyGate(), example_seen())  # an AssertionError says what is wrong

Each check is a small function that can be run alone; `check_gate`, `check_exit`, `check_layer`,
`check_engine` and `check_recipe` run all that there are for their kind. Logits are [B, C], scores
[B].
"""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.fitting.training import fit
from offramp.networks.inputs import State
from offramp.networks.layer import Layer, dense_cost
from offramp.networks.network import LOGITS, SCORE, EngineStage, Network
from offramp.networks.nodes import Exit, Gate, Hands, Seen, answer, grade
from offramp.networks.recipe import Pools, Recipe, pooled_by
from offramp.plans.schedule import full_schedule
from offramp.plans.signature import INPUT, is_input
from offramp.runtime.engine import Engine

TOLERANCE = 1e-5  # kernels depend on the batch size: a score may move in its last bits
ROWS = 16  # of a batch, where recipes are checked

RowFunction = Callable[[Seen], Tensor]  # what is checked: scores or logits, one per row


def example_seen(
    rows: int = 16,
    classes: int = 5,
    reads: Sequence[str] = (),
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> Seen:
    """Something to look at: features, own logits and earlier logits, with ties and a row of large
    logits.

    shape: of one row's features; without it they are logits, as at the end of a model. reads:
    exits, and inputs, which are masks of ragged lengths.
    """
    draw = torch.Generator().manual_seed(seed)

    def logits() -> Tensor:
        some = torch.randn(rows, classes, generator=draw) * 3
        some[0], some[1, 0] = 1.0, 120.0  # all equal, and a probability of 1
        return some

    own = logits()
    features = own if shape is None else torch.randn(rows, *shape, generator=draw)
    masks = {name: _ragged(rows, shape[0] if shape else 1) for name in reads if is_input(name)}
    return Seen(features, {name: logits() for name in reads if name not in masks}, own, masks)


def _ragged(rows: int, length: int) -> Tensor:
    """A mask [rows, length]: row i has its first 1 + i places, in turn."""
    return (torch.arange(length) <= torch.arange(rows)[:, None] % length).long()


def check_gate(
    gate: Gate, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Gate] | None = None
) -> None:
    """All that a gate must do. `rebuild` makes it again from its config; without it that is not
    checked.
    """
    check_reads(gate, seen)
    scores = gate.score(seen)
    check_shape(scores, (len(seen.features),), "scores")
    check_float(scores, "scores")
    assert not scores.isnan().any(), (
        "the gate gave NaN for finite logits; NaN is for rows that must not leave"
    )
    _check_rows(gate, gate.score, seen)
    check_rows_of_nan(lambda some: grade(gate, some, _own(some)), seen)
    if rebuild is not None:
        check_config(gate, gate.score, seen, rebuild)


def check_exit(
    exit_: Exit, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Exit] | None = None
) -> None:
    """All that an exit must do. `rebuild` makes it again from its config; without it that is not
    checked.
    """
    check_reads(exit_, seen)
    seen = replace(seen, own=None)
    logits = answer(exit_, seen, type(exit_).__name__)
    check_shape(logits, (len(seen.features), logits.shape[1]), "logits")
    check_float(logits, "logits")
    assert logits.isfinite().all(), "the exit gave logits that are not finite for finite features"
    if isinstance(exit_, Hands):
        check_close(
            exit_.both(seen)[0], exit_(seen), "the logits that `both` and that `forward` gave"
        )
        _check_rows(exit_, lambda some: exit_.both(some)[1], seen)
    if isinstance(exit_, Pools):
        pooled = replace(seen, features=pooled_by(exit_, seen.features, seen.inputs))
        check_close(exit_(pooled), logits, "logits from features and from what `pool` made of them")
    _check_rows(exit_, exit_, seen)
    check_rows_of_nan(exit_, seen)
    if rebuild is not None:
        check_config(exit_, exit_, seen, rebuild)


def check_engine(engine: Engine, network: Network, x: Tensor) -> None:
    """An engine says what it is, its parts give what the network gives, for any batch, and say
    truly what they read.
    """
    check_said(engine)
    schedule = full_schedule(network.topology)
    parts: Sequence[EngineStage] = engine.open(network, schedule, network.device())
    names = [part.name for part in parts]
    assert names == [*schedule.index], "the engine must give one part per stage, in their order"
    for rows in (x, x[:1], x[torch.arange(len(x) - 1, -1, -2)]):
        state: State = {INPUT: rows}
        with torch.inference_mode():
            for part, (name, logits, score) in zip(parts, network.walk(rows), strict=True):
                missing = set(part.reads) - state.keys()
                assert not missing, f"part {name!r} reads {missing}, which nothing before it gives"
                part.call(state)
                check_close(
                    state[name + LOGITS],
                    logits,
                    f"logits of {name!r}, in the engine and in the network,",
                )
                if score is not None:
                    check_close(
                        state[name + SCORE],
                        score,
                        f"scores of {name!r}, in the engine and in the network,",
                    )


def check_layer(
    kind: type[Layer], dense: nn.Module, shape: Sequence[int], *, same: bool = False, **options: Any
) -> None:
    """All that a layer must do in the place of another one.

    Args:
        kind: the layer's class.
        dense: what it replaces, in eval mode, in float32.
        shape: of one row that goes in, without the batch.
        same: whether it starts by giving what `dense` gives, up to the last bits.
        options: of `from_layer`.
    """
    draw = torch.Generator().manual_seed(0)
    before = copy.deepcopy(dense.state_dict())
    layer = kind.from_layer(dense, **options)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), (
            f"from_layer changed {key!r} of what it replaces; copy it"
        )
    shared = {value.data_ptr() for value in dense.parameters()} & {
        value.data_ptr() for value in layer.parameters()
    }
    assert not shared, "it shares weights with what it replaces: training one would train the other"
    assert not any(part.training for part in layer.modules()), (
        "it must be in the mode of what it replaces, eval mode"
    )
    seen = Seen(torch.randn(ROWS, *shape, generator=draw), {})
    with torch.no_grad():
        want = dense(seen.features)
        got = layer(seen.features)
        check_shape(got, tuple(want.shape), "what the layer gives")
        check_float(got, "what the layer gives")
        if same:
            check_close(got, want, "what the layer and what it replaces give")
        _check_rows(layer, lambda some: layer(some.features), seen)
    _check_options(kind, layer, dense, seen)
    check_cost(layer, shape)


def _check_options(kind: type[Layer], layer: Layer, dense: nn.Module, seen: Seen) -> None:
    """Its options make a layer that takes its weights and then gives the same."""
    again = kind.from_layer(dense, **layer.options())
    try:
        again.load_state_dict(layer.state_dict())
    except RuntimeError as problem:
        why = str(problem).strip().splitlines()[-1].strip()
        raise AssertionError(
            f"a layer that is made from options() {layer.options()} cannot take its weights "
            f"({why}); options() must name what the shapes depend on"
        ) from problem
    with torch.no_grad():
        check_close(
            again(seen.features),
            layer(seen.features),
            "what the layer and one made from its options() give",
        )


def check_cost(layer: Layer, shape: Sequence[int]) -> None:
    """Its cost is a finite number of each kind, the same every time, and no less than what torch
    counts and stores.
    """
    cost = layer.cost(shape)
    counted = dense_cost(layer, shape)
    assert cost == layer.cost(shape), "its cost differs from call to call"
    for name, figure in vars(cost).items():
        assert 0 <= figure < math.inf, f"its {name} is {figure}, expected a number of at least 0"
    assert cost.macs >= counted.macs * (1 - TOLERANCE), (
        f"it says {cost.macs:g} MACs and runs {counted.macs:g}; what could be saved and is "
        f"computed counts"
    )
    stored = sum(value.numel() * value.element_size() for value in layer.state_dict().values())
    assert cost.stored_bytes >= stored, (
        f"it says {cost.stored_bytes} bytes and stores {stored}; zeros count too"
    )


def check_said(engine: Engine) -> None:
    """What an engine says of itself has the types of the contract, and is the same when it is asked
    again.
    """
    assert isinstance(engine, Engine), f"{engine!r} is no offramp.contracts.Engine"
    marks = engine.marks()
    training_rows = engine.trained_on
    texts = isinstance(marks, list) and all(isinstance(mark, str) for mark in marks)
    assert texts, f"marks() gave {marks!r}, expected a list of texts"
    version = engine.version()
    named = isinstance(version, str) and version != ""
    assert named, (
        f"version() gave {version!r}, expected a name, and a version if results differ between them"
    )
    first = engine.identity
    again = engine.identity
    assert first == again, "its identity differs from call to call; a plan is held against it"
    for name in ("compiles", "own_threads", "measures_threads"):
        flag = getattr(engine, name)
        assert isinstance(flag, bool), f"{name} is {flag!r}, expected True or False"
    digests = training_rows is None or (
        isinstance(training_rows, np.ndarray) and training_rows.dtype == np.uint64
    )
    assert digests, f"trained_on is {training_rows!r}, expected digests of rows (uint64) or None"


def check_bare(engine: Engine, network: Network, rows: State) -> None:
    """The bare call of a network's only node runs, and again: it is the baseline of every
    timing.
    """
    call = engine.bare(network, full_schedule(network.topology), rows)(rows)
    assert callable(call), "bare() must give a function of inputs that returns the call to time"
    call()
    call()


def check_recipe(
    make: Callable[[], Recipe], network_of: Callable[[], Network], data: Any, folder: Path
) -> None:
    """All that a recipe must do: `make` gives it, `network_of` the same seeded and untrained
    network every time.

    data: a toy set (x, y) that the network can learn. folder: a new one, for checkpoints.
    """
    net = network_of()
    check_what_is_trained(make(), net, data)
    assert not net.untrained(), (
        f"the recipe left {net.untrained()} as they were; every exit must be trained"
    )
    # the one before was prepared twice, the first time without a seed
    net = check_learns(make, network_of, data)
    again = network_of()
    after = [network_of(), network_of()]
    history = fit(again, data, recipe=make(), batch_size=ROWS, progress=False)
    check_same(net, again, "two runs from the same seed")
    # a phase that solves has one step
    late = 4 if any(epoch.step for epoch in history.epochs) else len(history.epochs)
    for steps, other in zip((1, late), after, strict=True):
        check_resumes(make, other, again, data, folder / str(steps), steps)


def check_what_is_trained(recipe: Recipe, network: Network, data: Any) -> None:
    """Every loss is finite; parameters outside the phases, and all modes and wishes for gradients,
    stay.
    """
    recipe.prepare(network)
    trained = {id(value) for phase in recipe.phases(network) for value in phase.parameters}
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    wishes = {name: value.requires_grad for name, value in network.named_parameters()}
    history = fit(network, data, recipe=recipe, batch_size=ROWS, progress=False)
    figures = [value for epoch in history.epochs for value in epoch.figures.values()]
    assert figures, "the history is empty; a recipe must report what it minimises"
    assert all(map(math.isfinite, figures)), f"a figure in the history is not finite: {figures}"
    for name, value in network.named_parameters():
        kept = id(value) in trained or torch.equal(value, before[name])
        assert kept, f"parameter {name!r} changed and is in no phase"
        assert value.requires_grad == wishes[name], f"fit left requires_grad of {name!r} changed"
    assert not any(part.training for part in network.modules()), (
        "the network was left in training mode"
    )


def check_learns(
    make: Callable[[], Recipe], network_of: Callable[[], Network], data: Any
) -> Network:
    """Each trained exit answers more of the toy set right than before, or nine in ten. Returns the
    trained network.
    """
    x, y = data
    before = network_of()
    after = network_of()
    fit(after, data, recipe=make(), batch_size=ROWS, progress=False)
    with torch.no_grad():
        for label, one, other in zip(after.topology.exit_labels, before(x), after(x), strict=True):
            name = label if label in after.topology.exits else label.rpartition("#")[0]
            old, new = (
                (logits.argmax(1) == torch.as_tensor(y)).float().mean().item()
                for logits in (one, other)
            )
            if name in before.untrained():
                assert new > old or new > 0.9, (
                    f"exit {name!r} answered {old:.0%} right before and {new:.0%} after"
                )
    return after


def check_resumes(
    make: Callable[[], Recipe],
    network: Network,
    whole: Network,
    data: Any,
    folder: Path,
    steps: int,
) -> None:
    """Stopped by Ctrl-C after some steps and resumed, it ends with the weights of a run that was
    never stopped.
    """
    options: dict[str, Any] = {"batch_size": ROWS, "progress": False, "folder": folder}
    try:
        fit(network, data, recipe=stopping(make(), steps), **options)
    except KeyboardInterrupt:
        fit(network, data, recipe=make(), resume=True, **options)
    else:
        raise AssertionError(
            f"the recipe has fewer than {steps} steps; give it a toy set that takes more"
        )
    check_same(network, whole, "a run that was stopped and resumed, and one that was not,")


def check_same(one: Network, other: Network, what: str) -> None:
    """Equal weights, bit for bit."""
    its = other.state_dict()
    different = [key for key, value in one.state_dict().items() if not torch.equal(value, its[key])]
    assert not different, (
        f"{what} differ in {different}; draw at random from torch's generator alone"
    )


def stopping(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe, during whose n-th step somebody presses Ctrl-C."""
    kind = type(recipe)
    left = [steps]

    def counted(name: str) -> Callable[..., Any]:
        def step(self: Recipe, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return getattr(kind, name)(self, *arguments)

        return step

    made = copy.copy(recipe)
    made.__class__ = type(
        kind.__name__, (kind,), {name: counted(name) for name in ("loss", "update", "solve")}
    )
    return made


def check_reads(part: Gate | Exit, seen: Seen) -> None:
    """`reads` is a tuple of names, and the example has them."""
    named = isinstance(part.reads, tuple) and all(isinstance(name, str) for name in part.reads)
    assert named, f"reads is {part.reads!r}, expected a tuple of names of earlier exits and inputs"
    known = seen.logits.keys() | seen.inputs.keys()
    assert set(part.reads) <= known, f"it reads {part.reads}; make the example with these names"


def check_shape(got: Tensor, shape: tuple[int, ...], what: str) -> None:
    """The shape is as the contract says."""
    assert tuple(got.shape) == shape, f"{what} have shape {tuple(got.shape)}, expected {shape}"


def check_float(got: Tensor, what: str) -> None:
    """Scores and logits are float32 where the network is."""
    assert got.dtype == torch.float32, (
        f"{what} are {got.dtype}, expected torch.float32 for float32 logits"
    )


def check_subset_invariance(call: RowFunction, seen: Seen) -> None:
    """What a row gets does not depend on its batch-mates: it gets the same in half the batch, and
    alone.
    """
    whole = call(seen)
    for rows in (torch.arange(0, len(whole), 2), torch.arange(1)):
        check_close(
            call(taken(seen, rows)),
            whole[rows],
            "the values of a row in its batch and in a part of it",
        )


def check_permutation_invariance(call: RowFunction, seen: Seen) -> None:
    """Shuffling the batch shuffles what it gets."""
    rows = torch.randperm(len(seen.features), generator=torch.Generator().manual_seed(1))
    check_close(
        call(taken(seen, rows)),
        call(seen)[rows],
        "the values of a batch and of the same rows shuffled",
    )


def check_determinism(call: RowFunction, seen: Seen) -> None:
    """Twice the same batch, twice the same."""
    assert torch.equal(call(seen), call(seen)), (
        "the same batch gave two different results; it may not draw at random"
    )


def check_state_is_kept(part: nn.Module, call: RowFunction, seen: Seen) -> None:
    """Calling it changes neither it nor what it looked at."""
    before = copy.deepcopy(seen)
    state = copy.deepcopy(part.state_dict())
    modes = [module.training for module in part.modules()]
    call(seen)
    assert modes == [module.training for module in part.modules()], (
        "calling it changed its training mode"
    )
    for key, value in part.state_dict().items():
        assert torch.equal(value, state[key]), (
            f"calling it changed its own {key!r}; nothing is parked on modules"
        )
    for mine, old in zip(_tensors(seen), _tensors(before), strict=True):
        assert torch.equal(mine, old), (
            "calling it changed the logits or features that it was given, in place"
        )


def check_rows_of_nan(call: RowFunction, seen: Seen) -> None:
    """A row of NaN or infinities breaks nothing, and leaves its batch-mates alone."""
    clean = call(seen)
    bad = taken(seen, torch.arange(len(seen.features)))
    for tensor in _tensors(bad):
        if tensor.is_floating_point():
            tensor[2], tensor[3] = torch.nan, torch.inf
    others = torch.tensor([row for row in range(len(clean)) if row not in (2, 3)])
    check_close(call(bad)[others], clean[others], "the values of sound rows beside rows of NaN")


def check_config(
    part: Gate | Exit, call: RowFunction, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Its config is plain data with a name, goes through JSON, and makes the same thing again."""
    plain = json.loads(json.dumps(part.config()))
    assert isinstance(plain, dict), f"config() gave {plain!r}, expected a dict of plain data"
    assert isinstance(plain.get("name"), str), (
        f"config() gave {plain!r}, expected the name on the shelf under 'name'"
    )
    again = rebuild(plain)
    assert json.loads(json.dumps(again.config())) == plain, (
        "what was made from the config has another config"
    )
    again.train(part.training).load_state_dict(part.state_dict())
    made = again.score if isinstance(again, Gate) else again
    check_close(
        made(seen), call(seen), "the values of the original and of what was made from its config"
    )


def check_close(got: Tensor, want: Tensor, what: str) -> None:
    """Equal up to the last bits, NaN and infinities included."""
    same = got.shape == want.shape and torch.allclose(
        got, want, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
    )
    assert same, f"{what} differ: {got.tolist()} and {want.tolist()}"


def taken(seen: Seen, rows: Tensor) -> Seen:
    """Some rows of what was seen, copied."""
    earlier = {name: logits[rows] for name, logits in seen.logits.items()}
    inputs = {name: value[rows] for name, value in seen.inputs.items()}
    return Seen(seen.features[rows], earlier, None if seen.own is None else seen.own[rows], inputs)


def _check_rows(part: nn.Module, call: RowFunction, seen: Seen) -> None:
    check_determinism(call, seen)
    check_subset_invariance(call, seen)
    check_permutation_invariance(call, seen)
    check_state_is_kept(part, call, seen)


def _own(seen: Seen) -> Tensor:
    assert seen.own is not None, "a gate sees the logits of its own exit; give an example with own="
    return seen.own


def _tensors(seen: Seen) -> Iterator[Tensor]:
    yield seen.features
    yield from seen.logits.values()
    if seen.own is not None:
        yield seen.own
