"""What runs graphs on NumPy arrays, as calls on named tensors; what it says when it fails becomes one sentence."""

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
from offramp.runtime.graphs import Call
from offramp.runtime.onnx_graphs import Graph

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Sequence[Array]]  # what a graph reads, by name -> what it writes, in order


def package(name: str) -> Any:
    """The package that an engine of its name runs on. Raises MissingExtra."""
    try:
        return import_module(name)
    except ImportError as problem:
        raise MissingExtra(name, name, f"engine={name!r}") from problem


def on_arrays(graph: Graph, runtime: str, made: Callable[[Graph], Run], told: Callable[[str], str]) -> Call:
    """A graph as a call. told: one sentence of what the runtime says, on one line. Raises BadNetwork; calls BadData."""
    try:
        run = made(graph)
    except Exception as problem:  # errors of runtimes share no class but Exception
        raise BadNetwork(
            f"segment {graph.node!r} cannot run on {runtime}: {_brief(problem, told)}; run it with engine='torch'"
        ) from problem

    node, reads, writes = graph.node, graph.reads, graph.writes  # and not the graph, which has the weights once more

    def call(state: State) -> State:
        try:
            found = run({name: state[name].detach().numpy() for name in reads})
        except Exception as problem:
            raise BadData(
                f"segment {node!r} failed in {runtime}: {_brief(problem, told)}; run it with engine='torch'"
            ) from problem
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(writes, found, strict=True)}

    return call


def bound(run: Run, reads: Sequence[str]) -> Callable[[State], Callable[[], object]]:
    """A function that makes arrays of inputs and returns the bare call of a graph on them."""

    def bind(rows: State) -> Callable[[], object]:
        return partial(run, {name: rows[name].detach().numpy() for name in reads})

    return bind


def _brief(problem: Exception, told: Callable[[str], str]) -> str:
    return told(" ".join(str(problem).split()))[:300].rstrip(".")
