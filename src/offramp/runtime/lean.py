"""The loop of a chain on NumPy arrays, for engines that take arrays: what a small batch waits for,
and no more.

`Runner._walk` serves every schedule and every engine. At batch 1 on a small network its tensors,
dictionaries and checks take longer than the network itself. This loop does the same for the usual
case: a chain, rows of the shapes that were compiled, no deadline. For all else it gives None, and
the Runner walks.

Shapes: B rows handed in, n rows still here, C classes.
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

from offramp.networks.inputs import State
from offramp.networks.network import LOGITS, SCORE, EngineStage
from offramp.plans.schedule import Stage
from offramp.plans.signature import INPUT, is_input
from offramp.plans.topology import LEAVE, Topology
from offramp.plans.trace import WHY
from offramp.runtime.outputs import GATE, Outputs, RowNumbers, Unpacked

Array = NDArray[Any]
Shape = tuple[int | None, ...]  # of a row; None where it follows the length of a text
# what is read, by name -> what is given, in order
Run = Callable[[Mapping[str, Array]], Sequence[Array]]


class CompiledPiece(abc.ABC):
    """A function of an engine's stage that is compiled for the shapes and types of rows that
    arrive.
    """

    @abc.abstractmethod
    def __call__(self, state: State) -> State:
        """The named tensors that it gives."""

    @abc.abstractmethod
    def seal(self) -> None:
        """From here on nothing is compiled: rows of other shapes are refused."""

    @abc.abstractmethod
    def compiled_for(self) -> list[dict[str, Wanted]]:
        """By name what it reads, once for each kind of rows that it was compiled for."""


@dataclass(frozen=True)
class Wanted:
    """The type and the shape of the rows that were compiled for."""

    dtype: torch.dtype
    shape: Shape

    def fits(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Whether rows of this type and shape were compiled for."""
        if dtype != self.dtype or len(shape) != len(self.shape):
            return False
        return all(size is None or size == got for size, got in zip(self.shape, shape, strict=True))


@dataclass(frozen=True)
class OnArrays:
    """What an engine's stage computes, on NumPy arrays: `reads` by name in, `writes` in order
    out.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Run
    inputs: Mapping[str, Wanted]


@runtime_checkable
class ArrayFunction(Protocol):
    """A function of an engine's stage that can be run on arrays as well."""

    def on_arrays(self) -> OnArrays | None:
        """The call on arrays; None where there is none, or where it is compiled for several
        shapes.
        """


@dataclass(frozen=True)
class _LeanStep:
    """A stage of the chain, with all that the loop needs of it at hand.

    Attributes:
        run: what it computes.
        reads: names of what `run` is given.
        score: where among its results the score is; -1 without a gate.
        threshold: scores from here on leave; never +inf, which closes a gate.
        logits: where among its results the answer is; -1 without one.
        exit_index: the number of its exit; -1 without one.
        keeps: names of what later stages read of its results, and where among them it is.
        carries: names of all that later stages read.
        why: why rows are answered that end here; -1 where none do.
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
    """The loop over these stages; None where it cannot be had: forks, several shapes, or no
    arrays.
    """
    if not topology.is_chain or topology.defaults:
        return None
    found = list[OnArrays]()
    inputs = dict[str, Wanted]()
    for engine_stage in engine_stages:
        (function, *others) = engine_stage.functions.values()
        if isinstance(function, ArrayFunction):
            on_arrays = function.on_arrays()
        else:
            on_arrays = None
        if others or on_arrays is None or not expected(engine_stage.stage):
            return None
        if any(inputs.get(name, wanted) != wanted for name, wanted in on_arrays.inputs.items()):
            return None
        inputs.update(on_arrays.inputs)
        found.append(on_arrays)
    if not inputs:
        return None
    following = [engine_stage.name for engine_stage in engine_stages[1:]]
    steps = list[_LeanStep]()
    for engine_stage, one, after in zip(engine_stages, found, [*following, LEAVE], strict=True):
        if engine_stage.stage.edges[-1].to != after:
            return None
        steps.append(_step(topology, engine_stage, one, tuple(inputs)))
    return LeanChain(steps, inputs, topology.exits)


def expected(stage: Stage) -> bool:
    """Whether rows leave here by one score, or all go on, or all end."""
    if not stage.gate:
        return len(stage.edges) == 1
    return len(stage.edges) == 2 and stage.edges[0].to == LEAVE and stage.exit


def _step(
    topology: Topology, engine_stage: EngineStage, one: OnArrays, inputs: Sequence[str]
) -> _LeanStep:
    stage = engine_stage.stage
    columns = {name: index for index, name in enumerate(one.writes)}
    carries = list[str]()
    for name in stage.edges[-1].carries:
        carries += inputs if name == INPUT else [name]
    return _LeanStep(
        run=one.run,
        reads=one.reads,
        score=columns[stage.name + SCORE] if stage.gate else -1,
        threshold=float(np.float32(stage.thresholds[0])) if stage.gate else 0.0,
        logits=columns.get(stage.name + LOGITS, -1),
        exit_index=topology.exit_index(stage.name) if stage.exit else -1,
        keeps=tuple((name, columns[name]) for name in carries if name in columns),
        carries=tuple(carries),
        why=WHY.index(stage.why) if stage.last else -1,
    )


class LeanChain:
    """A chain of stages as a loop on arrays. `chain(x)` -> Outputs, or None for what the Runner has
    to look at.
    """

    def __init__(
        self, steps: Sequence[_LeanStep], inputs: Mapping[str, Wanted], exits: tuple[str, ...]
    ) -> None:
        self._steps = tuple(steps)
        self.exits = exits
        self._inputs = dict(inputs)
        self._only = None
        if tuple(inputs) == (INPUT,) and None not in inputs[INPUT].shape:
            wanted = inputs[INPUT]
            self._only = torch.empty(0, dtype=wanted.dtype).numpy().dtype, wanted.shape

    def __call__(self, x: Any) -> Outputs | None:
        """Answers for x [B, ...]. Raises whatever the engine raises."""
        state = self.bound(x)
        if state is None:
            return None
        count = len(next(iter(state.values())))
        if count == 1:
            return self._one(state)
        return self._several(state, count) if count else None

    def bound(self, x: Any) -> dict[str, Array] | None:
        """The inputs as arrays by name; None unless they are just what was compiled for."""
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
            array = _plain_array(value)
            if array is None or not array.ndim:
                return None
            if not wanted.fits(torch.from_numpy(array[:0]).dtype, array.shape[1:]):
                return None
            state[name] = array
        return state if len({len(array) for array in state.values()}) == 1 else None

    def _one(self, state: dict[str, Array]) -> Outputs:
        """A batch of one row: scores are compared as Python's floats."""
        bad: tuple[tuple[RowNumbers, Any], ...] = ()
        for step in self._steps:
            found = step.run({name: state[name] for name in step.reads})
            if step.score >= 0:
                score = found[step.score].item()
                if score >= step.threshold:  # `choose`, for a threshold below +inf
                    return Unpacked(
                        found[step.logits], ((None, step.exit_index),), GATE, bad, self.exits
                    )
                if score != score:
                    bad = ((None, np.True_),)
            elif step.why >= 0:
                return Unpacked(
                    found[step.logits], ((None, step.exit_index),), step.why, bad, self.exits
                )
            for name, index in step.keeps:
                state[name] = found[index]
        raise AssertionError("a chain ends in a stage that answers")

    def _several(self, state: dict[str, Array], count: int) -> Outputs | None:
        """A batch of several rows.

        The answers of a stage are written for all rows that are still here; those of the rows that
        go on are written over by later stages. So rows that leave are never gathered.
        """
        logits: Array | None = None  # [B, C]
        rows: RowNumbers = None
        passed = list[tuple[RowNumbers, int]]()
        bad = list[tuple[RowNumbers, Any]]()
        why = GATE
        for step in self._steps:
            found = step.run({name: state[name] for name in step.reads})
            ends = step.why >= 0
            later: Any = None
            if step.score >= 0:
                scores = found[step.score]  # [n]
                later = staying(scores, step.threshold)
                if len(later):
                    nan = np.isnan(scores)
                    if nan.any():
                        bad.append((rows, nan))
                ends = not len(later)
            if ends or (later is not None and len(later) < len(scores)):
                answers = found[step.logits]
                if logits is None and rows is None:
                    logits = answers
                elif (
                    logits is None
                    or answers.dtype != logits.dtype
                    or answers.shape[1] != logits.shape[1]
                ):
                    return None
                else:
                    logits[rows] = answers
                passed.append((rows, step.exit_index))
                if ends:
                    why = step.why if step.score < 0 else GATE
                    return Unpacked(logits, passed, why, bad, self.exits)
            for name, index in step.keeps:
                state[name] = found[index]
            if later is not None and len(later) < len(scores):
                state = {name: state[name][later] for name in step.carries}
                rows = later if rows is None else rows[later]
        raise AssertionError("a chain ends in a stage that answers")


def staying(scores: Array, threshold: float) -> NDArray[np.int64]:
    """The rows of scores [n] that do not leave: `choose` for one score a row and a threshold below
    +inf.
    """
    return np.flatnonzero(~(scores >= np.float32(threshold)))


def _plain_array(x: Any) -> Array | None:
    """An array, or the memory of a plain tensor on the CPU; None for all else."""
    if type(x) is np.ndarray:
        return x
    if type(x) is not Tensor:
        return None
    try:
        return x.numpy()
    except (RuntimeError, TypeError):  # it needs a gradient, or lies on another device
        return None


def inputs_of(reads: Mapping[str, Wanted]) -> dict[str, Wanted]:
    """Of what a stage reads the inputs."""
    return {name: wanted for name, wanted in reads.items() if is_input(name)}
