"""Wall-clock of a plan beside its bare parts and beside the plain network, interleaved in one
run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from offramp.runtime.running import Runner
from offramp.runtime.session import open


@dataclass(frozen=True)
class Line:
    """One batch. Milliseconds are medians; ratios of medians come with a 90 % bootstrap interval.

    left: rows by exit. over_parts: run / its bare segments, exits and gates at the batch sizes that
    remain (the prediction). over_plain: run / the plain network. same: the plain network / itself,
    which shows the noise.
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
    """Lines by batch, for the exits named."""

    exits: tuple[str, ...]
    threads: int
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{'batch':>5}  {'left at ' + '/'.join(self.exits):<28} {'run':>9} "
            f"{'predicted':>9} {'plain':>9}   "
        )
        rows = [
            f"{head}run/predicted          run/plain              plain/plain ({self.threads} "
            f"threads)"
        ]
        for line in self.lines:
            left = "/".join(map(str, line.left))
            times = " ".join(f"{ms:6.2f} ms" for ms in (line.run_ms, line.parts_ms, line.plain_ms))
            ratios = "   ".join(
                f"{value!s:<20}" for value in (line.over_parts, line.over_plain, line.same)
            )
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
    """Time a plan on rows x [N, ...]: one line per batch size, and at batch 1 one line per exit
    that rows leave at.

    The plain network is its engine's bare call: see `plain_of`. Measure where nothing else runs.

    Args:
        network: in eval mode.
        plan: what is timed.
        x: rows, at least as many as the largest batch.
        batches: sizes, one line each.
        repeats: rounds; each runs every call once.
        threads: of torch while it lasts; None leaves them as they are.
        engine: where all of it runs, as for `open`.
        clock: seconds; `time.process_time` on one thread leaves out what other programs took.

    Raises:
        BadData: there are fewer rows than a batch holds.
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
            f"there are {count} rows, expected at least {max(batches)}; give more rows or smaller "
            f"batches"
        )
    engine_stages: Sequence[EngineStage] = shelved.open(
        network, plan.schedule(network.topology), network.device()
    )
    lines = []
    for batch in batches:
        if batch > 1:
            picks = [_some(rows, slice(batch))]
        else:
            picks = _one_per_exit(runner, rows)
        lines += [
            _line(network, runner, engine_stages, pick, repeats, shelved, clock) for pick in picks
        ]
    return Bench(network.topology.exits, torch.get_num_threads(), tuple(lines))


def _some(rows: State, which: slice) -> State:
    return {name: value[which] for name, value in rows.items()}


def _one_per_exit(runner: Runner, rows: State) -> list[State]:
    exits = runner(given(_some(rows, slice(256)))).exit.tolist()
    firsts = [exits.index(index) for index in sorted(set(exits))]
    return [_some(rows, slice(first, first + 1)) for first in firsts]


def _line(
    network: Network,
    runner: Runner,
    engine_stages: Sequence[EngineStage],
    rows: State,
    repeats: int,
    engine: Engine,
    clock: Callable[[], float],
) -> Line:
    x = given(rows)
    answers = runner(x)
    plain = plain_call(network, rows, engine)
    # The plain network stands first and last: rounds go forwards and backwards, so that both have
    # the same neighbours.
    functions = bare(network, runner.plan, engine_stages, rows, engine)
    calls = {"plain": plain, "run": lambda: runner(x), "parts": functions, "same": plain}
    times = interleaved(calls, repeats=repeats, warmup=2, clock=clock)
    ms = {name: float(np.median(values)) for name, values in times.items()}
    return Line(
        batch=len(answers.exit),
        left=tuple(torch.bincount(answers.exit, minlength=len(network.topology.exits)).tolist()),
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
    """The plain network as its engine runs it bare: the user's last model behind its preprocessing,
    no exits, no gates.

    Of a network with forks it is the dearest path, its segments called one after the other.

    Nothing of ours is around the call: `session.run` on arrays, `infer` of a request, the module in
    inference_mode.

    Args:
        network: whose last model it is.
        rows: named inputs [B, ...] such as the call will be given.
        engine: where it runs.

    Returns:
        A function that binds inputs, converted beforehand, and returns the call to time.
    """
    plain = last_model(network)
    return engine.bare(plain, alone(plain.members[-1].name), rows)


def plain_call(network: Network, rows: State, engine: Engine) -> Callable[[], object]:
    """`plain_of` bound to these rows."""
    return plain_of(network, rows, engine)(rows)


def bare(
    network: Network, plan: Plan, engine_stages: Sequence[EngineStage], rows: State, engine: Engine
) -> Callable[[], object]:
    """The pieces of a plan on the rows that reach them, gathered beforehand: no choosing, no
    compaction.

    Args:
        network: whose parts they are.
        plan: what they were opened for.
        parts: the stages of the plan, on an engine.
        rows: named inputs [B, ...].
        engine: of the parts.

    Returns:
        The call to time.
    """
    ready: list[tuple[Callable[[State], State], State]] = []

    def heard(function: Callable[[State], State]) -> Callable[[State], State]:
        def call(state: State) -> State:
            ready.append((function, dict(state)))
            return function(state)

        return call

    listening = [
        replace(
            engine_stage,
            functions={kind: heard(function) for kind, function in engine_stage.functions.items()},
        )
        for engine_stage in engine_stages
    ]
    every: Sequence[EngineStage] = engine.open(
        network, full_schedule(network.topology), network.device()
    )
    Runner(network, plan, listening, every, None, own_threads=engine.own_threads)(given(rows))

    def call() -> object:
        with torch.inference_mode():
            return [function(state) for function, state in ready]

    return call
