"""A fast loop over a chain of stages, on NumPy arrays, for engines that take arrays.

`Runner._walk` serves every schedule and every engine. At batch 1 on a small network, its tensors,
dictionaries and checks take longer than the network itself. The loop here computes the same for the
common case: a chain, rows of the compiled shapes, no deadline. In all other cases it returns None,
and the Runner uses `_walk`.

Shapes: B rows in x, n rows still on their way, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.networks.inputs import State, readable
from offramp.networks.network import LOGITS, SCORE, EngineStage
from offramp.plans.replay import WHY
from offramp.plans.schedule import Stage
from offramp.plans.signature import INPUT, is_input
from offramp.plans.topology import LEAVE, Topology
from offramp.runtime.outputs import GATE, Outputs, RowNumbers, Unpacked

Array = NDArray[Any]
Shape = tuple[int | None, ...]  # of a row; None where it follows the length of a text
# the arrays that are read, by name -> the arrays that are written, in order
Run = Callable[[Mapping[str, Array]], Sequence[Array]]


class CompiledPiece(abc.ABC):
    """A function of a stage that is compiled for the shapes and types of the rows that arrive."""

    @abc.abstractmethod
    def __call__(self, state: State) -> State:
        """The named tensors that it writes."""

    @abc.abstractmethod
    def seal(self) -> None:
        """Compile nothing from now on. Rows of other shapes raise an error."""

    @abc.abstractmethod
    def compiled_for(self) -> list[dict[str, Wanted]]:
        """What it reads, by name; once for each kind of rows that it was compiled for."""


@dataclass(frozen=True)
class Wanted:
    """The type and shape of rows for which a stage was compiled.

    Attributes:
        dtype: of the rows.
        shape: of a row; None for a dimension of any size.
    """

    dtype: torch.dtype
    shape: Shape

    def fits(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Whether rows have this type and shape."""
        if dtype != self.dtype or len(shape) != len(self.shape):
            return False
        for wanted, size in zip(self.shape, shape, strict=True):
            if wanted is not None and wanted != size:
                return False
        return True


@dataclass(frozen=True)
class OnArrays:
    """A stage as a function of NumPy arrays.

    Attributes:
        reads: names of the arrays that it reads.
        writes: names of the arrays that it returns, in order.
        run: the function.
        inputs: types and shapes of the network's inputs among `reads`.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Run
    inputs: Mapping[str, Wanted]


@runtime_checkable
class ArrayFunction(Protocol):
    """A function of a stage that also runs on arrays."""

    def on_arrays(self) -> OnArrays | None:
        """The function of arrays; None if there is none, or if it has several shapes."""


@dataclass(frozen=True)
class _LeanStep:
    """A stage of the chain, prepared for the loop.

    Attributes:
        run: the function of the stage.
        reads: names of the arrays that `run` reads.
        score: position of the score among its results; -1 without a gate.
        threshold: rows with this score or a larger one leave. Never +inf, which closes a gate.
        logits: position of the answer among its results; -1 without an exit.
        exit_index: the number of its exit; -1 without an exit.
        keeps: the results that later stages read: their names and positions.
        carries: names of all arrays that later stages read.
        why: the reason of rows that end here; -1 if rows go on.
    """

    run: Run
    reads: tuple[str, ...]
    score: int
    threshold: float
    logits: int
    exit_index: int
    keeps: tuple[tuple[str, int], ...]
    carries: tuple[str, ...]
    why: int


def lean_chain(topology: Topology, engine_stages: Sequence[EngineStage]) -> LeanChain | None:
    """Make the loop over some stages.

    Args:
        topology: of the network.
        engine_stages: of a schedule, opened on an engine.

    Returns:
        The loop. None if the network has forks, if stages were compiled for several shapes, or if
        the engine does not run on arrays.
    """
    if not topology.is_chain or topology.defaults:
        return None
    functions = list[OnArrays]()
    inputs = dict[str, Wanted]()
    for engine_stage in engine_stages:
        on_arrays = _array_function(engine_stage)
        if on_arrays is None:
            return None
        for name, wanted in on_arrays.inputs.items():
            if inputs.setdefault(name, wanted) != wanted:  # two stages want different shapes
                return None
        functions.append(on_arrays)
    if not inputs:
        return None
    # Each stage must lead to the next one, and the last one to the end.
    following = [engine_stage.name for engine_stage in engine_stages[1:]]
    following.append(LEAVE)
    steps = list[_LeanStep]()
    for engine_stage, on_arrays, after in zip(engine_stages, functions, following, strict=True):
        if engine_stage.stage.edges[-1].to != after:
            return None
        steps.append(_step(topology, engine_stage, on_arrays, tuple(inputs)))
    return LeanChain(steps, inputs, topology.exits)


def _array_function(engine_stage: EngineStage) -> OnArrays | None:
    """The only function of a stage as a function of arrays; None if the loop cannot use it."""
    function, *others = engine_stage.functions.values()
    if others or not isinstance(function, ArrayFunction) or not expected(engine_stage.stage):
        return None
    return function.on_arrays()


def expected(stage: Stage) -> bool:
    """Whether a stage is usual: rows leave here by one score, or all go on, or all end."""
    if not stage.gate:
        return len(stage.edges) == 1
    return len(stage.edges) == 2 and stage.edges[0].to == LEAVE and stage.exit


def _step(
    topology: Topology, engine_stage: EngineStage, on_arrays: OnArrays, inputs: Sequence[str]
) -> _LeanStep:
    stage = engine_stage.stage
    positions = {name: index for index, name in enumerate(on_arrays.writes)}
    carries = list[str]()
    keeps = list[tuple[str, int]]()
    for name in stage.edges[-1].carries:
        if name == INPUT:  # stands for all inputs
            carries += inputs
        else:
            carries.append(name)
    for name in carries:
        if name in positions:
            keeps.append((name, positions[name]))
    score = -1
    threshold = 0.0
    if stage.gate:
        score = positions[stage.name + SCORE]
        threshold = float(np.float32(stage.thresholds[0]))
    return _LeanStep(
        run=on_arrays.run,
        reads=on_arrays.reads,
        score=score,
        threshold=threshold,
        logits=positions.get(stage.name + LOGITS, -1),
        exit_index=topology.exit_index(stage.name) if stage.exit else -1,
        keeps=tuple(keeps),
        carries=tuple(carries),
        why=WHY.index(stage.why) if stage.last else -1,
    )


class LeanChain:
    """A chain of stages as a loop on arrays. `chain(x)` returns Outputs, or None for rows that need
    the general loop of the Runner.

    Args:
        steps: the stages, in order.
        inputs: types and shapes of the inputs, by name.
        exits: names of the exits of the network.
    """

    def __init__(
        self, steps: Sequence[_LeanStep], inputs: Mapping[str, Wanted], exits: tuple[str, ...]
    ) -> None:
        self._steps = tuple(steps)
        self.exits = exits
        self._inputs = dict(inputs)
        # NumPy type and row shape, if there is a single input of one shape: the fastest check.
        self._only: tuple[np.dtype[Any], Shape] | None = None
        if tuple(inputs) == (INPUT,) and None not in inputs[INPUT].shape:
            wanted = inputs[INPUT]
            self._only = (torch.empty(0, dtype=wanted.dtype).numpy().dtype, wanted.shape)

    def __call__(self, x: Any) -> Outputs | None:
        """The Outputs for x [B, ...]. Raises whatever the engine raises."""
        state = self.bound(x)
        if state is None:
            return None
        count = len(next(iter(state.values())))
        if count == 1:
            return self._one(state)
        if not count:
            return None
        return self._several(state)

    def bound(self, x: Any) -> dict[str, Array] | None:
        """The inputs as arrays by name. None if they have other types or shapes than compiled."""
        if self._only is not None:
            array = _plain_array(x)
            dtype, shape = self._only
            if array is None or array.dtype != dtype or array.shape[1:] != shape or not array.ndim:
                return None
            return {INPUT: array}
        if not isinstance(x, Mapping) or len(x) != len(self._inputs):
            return None
        state = dict[str, Array]()
        for name, wanted in self._inputs.items():
            value = x.get(name.removeprefix(INPUT + "/"))
            array = _plain_array(readable(value))
            if array is None or not array.ndim:
                return None
            if not wanted.fits(torch.from_numpy(array[:0]).dtype, array.shape[1:]):
                return None
            state[name] = array
        counts = set(map(len, state.values()))
        return state if len(counts) == 1 else None

    def _one(self, state: dict[str, Array]) -> Outputs:
        """A batch of one row. Its scores are compared as Python floats, which is fastest."""
        bad: tuple[tuple[RowNumbers, Any], ...] = ()
        for step in self._steps:
            results = step.run({name: state[name] for name in step.reads})
            if step.score >= 0:
                score = results[step.score].item()
                if score >= step.threshold:  # `choose`, for a threshold below +inf
                    passed = ((None, step.exit_index),)
                    return Unpacked(results[step.logits], passed, GATE, bad, self.exits)
                if score != score:  # NaN
                    bad = ((None, np.True_),)
            elif step.why >= 0:
                passed = ((None, step.exit_index),)
                return Unpacked(results[step.logits], passed, step.why, bad, self.exits)
            for name, index in step.keeps:
                state[name] = results[index]
        raise AssertionError("a chain ends in a stage that answers")

    def _several(self, state: dict[str, Array]) -> Outputs | None:
        """A batch of several rows.

        A stage writes its answers for all rows that are still on their way. Later stages overwrite
        those of the rows that go on. So rows that leave are never gathered.
        """
        logits: Array | None = None  # [B, C]
        rows: RowNumbers = None
        passed = list[tuple[RowNumbers, int]]()
        bad = list[tuple[RowNumbers, Any]]()
        why = GATE
        for step in self._steps:
            results = step.run({name: state[name] for name in step.reads})
            ends = step.why >= 0  # whether all rows end here
            later: Any = None  # positions of the rows that go on; None without a gate
            if step.score >= 0:
                scores = results[step.score]  # [n]
                later = staying(scores, step.threshold)
                if len(later):
                    nan = np.isnan(scores)
                    if nan.any():
                        bad.append((rows, nan))
                ends = not len(later)
            # Some rows are answered here.
            if ends or (later is not None and len(later) < len(scores)):
                answers = results[step.logits]  # [n, C]
                if logits is None and rows is None:
                    logits = answers
                elif (
                    logits is None
                    or answers.dtype != logits.dtype
                    or answers.shape[1] != logits.shape[1]
                ):
                    return None  # exits with answers of different types or sizes
                else:
                    logits[rows] = answers
                passed.append((rows, step.exit_index))
                if ends:
                    why = step.why if step.score < 0 else GATE
                    return Unpacked(logits, passed, why, bad, self.exits)
            for name, index in step.keeps:
                state[name] = results[index]
            # Gather the rows that go on.
            if later is not None and len(later) < len(scores):
                state = {name: state[name][later] for name in step.carries}
                rows = later if rows is None else rows[later]
        raise AssertionError("a chain ends in a stage that answers")


def staying(scores: Array, threshold: float) -> NDArray[np.int64]:
    """The positions of rows that do not leave, for scores [n] and a threshold below +inf.

    This is `choose` for one score a row. A row whose score is NaN stays.
    """
    return np.flatnonzero(~(scores >= np.float32(threshold)))


def leaving(scores: Array, threshold: float) -> NDArray[np.int64]:
    """The positions of the other rows, those that leave."""
    return np.flatnonzero(scores >= np.float32(threshold))


def leaves(score: float, threshold: float) -> bool:
    """The same for one row: whether it leaves. A call of NumPy would take much longer."""
    return score >= threshold


def _plain_array(x: Any) -> Array | None:
    """An array, or the memory of a plain tensor on the CPU; None for anything else."""
    if type(x) is np.ndarray:
        return x
    if type(x) is not Tensor:
        return None
    try:
        return x.numpy()
    except (RuntimeError, TypeError):  # it needs a gradient, or is on another device
        return None


def inputs_of(reads: Mapping[str, Wanted]) -> dict[str, Wanted]:
    """The inputs of the network among the tensors that a stage reads."""
    return {name: wanted for name, wanted in reads.items() if is_input(name)}
