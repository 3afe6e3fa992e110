"""OpenVINO on the CPU, in float32: each segment with its exit and gate is one graph, on as many
threads as torch.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from offramp.engines._arrays import Array, Run, on_arrays, package
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage, Network
from offramp.plans.schedule import Schedule
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import Call, graphs_of, parts_of
from offramp.runtime.onnx_graphs import Graph

__all__ = ["OpenVino"]


class OpenVino(Engine):
    """Graphs in compiled models of OpenVINO, on the CPU."""

    def __init__(self) -> None:
        """It has no options."""
        super().__init__()

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One part per stage at which something is asked, compiled when its first rows arrive.

        Raises MissingExtra, InvalidArgument for another device.

        The number of threads is torch's when a part is compiled.
        """
        told = f"{self.version()}, {torch.get_num_threads()} threads"
        return parts_of(network, schedule, device, told, _compiled)

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """`infer` of one request, which shares its inputs, and nothing else: not our look for
        NaN.
        """
        (graph,) = graphs_of(network, schedule, dict(state))
        model = _model(graph)
        known = {name for port in model.inputs for name in port.get_names()}

        def bind(rows: State) -> Callable[[], object]:
            request = model.create_infer_request()
            given = {name: rows[name].detach().numpy() for name in known}
            return partial(request.infer, given, share_inputs=True)

        return bind

    def version(self) -> str:
        """The package's. Raises MissingExtra."""
        return f"openvino {_package().__version__.split('-')[0]}"

    @property
    def compiles(self) -> bool:
        """Always."""
        return True

    @property
    def own_threads(self) -> bool:
        """Always."""
        return True


def _package() -> Any:
    """The package without its telemetry, which forks a process on import to send that it was
    imported.
    """
    silent = {} if "openvino" in sys.modules else {"openvino_telemetry": None}
    before = {name: sys.modules[name] for name in silent if name in sys.modules}
    sys.modules.update(silent)  # type: ignore[arg-type]
    try:
        return package("openvino")
    finally:
        for name in silent:
            del sys.modules[name]
        sys.modules.update(before)


def _compiled(graph: Graph) -> Call:
    return on_arrays(graph, "OpenVINO", _requests, _told)


@cache
def _core() -> Any:
    """The one Core of the process, which is never destroyed.

    Each Core loads its CPU plugin, which puts a stack for signals in place of the one before, and
    unmaps it when the Core goes: after two Cores went in their order the stack was unmapped memory,
    and the next Ctrl-C a crash. A forked child that destroys a Core waits for threads that it does
    not have, or aborts.
    """
    core = _package().Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))
    return core


def _model(graph: Graph) -> Any:
    """The graph, compiled."""
    # Precision is set by hand: left to itself it computes in bfloat16 where the processor can.
    # Pinned threads would share their cores with torch's.
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(_core().read_model(graph.model.SerializeToString()), "CPU", config)


def _requests(graph: Graph) -> Run:
    """The graph, compiled, as a function that any number of threads may call at once."""
    model = _model(graph)
    # it drops what the graph does not read
    known = tuple(name for port in model.inputs for name in port.get_names())
    ports = {name: port for port in model.outputs for name in port.get_names()}
    wanted = tuple(ports[name] for name in graph.writes)  # found faster by port than by name
    free: list[Any] = []  # a request holds the tensors of one call

    def run(given: Mapping[str, Array]) -> list[Array]:
        try:
            request = free.pop()
        except IndexError:
            request = model.create_infer_request()
        # The request reads our arrays while it runs. Its own results are copied: the next call
        # writes over them.
        inputs = {name: given[name] for name in known}
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        answers = [found[port].copy() for port in wanted]
        free.append(request)
        if (spoiled := _spoiled(given)) is not None:
            for value in filter(_floating, answers):
                value[spoiled] = np.nan
        return answers

    return run


def _spoiled(given: Mapping[str, Array]) -> Array | None:
    """The rows [B] that hold a NaN, None without: its ReLU makes 0 of NaN, and such a row would
    leave with an answer.

    Infinities stay: masks hold them. So a NaN that a segment makes of infinities may still become a
    number inside it.
    """
    found: Array | None = None
    for value in filter(_floating, given.values()):
        # a quick look at all of it; torch would wake its threads
        if value.size and np.isnan(value.min()):
            rows = np.asarray(np.isnan(value).reshape(len(value), -1).any(1))
            found = rows if found is None else found | rows
    return found


def _floating(value: Array) -> bool:
    return value.dtype.kind == "f"


def _told(text: str) -> str:
    """Its sentence, or the operators that it does not know; without the places in its source."""
    if found := re.search(r"operations?: ([\w.]+)|-- (\w+)-\d+ with a message", text):
        return f"it does not have the operator {found[1] or found[2]} as it is used here"
    return re.sub(r"(?:Exception from|Check '[^']*' failed at) \S+:\s*", "", text)
