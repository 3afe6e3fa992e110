"""The eager PyTorch engine: segments, exits and gates as they stand, and with options in another
form.

bf16: what autocast takes is computed in bfloat16; logits and scores come out as float32. Rounding
depends on the batch a little, so that promises made on it have a wider band around thresholds
(`Origin.band`).
channels_last: images [B, C, H, W] enter every segment in that memory format; weights stay the
network's own, so give them the same format (`net.to(memory_format=torch.channels_last)`) where a
device reorders them at every call.
compile: every part is compiled ahead of time, for all batch sizes, when its first rows arrive:
those of a plan's probe, while it is opened. Needs a C++ compiler, and half a minute for each part.
cuda_graphs: what each part launches on a GPU is recorded at batches of 1, 2, 4 to 64 and replayed,
batches between them padded to the next; larger ones run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

__all__ = ["Eager"]

ANSWERS = (LOGITS, SCORE, HANDED)  # ends of names whose tensors stay float32


class Eager(Engine):
    """Segments, exits and gates on the network's own parameters."""

    def __init__(
        self,
        *,
        bf16: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        """Keep what was asked for. Raises InvalidArgument for compile with another option."""
        asked = {
            "bf16": bf16,
            "channels_last": channels_last,
            "compile": compile,
            "cuda_graphs": cuda_graphs,
        }
        super().__init__(**{name: True for name, wanted in asked.items() if wanted})
        if compile and (named := [name for name in self.options if name != "compile"]):
            raise InvalidArgument(
                f"got compile with {named[0]}, which it does not keep; take one or the other"
            )
        self.bf16 = bf16
        self.channels_last = channels_last
        self.compile = compile
        self.cuda_graphs = cuda_graphs

    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One part per stage; `device` is where the parameters are.

        Raises InvalidArgument for bf16 on a device that has none, and for cuda_graphs on another
        device than a GPU and for text of any length.
        """
        if self.compile:
            return lazy_parts(network, schedule, device, f"torch:compile on {device}", ahead)
        segments = segments_of(network)
        engine_stages = linked(
            schedule, [_part(network, segments[stage.name], stage) for stage in schedule.stages]
        )
        if self.bf16:
            _require_bf16(device)
            engine_stages = tuple(
                _each(engine_stage, partial(_in_bf16, device.type))
                for engine_stage in engine_stages
            )
        if self.channels_last:
            engine_stages = tuple(
                _each(engine_stage, _in_channels_last) for engine_stage in engine_stages
            )
        if self.cuda_graphs:
            _require_fixed(network, device)
            engine_stages = tuple(
                replace(engine_stage, functions={"segment": Replayed(engine_stage)})
                for engine_stage in engine_stages
            )
        return engine_stages

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """The user's own module, called under inference_mode behind its preprocessing, as no
        wrapper of ours would call it.

        With compile and cuda_graphs it is what was compiled or recorded for this node, without the
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
            narrow = self.bf16
            images = self.channels_last

            def call() -> object:
                with (
                    torch.inference_mode(),
                    torch.autocast(device.type, torch.bfloat16, enabled=narrow),
                ):
                    given = args
                    if images:
                        given = tuple(_channels_last(value) for value in args)
                    if preprocess is None:
                        return model(*given, **kwargs)
                    return model(preprocess(*given, **kwargs))

            return call

        return bind

    @property
    def compiles(self) -> bool:
        """With compile and with cuda_graphs."""
        return self.compile or self.cuda_graphs


def _in_inference_mode(function: Callable[[State], State], rows: State) -> State:
    with torch.inference_mode():
        return function(rows)


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    if value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _each(
    engine_stage: EngineStage,
    dressed: Callable[[Callable[[State], State]], Callable[[State], State]],
) -> EngineStage:
    return replace(
        engine_stage,
        functions={kind: dressed(function) for kind, function in engine_stage.functions.items()},
    )


def _require_bf16(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InvalidArgument(
            f"{torch.cuda.get_device_name(device)} has no bfloat16; open it with engine='torch'"
        )


def _require_fixed(network: Network, device: torch.device) -> None:
    if device.type != "cuda":
        raise InvalidArgument(
            f"the network is on {device}, and cuda_graphs replays what a GPU does; leave the "
            f"option out"
        )
    if free := [name for member in network.members for name in member.length]:
        raise InvalidArgument(
            f"{free[0]} may have any length, and cuda_graphs records fixed shapes; leave the "
            f"option out"
        )


def _in_bf16(device: str, function: Callable[[State], State]) -> Callable[[State], State]:
    def call(state: State) -> State:
        with torch.autocast(device, torch.bfloat16):
            found = function(state)
        return {
            name: value.float() if name.endswith(ANSWERS) else value
            for name, value in found.items()
        }

    return call


def _in_channels_last(function: Callable[[State], State]) -> Callable[[State], State]:
    def call(state: State) -> State:
        form = torch.channels_last
        images = {
            name: value.contiguous(memory_format=form)
            for name, value in state.items()
            if value.dim() == 4
        }
        return function({**state, **images})

    return call


def _part(network: Network, segment: Segment, stage: Stage) -> EngineStage:
    name = stage.name
    node = network.topology.node(name)
    reads = [*segment.reads]
    writes = [*segment.writes]
    modules = [*segment.modules]
    functions: dict[str, Callable[[State], State]] = {"segment": _explained(segment.call, name)}
    if stage.exit:
        exit_ = network.exit_of(name)
        needed, seen_by_exit = _looked_at(
            node, node.exit_reads, lambda other: other + _handed(network, other)
        )
        mine = name + _handed(network, name)
        reads += needed
        writes += dict.fromkeys((name + LOGITS, mine))
        modules += exit_.modules()

        def leave(state: State) -> State:
            own, on = answers(exit_, seen_by_exit(state), name)
            return {mine: on, name + LOGITS: own}

        functions["exit"] = leave
    if stage.gate:
        gate = network.gate_of(name)
        routes = network.topology.routes(name)
        needed, seen_by_gate = _looked_at(node, node.gate_reads, lambda other: other + LOGITS)
        reads += needed
        writes.append(name + SCORE)
        modules += gate.modules()

        def score(state: State) -> State:
            return {
                name + SCORE: grade(
                    gate,
                    seen_by_gate(state),
                    state.get(name + LOGITS) if node.has_exit else None,
                    routes,
                )
            }

        functions["gate"] = score
    stage = replace(stage, reads=tuple(dict.fromkeys(reads)), writes=tuple(dict.fromkeys(writes)))
    return EngineStage(stage, tuple(modules), functions)


def _looked_at(
    node: Node, reads: Sequence[str], place_of: Callable[[str], str]
) -> tuple[tuple[str, ...], Callable[[State], Seen]]:
    """The names of the tensors that an exit or a gate with these `reads` needs, and how it sees
    them.
    """
    name = node.name
    given = tuple(filter(is_input, reads))
    earlier = {other: place_of(other) for other in reads if other not in given}

    def seen(state: State) -> Seen:
        logits = {other: state[key] for other, key in earlier.items()}
        return Seen(state[name], logits, None, {key: state[key] for key in given})

    return (*earlier.values(), *given), seen


def _handed(network: Network, name: str) -> str:
    return HANDED if isinstance(network.exit_of(name), Hands) else LOGITS


def _explained(call: Callable[[State], State], name: str) -> Callable[[State], State]:
    def explained(state: State) -> State:
        try:
            return call(state)
        except OfframpError:
            raise
        except (
            RuntimeError,
            LookupError,
            TypeError,
            ValueError,
        ) as problem:  # an index: a word not in the table
            # what cannot be exported, and no row that does not fit
            if torch.compiler.is_exporting():
                raise
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
            brief = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            way = remedy(state, problem, "give rows of its shape and type")
            raise BadData(f"segment {name!r} cannot run on {shapes}: {brief}; {way}") from problem

    return explained
