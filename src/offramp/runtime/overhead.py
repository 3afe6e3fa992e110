"""Measures milliseconds that are not in a segment, exit or gate: those of the Runner and of the
plain network, and the noise of the timings.

A user waits longer than the sum of a network's parts: the Runner checks, compares scores and
gathers rows. The plain network, for comparison, runs as one call. Both are measured together with
the parts, so that the price of a plan agrees with what `bench` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from offramp.runtime.measuring import SIZES, interleaved, line, median_line, tiled_state
from offramp.runtime.merging import picked
from offramp.runtime.programs import read_by
from offramp.runtime.running import Runner

REPEATS = 7
NOISE_SIZES = (1, 64)  # batches at which the same call is timed before and after everything else

Array = np.ndarray[Any, np.dtype[Any]]


def runner_costs(
    network: Network, engine_stages: Sequence[EngineStage], x: State, *, own_threads: bool
) -> dict[str, Array]:
    """Measure the milliseconds of the Runner itself.

    A Runner is timed on stages that compute nothing: they return tensors that the real stages
    computed before. At every gate one row leaves, so that the other rows are gathered, from tensors
    of the real sizes. A batch of one goes on to the end.

    Runners of increasing depth are timed: the first ends at the first exit, the next at the second
    exit, and so on. The difference between two of them is the cost of one more gate.

    Args:
        network: whose Runner it is.
        engine_stages: all of its stages, as an engine opened them, every gate open.
        x: some rows, by the names of the inputs.
        own_threads: whether the engine computes on threads of its own. Rows are then gathered by
            NumPy.

    Returns:
        Columns of a trace: `cost/runner` for a batch and `cost/runner/<gate>` at each gate. Each
        is [3]: no MACs, milliseconds per call, milliseconds per row.
    """
    topology = network.topology
    # All tensors of the network, at each batch size.
    states = dict[int, State]()
    for size in SIZES:
        states[size] = _computed(engine_stages, tiled_state(x, size))
    plan = Plan.by_hand(dict.fromkeys(topology.gates, 0.5))
    calls = dict[str, Callable[[], object]]()
    for depth, node in enumerate(topology.exits):
        short_plan = plan.changed(max_exit=node)
        for size, state in states.items():
            inputs = {name: state[name] for name in x}
            stages = _canned_stages(engine_stages[: depth + 1], state, inputs)
            runner = Runner(
                network, short_plan, stages, engine_stages, None, own_threads=own_threads
            )
            # Bound to the inputs, and not to the loop variables.
            calls[f"{depth}/{size}"] = _bound(runner, given(inputs))
    times = interleaved(calls, repeats=REPEATS, warmup=2)

    # What each depth takes longer than the one before.
    costs = dict[str, Array]()
    before = [0.0] * len(SIZES)
    for depth in range(len(topology.exits)):
        now = [float(np.median(times[f"{depth}/{size}"])) for size in SIZES]
        added = list[float]()
        for ms, ms_before in zip(now, before, strict=True):
            added.append(max(0.0, ms - ms_before))
        name = RUNNER
        if depth > 0:
            name = f"{RUNNER}/{topology.gates[depth - 1]}"
        costs[f"cost/{name}"] = np.array([0.0, *line(SIZES, added)])
        before = now
    return costs


def plain_costs(network: Network, engine: Engine, x: State) -> dict[str, Array]:
    """Measure the milliseconds of the last model as its engine runs it bare.

    Returns:
        `cost/plain` [3]: no MACs, milliseconds per call, milliseconds per row. Empty if the engine
        can run only parts of the model, or if it would have to compile the model first.
    """
    if {"compile", "cuda_graphs"} & set(engine.options):
        return {}
    states = {size: tiled_state(x, size) for size in SIZES}
    try:
        bind = plain_of(network, states[SIZES[-1]], engine)
        calls = {str(size): bind(states[size]) for size in SIZES}
        times = interleaved(calls, repeats=REPEATS, warmup=2)
    except OfframpError:
        return {}
    return {f"cost/{PLAIN}": np.array([0.0, *median_line(times)])}


class Noise:
    """How much timings of the same call differ: all stages on the same rows, timed before and after
    everything else.
    """

    def __init__(self, engine_stages: Sequence[EngineStage], x: State) -> None:
        self._calls = dict[str, Callable[[], object]]()
        for size in NOISE_SIZES:
            self._calls[str(size)] = partial(_computed, engine_stages, tiled_state(x, size))
        self._times: list[dict[str, Array]] = []

    def time(self) -> None:
        """Time the calls once more."""
        self._times.append(interleaved(self._calls, repeats=REPEATS))

    def share(self) -> float:
        """How far the upper quartile of a call's timings is above the lower one, as a share of the
        lower one. The largest of all calls counts.
        """
        spreads = list[float]()
        for name in self._calls:
            timings = np.concatenate([times[name] for times in self._times])
            low, high = np.quantile(timings, [0.25, 0.75])
            spreads.append(float(high / low) - 1)
        return max(spreads)


def _computed(engine_stages: Sequence[EngineStage], rows: State) -> State:
    """Every named tensor of a batch, from running all stages."""
    state = dict(rows)
    with torch.inference_mode():
        for engine_stage in engine_stages:
            engine_stage.call(state)
    return state


def _canned_stages(
    engine_stages: Sequence[EngineStage], state: State, inputs: State
) -> tuple[EngineStage, ...]:
    """Stages that compute nothing; all rows end at the last of them."""
    canned = list[EngineStage]()
    for engine_stage in engine_stages:
        is_last = engine_stage is engine_stages[-1]
        canned.append(_canned(engine_stage, state, last=is_last, inputs=inputs))
    schedule = Schedule(tuple(engine_stage.stage for engine_stage in canned))
    return linked(schedule, canned)


def _canned(engine_stage: EngineStage, state: State, *, last: bool, inputs: State) -> EngineStage:
    """A stage that computes nothing: it returns the first rows of tensors that were computed
    before.

    Of several rows its scores let one leave. A single row stays.
    """
    outputs: State = {}
    for name in engine_stage.writes:
        if name in state:
            outputs[name] = state[name]
    score = engine_stage.name + SCORE
    if score in outputs:
        outputs[score] = torch.zeros_like(outputs[score])
        outputs[score][0] = 1.0
    stage = engine_stage.stage
    if last:
        stage = replace(
            stage, gate=False, edges=(Edge(LEAVE, LEAVE),), thresholds=(), routes=(), why="end"
        )
    elif stage.gate:
        stage = replace(stage, thresholds=(0.5,))
    engine_stage = replace(engine_stage, stage=stage)
    function = _Canned(outputs, score, read_by(engine_stage, inputs), inputs)
    return replace(engine_stage, functions={"segment": function})


class _Canned:
    """A function that returns the first rows of ready tensors, or of the same memory as arrays."""

    def __init__(self, outputs: State, score: str, reads: Sequence[str], inputs: State) -> None:
        self._outputs = outputs
        self._reads = tuple(reads)
        self._inputs = inputs
        self._single = dict(outputs)  # the outputs for a batch of one, which does not leave
        if score in outputs:
            self._single[score] = torch.zeros_like(outputs[score][:1])

    def __call__(self, rows: State) -> State:
        count = count_of(rows)
        outputs = self._single if count == 1 else self._outputs
        return picked(outputs, slice(count))

    def on_arrays(self) -> OnArrays | None:
        """The same for the loop on arrays; None if the tensors are on another device."""
        several = list[Array]()
        single = list[Array]()
        for name, value in self._outputs.items():
            if value.device.type != "cpu":
                return None
            several.append(value.detach().numpy())
            single.append(self._single[name].detach().numpy())

        def run(given: Mapping[str, Array]) -> list[Array]:
            count = len(next(iter(given.values())))
            outputs = single if count == 1 else several
            return [value[:count] for value in outputs]

        inputs = dict[str, Wanted]()
        for name in self._reads:
            if name in self._inputs:
                value = self._inputs[name]
                inputs[name] = Wanted(value.dtype, tuple(value.shape[1:]))
        return OnArrays(self._reads, tuple(self._outputs), run, inputs)


def _bound(runner: Runner, rows: Any) -> Callable[[], object]:
    return lambda: runner(rows)
