"""What milliseconds need besides those of segments, exits and gates: the Runner's own, the bare
network's, the noise.

The sum of a network's parts is not what a user waits for: a Runner checks, compares scores and
gathers rows, and the plain network beside it runs as one call. All three are measured where the
parts are, so that a plan's price says what `bench` would measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from offramp.errors import OfframpError
from offramp.networks.inputs import State, count_of, given
from offramp.networks.network import SCORE, EngineStage, Network
from offramp.plans.plan import Plan
from offramp.plans.pricing import PLAIN, RUNNER
from offramp.plans.schedule import Edge, Schedule
from offramp.plans.topology import LEAVE
from offramp.runtime.benching import plain_of
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import linked
from offramp.runtime.lean import OnArrays, Wanted
from offramp.runtime.measuring import SIZES, interleaved, line, tiled
from offramp.runtime.programs import read_by
from offramp.runtime.running import Runner

REPEATS = 7
NOISE_SIZES = (1, 64)  # batches at which the same call is timed before and after everything else

Array = np.ndarray[Any, np.dtype[Any]]


def runner_costs(
    network: Network, engine_stages: Sequence[EngineStage], x: State, *, own_threads: bool
) -> dict[str, Array]:
    """Milliseconds of the Runner itself: `cost/runner` for a batch, `cost/runner/<gate>` at each
    gate, [3] each.

    A Runner is timed on parts that compute nothing: they hand out what the real parts gave before.
    At every gate one row leaves, so that the others are gathered, tensors of the real sizes; a
    batch of one goes on.

    Args:
        network: whose Runner it is.
        parts: all of its parts, as an engine opened them, every gate open.
        x: some rows, by the names of the inputs.
        own_threads: whether the engine computes on threads of its own, where rows are gathered by
            NumPy.

    Returns:
        Columns of a trace: no MACs, milliseconds per call, milliseconds per row.
    """
    states = dict[int, State]()
    for count in SIZES:
        states[count] = _computed(
            engine_stages, {name: tiled(value, count) for name, value in x.items()}
        )
    plan = Plan.by_hand(dict.fromkeys(network.topology.gates, 0.5))
    calls = dict[str, Callable[[], object]]()
    for depth, node in enumerate(network.topology.exits):
        for count in SIZES:
            rows = given({name: states[count][name] for name in x})
            canned = list[EngineStage]()
            for engine_stage in engine_stages[: depth + 1]:
                inputs = {name: states[count][name] for name in x}
                canned.append(
                    _canned(
                        engine_stage,
                        states[count],
                        last=engine_stage is engine_stages[depth],
                        inputs=inputs,
                    )
                )
            some = linked(Schedule(tuple(engine_stage.stage for engine_stage in canned)), canned)
            short = plan.changed(max_exit=node)
            calls[f"{depth}/{count}"] = _bound(
                Runner(network, short, some, engine_stages, None, own_threads=own_threads), rows
            )
    times = interleaved(calls, repeats=REPEATS, warmup=2)
    found = dict[str, Array]()
    before = [0.0] * len(SIZES)
    for depth in range(len(network.topology.exits)):
        now = [float(np.median(times[f"{depth}/{count}"])) for count in SIZES]
        more = [max(0.0, after - earlier) for after, earlier in zip(now, before, strict=True)]
        name = RUNNER if depth == 0 else f"{RUNNER}/{network.topology.gates[depth - 1]}"
        found[f"cost/{name}"] = np.array([0.0, *line(SIZES, more)])
        before = now
    return found


def plain_costs(network: Network, engine: Engine, x: State) -> dict[str, Array]:
    """Milliseconds of the last model as its engine runs it bare, as `cost/plain` [3].

    Nothing where it cannot be had: a model that only its parts can be run of on this engine, and
    engines whose call must be compiled for it first.
    """
    if {"compile", "cuda_graphs"} & set(engine.options):
        return {}
    states = {count: {name: tiled(value, count) for name, value in x.items()} for count in SIZES}
    try:
        bind = plain_of(network, states[SIZES[-1]], engine)
        times = interleaved(
            {str(count): bind(states[count]) for count in SIZES}, repeats=REPEATS, warmup=2
        )
    except OfframpError:
        return {}
    return {
        f"cost/{PLAIN}": np.array(
            [0.0, *line(SIZES, [float(np.median(times[str(n)])) for n in SIZES])]
        )
    }


class Noise:
    """How far timings of the same call lie apart: all parts on the same rows, timed before and
    after other things.
    """

    def __init__(self, engine_stages: Sequence[EngineStage], x: State) -> None:
        self._calls = dict[str, Callable[[], object]]()
        for count in NOISE_SIZES:
            rows = {name: tiled(value, count) for name, value in x.items()}
            self._calls[str(count)] = lambda rows=rows: _computed(engine_stages, rows)  # type: ignore[misc]
        self._times: list[dict[str, Array]] = []

    def time(self) -> None:
        """Time the calls once more."""
        self._times.append(interleaved(self._calls, repeats=REPEATS))

    def share(self) -> float:
        """The upper quartile of all timings of a call above the lower one, as a share of it; of
        both calls the more.
        """
        spreads = list[float]()
        for name in self._calls:
            low, high = np.quantile(
                np.concatenate([times[name] for times in self._times]), [0.25, 0.75]
            )
            spreads.append(float(high / low) - 1)
        return max(spreads)


def _computed(engine_stages: Sequence[EngineStage], rows: State) -> State:
    """Every named tensor of a batch."""
    state = dict(rows)
    with torch.inference_mode():
        for engine_stage in engine_stages:
            engine_stage.call(state)
    return state


def _canned(engine_stage: EngineStage, state: State, *, last: bool, inputs: State) -> EngineStage:
    """A part that computes nothing: it hands out the first rows of what was computed before.

    Its score lets one row leave of several, and none of one.
    """
    made = {name: state[name] for name in engine_stage.writes if name in state}
    score = engine_stage.name + SCORE
    if score in made:
        made[score] = torch.zeros_like(made[score])
        made[score][0] = 1.0
    stage = engine_stage.stage
    if last:
        stage = replace(
            stage, gate=False, edges=(Edge(LEAVE, LEAVE),), thresholds=(), routes=(), why="end"
        )
    elif stage.gate:
        stage = replace(stage, thresholds=(0.5,))
    engine_stage = replace(engine_stage, stage=stage)
    return replace(
        engine_stage,
        functions={"segment": _Canned(made, score, read_by(engine_stage, inputs), inputs)},
    )


class _Canned:
    """A piece that hands out tensors, or the same memory as arrays."""

    def __init__(self, made: State, score: str, reads: Sequence[str], inputs: State) -> None:
        self._made = made
        self._score = score
        self._reads = tuple(reads)
        self._inputs = inputs
        if score not in made:
            self._one = {}
        else:
            self._one = {score: torch.zeros_like(made[score][:1])}

    def __call__(self, rows: State) -> State:
        count = count_of(rows)
        found = {name: value[:count] for name, value in self._made.items()}
        if count == 1:
            found.update(self._one)
        return found

    def on_arrays(self) -> OnArrays | None:
        """The same for the loop on arrays; None where tensors are on another device."""
        if any(value.device.type != "cpu" for value in self._made.values()):
            return None
        several = [value.detach().numpy() for value in self._made.values()]
        single = [value.detach().numpy() for value in (self._made | self._one).values()]

        def run(given: Mapping[str, Array]) -> list[Array]:
            count = len(next(iter(given.values())))
            return [value[:count] for value in (single if count == 1 else several)]

        wanted = {
            name: Wanted(value.dtype, tuple(value.shape[1:]))
            for name, value in self._inputs.items()
        }
        inputs = {name: wanted[name] for name in self._reads if name in wanted}
        return OnArrays(self._reads, tuple(self._made), run, inputs)


def _bound(runner: Runner, rows: Any) -> Callable[[], object]:
    return lambda: runner(rows)
