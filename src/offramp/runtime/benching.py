"""Wall-clock times of a plan, its bare parts and the plain network, interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from offramp._support.arguments import require_count
from offramp.errors import BadData, InvalidArgument
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import State, as_inputs, count_of, given
from offramp.networks.network import EngineStage, Network, as_network, last_model
from offramp.plans.plan import Plan
from offramp.plans.schedule import alone, full_schedule
from offramp.runtime.engine import Engine, engine_of
from offramp.runtime.measuring import Ratio, interleaved, ratio
from offramp.runtime.merging import picked
from offramp.runtime.outputs import Outputs
from offramp.runtime.running import Runner
from offramp.runtime.session import open


@dataclass(frozen=True)
class Line:
    """Timings of one batch. Milliseconds are medians; ratios have a 90 % bootstrap interval.

    Attributes:
        batch: rows.
        left: rows that left at each exit.
        run_ms: of the plan.
        parts_ms: of its bare segments, exits and gates at the batch sizes that remain. This is the
            prediction.
        plain_ms: of the plain network.
        over_parts: the plan / its bare parts.
        over_plain: the plan / the plain network.
        same: the plain network / itself, which shows the noise.
    """

    batch: int
    left: tuple[int, ...]
    run_ms: float
    parts_ms: float
    plain_ms: float
    over_parts: Ratio
    over_plain: Ratio
    same: Ratio


@dataclass(frozen=True)
class Bench:
    """The timings of a plan.

    Attributes:
        exits: their names, to which `Line.left` refers.
        threads: of torch.
        lines: one for each batch.
    """

    exits: tuple[str, ...]
    threads: int
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        left_at = "left at " + "/".join(self.exits)
        head = f"{'batch':>5}  {left_at:<28} {'run':>9} {'predicted':>9} {'plain':>9}   "
        ratio_heads = "run/predicted          run/plain              plain/plain"
        rows = [f"{head}{ratio_heads} ({self.threads} threads)"]
        for line in self.lines:
            left = "/".join(map(str, line.left))
            times = f"{line.run_ms:6.2f} ms {line.parts_ms:6.2f} ms {line.plain_ms:6.2f} ms"
            ratios = f"{line.over_parts!s:<20}   {line.over_plain!s:<20}   {line.same!s:<20}"
            rows.append(f"{line.batch:>5}  {left:<28} {times}   {ratios}")
        return "\n".join(rows)


@without_autocast()
def bench(
    network: Network,
    plan: Plan,
    x: Any,
    *,
    batches: Sequence[int] = (1, 64),
    repeats: int = 9,
    threads: int | None = None,
    engine: str = "torch",
    clock: Callable[[], float] = time.perf_counter,
) -> Bench:
    """Time a plan, and compare it with its bare parts and with the plain network.

    The plain network is its engine's bare call: see `plain_of`. Measure where nothing else runs.

    Args:
        network: in eval mode.
        plan: to be timed.
        x: rows [N, ...], at least as many as the largest batch.
        batches: batch sizes. Each gives one line; batch 1 gives one line for each exit at which
            rows leave.
        repeats: rounds; each runs every call once.
        threads: of torch during the measurement; None leaves the number as it is.
        engine: where all of it runs, as for `open`.
        clock: seconds; `time.process_time` on one thread leaves out the time of other programs.

    Returns:
        The timings; print them for a table.

    Raises:
        BadData: there are fewer rows than a batch holds.
        InvalidArgument: batches, repeats or threads are not counts.
    """
    batches = [require_count("batches", batch) for batch in batches]
    if not batches:
        raise InvalidArgument("batches must hold at least one size, got none")
    repeats = require_count("repeats", repeats)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return _benched(network, plan, x, batches, repeats, engine, clock)
    finally:
        torch.set_num_threads(before)


def _benched(
    network: Network,
    plan: Plan,
    x: Any,
    batches: Sequence[int],
    repeats: int,
    engine: str,
    clock: Callable[[], float],
) -> Bench:
    network = as_network(network)
    runner = open(network, plan, engine=engine, example=x)
    shelved, _ = engine_of(engine)
    rows = as_inputs(x, network.device())
    count = count_of(rows)
    if not count or max(batches) > count:
        raise BadData(
            f"x must have at least {max(batches)} rows for the largest batch, got {count}"
        )
    engine_stages: Sequence[EngineStage] = shelved.open(
        network, plan.schedule(network.topology), network.device()
    )
    # An engine that compiles does so here, once for all sizes.
    bind_plain = plain_of(network, picked(rows, slice(max(batches))), shelved)
    lines = list[Line]()
    for batch in batches:
        if batch > 1:
            examples = [picked(rows, slice(batch))]
        else:
            examples = _one_per_exit(runner, rows)
        for example in examples:
            calls = _calls(network, runner, engine_stages, example, bind_plain, shelved)
            answers = runner(given(example))
            lines.append(_line(calls, answers, len(network.topology.exits), repeats, clock))
    return Bench(network.topology.exits, torch.get_num_threads(), tuple(lines))


def _one_per_exit(runner: Runner, rows: State) -> list[State]:
    """For each exit at which some of the first rows leave, a batch of the first such row."""
    exits = runner(given(picked(rows, slice(256)))).exit.tolist()
    batches = list[State]()
    for index in sorted(set(exits)):
        first = exits.index(index)
        batches.append(picked(rows, slice(first, first + 1)))
    return batches


def _calls(
    network: Network,
    runner: Runner,
    engine_stages: Sequence[EngineStage],
    rows: State,
    bind_plain: Callable[[State], Callable[[], object]],
    engine: Engine,
) -> dict[str, Callable[[], object]]:
    """What is timed on these rows, by name."""
    x = given(rows)
    plain = bind_plain(rows)
    parts = bare(network, runner.plan, engine_stages, rows, engine)
    # The plain network is first and last: rounds go forwards and backwards, so that both have the
    # same neighbours.
    return {"plain": plain, "run": lambda: runner(x), "parts": parts, "same": plain}


def _line(
    calls: Mapping[str, Callable[[], object]],
    answers: Outputs,
    exits: int,
    repeats: int,
    clock: Callable[[], float],
) -> Line:
    """Time the calls in turn. The answers are those of these rows, from a network with so many
    exits.
    """
    times = interleaved(calls, repeats=repeats, warmup=2, clock=clock)
    ms = {name: float(np.median(values)) for name, values in times.items()}
    left = torch.bincount(answers.exit, minlength=exits)
    return Line(
        batch=len(answers.exit),
        left=tuple(left.tolist()),
        run_ms=ms["run"],
        parts_ms=ms["parts"],
        plain_ms=ms["plain"],
        over_parts=ratio(times["run"], times["parts"]),
        over_plain=ratio(times["run"], times["plain"]),
        same=ratio(times["same"], times["plain"]),
    )


def plain_of(
    network: Network, rows: State, engine: Engine
) -> Callable[[State], Callable[[], object]]:
    """The plain network as its engine runs it bare: the user's last model after its preprocessing,
    without exits and gates.

    For a network with forks it is the most expensive path, its segments called one after the other.
    The call has no code of ours around it: it is `session.run` on arrays, `infer` of a request, or
    the module in inference_mode.

    Args:
        network: whose last model it is.
        rows: named inputs [B, ...] like those that the call will get.
        engine: where it runs.

    Returns:
        A function that converts and binds inputs, and returns the call to time.
    """
    plain = last_model(network)
    return engine.bare(plain, alone(plain.members[-1].name), rows)


def plain_call(network: Network, rows: State, engine: Engine) -> Callable[[], object]:
    """`plain_of` bound to these rows."""
    return plain_of(network, rows, engine)(rows)


def bare(
    network: Network, plan: Plan, engine_stages: Sequence[EngineStage], rows: State, engine: Engine
) -> Callable[[], object]:
    """The functions of a plan on the rows that reach them, without choosing and compaction.

    The plan runs once, to note each function with its inputs. The call to time runs the noted
    functions again.

    Args:
        network: whose stages they are.
        plan: for which they were opened.
        engine_stages: the stages of the plan, on an engine.
        rows: named inputs [B, ...].
        engine: of the stages.

    Returns:
        The call to time.
    """
    ready: list[tuple[Callable[[State], State], State]] = []

    def noting(function: Callable[[State], State]) -> Callable[[State], State]:
        def call(state: State) -> State:
            ready.append((function, dict(state)))
            return function(state)

        return call

    noting_stages = list[EngineStage]()
    for engine_stage in engine_stages:
        functions = {kind: noting(function) for kind, function in engine_stage.functions.items()}
        noting_stages.append(replace(engine_stage, functions=functions))
    every: Sequence[EngineStage] = engine.open(
        network, full_schedule(network.topology), network.device()
    )
    runner = Runner(network, plan, noting_stages, every, None, own_threads=engine.own_threads)
    runner(given(rows))

    def call() -> object:
        with torch.inference_mode():
            return [function(state) for function, state in ready]

    return call
