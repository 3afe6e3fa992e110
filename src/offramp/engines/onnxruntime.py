"""ONNX Runtime on the CPU: each segment with its exit and gate as one graph, on as many threads as
torch has.

int8=ROWS: segments in eight bits, on scales that are set by these rows (a spec such as
digits[0:200]). Take rows that are used for nothing else: they count as rows that trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.engines._arrays import Run, bound, on_arrays, package
from offramp.engines._quantizing import Quantizer, scaling_rows
from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage, Network
from offramp.plans.schedule import Schedule
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import Call, graphs_of, parts_of
from offramp.runtime.one_graph import lowered
from offramp.runtime.onnx_graphs import Graph

__all__ = ["OnnxRuntime"]

Digests = NDArray[np.uint64]


class OnnxRuntime(Engine):
    """Graphs in sessions of ONNX Runtime, on the CPU."""

    def __init__(self, *, int8: str | None = None) -> None:
        """int8: a spec of the rows that set scales; None computes in float32."""
        super().__init__(**({} if int8 is None else {"int8": int8}))
        self.int8 = int8

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One part per stage at which something is asked (in eight bits one per step), compiled
        when its first rows arrive.

        Raises MissingExtra, InvalidArgument for another device.
        The number of threads is torch's when a part is compiled, unless the process was given one
        pool for all sessions (`onnxruntime.set_global_thread_pool_sizes`): then it is that pool's.
        """
        told = f"{self.version()}, {torch.get_num_threads()} threads"
        if self.int8 is None:
            return parts_of(network, schedule, device, told, _compiled)
        narrow = Quantizer(network, scaling_rows(self.int8))
        told = ", ".join([told, *self.marks()])
        # Each node is quantised as it was when it was recorded: what stands between two would be
        # rounded otherwise.
        return parts_of(
            network, schedule, device, told, lambda graph: _compiled(narrow(graph)), joined=False
        )

    def in_one(
        self,
        network: Network,
        schedule: Schedule,
        engine_stages: Sequence[EngineStage],
        rows: State,
    ) -> Run:
        """A session of the whole schedule. Not in eight bits, where each stage stays as it was
        recorded.
        """
        if self.int8 is not None:
            raise BadNetwork("stages in eight bits are rounded one by one")
        return _session(lowered(network, schedule, engine_stages, rows))

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """`session.run` on NumPy arrays, and nothing else. The session has the options of
        `open`.
        """
        (graph,) = graphs_of(network, schedule, dict(state))
        if self.int8 is not None:
            graph = Quantizer(network, scaling_rows(self.int8))(graph)
        return bound(_session(graph), graph.reads)

    def version(self) -> str:
        """The package's. Raises MissingExtra."""
        return f"onnxruntime {package('onnxruntime').__version__}"

    def marks(self) -> list[str]:
        """The rows of the option by what they hold, wherever they lie."""
        if self.int8 is None:
            return []
        return [f"int8={scaling_rows(self.int8).fingerprint}"]

    @property
    def compiles(self) -> bool:
        """Always."""
        return True

    @property
    def own_threads(self) -> bool:
        """Always."""
        return True

    @property
    def trained_on(self) -> Digests | None:
        """The rows [n] that set scales."""
        if self.int8 is None:
            return None
        source = scaling_rows(self.int8)
        return source.take(np.arange(len(source))).digest


def _compiled(graph: Graph) -> Call:
    return on_arrays(graph, "ONNX Runtime", _session, _told)


def _session(graph: Graph) -> Run:
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Each segment has threads of its own: those that wait for its next batch must not stand in the
    # way of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    written = graph.model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    except RuntimeError as problem:  # the process was given one pool for all sessions
        if "use_per_session_threads" not in str(problem):
            raise
        options.use_per_session_threads = False
        session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    return partial(session.run, graph.writes)


def _told(text: str) -> str:
    """Its sentence, without the code before it and the path of the source behind it."""
    if found := re.search(r"implementation for ([\w.]+)\((\d+)\)", text):
        return (
            f"it has no implementation of the operator {found[1]} (opset {found[2]}) for "
            "these types"
        )
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
