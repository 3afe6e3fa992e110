"""The eager PyTorch engine: it runs segments, exits and gates as they are. Options change how.

bf16: operations under autocast compute in bfloat16; logits and scores are returned as float32.
Rounding depends a little on the batch, so promises made on it have a wider band around thresholds
(`Origin.band`).
channels_last: images [B, C, H, W] enter every segment in that memory format. The weights stay as
they are. If a device reorders them at every call, give them the same format with
`net.to(memory_format=torch.channels_last)`.
compile: every stage is compiled ahead of time, for all batch sizes, when its first rows arrive.
These are the rows of a plan's probe, while the network is opened. It needs a C++ compiler, and half
a minute for each stage.
cuda_graphs: the kernels of each stage are recorded on a GPU at batches of 1, 2, 4 to 64, and
replayed. Other batches are padded to the next size; larger ones run without a graph.
threads=N: stages run on N threads of a CPU. Without it, a Runner measures its batches, and chooses
for each stage and size of batch between one thread and as many as torch has in the thread that
calls. Other threads of the process keep their number. `compile` fixes the number when it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from offramp.engines._compiling import ahead
from offramp.engines._cuda_graphs import Replayed
from offramp.errors import BadData, InvalidArgument, OfframpError
from offramp.networks.inputs import State, arguments, remedy
from offramp.networks.network import HANDED, LOGITS, SCORE, EngineStage, Network, Segment
from offramp.networks.nodes import Hands, Seen, answers, grade
from offramp.partition.segmenting import segments_of
from offramp.plans.schedule import Schedule, Stage
from offramp.plans.signature import is_input
from offramp.plans.topology import Node
from offramp.runtime.engine import Engine
from offramp.runtime.graphs import lazy_parts, linked
from offramp.runtime.threads import can_set, on_threads

__all__ = ["Eager"]

ANSWERS = (LOGITS, SCORE, HANDED)  # endings of names whose tensors stay float32

Function = Callable[[State], State]


class Eager(Engine):
    """Segments, exits and gates on the network's own parameters."""

    def __init__(
        self,
        *,
        bf16: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
        threads: str | None = None,
    ) -> None:
        """Keep the options. Raises InvalidArgument for compile with another option, and for threads
        that are not a number of at least 1.
        """
        flags = {
            "bf16": bf16,
            "channels_last": channels_last,
            "compile": compile,
            "cuda_graphs": cuda_graphs,
        }
        options = [name for name, is_set in flags.items() if is_set]
        given = dict[str, str | bool](dict.fromkeys(options, True))
        if threads is not None:
            given["threads"] = threads
        super().__init__(**given)
        for name in self.options:
            if compile and name != "compile":
                raise InvalidArgument(
                    f"compile must be the only option, got it together with {name}"
                )
        self.bf16 = bf16
        self.channels_last = channels_last
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self.threads = None if threads is None else _number_of(threads)

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One stage of the engine per stage of the schedule. The parameters are on `device`.

        Raises InvalidArgument for bf16 on a device without it, and for cuda_graphs if the device is
        not a GPU or if the network takes texts of any length.
        """
        if self.compile:
            return lazy_parts(network, schedule, device, f"torch:compile on {device}", ahead)
        segments = segments_of(network)
        if self.bf16:
            _require_bf16(device)
        if self.threads is not None:
            _require_cpu(device)
        if self.cuda_graphs:
            _require_fixed(network, device)
        plain_stages = list[EngineStage]()
        for stage in schedule.stages:
            plain_stages.append(_engine_stage(network, segments[stage.name], stage))
        engine_stages = list[EngineStage]()
        for engine_stage in linked(schedule, plain_stages):
            if self.bf16:
                engine_stage = _wrapped(engine_stage, partial(_in_bf16, device.type))
            if self.channels_last:
                engine_stage = _wrapped(engine_stage, _in_channels_last)
            if self.cuda_graphs:
                engine_stage = replace(engine_stage, functions={"segment": Replayed(engine_stage)})
            if self.threads is not None:
                engine_stage = _wrapped(engine_stage, partial(_on_threads, self.threads))
            engine_stages.append(engine_stage)
        return tuple(engine_stages)

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """The user's own module after its preprocessing, under inference_mode, without any wrapper
        of ours.

        With compile and cuda_graphs it is the compiled or recorded stage of this node, without the
        Runner.
        """
        member = network.members[-1]
        model = network.model_of(member)
        preprocess = network.preprocess_of(member)
        device = network.device()
        if self.compiles:
            (engine_stage,) = self.open(network, schedule, device)
            return lambda rows: partial(_in_inference_mode, engine_stage.functions["segment"], rows)

        def bind(rows: State) -> Callable[[], object]:
            args, kwargs = arguments(rows)
            bf16 = self.bf16
            channels_last = self.channels_last
            threads = self.threads

            def call() -> object:
                with (
                    nullcontext() if threads is None else on_threads(threads),
                    torch.inference_mode(),
                    torch.autocast(device.type, torch.bfloat16, enabled=bf16),
                ):
                    inputs = args
                    if channels_last:
                        inputs = tuple(map(_channels_last, args))
                    if preprocess is None:
                        return model(*inputs, **kwargs)
                    return model(preprocess(*inputs, **kwargs))

            return call

        return bind

    def marks(self) -> list[str]:
        """The options that change what is computed. The number of threads is not one of them."""
        return [name for name in super().marks() if not name.startswith("threads=")]

    @property
    def compiles(self) -> bool:
        """True with compile and with cuda_graphs."""
        return self.compile or self.cuda_graphs

    @property
    def measures_threads(self) -> bool:
        """True unless the number is given, or is fixed in compiled code."""
        return self.threads is None and not self.compiles


def _in_inference_mode(function: Callable[[State], State], rows: State) -> State:
    with torch.inference_mode():
        return function(rows)


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] in this memory format; other tensors as they are."""
    if value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _wrapped(engine_stage: EngineStage, wrap: Callable[[Function], Function]) -> EngineStage:
    """A stage with a wrapper around each of its functions."""
    functions = {kind: wrap(function) for kind, function in engine_stage.functions.items()}
    return replace(engine_stage, functions=functions)


def _number_of(threads: str) -> int:
    """The number in an option's text. Raises InvalidArgument."""
    if not threads.isascii() or not threads.isdigit() or int(threads) < 1:
        raise InvalidArgument(f"threads must be a whole number of at least 1, got {threads!r}")
    return int(threads)


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise InvalidArgument(f"threads needs a network on the cpu, got one on {device}")
    if not can_set():
        raise InvalidArgument(
            "threads needs a build of torch with OpenMP, and this one has none. Use "
            "torch.set_num_threads"
        )


def _on_threads(threads: int, function: Function) -> Function:
    """A function that computes on so many threads."""

    def call(state: State) -> State:
        with on_threads(threads):
            return function(state)

    return call


def _require_bf16(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InvalidArgument(
            f"bf16 needs a device with bfloat16, got {torch.cuda.get_device_name(device)}. Use "
            "engine='torch'"
        )


def _require_fixed(network: Network, device: torch.device) -> None:
    if device.type != "cuda":
        raise InvalidArgument(f"cuda_graphs needs a network on a GPU, got one on {device}")
    for member in network.members:
        if member.length:
            text = next(iter(member.length))
            raise InvalidArgument(
                f"cuda_graphs needs inputs of fixed shapes, got {text!r} of any length. Leave the "
                "option out"
            )


def _in_bf16(device: str, function: Function) -> Function:
    """A function that computes under autocast, and returns logits and scores in float32."""

    def call(state: State) -> State:
        with torch.autocast(device, torch.bfloat16):
            outputs = function(state)
        converted: State = {}
        for name, value in outputs.items():
            converted[name] = value.float() if name.endswith(ANSWERS) else value
        return converted

    return call


def _in_channels_last(function: Function) -> Function:
    """A function that gets its images in this memory format."""

    def call(state: State) -> State:
        return function({name: _channels_last(value) for name, value in state.items()})

    return call


def _engine_stage(network: Network, segment: Segment, stage: Stage) -> EngineStage:
    """A stage as functions of named tensors: its segment, and its exit and gate if it has them."""
    name = stage.name
    node = network.topology.node(name)
    reads = [*segment.reads]
    writes = [*segment.writes]
    modules = [*segment.modules]
    functions: dict[str, Function] = {"segment": _explained(segment.call, name)}
    if stage.exit:
        exit_ = network.exit_of(name)
        hands = isinstance(exit_, Hands)
        needed, seen_by_exit = _looked_at(
            node, node.exit_reads, lambda other: other + _handed(network, other)
        )
        handed = name + _handed(network, name)  # the tensor for later exits; often the logits
        reads += needed
        writes += dict.fromkeys((name + LOGITS, handed))
        modules += exit_.modules()

        def leave(state: State) -> State:
            logits, for_later_exits = answers(exit_, seen_by_exit(state), name, hands=hands)
            return {handed: for_later_exits, name + LOGITS: logits}

        functions["exit"] = leave
    if stage.gate:
        gate = network.gate_of(name)
        routes = network.topology.routes(name)
        needed, seen_by_gate = _looked_at(node, node.gate_reads, lambda other: other + LOGITS)
        reads += needed
        writes.append(name + SCORE)
        modules += gate.modules()

        def score(state: State) -> State:
            logits = state.get(name + LOGITS) if node.has_exit else None
            return {name + SCORE: grade(gate, seen_by_gate(state), logits, routes)}

        functions["gate"] = score
    stage = replace(stage, reads=tuple(dict.fromkeys(reads)), writes=tuple(dict.fromkeys(writes)))
    return EngineStage(stage, tuple(modules), functions)


def _looked_at(
    node: Node, reads: Sequence[str], tensor_of: Callable[[str], str]
) -> tuple[tuple[str, ...], Callable[[State], Seen]]:
    """How an exit or a gate reads a state.

    Args:
        node: of the exit or gate.
        reads: names of inputs and of earlier exits that it reads.
        tensor_of: the name of the tensor that it reads of an earlier exit.

    Returns:
        The names of the tensors that it needs, and a function that picks them from a state.
    """
    name = node.name
    inputs = tuple(filter(is_input, reads))
    earlier = {other: tensor_of(other) for other in reads if other not in inputs}

    def seen(state: State) -> Seen:
        logits = {other: state[key] for other, key in earlier.items()}
        return Seen(state[name], logits, None, {key: state[key] for key in inputs})

    return (*earlier.values(), *inputs), seen


def _handed(network: Network, name: str) -> str:
    """The ending of the tensor that a node's exit hands to later exits."""
    return HANDED if isinstance(network.exit_of(name), Hands) else LOGITS


def _explained(call: Function, name: str) -> Function:
    """A segment whose errors become BadData with the shapes of its inputs."""

    def explained(state: State) -> State:
        try:
            return call(state)
        except OfframpError:
            raise
        except (RuntimeError, LookupError, TypeError, ValueError) as problem:
            # While exporting, this is code that cannot be exported and not a row that does not fit.
            if torch.compiler.is_exporting():
                raise
            shapes = list[str]()
            for key, value in state.items():
                shapes.append(f"{key} {tuple(value.shape)}")
            listed = ", ".join(shapes)
            lines = str(problem).strip().splitlines() or [type(problem).__name__]
            hint = remedy(state, problem, "give rows of its shape and type")
            raise BadData(
                f"segment {name!r} cannot run on {listed}: {lines[0]}; {hint}"
            ) from problem

    return explained
