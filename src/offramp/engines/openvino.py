"""OpenVINO on the CPU, in float32: a segment with its exit and gate is one graph, on as many threads as torch has."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from offramp.chain import Step
from offramp.errors import BadData, BadNetwork, MissingExtra
from offramp.graphs import Call, Graph, parts_of
from offramp.inputs import State
from offramp.network import Network, Part


def open(network: Network, steps: Sequence[Step], device: torch.device) -> tuple[Part, ...]:
    """One part per step, compiled when its first rows arrive. Raises MissingExtra, BadInput for another device.

    The number of threads is torch's when a part is compiled.
    """
    return parts_of(network, steps, device, f"{version()}, {torch.get_num_threads()} threads", _compiled)


def version() -> str:
    """What a trace and a plan remember. Raises MissingExtra."""
    return f"openvino {_package().__version__.split('-')[0]}"


def _package() -> Any:
    try:
        import openvino
    except ImportError as problem:
        raise MissingExtra("openvino", "openvino", "engine='openvino'") from problem
    return openvino


def _compiled(graph: Graph) -> Call:
    """Precision is set by hand: left to itself it computes in bfloat16 where the processor can."""
    package = _package()
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    try:
        core = package.Core()
        model = core.compile_model(core.read_model(graph.model.SerializeToString()), "CPU", config)
    except RuntimeError as problem:
        raise BadNetwork(
            f"segment {graph.node!r} cannot run on OpenVINO: {_told(problem)}; run it with engine='torch'"
        ) from problem
    own = threading.local()  # a request holds the tensors of one call

    def call(state: State) -> State:
        if not hasattr(own, "request"):
            own.request = model.create_infer_request()
        given = {name: np.ascontiguousarray(state[name].detach().numpy()) for name in graph.reads}
        try:
            found = own.request.infer(given, share_inputs=True, share_outputs=False)
        except RuntimeError as problem:
            raise BadData(
                f"segment {graph.node!r} failed in OpenVINO: {_told(problem)}; run it with engine='torch'"
            ) from problem
        return {name: torch.from_numpy(found[name]) for name in graph.writes}

    return call


def _told(problem: Exception) -> str:
    """Its sentence, or the operators that it does not know; without the places in its source."""
    text = " ".join(str(problem).split())
    if found := re.search(
        r"(?:No conversion rule found for operations?|Unsupported (?:operation|op) of type):? ([\w.:]+)", text
    ):
        return f"it has no implementation of the operator {found[1]}"
    return re.sub(r"(?:Exception from|Check '[^']*' failed at) \S+:\s*", "", text)[:300].rstrip(".")
