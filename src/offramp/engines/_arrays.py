"""Calls of runtimes that take NumPy arrays, as calls on named tensors. An error of the runtime
becomes one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.errors import BadData, BadNetwork, MissingExtra
from offramp.networks.inputs import State
from offramp.runtime.onnx_graphs import Graph

Array = NDArray[Any]
Made = TypeVar("Made")
# the arrays that a graph reads, by name -> the arrays that it writes, in order
Run = Callable[[Mapping[str, Array]], Sequence[Array]]


def package(name: str) -> Any:
    """The package with the name of an engine, on which it runs. Raises MissingExtra."""
    try:
        return import_module(name)
    except ImportError as problem:
        raise MissingExtra(name, name, f"engine={name!r}") from problem


class ArrayCall:
    """A compiled graph as a call on named tensors.

    Args:
        graph: the graph.
        run: the same as a function of arrays.
        runtime: its name, for messages.
        explain: turns an error text of the runtime into one sentence.
    """

    def __init__(self, graph: Graph, run: Run, runtime: str, explain: Callable[[str], str]) -> None:
        # The graph itself is not kept: it has a second copy of the weights.
        self.node = graph.node
        self.reads = graph.reads
        self.writes = graph.writes
        self.run = run
        self.runtime = runtime
        self.explain = explain

    def __call__(self, state: State) -> State:
        """The named tensors that the graph writes. Raises BadData if the runtime fails."""
        try:
            arrays = self.run(as_arrays(state, self.reads))
        except Exception as problem:  # errors of runtimes share no class but Exception
            reason = reason_of(problem, self.explain)
            raise BadData(
                f"segment {self.node!r} failed in {self.runtime}: {reason}. Use engine='torch'"
            ) from problem
        outputs: State = {}
        for name, array in zip(self.writes, arrays, strict=True):
            outputs[name] = torch.from_numpy(np.asarray(array))
        return outputs


def as_arrays(state: State, names: Sequence[str]) -> dict[str, Array]:
    """Some tensors of a state as arrays, without a copy."""
    return {name: state[name].detach().numpy() for name in names}


def on_arrays(
    graph: Graph, runtime: str, compiled: Callable[[Graph], Run], explain: Callable[[str], str]
) -> ArrayCall:
    """Compile a graph.

    Args:
        graph: the graph.
        runtime: its name, for messages.
        compiled: compiles the graph.
        explain: turns an error text of the runtime, on one line, into one sentence.

    Raises:
        BadNetwork: the runtime cannot run the graph.
    """
    try:
        run = compiled(graph)
    except Exception as problem:  # errors of runtimes share no class but Exception
        reason = reason_of(problem, explain)
        raise BadNetwork(
            f"segment {graph.node!r} cannot run on {runtime}: {reason}. Use engine='torch'"
        ) from problem
    return ArrayCall(graph, run, runtime, explain)


def in_one_call(
    graph: Graph, compiled: Callable[[Graph], Made], explain: Callable[[str], str]
) -> Made:
    """Compile the graph of a whole plan.

    Args:
        graph: the graph.
        compiled: compiles the graph.
        explain: turns an error text of the runtime, on one line, into one sentence.

    Raises:
        BadNetwork: the runtime cannot run the graph. Stages run instead.
    """
    try:
        return compiled(graph)
    except Exception as problem:  # errors of runtimes share no class but Exception
        raise BadNetwork(f"one graph cannot run: {reason_of(problem, explain)}") from problem


def bound(run: Run, reads: Sequence[str]) -> Callable[[State], Callable[[], object]]:
    """A function that turns inputs into arrays and returns the bare call of a graph on them."""

    def bind(rows: State) -> Callable[[], object]:
        return partial(run, as_arrays(rows, reads))

    return bind


def reason_of(problem: Exception, explain: Callable[[str], str]) -> str:
    """An error of a runtime as one sentence without its full stop, by the runtime's `explain`."""
    text = " ".join(str(problem).split())  # on one line
    return explain(text)[:300].rstrip(".")
