"""ONNX Runtime on the CPU: each segment with its exit and gate is one graph, on as many threads as
torch has.

int8=ROWS: segments in eight bits, on scales that these rows set (a spec such as digits[0:200]). Use
rows that are used for nothing else: they count as training rows.
reach=FILE, with int8: the scales of a segment follow only those of the rows that reach it under the
plan in this file, such as one that was calibrated in float32. Another plan there makes another
engine. The rows that made this plan count as training rows too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.engines._arrays import Run, bound, in_one_call, on_arrays, package
from offramp.engines._quantizing import Quantizer, plan_mark, reaching_plan, scaling_rows
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage, Network
from offramp.plans.provenance import FORM
from offramp.plans.schedule import Schedule
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import Call, graphs_of, parts_of
from offramp.runtime.one_graph import lowered
from offramp.runtime.onnx_graphs import Graph

__all__ = ["OnnxRuntime"]

Digests = NDArray[np.uint64]


class OnnxRuntime(Engine):
    """Graphs in sessions of ONNX Runtime, on the CPU."""

    def __init__(self, *, int8: str | None = None, reach: str | None = None) -> None:
        """Keep the options.

        Args:
            int8: a spec of the rows that set scales; None computes in float32.
            reach: the file of a plan; only rows that reach a segment under it set its scales. None
                for all rows.

        Raises:
            InvalidArgument: reach without int8.
        """
        options = dict[str, str]()
        if int8 is not None:
            options["int8"] = int8
        if reach is not None:
            options["reach"] = reach
        super().__init__(**options)
        if reach is not None and int8 is None:
            raise InvalidArgument(f"reach must come with int8=ROWS, got reach={reach} alone")
        self.int8 = int8
        self.reach = reach

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One stage per node with an open exit (in eight bits one per node), compiled when its
        first rows arrive.

        Raises MissingExtra, and InvalidArgument for another device.
        The number of threads is that of torch when a stage is compiled. If the process has one pool
        for all sessions (`onnxruntime.set_global_thread_pool_sizes`), it is that of the pool.
        """
        told = f"{self.version()}, {torch.get_num_threads()} threads"
        if self.int8 is None:
            return parts_of(network, schedule, device, told, _compiled)
        narrow = self._quantizer(network, self.int8)
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
        """A session of the whole schedule. There is none in eight bits, because a stage must round
        as it did when it was recorded.
        """
        if self.int8 is not None:
            raise BadNetwork("stages in eight bits are rounded one by one")
        graph = lowered(network, schedule, engine_stages, rows)
        return in_one_call(graph, _session, _explained)

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """Only `session.run` on NumPy arrays. The session has the options of `open`."""
        (graph,) = graphs_of(network, schedule, dict(state))
        if self.int8 is not None:
            graph = self._quantizer(network, self.int8)(graph)
        return bound(_session(graph), graph.reads)

    def version(self) -> str:
        """The package and its version. Raises MissingExtra."""
        return f"onnxruntime {package('onnxruntime').__version__}"

    def marks(self) -> list[str]:
        """The options with fingerprints of their rows and plan, which do not depend on where these
        are.
        """
        marks = list[str]()
        if self.int8 is not None:
            marks.append(f"int8={scaling_rows(self.int8).fingerprint}")
        if self.reach is not None:
            marks.append(f"reach={plan_mark(reaching_plan(self.reach))}")
        return marks

    @property
    def compiles(self) -> bool:
        """True: a session is made for the first rows."""
        return True

    @property
    def own_threads(self) -> bool:
        """True: sessions have threads and weights of their own."""
        return True

    @property
    def trained_on(self) -> Digests | None:
        """The digests [n] of the rows that set scales, and of those that made the plan of `reach`.
        None without int8.
        """
        if self.int8 is None:
            return None
        source = scaling_rows(self.int8)
        digests = source.take(np.arange(len(source))).digest
        seen = None if self.reach is None else reaching_plan(self.reach).rows
        if seen is None:
            return digests
        return np.concatenate([digests, seen.in_form(FORM)])

    def _quantizer(self, network: Network, int8: str) -> Quantizer:
        plan = None if self.reach is None else reaching_plan(self.reach)
        return Quantizer(network, scaling_rows(int8), plan)


def _compiled(graph: Graph) -> Call:
    return on_arrays(graph, "ONNX Runtime", _session, _explained)


def _session(graph: Graph) -> Run:
    """A graph as a function of arrays."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Each segment has threads of its own. Threads that wait for the next batch of their segment
    # must not take cores from the others.
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


def _explained(text: str) -> str:
    """An error of the runtime as one sentence, without its code."""
    match = re.search(r"implementation for ([\w.]+)\((\d+)\)", text)
    if match:
        return (
            f"it has no implementation of the operator {match[1]} (opset {match[2]}) for "
            "these types"
        )
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
