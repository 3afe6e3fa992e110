"""MACs and milliseconds of parts. Timings are medians of interleaved repeats; ratios carry a
bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.networks.inputs import State, call_model
from offramp.networks.members import outside_torch
from offramp.networks.network import EngineStage
from offramp.networks.taps import listening

SIZES = (1, 4, 16, 64)

Array = np.ndarray[Any, np.dtype[Any]]


def macs(call: Callable[[], object]) -> float:
    """Multiply-adds of convolutions and matrix products in one call (element-wise work counts
    nothing).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 2


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Array]:
    """Milliseconds [repeats] of each call; every round runs all of them once, so that drift hits
    all alike.

    clock: seconds; `time.process_time` on one thread leaves out what other programs took.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for turn in range(repeats):
        for name, call in order if turn % 2 == 0 else reversed(order):
            start = clock()
            call()
            _wait()
            times[name].append((clock() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with a 90 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(above: Array, below: Array, *, seed: int = 0, draws: int = 1000) -> Ratio:
    """Median(above) / median(below) over paired repeats; the pairs are drawn again, so that drift
    cancels.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(above), (draws, len(above)))
    spread = np.median(above[picks], axis=1) / np.median(below[picks], axis=1)
    low, high = np.quantile(spread, [0.05, 0.95])
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def line(sizes: Sequence[int], ms: Sequence[float]) -> tuple[float, float]:
    """a and b >= 0 of ms = a + b n with the smallest squared relative error."""
    from scipy.optimize import nnls

    design = np.column_stack([np.ones(len(sizes)), np.asarray(sizes, float)])
    weights = 1 / np.maximum(np.asarray(ms, float), 1e-9)
    (a, b), _ = nnls(design * weights[:, None], np.asarray(ms, float) * weights)
    return float(a), float(b)


def cost(
    call: Callable[[State], object] | None,
    state_of: Callable[[int], State],
    *,
    timed: bool,
    repeats: int = 5,
    counted: Callable[[State], object] | None = None,
) -> Array:
    """[3]: MACs per row, ms per call and ms per row of a part (NaN when not timed); state_of(n)
    makes n rows.

    counted: the same part in torch, where operations can be counted. call: None for what runs
    inside another part.
    """
    two = state_of(2)
    seen = counted or call
    per_row = 0.0 if seen is None else macs(lambda: seen(two)) / 2
    if not timed:
        return np.array([per_row, np.nan, np.nan])
    if call is None:
        return np.array([per_row, 0.0, 0.0])
    states = {n: state_of(n) for n in SIZES}
    with torch.inference_mode():
        calls = {str(n): _bind(call, state) for n, state in states.items()}
        times = interleaved(calls, repeats=repeats)
    return np.array([per_row, *line(SIZES, [float(np.median(times[str(n)])) for n in SIZES])])


def costs_of(
    engine_stages: Sequence[EngineStage],
    x: State,
    *,
    timed: bool,
    counted: Sequence[EngineStage] | None = None,
) -> dict[str, Array]:
    """MACs and milliseconds of every segment, exit and gate on some rows: [3] each, as columns of a
    trace.

    counted: the same parts in torch, where multiply-adds can be counted. What an engine fused into
    one piece has all its milliseconds there.
    """
    state = dict(x)
    costs: dict[str, Array] = {}

    def of(count: int) -> State:
        return {key: tiled(value, count) for key, value in state.items()}

    for engine_stage, plain in zip(engine_stages, counted or engine_stages, strict=True):
        for kind, function in plain.functions.items():
            price = cost(engine_stage.functions.get(kind), of, timed=timed, counted=function)
            if kind == "segment" and outside_torch(plain.modules):
                price[0] = np.nan
            costs[f"cost/{kind}/{engine_stage.name}"] = price
            with torch.inference_mode():
                state.update(function(state))
    return costs


@dataclass(frozen=True)
class Percentile:
    """The 95th percentile of a part's milliseconds by batch size: between measured sizes a straight
    line.
    """

    sizes: tuple[int, ...]
    ms: tuple[float, ...]

    def __call__(self, count: int) -> float:
        if count > self.sizes[-1]:
            return self.ms[-1] * count / self.sizes[-1]
        return float(np.interp(count, self.sizes, self.ms))


def percentiles(
    engine_stages: Sequence[EngineStage], rows: State, *, repeats: int = 20
) -> tuple[Percentile, ...]:
    """Each part's 95th percentile at batch 1 to 64, on the given rows, repeated to fill a batch."""
    found = []
    with torch.inference_mode():
        states = {n: {name: tiled(value, n) for name, value in rows.items()} for n in SIZES}
        for engine_stage in engine_stages:
            calls = {str(n): _bind(engine_stage.call, dict(state)) for n, state in states.items()}
            times = interleaved(calls, repeats=repeats)
            worst = np.maximum.accumulate([float(np.quantile(times[str(n)], 0.95)) for n in SIZES])
            found.append(Percentile(SIZES, tuple(map(float, worst))))
            for state in states.values():
                engine_stage.call(state)
    return tuple(found)


@dataclass(frozen=True)
class Pace:
    """When each module has ended, as a part (0 to 1) of one eager forward; and the milliseconds of
    that forward.
    """

    shares: Mapping[str, float]
    ms: float


def pace(model: nn.Module, preprocess: nn.Module | None, rows: State, *, repeats: int = 9) -> Pace:
    """Medians over repeats of one forward of these rows, preprocessing included, after two that are
    not counted.

    A module that runs more than once counts to its last end. The stamps themselves take a
    microsecond or so each, which small modules feel; on a GPU each waits for what was started, so
    that modules do not overlap as they else may.
    """
    names = {name: module for name, module in model.named_modules() if name}
    found = [
        _stamped(names, lambda: call_model(model, preprocess, rows), rows)
        for _ in range(repeats + 2)
    ][2:]
    shares = {
        name: float(np.median([ends[name] / whole for ends, whole in found]))
        for name in found[0][0]
    }
    return Pace(shares, float(np.median([whole for _, whole in found])))


def _stamped(
    modules: Mapping[str, nn.Module], call: Callable[[], object], rows: State
) -> tuple[dict[str, float], float]:
    """Milliseconds from the start of a call to the end of each module, and to its own end."""
    ends = dict[str, float]()
    final = list[tuple[str, object]]()
    wait = _wait if any(value.is_cuda for value in rows.values()) else lambda: None

    def heard(name: str, output: object) -> None:
        wait()
        ends[name] = (time.perf_counter() - start) * 1e3
        if not (final and final[-1][1] is output):
            final.clear()
        # modules that gave one and the same value, one inside the other
        final.append((name, output))

    with torch.inference_mode(), listening(modules, heard):
        start = time.perf_counter()
        result = call()
        wait()
        whole = (time.perf_counter() - start) * 1e3
    return ends | {name: whole for name, output in final if output is result}, whole


def tiled(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows, starting again at the first when there are fewer."""
    return rows.repeat(-(-count // len(rows)), *[1] * (rows.dim() - 1))[:count].contiguous()


def _bind(call: Callable[[State], object], state: State) -> Callable[[], object]:
    return lambda: call(state)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
