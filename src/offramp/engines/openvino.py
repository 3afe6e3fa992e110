"""OpenVINO on the CPU: each segment with its exit and gate is one graph, and so is a whole plan
with an open gate, on as many threads as torch. It computes in float32.

bf16: convolutions and matrix products compute in bfloat16. What comes after the last of them in a
segment stays in float32, and so do logits, scores and what segments hand on.

Compiled models are kept on disk, in the files of `_support/cache.py` and not in OpenVINO's own
cache folder, which trusts what it finds. The next process reads them in a quarter of the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from offramp._support import cache as disk
from offramp.engines._arrays import Array, Run, as_arrays, in_one_call, on_arrays, package
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage, Network
from offramp.plans.schedule import Schedule
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import Call, graphs_of, parts_of
from offramp.runtime.one_graph import OneCall, lowered
from offramp.runtime.onnx_graphs import Graph

__all__ = ["OpenVino"]

TELEMETRY = "openvino_telemetry"


class OpenVino(Engine):
    """Graphs in compiled models of OpenVINO, on the CPU."""

    def __init__(self, *, bf16: bool = False) -> None:
        """Keep the options.

        Args:
            bf16: compute in bfloat16, on processors that have it.
        """
        options = dict[str, bool]()
        if bf16:
            options["bf16"] = True
        super().__init__(**options)
        self.precision = "bf16" if bf16 else "f32"

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One stage per node with an open exit, compiled when its first rows arrive.

        In bfloat16 it is one stage per node. The number of threads is that of torch when a stage is
        compiled.

        Raises MissingExtra, and InvalidArgument for another device and for bf16 on a processor
        without it.
        """
        name = f"{self.version()}, {torch.get_num_threads()} threads"
        if self.precision == "f32":
            return parts_of(network, schedule, device, name, _compiled)
        _require_bf16()
        # Each node is rounded as it was when it was recorded. In a graph of two nodes, the last
        # layers of the first one would be rounded too.
        compiled = partial(_compiled, precision=self.precision)
        return parts_of(network, schedule, device, f"{name}, bf16", compiled, joined=False)

    def in_one(
        self,
        network: Network,
        schedule: Schedule,
        engine_stages: Sequence[EngineStage],
        rows: State,
    ) -> OneCall:
        """A compiled model of the whole schedule. There is none in bfloat16, because a stage must
        round as it did when it was recorded.

        Rows with NaN or infinities, in an input or in what stages hand on, are left to the stages,
        which mark rows of NaN. In one graph they would be lost: see `_rows_with_nan`.
        """
        if self.precision != "f32":
            raise BadNetwork("stages in bfloat16 are rounded one by one")
        graph = lowered(network, schedule, engine_stages, rows, guarded=True)
        requests = partial(_requests, precision=self.precision)
        return _finite_alone(in_one_call(graph, requests, _explained))

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """Only `infer` of a request that shares its inputs, without our search for NaN."""
        (graph,) = graphs_of(network, schedule, dict(state))
        model = _model(graph, self.precision)
        names = tuple(_ports(model.inputs))

        def bind(rows: State) -> Callable[[], object]:
            request = model.create_infer_request()
            return partial(request.infer, as_arrays(rows, names), share_inputs=True)

        return bind

    def version(self) -> str:
        """The package and its version. Raises MissingExtra."""
        return f"openvino {_package().__version__.split('-')[0]}"

    @property
    def compiles(self) -> bool:
        """True: a model is compiled for the first rows."""
        return True

    @property
    def own_threads(self) -> bool:
        """True: models have threads and weights of their own."""
        return True


def _package() -> Any:
    """The package without its telemetry, which would start a process on import and report it.

    A module that is None in `sys.modules` cannot be imported, and OpenVINO does without it.
    """
    if "openvino" in sys.modules:
        return package("openvino")
    telemetry = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        return package("openvino")
    finally:
        del sys.modules[TELEMETRY]
        if telemetry is not None:
            sys.modules[TELEMETRY] = telemetry


def _require_bf16() -> None:
    """Raise InvalidArgument on a processor that would compute in float32 all the same."""
    core = _core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        processor = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise InvalidArgument(
            f"bf16 needs a processor with bfloat16, got {processor}. Use engine='openvino'"
        )


def _compiled(graph: Graph, precision: str = "f32") -> Call:
    def compiled(written: Graph) -> Run:
        return _with_nan_kept(_requests(written, precision))

    return on_arrays(graph, "OpenVINO", compiled, _explained)


@cache
def _core() -> Any:
    """The only Core of the process, which is never destroyed.

    Each Core loads a CPU plugin. The plugin replaces the stack for signals, and unmaps its own when
    the Core is destroyed. After two Cores were destroyed in order, the stack was unmapped memory,
    and the next Ctrl-C crashed the process. A forked child that destroys a Core waits for threads
    that it does not have, or aborts.
    """
    core = _package().Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))
    return core


def _model(graph: Graph, precision: str = "f32") -> Any:
    """A graph, compiled now or by an earlier process, in the precision "f32" or "bf16"."""
    # Without a precision it is bfloat16 on processors that have it. Pinned threads would share
    # their cores with those of torch.
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    core = _core()
    written = graph.model.SerializeToString()
    key = f"{_kind()} {config} {hashlib.sha256(written).hexdigest()}"
    content = disk.read(key)
    if content is not None:
        # OpenVINO refuses what it cannot read, with errors of no common class.
        with contextlib.suppress(Exception):
            return core.import_model(content, "CPU", config)
    model = core.compile_model(core.read_model(written), "CPU", config)
    with contextlib.suppress(Exception):  # some models cannot be exported
        disk.write(key, model.export_model().getvalue())
    return model


@cache
def _kind() -> str:
    """The build of OpenVINO and the processor. A compiled model belongs to both."""
    core = _core()
    processor = [core.get_property("CPU", "FULL_DEVICE_NAME")]
    processor += sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"openvino {_package().__version__} on {processor}"


def _requests(graph: Graph, precision: str) -> Run:
    """A graph, compiled, as a function that any number of threads may call at once."""
    tensor_of = _package().Tensor
    model = _model(graph, precision)
    # Inputs that the graph does not use are left out. Names and ports take long to look up, so
    # tensors are set and taken by their positions.
    inputs = [_name_among(graph.reads, port) for port in model.inputs]
    positions = dict[str, int]()
    for number, port in enumerate(model.outputs):
        positions.update(dict.fromkeys(port.get_names(), number))
    outputs = [positions[name] for name in graph.writes]
    free: list[Any] = []  # requests; each has the tensors of one call

    def run(given: Mapping[str, Array]) -> list[Array]:
        try:
            request = free.pop()
        except IndexError:
            request = model.create_infer_request()
        # The request reads our arrays in place. Its results are copied, because the next call
        # overwrites them.
        arrays_in = [_shareable(given[name]) for name in inputs]  # alive until the end
        for number, array in enumerate(arrays_in):
            request.set_input_tensor(number, tensor_of(array, shared_memory=True))
        results = request.infer(share_outputs=True).to_tuple()
        arrays = [results[number].copy() for number in outputs]
        free.append(request)
        return arrays

    return run


def _name_among(names: Sequence[str], port: Any) -> str:
    """The name of a port that is one of these. A port may have several."""
    (name,) = port.get_names().intersection(names)
    return str(name)


def _shareable(array: Array) -> Array:
    """An array whose memory OpenVINO may read in place, or a copy of it."""
    flags = array.flags
    return array if flags.c_contiguous and flags.writeable else array.copy()


def _with_nan_kept(run: Run) -> Run:
    """A graph whose results are NaN for rows of NaN."""

    def call(given: Mapping[str, Array]) -> Sequence[Array]:
        arrays = run(given)
        with_nan = _rows_with_nan(given)
        if with_nan is not None:
            for array in arrays:
                if _is_float(array):
                    array[with_nan] = np.nan
        return arrays

    return call


def _finite_alone(run: Run) -> OneCall:
    """One graph with a guard, as a call that returns None for values that are not finite."""

    def call(given: Mapping[str, Array]) -> Sequence[Array] | None:
        if not all(map(_is_finite, given.values())):
            return None
        logits, codes, guard = run(given)
        return (logits, codes) if math.isfinite(guard) else None

    return call


def _ports(ports: Any) -> dict[str, Any]:
    """Ports of a model by their names. A port may have several."""
    by_name = dict[str, Any]()
    for port in ports:
        by_name.update(dict.fromkeys(port.get_names(), port))
    return by_name


def _rows_with_nan(given: Mapping[str, Array]) -> Array | None:
    """The rows with a NaN, [B] bool; None if there are none.

    OpenVINO's ReLU turns NaN into 0, so such a row would leave with an answer. Infinities are
    allowed, because masks have them. A NaN that arises from infinities inside a segment may still
    become a number there.
    """
    with_nan: Array | None = None
    for value in given.values():
        # The minimum is NaN if any value is. torch would wake its threads for this.
        if _is_float(value) and value.size and np.isnan(value.min()):
            rows = np.asarray(np.isnan(value).reshape(len(value), -1).any(1))  # [B, ...] -> [B]
            with_nan = rows if with_nan is None else with_nan | rows
    return with_nan


def _is_finite(value: Array) -> bool:
    """Whether all values of an array are finite; integers are."""
    if not _is_float(value) or not value.size:
        return True
    # Both are NaN if any value is. torch would wake its threads for this.
    return math.isfinite(value.min()) and math.isfinite(value.max())


def _is_float(value: Array) -> bool:
    return value.dtype.kind == "f"


def _explained(text: str) -> str:
    """An error of the runtime as one sentence: the operator that it does not know, or its text
    without places in its source.
    """
    match = re.search(r"operations?: ([\w.]+)|-- (\w+)-\d+ with a message", text)
    if match:
        return f"it does not have the operator {match[1] or match[2]} as it is used here"
    return re.sub(r"(?:Exception from|Check '[^']*' failed at) \S+:\s*", "", text)
