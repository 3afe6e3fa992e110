"""Measures MACs and milliseconds of the parts of a network.

Timings are medians of interleaved repeats. Ratios of timings come with a bootstrap interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.networks.inputs import State, call_model
from offramp.networks.members import outside_torch
from offramp.networks.network import EngineStage
from offramp.networks.taps import listening

SIZES = (1, 4, 16, 64)  # batch sizes at which parts are timed
WARMUPS = 2  # forwards before those that count

Array = np.ndarray[Any, np.dtype[Any]]


def macs(call: Callable[[], object]) -> float:
    """Multiply-adds of convolutions and matrix products in one call. Element-wise operations do not
    count.
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
    """Time several calls in rounds. Every round runs each call once, so drift affects all equally.

    Args:
        calls: by name.
        repeats: rounds. Every second round runs the calls in reverse order.
        warmup: how often each call runs before, without being timed.
        clock: seconds; `time.process_time` on one thread leaves out the time of other programs.

    Returns:
        Milliseconds [repeats] of each call, by name.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for number in range(repeats):
        in_turn = order if number % 2 == 0 else order[::-1]
        for name, call in in_turn:
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
    """Median(above) / median(below) of paired repeats, with a bootstrap interval.

    The bootstrap draws pairs, so that drift cancels.

    Args:
        above: timings [repeats] of one call.
        below: timings [repeats] of the other call, from the same rounds.
        seed: of the draws.
        draws: bootstrap samples.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(above), (draws, len(above)))  # [draws, repeats]
    spread = np.median(above[picks], axis=1) / np.median(below[picks], axis=1)  # [draws]
    low, high = np.quantile(spread, [0.05, 0.95])
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def line(sizes: Sequence[int], ms: Sequence[float]) -> tuple[float, float]:
    """Fit a line through timings.

    Args:
        sizes: batch sizes n.
        ms: milliseconds at each size.

    Returns:
        a and b >= 0 of ms = a + b n with the smallest squared relative error.
    """
    from scipy.optimize import nnls

    times = np.asarray(ms, float)
    design = np.column_stack([np.ones(len(sizes)), np.asarray(sizes, float)])  # [sizes, 2]
    weights = 1 / np.maximum(times, 1e-9)  # makes errors relative
    (a, b), _ = nnls(design * weights[:, None], times * weights)
    return float(a), float(b)


def median_line(times: Mapping[str, Array]) -> tuple[float, float]:
    """Fit a line through the medians of timings at `SIZES`. The name of a size is its number."""
    medians = [float(np.median(times[str(size)])) for size in SIZES]
    return line(SIZES, medians)


def cost(
    call: Callable[[State], object] | None,
    state_of: Callable[[int], State],
    *,
    timed: bool,
    repeats: int = 5,
    counted: Callable[[State], object] | None = None,
) -> Array:
    """What one part costs.

    Args:
        call: the part; None if it runs inside another part.
        state_of: makes the inputs of the part for a number of rows.
        timed: whether to measure milliseconds.
        repeats: of the timings at each batch size.
        counted: the same part in torch, where operations can be counted.

    Returns:
        [3]: MACs per row, milliseconds per call, milliseconds per row. The last two are NaN if not
        timed.
    """
    two_rows = state_of(2)
    in_torch = counted or call
    macs_per_row = 0.0
    if in_torch is not None:
        macs_per_row = macs(lambda: in_torch(two_rows)) / 2
    if not timed:
        return np.array([macs_per_row, np.nan, np.nan])
    if call is None:
        return np.array([macs_per_row, 0.0, 0.0])
    calls = {str(size): _bind(call, state_of(size)) for size in SIZES}
    with torch.inference_mode():
        times = interleaved(calls, repeats=repeats)
    return np.array([macs_per_row, *median_line(times)])


def costs_of(
    engine_stages: Sequence[EngineStage],
    x: State,
    *,
    timed: bool,
    counted: Sequence[EngineStage] | None = None,
) -> dict[str, Array]:
    """What every segment, exit and gate costs on some rows.

    Args:
        engine_stages: whose functions are timed. A function that an engine fused into another one
            has its milliseconds there. If an engine joined several nodes in a stage, they share its
            milliseconds in proportion to their multiply-adds.
        x: inputs by name, [B, ...] each.
        timed: whether to measure milliseconds.
        counted: one stage for each node in torch, where multiply-adds can be counted.

    Returns:
        Columns of a trace, [3] each, as `cost` returns them.
    """
    state = dict(x)
    costs: dict[str, Array] = {}

    def rows_of(count: int) -> State:
        return tiled_state(state, count)

    plain_of_node = {plain.name: plain for plain in counted or engine_stages}
    for engine_stage in engine_stages:
        alone = len(engine_stage.stage.nodes) == 1
        prices: dict[str, Array] = {}
        before = dict(state)  # what the stage reads
        for node in engine_stage.stage.nodes:
            plain = plain_of_node[node]
            for kind, function in plain.functions.items():
                call = engine_stage.functions.get(kind) if alone else None
                price = cost(call, rows_of, timed=timed and alone, counted=function)
                if kind == "segment" and outside_torch(plain.modules):
                    price[0] = np.nan  # its operations cannot be counted
                prices[f"cost/{kind}/{node}"] = price
                # Later parts read what this one writes.
                with torch.inference_mode():
                    state.update(function(state))
        if timed and not alone:
            whole = cost(
                _as_one(engine_stage), partial(tiled_state, before), timed=True, counted=_nothing
            )
            _share(whole, prices)
        costs |= prices
    return costs


def _as_one(engine_stage: EngineStage) -> Callable[[State], object]:
    """All functions of a stage as one, which leaves the state as it is."""
    return lambda state: engine_stage.call(dict(state))


def _nothing(_state: State) -> object:
    """Stands for a part whose multiply-adds are counted elsewhere."""
    return None


def _share(whole: Array, prices: Mapping[str, Array]) -> None:
    """Divide the milliseconds of a joined stage among its parts, in proportion to their MACs.

    Args:
        whole: the price [3] of the stage; its milliseconds count.
        prices: of the parts, [3] each, whose milliseconds are filled in.
    """
    macs_of_parts = np.nan_to_num([price[0] for price in prices.values()])
    total = macs_of_parts.sum()
    # Parts that compute nothing share equally.
    shares = macs_of_parts / total if total else np.full(len(prices), 1 / len(prices))
    for price, share in zip(prices.values(), shares, strict=True):
        price[1:] = whole[1:] * share


@dataclass(frozen=True)
class Percentile:
    """The 95th percentile of a stage's milliseconds as a function of the batch size.

    Between measured sizes it is a straight line.

    Attributes:
        sizes: measured batch sizes, rising.
        ms: the percentile at each of them.
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
    """Each stage's 95th percentile at batch 1 to 64.

    Args:
        engine_stages: in the order in which they run.
        rows: inputs by name, [B, ...] each. They are repeated to fill a batch.
        repeats: timings at each size.
    """
    percentiles = list[Percentile]()
    with torch.inference_mode():
        states = {size: tiled_state(rows, size) for size in SIZES}
        for engine_stage in engine_stages:
            calls = dict[str, Callable[[], object]]()
            for size, state in states.items():
                calls[str(size)] = _bind(engine_stage.call, dict(state))
            times = interleaved(calls, repeats=repeats)
            measured = [float(np.quantile(times[str(size)], 0.95)) for size in SIZES]
            # A larger batch never counts as faster than a smaller one.
            rising = np.maximum.accumulate(measured)
            percentiles.append(Percentile(SIZES, tuple(map(float, rising))))
            for state in states.values():
                engine_stage.call(state)
    return tuple(percentiles)


@dataclass(frozen=True)
class Pace:
    """When each module ends within one eager forward.

    Attributes:
        shares: by module, the time of its end as a share (0 to 1) of the forward.
        ms: milliseconds of the forward.
    """

    shares: Mapping[str, float]
    ms: float


def pace(model: nn.Module, preprocess: nn.Module | None, rows: State, *, repeats: int = 9) -> Pace:
    """Measure when each module ends within a forward, as medians over repeats.

    A module that runs more than once counts to its last end. A time stamp takes about a
    microsecond, which matters for small modules. On a GPU each stamp waits for the work that was
    started, so modules do not overlap as they otherwise may.

    Args:
        model: in eval mode.
        preprocess: runs before it and counts; None for none.
        rows: inputs by name, [B, ...] each.
        repeats: forwards that count. Two more run before them.
    """
    modules = dict(model.named_modules())
    del modules[""]  # the model itself
    shares_of = dict[str, list[float]]()
    totals = list[float]()
    for number in range(WARMUPS + repeats):
        ends, total = _stamped(modules, lambda: call_model(model, preprocess, rows), rows)
        if number < WARMUPS:
            continue
        totals.append(total)
        for name, end in ends.items():
            shares_of.setdefault(name, []).append(end / total)
    shares = {name: float(np.median(values)) for name, values in shares_of.items()}
    return Pace(shares, float(np.median(totals)))


def _stamped(
    modules: Mapping[str, nn.Module], call: Callable[[], object], rows: State
) -> tuple[dict[str, float], float]:
    """Milliseconds from the start of a call to the end of each module, and to the end of the call.

    A module whose output is the output of the call ends with the call.
    """
    ends = dict[str, float]()
    # The last modules that returned the same value: one is inside the other.
    last = list[tuple[str, object]]()
    on_gpu = any(value.is_cuda for value in rows.values())

    def stamp(name: str, output: object) -> None:
        if on_gpu:
            _wait()
        ends[name] = (time.perf_counter() - start) * 1e3
        if last and last[-1][1] is not output:
            last.clear()
        last.append((name, output))

    with torch.inference_mode(), listening(modules, stamp):
        start = time.perf_counter()
        result = call()
        if on_gpu:
            _wait()
        total = (time.perf_counter() - start) * 1e3
    for name, output in last:
        if output is result:
            ends[name] = total
    return ends, total


def tiled(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows [count, ...]. If there are fewer, they are repeated from the first."""
    copies = math.ceil(count / len(rows))
    other_dims = [1] * (rows.dim() - 1)
    return rows.repeat(copies, *other_dims)[:count].contiguous()


def tiled_state(state: State, count: int) -> State:
    """`tiled` for every tensor of a state."""
    return {name: tiled(value, count) for name, value in state.items()}


def _bind(call: Callable[[State], object], state: State) -> Callable[[], object]:
    return lambda: call(state)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
