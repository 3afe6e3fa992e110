"""A network opened under a plan on an engine: checked once, and compiled before it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from offramp._support.arguments import require_kind
from offramp.errors import BadData, InvalidArgument, Mismatch, OfframpError, StaleRunner
from offramp.networks.ambient import without_autocast
from offramp.networks.compiled import compiled_of, undisturbed
from offramp.networks.inputs import State, as_inputs, count_of, given
from offramp.networks.network import EngineStage, Network, as_network, trial_rows
from offramp.networks.walking import with_defaults
from offramp.plans.plan import Plan
from offramp.plans.provenance import BAND
from offramp.plans.schedule import full_schedule
from offramp.runtime.code_marks import code_marks
from offramp.runtime.engine import Engine, engine_of
from offramp.runtime.lean import CompiledPiece, lean_chain
from offramp.runtime.measuring import percentiles
from offramp.runtime.one_graph import OneGraph, farthest, require_lowerable
from offramp.runtime.outputs import Outputs
from offramp.runtime.probing import compare_probe, given_as
from offramp.runtime.running import Runner


def open(
    network: Network,
    plan: Plan,
    *,
    engine: str = "torch",
    device: str | torch.device | None = None,
    timing_rows: Any = None,
    example: Any = None,
) -> Runner:
    """Check once, and make a Runner. The network stays where it is: place it first, then open it.

    A plan that was calibrated is compared with this network: weights and configuration, engine,
    precision, the code of gates, exits and models that is the user's own, and logits and scores on
    the rows of its probe. docs/concepts/promises.md says what cannot be seen. Autocast around the
    call does not count.

    Args:
        network: In eval mode.
        plan: From `calibrate`, or set by hand.
        engine: torch, onnxruntime or openvino, with options as in "torch:bf16".
        device: Where the network must be; None means wherever it is.
        timing_rows: Rows [B, ...] on which every segment is timed at batch 1 to 64, for deadlines.
        example: Rows [B, ...] as they will be served. An engine that compiles needs them where
            neither the plan nor the network has seen any, as in a ladder with a plan set by hand.
            All is compiled here and nothing while serving, so rows of other types and shapes are
            refused later (texts may have any length). If some of these rows are recorded rows that
            the plan knows by their digests, logits and scores are compared on them as well.

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
            f"the network is on {home_device}, asked for was {device}; call "
            f"net.to({str(device)!r}) first"
        )
    shelved, identity = engine_of(engine)
    check_origin(network, plan, identity)
    engine_stages: Sequence[EngineStage] = shelved.open(
        network, plan.schedule(network.topology), home_device
    )
    every: Sequence[EngineStage] = shelved.open(
        network, full_schedule(network.topology), home_device
    )
    every = _with_pieces_of(engine_stages, every)
    compare_probe(network, plan, every, example)
    # graphs of their own, which nothing else has looked at
    if any(engine_stage.stage.passes for engine_stage in engine_stages):
        compare_probe(network, plan, engine_stages, example)
    if shelved.compiles:
        served = _served(network, plan, engine, timing_rows if example is None else example)
        for some in (engine_stages, every):
            _warm(network, served, some)
            _seal(some)
    one = None
    way = f"one after the other on {identity}"
    if shelved.own_threads:
        one, way = _in_one(
            network, plan, shelved, identity, engine_stages, _known_rows(network, plan, served)
        )
    if timing_rows is None:
        timed = None
    else:
        timed = percentiles(engine_stages, _some_rows(as_inputs(timing_rows, home_device)))
    return Runner(
        network,
        plan,
        engine_stages,
        every,
        timed,
        own_threads=shelved.own_threads,
        one_graph=one,
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
    """The plan as one graph where the engine has it, compared with the parts on all rows at hand.

    Returns:
        The graph, or None; and a line for print that says which way it is, and why.
    """
    in_parts = f"one after the other on {identity}"
    lean = lean_chain(network.topology, engine_stages)
    if lean is None:
        return None, f"{in_parts}: it is no chain on arrays of one shape"
    band = BAND if plan.origin is None else plan.origin.band
    try:
        require_lowerable(network, engine_stages)
        run = engine.in_one(network, plan.schedule(network.topology), engine_stages, known[0])
        graph = OneGraph(run, lean, engine_stages)
        far = max(farthest(graph, lean, engine_stages, rows, band) for rows in known)
    except OfframpError as problem:
        return None, f"{in_parts}: {problem}"
    except Exception as problem:  # errors of runtimes share no class but Exception
        return None, f"{in_parts}: one graph failed with {type(problem).__name__}"
    count = sum(count_of(rows) for rows in known)
    compared = (
        f"compared with the stages one by one on {count} rows, logits at most {far:.1g} apart"
    )
    return (
        graph,
        f"in one graph on {identity}: {compared}; deadlines and anytime run stage by stage",
    )


def _known_rows(network: Network, plan: Plan, served: State) -> list[State]:
    """All rows at hand on which two ways can be compared: those served, the seeded and the recorded
    ones.
    """
    found = [served]
    probe = plan.origin.probe if plan.origin else None
    if probe is not None and (probe.rows is None or probe.rows):
        found.append(as_inputs(probe.batch(), network.device()))
    if probe is not None and probe.recorded is not None and (kept := probe.recorded.arrays()):
        found.append(as_inputs(given_as(kept), network.device()))
    return found


def _there(asked: torch.device, device: torch.device) -> bool:
    """Whether a network is where it was asked for: `cuda` is any GPU."""
    return asked.type == device.type and asked.index in (None, device.index or 0)


def _some_rows(rows: State) -> State:
    if not count_of(rows):
        raise BadData(
            "timing_rows has no rows, expected at least one to time segments on; give some, or "
            "leave it out"
        )
    return rows


def check_origin(network: Network, plan: Plan, engine: str) -> None:
    if plan.origin is None:
        return
    mine = (network.fingerprint(), engine, network.precision())
    its = plan.origin.key
    if mine != its:
        raise Mismatch(
            f"the plan is for network {its[0]} on {its[1]} in {its[2]}, this is network {mine[0]} "
            f"on {mine[1]} in "
            f"{mine[2]}; record and calibrate this one, or drop the promise: "
            f"Plan.by_hand(plan.thresholds)"
        )
    plan.origin.refuse_other_code(code_marks(network))


def _served(network: Network, plan: Plan, engine: str, example: Any) -> State:
    """Rows like those that will be served: an example, those of the plan's probe, or those that a
    cut was tried on.
    """
    if example is not None:
        state = as_inputs(example, network.device())
        if not count_of(state):
            raise BadData("the example has no rows, expected at least one")
        return state
    probe = plan.origin.probe if plan.origin else None
    if probe is not None and probe.known:
        return as_inputs(probe.some(2), network.device())
    state = trial_rows(network)
    if not state:
        raise InvalidArgument(
            f"{engine} compiles a network for rows of one shape, and neither the plan nor the "
            f"network has seen rows; "
            "give some: open(..., example=x), or ladder(..., example=x)"
        )
    return state


def _warm(network: Network, rows: State, engine_stages: Sequence[EngineStage]) -> None:
    """Run parts on rows, along every edge: what compiles does so before it serves."""
    state = dict(with_defaults(network.topology, {name: value[:2] for name, value in rows.items()}))
    with torch.inference_mode():
        for engine_stage in engine_stages:
            engine_stage.call(state)


def _seal(engine_stages: Sequence[EngineStage]) -> None:
    """From here on parts compile nothing: rows that would need it are refused."""
    for engine_stage in engine_stages:
        for function in engine_stage.functions.values():
            if isinstance(function, CompiledPiece):
                function.seal()


def _with_pieces_of(
    engine_stages: Sequence[EngineStage], every: Sequence[EngineStage]
) -> list[EngineStage]:
    """The parts of every exit, with the pieces of a plan's where they are the same: compiled, or
    recorded, once.
    """
    mine = {engine_stage.name: engine_stage for engine_stage in engine_stages}
    shared = []
    for engine_stage in every:
        same = mine.get(engine_stage.name)
        if same is not None and same.functions.keys() == engine_stage.functions.keys():
            here = (same.reads, same.writes, same.stage.nodes)
            if here == (engine_stage.reads, engine_stage.writes, engine_stage.stage.nodes):
                engine_stage = replace(engine_stage, functions=same.functions)
        shared.append(engine_stage)
    return shared


def run(network: Network, plan: Plan, x: Any, *, engine: str = "torch") -> Outputs:
    """Open a network under a plan and answer one batch.

    The last runner of a network is kept, and used again while nothing has changed. For a server,
    use `open`.

    Args:
        network: In eval mode.
        plan: From `calibrate`, or set by hand.
        x: A batch [B, ...], or a tuple or mapping of inputs.
        engine: torch, onnxruntime or openvino, with options as in "torch:bf16".

    Returns:
        Logits, exit and reason of every row, in the order of x.

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

    # without waiting for other threads that open or compile
    last: _Opened | None = kept.found("runner")
    if last is None or not fits(last):
        last = kept.once("runner", make, fits)
    return last.runner(x)


@dataclass(frozen=True)
class _Opened:
    """The last Runner of a network, and under what it was opened."""

    plan: Plan
    engine: str
    runner: Runner


def _one_of(x: Any) -> Any:
    """A batch as an example; of an empty one, a row of zeros."""
    state = as_inputs(x)
    if count_of(state):
        return x
    return given({name: value.new_zeros((1, *value.shape[1:])) for name, value in state.items()})


def _current(runner: Runner) -> bool:
    try:
        runner.check_values()
    except StaleRunner:
        return False
    return True
