"""ONNX Runtime on the CPU: each segment with its exit and gate as one graph, on as many threads as torch has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

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
    return f"onnxruntime {_package().__version__}"


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as problem:
        raise MissingExtra("onnxruntime", "onnxruntime", "engine='onnxruntime'") from problem
    return onnxruntime


def _compiled(graph: Graph) -> Call:
    package = _package()
    options = package.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    # Each segment has threads of its own: those that wait for its next batch must not stand in the way of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = package.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # its errors share no class but Exception
        raise BadNetwork(
            f"segment {graph.node!r} cannot run on ONNX Runtime: {_told(problem)}; run it with engine='torch'"
        ) from problem

    def call(state: State) -> State:
        try:
            found = session.run(graph.writes, {name: state[name].detach().numpy() for name in graph.reads})
        except Exception as problem:
            raise BadData(
                f"segment {graph.node!r} failed in ONNX Runtime: {_told(problem)}; run it with engine='torch'"
            ) from problem
        return {name: torch.from_numpy(value) for name, value in zip(graph.writes, found, strict=True)}

    return call


def _told(problem: Exception) -> str:
    """Its sentence, without the code before it and the path of the source behind it."""
    text = " ".join(str(problem).split())
    if found := re.search(r"implementation for ([\w.]+)\((\d+)\)", text):
        return f"it has no implementation of the operator {found[1]} (opset {found[2]}) for these types"
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:300].rstrip(".")
