"""What runs graphs on NumPy arrays, as calls on named tensors; what it says when it fails becomes
one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.errors import BadData, BadNetwork, MissingExtra
from offramp.networks.inputs import State
from offramp.runtime.onnx_graphs import Graph

Array = NDArray[Any]
# what a graph reads, by name -> what it writes, in order
Run = Callable[[Mapping[str, Array]], Sequence[Array]]


def package(name: str) -> Any:
    """The package that an engine of its name runs on. Raises MissingExtra."""
    try:
        return import_module(name)
    except ImportError as problem:
        raise MissingExtra(name, name, f"engine={name!r}") from problem


class ArrayCall:
    """A graph as a call on named tensors; `run` is the same on arrays."""

    def __init__(self, graph: Graph, run: Run, runtime: str, told: Callable[[str], str]) -> None:
        # Not the graph itself, which has the weights once more.
        self.node = graph.node
        self.reads = graph.reads
        self.writes = graph.writes
        self.run = run
        self.runtime = runtime
        self.told = told

    def __call__(self, state: State) -> State:
        """What the graph gives. Raises BadData with a sentence of what the runtime says."""
        try:
            found = self.run({name: state[name].detach().numpy() for name in self.reads})
        except Exception as problem:  # errors of runtimes share no class but Exception
            brief = _brief(problem, self.told)
            raise BadData(
                f"segment {self.node!r} failed in {self.runtime}: {brief}; run it with "
                f"engine='torch'"
            ) from problem
        pairs = zip(self.writes, found, strict=True)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in pairs}


def on_arrays(
    graph: Graph, runtime: str, made: Callable[[Graph], Run], told: Callable[[str], str]
) -> ArrayCall:
    """A graph as a call.

    Args:
        graph: what is run.
        runtime: its name in sentences.
        made: compiles the graph.
        told: one sentence of what the runtime says, on one line.

    Raises:
        BadNetwork: the runtime cannot run it.
    """
    try:
        run = made(graph)
    except Exception as problem:  # errors of runtimes share no class but Exception
        raise BadNetwork(
            f"segment {graph.node!r} cannot run on {runtime}: {_brief(problem, told)}; run it "
            f"with engine='torch'"
        ) from problem
    return ArrayCall(graph, run, runtime, told)


def bound(run: Run, reads: Sequence[str]) -> Callable[[State], Callable[[], object]]:
    """A function that makes arrays of inputs and returns the bare call of a graph on them."""

    def bind(rows: State) -> Callable[[], object]:
        return partial(run, {name: rows[name].detach().numpy() for name in reads})

    return bind


def _brief(problem: Exception, told: Callable[[str], str]) -> str:
    return told(" ".join(str(problem).split()))[:300].rstrip(".")
