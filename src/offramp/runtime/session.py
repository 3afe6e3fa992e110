"""A network opened under a plan on an engine: checked once, and compiled before it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from offramp._support.arguments import require_kind
from offramp.errors import BadData, InvalidArgument, Mismatch, OfframpError, StaleRunner
from offramp.networks.ambient import without_autocast
from offramp.networks.code_marks import code_marks
from offramp.networks.compiled import compiled_of, undisturbed
from offramp.networks.inputs import State, as_inputs, count_of, given
from offramp.networks.network import EngineStage, Network, as_network, trial_rows
from offramp.networks.walking import with_defaults
from offramp.plans.plan import Plan
from offramp.plans.provenance import BAND
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import Engine, engine_of
from offramp.runtime.lean import CompiledPiece, lean_chain
from offramp.runtime.measuring import percentiles
from offramp.runtime.one_graph import OneGraph, farthest, require_lowerable
from offramp.runtime.outputs import Outputs
from offramp.runtime.probing import compare_probe, given_as
from offramp.runtime.running import Runner
from offramp.runtime.threads import MeasuredThreads


def open(
    network: Network,
    plan: Plan,
    *,
    engine: str = "torch",
    device: str | torch.device | None = None,
    timing_rows: Any = None,
    example: Any = None,
) -> Runner:
    """Check a network and a plan once, and make a Runner.

    The network stays on its device: move it first, then open it. A calibrated plan is compared with
    this network: weights and configuration, engine, precision, the user's code of gates, exits and
    models, and logits and scores on the rows of its probe. docs/concepts/promises.md lists changes
    that cannot be noticed. Autocast around the call has no effect.

    Args:
        network: In eval mode.
        plan: From `calibrate`, or set by hand.
        engine: torch, onnxruntime or openvino, with options as in "torch:bf16".
        device: Where the network must be; None means wherever it is.
        timing_rows: Rows [B, ...] on which every segment is timed at batch 1 to 64, for deadlines.
        example: Rows [B, ...] as they will be served. An engine that compiles needs them where
            neither the plan nor the network has seen any, as in a ladder with a plan set by hand.
            Everything is compiled here and nothing while serving, so rows of other types and shapes
            raise an error later (texts may have any length). If the plan knows some of these rows
            by their digests, logits and scores are compared on them as well.

    Returns:
        The network under this plan: immutable, thread-safe, callable.

    Raises:
        Mismatch: Another network, engine, precision or code; logits or scores that differ.
        BadNetwork: A part in training mode; an operator that the engine lacks.
        InvalidArgument: Another device, a plan that does not fit, an example that is missing.
        UnknownName: No such engine, option, exit or gate.
        MissingExtra: The engine is not installed.
    """
    with undisturbed(), without_autocast():
        return _opened(network, plan, engine, device, timing_rows, example)


def _opened(
    network: Network,
    plan: Plan,
    engine: str,
    device: str | torch.device | None,
    timing_rows: Any,
    example: Any,
) -> Runner:
    network = as_network(network)
    require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
    network.require_eval()
    home_device = network.device()
    if device is not None and not _there(torch.device(device), home_device):
        raise InvalidArgument(
            f"device must be {home_device}, where the network is, got {device}. Call "
            f"net.to({str(device)!r}) first"
        )
    chosen_engine, identity = engine_of(engine)
    check_origin(network, plan, identity)
    engine_stages: Sequence[EngineStage] = chosen_engine.open(
        network, plan.schedule(network.topology), home_device
    )
    every: Sequence[EngineStage] = chosen_engine.open(
        network, full_schedule(network.topology), home_device
    )
    every = _with_functions_of(engine_stages, every)
    compare_probe(network, plan, every, example)
    # Joined stages have graphs of their own, which the comparison above did not run.
    joined = [engine_stage for engine_stage in engine_stages if engine_stage.stage.passes]
    if joined:
        compare_probe(network, plan, engine_stages, example)
    if chosen_engine.compiles:
        served = _served(network, plan, engine, timing_rows if example is None else example)
        for some in (engine_stages, every):
            _warm(network, served, some)
            _seal(some)
    graph = None
    way = f"one after the other on {identity}"
    if chosen_engine.own_threads:
        known = _known_rows(network, plan, served)
        graph, way = _in_one(network, plan, chosen_engine, identity, engine_stages, known)
    threads = None
    if chosen_engine.measures_threads and home_device.type == "cpu":
        threads = MeasuredThreads()
    timed = None
    if timing_rows is not None:
        timed = percentiles(engine_stages, _some_rows(as_inputs(timing_rows, home_device)))
    return Runner(
        network,
        plan,
        engine_stages,
        every,
        timed,
        own_threads=chosen_engine.own_threads,
        one_graph=graph,
        threads=threads,
        way=way,
    )


def _in_one(
    network: Network,
    plan: Plan,
    engine: Engine,
    identity: str,
    engine_stages: Sequence[EngineStage],
    known: Sequence[State],
) -> tuple[OneGraph | None, str]:
    """The plan as one graph, if the engine has it, compared with the stages on all known rows.

    Returns:
        The graph, or None; and a line for print that says how the plan runs, and why.
    """
    in_parts = f"one after the other on {identity}"
    lean = lean_chain(network.topology, engine_stages)
    if lean is None:
        return None, f"{in_parts}: it is not a chain on arrays of one shape"
    band = BAND if plan.origin is None else plan.origin.band
    try:
        require_lowerable(network, engine_stages)
        run = engine.in_one(network, plan.schedule(network.topology), engine_stages, known[0])
        graph = OneGraph(run, lean, engine_stages)
        distances = [farthest(graph, lean, engine_stages, rows, band) for rows in known]
    except OfframpError as problem:
        return None, f"{in_parts}: {problem}"
    except Exception as problem:  # errors of runtimes share no class but Exception
        return None, f"{in_parts}: one graph failed with {type(problem).__name__}"
    count = sum(map(count_of, known))
    compared = (
        f"compared with the stages one by one on {count} rows, logits at most "
        f"{max(distances):.1g} apart"
    )
    return (
        graph,
        f"in one graph on {identity}: {compared}; deadlines and anytime run stage by stage",
    )


def _known_rows(network: Network, plan: Plan, served: State) -> list[State]:
    """All rows on which two ways to run can be compared: those to be served, and the seeded and
    recorded rows of the plan's probe.
    """
    batches = [served]
    probe = plan.origin.probe if plan.origin else None
    if probe is None:
        return batches
    if probe.rows is None or probe.rows:
        batches.append(as_inputs(probe.batch(), network.device()))
    arrays = probe.recorded.arrays() if probe.recorded is not None else {}
    if arrays:
        batches.append(as_inputs(given_as(arrays), network.device()))
    return batches


def _there(wanted: torch.device, device: torch.device) -> bool:
    """Whether a network is on the wanted device: `cuda` is any GPU."""
    return wanted.type == device.type and wanted.index in (None, device.index or 0)


def _some_rows(rows: State) -> State:
    if not count_of(rows):
        raise BadData("timing_rows must have at least one row, got none")
    return rows


def check_origin(network: Network, plan: Plan, engine: str) -> None:
    """Compare a network with the one for which a plan was calibrated.

    Args:
        network: to be opened.
        plan: the plan. One set by hand passes.
        engine: identity of the engine.

    Raises:
        Mismatch: the network, engine, precision or code differs.
    """
    if plan.origin is None:
        return
    network_key = (network.fingerprint(), engine, network.precision())
    plan_key = plan.origin.key
    if network_key != plan_key:
        raise Mismatch(
            f"the plan is for network {plan_key[0]} on {plan_key[1]} in {plan_key[2]}, this is "
            f"network {network_key[0]} on {network_key[1]} in {network_key[2]}. Record and "
            "calibrate this one, or drop the promise with Plan.by_hand(plan.thresholds)"
        )
    plan.origin.refuse_other_code(code_marks(network))


def _served(network: Network, plan: Plan, engine: str, example: Any) -> State:
    """Rows like those that will be served: an example, rows of the plan's probe, or rows on which a
    cut was tried.
    """
    if example is not None:
        state = as_inputs(example, network.device())
        if not count_of(state):
            raise BadData("example must have at least one row, got none")
        return state
    probe = plan.origin.probe if plan.origin else None
    if probe is not None and probe.known:
        return as_inputs(probe.some(2), network.device())
    state = trial_rows(network)
    if not state:
        raise InvalidArgument(
            f"{engine} compiles a network for rows of one shape, and neither the plan nor the "
            "network has seen rows. Use open(..., example=x), or ladder(..., example=x)"
        )
    return state


def _warm(network: Network, rows: State, engine_stages: Sequence[EngineStage]) -> None:
    """Run stages on two rows, along every edge, so that they are compiled before they serve."""
    two_rows = {name: value[:2] for name, value in rows.items()}
    state = dict(with_defaults(network.topology, two_rows))
    with torch.inference_mode():
        for engine_stage in engine_stages:
            engine_stage.call(state)


def _seal(engine_stages: Sequence[EngineStage]) -> None:
    """Let stages compile nothing from now on. Rows that would need it raise an error."""
    for engine_stage in engine_stages:
        for function in engine_stage.functions.values():
            if isinstance(function, CompiledPiece):
                function.seal()


def _with_functions_of(
    engine_stages: Sequence[EngineStage], every: Sequence[EngineStage]
) -> list[EngineStage]:
    """Let stages share functions, so that each is compiled or recorded once.

    Args:
        engine_stages: of a plan.
        every: the stages in which every exit runs.

    Returns:
        `every`, with the functions of those stages of the plan that compute the same.
    """
    of_plan = {engine_stage.name: engine_stage for engine_stage in engine_stages}
    shared = list[EngineStage]()
    for engine_stage in every:
        same = of_plan.get(engine_stage.name)
        if same is not None and _compute_the_same(same, engine_stage):
            engine_stage = replace(engine_stage, functions=same.functions)
        shared.append(engine_stage)
    return shared


def _compute_the_same(first: EngineStage, second: EngineStage) -> bool:
    return (
        first.functions.keys() == second.functions.keys()
        and first.reads == second.reads
        and first.writes == second.writes
        and first.stage.nodes == second.stage.nodes
    )


def run(network: Network, plan: Plan, x: Any, *, engine: str = "torch") -> Outputs:
    """Open a network under a plan and answer one batch.

    The last Runner of a network is kept, and used again while nothing has changed. For a server,
    use `open`.

    Args:
        network: In eval mode.
        plan: From `calibrate`, or set by hand.
        x: A batch [B, ...], or a tuple or mapping of inputs.
        engine: torch, onnxruntime or openvino, with options as in "torch:bf16".

    Returns:
        The logits, exit and reason of every row, in the order of x.

    Raises:
        Mismatch: The plan was made for another network, engine, precision or code.
        BadData: x does not fit the network.
        BadNetwork, InvalidArgument, UnknownName, MissingExtra: As for `open`.
    """
    network = as_network(network)

    kept = compiled_of(network)

    def make() -> _Opened:
        return _Opened(plan, engine, open(network, plan, engine=engine, example=_one_of(x)))

    def fits(last: _Opened) -> bool:
        same = last.plan is plan and last.engine == engine
        return same and last.runner.takes(x) and _current(last.runner)

    # A look first, which does not wait for other threads that open or compile.
    last: _Opened | None = kept.found("runner")
    if last is None or not fits(last):
        last = kept.once("runner", make, fits)
    return last.runner(x)


@dataclass(frozen=True)
class _Opened:
    """The last Runner of a network, and the plan and engine with which it was opened."""

    plan: Plan
    engine: str
    runner: Runner


def _one_of(x: Any) -> Any:
    """A batch as an example. For an empty batch, this is a row of zeros."""
    state = as_inputs(x)
    if count_of(state):
        return x
    zeros: State = {}
    for name, value in state.items():
        zeros[name] = value.new_zeros((1, *value.shape[1:]))  # [0, ...] -> [1, ...]
    return given(zeros)


def _current(runner: Runner) -> bool:
    """Whether nothing has changed since a Runner was opened."""
    try:
        runner.check_values()
    except StaleRunner:
        return False
    return True
