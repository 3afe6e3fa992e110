"""A test kit for the contracts of gates, exits, layers, engines and recipes, also for your own.

    from offramp.testing import check_gate, example_seen
    check_gate(MyGate(), example_seen())  # an AssertionError has the problem in words

Each check is a small function that can be used alone. `check_gate`, `check_exit`, `check_layer`,
`check_engine` and `check_recipe` run all checks for their kind. Logits are [B, C], scores [B].
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

TOLERANCE = 1e-5  # kernels depend on the batch size, so a score may differ in its last bits
ROWS = 16  # of a batch in the checks of recipes

RowFunction = Callable[[Seen], Tensor]  # gives scores or logits, one per row


def example_seen(
    rows: int = 16,
    classes: int = 5,
    reads: Sequence[str] = (),
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> Seen:
    """An example for a gate or an exit: features, own logits and earlier logits.

    The logits have ties and a row with a large value.

    Args:
        rows: B.
        classes: C.
        reads: the earlier exits and the inputs that the gate or exit reads. Inputs are masks of
            ragged lengths.
        shape: of one row's features. None takes logits as features, as at the end of a model.
        seed: of the random numbers.

    Returns:
        What a gate or an exit sees.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw_logits() -> Tensor:
        logits = torch.randn(rows, classes, generator=generator) * 3
        logits[0] = 1.0  # all equal
        logits[1, 0] = 120.0  # a probability of 1
        return logits

    own = draw_logits()
    features = own
    if shape is not None:
        features = torch.randn(rows, *shape, generator=generator)
    length = 1
    if shape:
        length = shape[0]
    masks = dict[str, Tensor]()
    earlier = dict[str, Tensor]()
    for name in reads:
        if is_input(name):
            masks[name] = _ragged(rows, length)
        else:
            earlier[name] = draw_logits()
    return Seen(features, earlier, own, masks)


def _ragged(rows: int, length: int) -> Tensor:
    """A mask [rows, length]. Row i has its first 1 + i % length positions."""
    positions = torch.arange(length)
    last = torch.arange(rows)[:, None] % length  # [rows, 1]
    return (positions <= last).long()


def check_gate(
    gate: Gate, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Gate] | None = None
) -> None:
    """Check everything that a gate must do.

    Args:
        gate: to check.
        seen: an example for it.
        rebuild: makes a gate from a config. None leaves that check out.

    Raises:
        AssertionError: the gate breaks the contract.
    """
    check_reads(gate, seen)
    scores = gate.score(seen)
    check_shape(scores, (len(seen.features),), "scores")
    check_float(scores, "scores")
    assert not scores.isnan().any(), (
        "the gate gave NaN for finite logits; NaN is for rows that must not leave"
    )
    _check_rows(gate, gate.score, seen)
    check_rows_of_nan(lambda example: grade(gate, example, _own(example)), seen)
    if rebuild is not None:
        check_config(gate, gate.score, seen, rebuild)


def check_exit(
    exit_: Exit, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Exit] | None = None
) -> None:
    """Check everything that an exit must do.

    Args:
        exit_: to check.
        seen: an example for it.
        rebuild: makes an exit from a config. None leaves that check out.

    Raises:
        AssertionError: the exit breaks the contract.
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
        _check_rows(exit_, lambda example: exit_.both(example)[1], seen)
    if isinstance(exit_, Pools):
        pooled = replace(seen, features=pooled_by(exit_, seen.features, seen.inputs))
        check_close(exit_(pooled), logits, "logits from features and from what `pool` made of them")
    _check_rows(exit_, exit_, seen)
    check_rows_of_nan(exit_, seen)
    if rebuild is not None:
        check_config(exit_, exit_, seen, rebuild)


def check_engine(engine: Engine, network: Network, x: Tensor) -> None:
    """Check everything that an engine must do.

    Its stages must give the outputs of the network for any batch, and read only what they declare.

    Args:
        engine: to check.
        network: that it runs.
        x: a batch of inputs.

    Raises:
        AssertionError: the engine breaks the contract.
    """
    check_said(engine)
    # Every stage runs, and is compared with the same node of the network.
    schedule = full_schedule(network.topology)
    parts: Sequence[EngineStage] = engine.open(network, schedule, network.device())
    names = [part.name for part in parts]
    assert names == list(schedule.index), "the engine must give one part per stage, in their order"
    backwards = torch.arange(len(x) - 1, -1, -2)  # every second row
    for rows in (x, x[:1], x[backwards]):
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
    """Check everything that a layer must do in the place of another one.

    Args:
        kind: the layer's class.
        dense: the layer that it replaces, in eval mode, in float32.
        shape: of one row of its input, without the batch.
        same: whether its first outputs are those of `dense`, up to the last bits.
        options: of `from_layer`.

    Raises:
        AssertionError: the layer breaks the contract.
    """
    generator = torch.Generator().manual_seed(0)
    # The layer that is replaced must stay as it is, and share nothing with the new one.
    before = copy.deepcopy(dense.state_dict())
    layer = kind.from_layer(dense, **options)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), (
            f"from_layer changed {key!r} of what it replaces; copy it"
        )
    addresses = {value.data_ptr() for value in dense.parameters()}
    for value in layer.parameters():
        assert value.data_ptr() not in addresses, (
            "it shares weights with what it replaces: training one would train the other"
        )
    for module in layer.modules():
        assert not module.training, "it must be in the mode of what it replaces, eval mode"
    seen = Seen(torch.randn(ROWS, *shape, generator=generator), {})
    with torch.no_grad():
        want = dense(seen.features)
        got = layer(seen.features)
        check_shape(got, tuple(want.shape), "what the layer gives")
        check_float(got, "what the layer gives")
        if same:
            check_close(got, want, "what the layer and what it replaces give")
        nothing = layer(seen.features[:0])
        check_shape(nothing, (0, *want.shape[1:]), "what the layer gives for no rows")
        _check_rows(layer, lambda example: layer(example.features), seen)
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
    """Check the cost of a layer.

    All figures must be finite and the same every time, and at least what torch counts and stores.
    """
    # A layer may cost more than torch counts, such as bits, but never less.
    cost = layer.cost(shape)
    counted = dense_cost(layer, shape)
    assert cost == layer.cost(shape), "its cost differs from call to call"
    for name, figure in vars(cost).items():
        assert 0 <= figure < math.inf, f"its {name} is {figure}, expected a number of at least 0"
    assert cost.macs >= counted.macs * (1 - TOLERANCE), (
        f"it says {cost.macs:g} MACs and runs {counted.macs:g}; what could be saved and is "
        f"computed counts"
    )
    stored = 0  # bytes
    for value in layer.state_dict().values():
        stored += value.numel() * value.element_size()
    assert cost.stored_bytes >= stored, (
        f"it says {cost.stored_bytes} bytes and stores {stored}; zeros count too"
    )


def check_said(engine: Engine) -> None:
    """Check the properties of an engine: their types, and that they stay the same."""
    assert isinstance(engine, Engine), f"{engine!r} is not an offramp.contracts.Engine"
    marks = engine.marks()
    training_rows = engine.trained_on
    assert isinstance(marks, list), f"marks() gave {marks!r}, expected a list of texts"
    assert _are_texts(marks), f"marks() gave {marks!r}, expected a list of texts"
    version = engine.version()
    is_named = isinstance(version, str) and version != ""
    assert is_named, (
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
    """Check that the bare call of a network's only node runs twice.

    It is the baseline of every timing.
    """
    call = engine.bare(network, full_schedule(network.topology), rows)(rows)
    assert callable(call), "bare() must give a function of inputs that returns the call to time"
    call()
    call()


def check_recipe(
    make: Callable[[], Recipe], network_of: Callable[[], Network], data: Any, folder: Path
) -> None:
    """Check everything that a recipe must do.

    Args:
        make: makes the recipe.
        network_of: makes the same seeded and untrained network every time.
        data: a toy set (x, y) that the network can learn.
        folder: a new one, for checkpoints.

    Raises:
        AssertionError: the recipe breaks the contract.
    """
    net = network_of()
    check_what_is_trained(make(), net, data)
    assert not net.untrained(), (
        f"the recipe left {net.untrained()} as they were; every exit must be trained"
    )
    # That network was prepared twice, the first time without a seed, so a new one is trained.
    net = check_learns(make, network_of, data)
    again = network_of()
    after = [network_of(), network_of()]
    history = fit(again, data, recipe=make(), batch_size=ROWS, progress=False)
    check_same(net, again, "two runs from the same seed")
    # Stop early, and late. A phase that solves has one step.
    late = len(history.epochs)
    for epoch in history.epochs:
        if epoch.step:
            late = 4
    for steps, other in zip((1, late), after, strict=True):
        check_resumes(make, other, again, data, folder / str(steps), steps)


def check_what_is_trained(recipe: Recipe, network: Network, data: Any) -> None:
    """Check that training changes only the parameters of the recipe's phases.

    All reported losses must be finite. Modes and requires_grad must be as before.
    """
    recipe.prepare(network)
    trained = set[int]()  # ids, because == of tensors compares elementwise
    for phase in recipe.phases(network):
        trained.update(map(id, phase.parameters))
    before = dict[str, Tensor]()
    requires_grad = dict[str, bool]()
    for name, value in network.named_parameters():
        before[name] = value.detach().clone()
        requires_grad[name] = value.requires_grad
    history = fit(network, data, recipe=recipe, batch_size=ROWS, progress=False)
    figures = list[float]()
    for epoch in history.epochs:
        figures.extend(epoch.figures.values())
    assert figures, "the history is empty; a recipe must report what it minimises"
    assert all(map(math.isfinite, figures)), f"a figure in the history is not finite: {figures}"
    for name, value in network.named_parameters():
        may_change = id(value) in trained
        assert may_change or torch.equal(value, before[name]), (
            f"parameter {name!r} changed and is in no phase"
        )
        assert value.requires_grad == requires_grad[name], (
            f"fit left requires_grad of {name!r} changed"
        )
    for module in network.modules():
        assert not module.training, "the network was left in training mode"


def check_learns(
    make: Callable[[], Recipe], network_of: Callable[[], Network], data: Any
) -> Network:
    """Check that each trained exit improves on the toy set, or is right on nine rows of ten.

    Returns:
        The trained network.
    """
    x, y = data
    before = network_of()
    after = network_of()
    fit(after, data, recipe=make(), batch_size=ROWS, progress=False)
    with torch.no_grad():
        logits_before = before(x)
        logits_after = after(x)
    labels = torch.as_tensor(y)
    for index, label in enumerate(after.topology.exit_labels):
        name = label
        if label not in after.topology.exits:  # one of several paths to an exit: "exit#1"
            name = label.rpartition("#")[0]
        old = _accuracy(logits_before[index], labels)
        new = _accuracy(logits_after[index], labels)
        if name in before.untrained():
            assert new > old or new > 0.9, (
                f"exit {name!r} answered {old:.0%} right before and {new:.0%} after"
            )
    return after


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of right answers of logits [B, C]."""
    return (logits.argmax(1) == labels).float().mean().item()


def check_resumes(
    make: Callable[[], Recipe],
    network: Network,
    whole: Network,
    data: Any,
    folder: Path,
    steps: int,
) -> None:
    """Check that a run that is stopped by Ctrl-C and resumed has the weights of an unbroken run.

    Args:
        make: makes the recipe.
        network: seeded and untrained.
        whole: the same network after a run that was not stopped.
        data: a toy set (x, y).
        folder: a new one, for checkpoints.
        steps: the step at which the run is stopped.
    """
    # The second run goes on from the checkpoint that the first one leaves.
    options: dict[str, Any] = {"batch_size": ROWS, "progress": False, "folder": folder}
    try:
        fit(network, data, recipe=stopping(make(), steps), **options)
    except KeyboardInterrupt:
        fit(network, data, recipe=make(), resume=True, **options)
    else:
        raise AssertionError(
            f"the recipe has fewer than {steps} steps; use a toy set that takes more"
        )
    check_same(network, whole, "a run that was stopped and resumed, and one that was not,")


def check_same(one: Network, other: Network, what: str) -> None:
    """Check that two networks have equal weights, bit for bit."""
    state = other.state_dict()
    different = list[str]()
    for key, value in one.state_dict().items():
        if not torch.equal(value, state[key]):
            different.append(key)
    assert not different, (
        f"{what} differ in {different}; draw at random from torch's generator alone"
    )


def stopping(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe, with a Ctrl-C in its n-th step."""
    kind = type(recipe)
    left = [steps]  # a list, so that the steps below can change it

    def counted(name: str) -> Callable[..., Any]:
        def step(self: Recipe, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return getattr(kind, name)(self, *arguments)

        return step

    stopped = copy.copy(recipe)
    methods = {name: counted(name) for name in ("loss", "update", "solve")}
    stopped.__class__ = type(kind.__name__, (kind,), methods)
    return stopped


def check_reads(part: Gate | Exit, seen: Seen) -> None:
    """Check that `reads` is a tuple of names that the example has."""
    are_names = isinstance(part.reads, tuple) and _are_texts(part.reads)
    assert are_names, (
        f"reads is {part.reads!r}, expected a tuple of names of earlier exits and inputs"
    )
    known = seen.logits.keys() | seen.inputs.keys()
    assert set(part.reads) <= known, f"it reads {part.reads}; make the example with these names"


def check_shape(got: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Check a shape."""
    assert tuple(got.shape) == shape, f"{what} have shape {tuple(got.shape)}, expected {shape}"


def check_float(got: Tensor, what: str) -> None:
    """Check that values are float32, as the network is."""
    assert got.dtype == torch.float32, (
        f"{what} are {got.dtype}, expected torch.float32 for float32 logits"
    )


def check_subset_invariance(call: RowFunction, seen: Seen) -> None:
    """Check that a row's values do not depend on the other rows of its batch.

    They must be the same in half of the batch, and alone.
    """
    values = call(seen)
    every_second = torch.arange(0, len(values), 2)
    first = torch.arange(1)
    for rows in (every_second, first):
        check_close(
            call(taken(seen, rows)),
            values[rows],
            "the values of a row in its batch and in a part of it",
        )


def check_permutation_invariance(call: RowFunction, seen: Seen) -> None:
    """Check that shuffling the batch shuffles its values."""
    rows = torch.randperm(len(seen.features), generator=torch.Generator().manual_seed(1))
    check_close(
        call(taken(seen, rows)),
        call(seen)[rows],
        "the values of a batch and of the same rows shuffled",
    )


def check_determinism(call: RowFunction, seen: Seen) -> None:
    """Check that the same batch gives the same values twice."""
    assert torch.equal(call(seen), call(seen)), (
        "the same batch gave two different results; it may not draw at random"
    )


def check_state_is_kept(part: nn.Module, call: RowFunction, seen: Seen) -> None:
    """Check that a call changes neither the module nor its inputs."""
    before = copy.deepcopy(seen)
    state = copy.deepcopy(part.state_dict())
    modes = [module.training for module in part.modules()]
    call(seen)
    assert modes == [module.training for module in part.modules()], (
        "calling it changed its training mode"
    )
    for key, value in part.state_dict().items():
        assert torch.equal(value, state[key]), (
            f"calling it changed its own {key!r}; modules must not store values"
        )
    for now, old in zip(_tensors(seen), _tensors(before), strict=True):
        assert torch.equal(now, old), (
            "calling it changed the logits or features that it was given, in place"
        )


def check_rows_of_nan(call: RowFunction, seen: Seen) -> None:
    """Check that rows of NaN or infinities raise nothing and do not change other rows."""
    # Rows 2 and 3 are damaged, in all floating-point values.
    clean = call(seen)
    bad = taken(seen, torch.arange(len(seen.features)))
    for tensor in _tensors(bad):
        if tensor.is_floating_point():
            tensor[2] = torch.nan
            tensor[3] = torch.inf
    is_sound = torch.ones(len(clean), dtype=torch.bool)
    is_sound[2:4] = False
    check_close(call(bad)[is_sound], clean[is_sound], "the values of sound rows beside rows of NaN")


def check_config(
    part: Gate | Exit, call: RowFunction, seen: Seen, rebuild: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Check that a config is plain data with a name, and makes the same thing again after JSON."""
    plain = json.loads(json.dumps(part.config()))
    assert isinstance(plain, dict), f"config() gave {plain!r}, expected a dict of plain data"
    assert isinstance(plain.get("name"), str), (
        f"config() gave {plain!r}, expected the name on the shelf under 'name'"
    )
    again = rebuild(plain)
    assert json.loads(json.dumps(again.config())) == plain, (
        "what was made from the config has another config"
    )
    # With the same weights and mode it must give the same values.
    again.train(part.training).load_state_dict(part.state_dict())
    call_again: RowFunction = again
    if isinstance(again, Gate):
        call_again = again.score
    check_close(
        call_again(seen),
        call(seen),
        "the values of the original and of what was made from its config",
    )


def check_close(got: Tensor, want: Tensor, what: str) -> None:
    """Check that values are equal up to the last bits, including NaN and infinities."""
    is_close = got.shape == want.shape and torch.allclose(
        got, want, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
    )
    assert is_close, f"{what} differ: {got.tolist()} and {want.tolist()}"


def taken(seen: Seen, rows: Tensor) -> Seen:
    """Some rows of an example, copied."""
    earlier = {name: logits[rows] for name, logits in seen.logits.items()}
    inputs = {name: value[rows] for name, value in seen.inputs.items()}
    own = None
    if seen.own is not None:
        own = seen.own[rows]
    return Seen(seen.features[rows], earlier, own, inputs)


def _are_texts(values: Sequence[object]) -> bool:
    """Whether all values are texts."""
    return all(isinstance(value, str) for value in values)


def _check_rows(part: nn.Module, call: RowFunction, seen: Seen) -> None:
    """The checks of everything that has values for each row."""
    check_determinism(call, seen)
    check_subset_invariance(call, seen)
    check_permutation_invariance(call, seen)
    check_state_is_kept(part, call, seen)


def _own(seen: Seen) -> Tensor:
    """The own logits of an example."""
    assert seen.own is not None, "a gate sees the logits of its own exit; give an example with own="
    return seen.own


def _tensors(seen: Seen) -> Iterator[Tensor]:
    """All tensors of an example but its inputs."""
    yield seen.features
    yield from seen.logits.values()
    if seen.own is not None:
        yield seen.own
