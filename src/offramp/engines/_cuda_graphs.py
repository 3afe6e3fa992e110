"""CUDA graphs: what a part launches on a GPU is recorded for a few batch sizes, and replayed in one
launch.

At small batches a GPU waits for Python to launch kernels. A graph has fixed shapes and fixed
memory: a batch is copied into the buffers of the next size up, and what stands in the rows behind
it is computed along and not looked at (rows do not see each other: `cut` checked that). Larger
batches than the largest size run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch

from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.runtime.programs import read_by

SIZES = (1, 2, 4, 8, 16, 32, 64)
WARMUP = 3  # calls before the recording, for libraries that choose their kernels in the first ones

Recorded = tuple[Callable[[], None], State]  # what computes anew, and where its results stand then
Key = tuple[object, ...]
_RECORDING = Lock()


def recorded(call: Callable[[], State], device: torch.device) -> Recorded:
    """One call on a GPU as a CUDA graph; one recording at a time, beside which other threads may
    work on.
    """
    with _RECORDING, torch.cuda.device(device):
        own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            for _ in range(WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = call()
    return graph.replay, found


class Replayed:
    """A part as one call on named tensors. All sizes are recorded when the first rows of their
    shapes arrive.

    Threads take turns, on the GPU too where they have streams of their own: the buffers are one for
    all. Raises BadNetwork for what cannot be recorded.
    """

    def __init__(self, engine_stage: EngineStage) -> None:
        self.engine_stage = engine_stage
        self.kept: dict[Key, dict[int, tuple[State, Recorded]]] = {}
        self.lock = Lock()
        # the last answers have been copied out of the buffers
        self.read: torch.cuda.Event | None = None

    def __call__(self, state: State) -> State:
        names = read_by(self.engine_stage, state)
        count = len(state[names[0]])
        size = next((size for size in SIZES if size >= count), None)
        if size is None:
            return self._computed({name: state[name] for name in names})
        with self.lock, torch.inference_mode():
            given, (replay, found) = self._sizes({name: state[name] for name in names})[size]
            if self.read is not None:
                self.read.wait()
            for name, buffer in given.items():
                buffer[:count].copy_(state[name], non_blocking=True)
            replay()
            answers = {name: value[:count].clone() for name, value in found.items()}
            if state[names[0]].is_cuda:
                self.read = torch.cuda.current_stream().record_event()
            else:
                self.read = None
            return answers

    def _sizes(self, state: State) -> dict[int, tuple[State, Recorded]]:
        key = tuple((name, value.dtype, value.shape[1:]) for name, value in state.items())
        if key not in self.kept:
            self.kept[key] = {size: self._one(size, state) for size in SIZES}
        return self.kept[key]

    def _one(self, size: int, state: State) -> tuple[State, Recorded]:
        given = {name: value.new_zeros((size, *value.shape[1:])) for name, value in state.items()}
        try:
            return given, recorded(lambda: self._computed(given), next(iter(given.values())).device)
        except RuntimeError as problem:
            brief = str(problem).strip().splitlines()[0].rstrip(".;")
            raise BadNetwork(
                f"segment {self.engine_stage.name!r} cannot be recorded as a CUDA graph: {brief}; "
                f"leave cuda_graphs out"
            ) from problem

    def _computed(self, given: State) -> State:
        """What the part's pieces give, and not what they were given."""
        state = dict(given)
        self.engine_stage.call(state)
        return {name: value for name, value in state.items() if name not in given}
