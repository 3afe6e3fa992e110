"""CUDA graphs: the kernels that a stage launches on a GPU are recorded for a few batch sizes, and
replayed in one launch.

At small batches a GPU waits for Python to launch kernels. A graph has fixed shapes and fixed
memory. A batch is therefore copied into the buffers of the next larger size. The rows behind it in
the buffer hold old values; they are computed too, and ignored. This is safe because a row does not
depend on other rows (`cut` checks that). Batches above the largest size run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch

from offramp._support.sentences import first_line
from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.runtime.programs import read_by

SIZES = (1, 2, 4, 8, 16, 32, 64)
WARMUP = 3  # calls before the recording, for libraries that choose their kernels in the first ones

Recorded = tuple[Callable[[], None], State]  # a replay, and the tensors that it writes
Key = tuple[object, ...]  # names, types and shapes of rows
_RECORDING = Lock()


def recorded(call: Callable[[], State], device: torch.device) -> Recorded:
    """Record one call on a GPU as a CUDA graph.

    There is one recording at a time. Other threads may use the GPU meanwhile.

    Args:
        call: computes on tensors that stay in place.
        device: the GPU.

    Returns:
        A function that computes again, and the tensors that it writes.
    """
    with _RECORDING, torch.cuda.device(device):
        # torch needs warm-up calls on a side stream before a capture.
        side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = call()
    return graph.replay, outputs


class Replayed:
    """A stage as one call on named tensors, replayed from CUDA graphs.

    All sizes are recorded when the first rows of their shapes arrive. Threads share the buffers, so
    they take turns, on the GPU too if they have streams of their own. Calls raise BadNetwork if the
    stage cannot be recorded.
    """

    def __init__(self, engine_stage: EngineStage) -> None:
        self.engine_stage = engine_stage
        # by names, types and shapes of rows, and by batch size: input buffers, and the graph
        self.kept: dict[Key, dict[int, tuple[State, Recorded]]] = {}
        self.lock = Lock()
        # happens when the last outputs have been copied out of the buffers
        self.outputs_read: torch.cuda.Event | None = None

    def __call__(self, state: State) -> State:
        names = read_by(self.engine_stage, state)
        inputs = {name: state[name] for name in names}
        first = state[names[0]]
        count = len(first)
        size = _size_for(count)
        if size is None:
            return self._computed(inputs)
        with self.lock, torch.inference_mode():
            buffers, (replay, outputs) = self._graphs_for(inputs)[size]
            if self.outputs_read is not None:
                self.outputs_read.wait()
            for name, buffer in buffers.items():
                buffer[:count].copy_(inputs[name], non_blocking=True)
            replay()
            answers: State = {}
            for name, value in outputs.items():
                answers[name] = value[:count].clone()  # [size, ...] -> [n, ...]
            self.outputs_read = None
            if first.is_cuda:
                self.outputs_read = torch.cuda.current_stream().record_event()
            return answers

    def _graphs_for(self, inputs: State) -> dict[int, tuple[State, Recorded]]:
        """The buffers and graphs of all sizes for rows of these shapes."""
        key = tuple((name, value.dtype, value.shape[1:]) for name, value in inputs.items())
        if key not in self.kept:
            graphs = dict[int, tuple[State, Recorded]]()
            for size in SIZES:
                graphs[size] = self._recorded(size, inputs)
            self.kept[key] = graphs
        return self.kept[key]

    def _recorded(self, size: int, inputs: State) -> tuple[State, Recorded]:
        buffers: State = {}
        for name, value in inputs.items():
            buffers[name] = value.new_zeros((size, *value.shape[1:]))
        device = next(iter(buffers.values())).device
        try:
            return buffers, recorded(lambda: self._computed(buffers), device)
        except RuntimeError as problem:
            reason = first_line(problem).rstrip(".;")
            raise BadNetwork(
                f"segment {self.engine_stage.name!r} cannot be recorded as a CUDA graph: {reason}. "
                "Leave cuda_graphs out"
            ) from problem

    def _computed(self, inputs: State) -> State:
        """The tensors that the stage writes, without its inputs."""
        state = dict(inputs)
        self.engine_stage.call(state)
        return {name: value for name, value in state.items() if name not in inputs}


def _size_for(count: int) -> int | None:
    """The smallest recorded batch size that holds so many rows; None if there are too many."""
    for size in SIZES:
        if size >= count:
            return size
    return None
