"""The eager PyTorch engine: segments, exits and gates as they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from offramp.chain import Step
from offramp.errors import BadData
from offramp.inputs import State
from offramp.network import HANDED, LOGITS, SCORE, Hands, Network, Part, Seen, Segment, answers, grade
from offramp.segmenting import segments_of


def open(network: Network, steps: Sequence[Step], device: torch.device) -> tuple[Part, ...]:
    """One part per step, on the network's own parameters; `device` is where they are."""
    segments = segments_of(network)
    return tuple(_part(network, segments[step.name], step) for step in steps)


def _part(network: Network, segment: Segment, step: Step) -> Part:
    name, node = step.name, network.chain.nodes[network.chain.place(step.name)]
    reads, writes, modules = [*segment.reads], [*segment.writes], [*segment.modules]
    pieces: dict[str, Callable[[State], State]] = {"segment": _explained(segment.call, name)}
    if step.exit:
        exit_ = network.exit_of(name)
        handed = {other: other + _handed(network, other) for other in node.exit_reads}
        mine = name + _handed(network, name)
        reads += handed.values()
        writes += dict.fromkeys((name + LOGITS, mine))
        modules += exit_.modules()

        def leave(state: State) -> State:
            own, on = answers(exit_, Seen(state[name], {key: state[place] for key, place in handed.items()}), name)
            return {mine: on, name + LOGITS: own}

        pieces["exit"] = leave
    if step.gate:
        gate = network.gate_of(name)
        reads += (other + LOGITS for other in node.gate_reads)
        writes.append(name + SCORE)
        modules += gate.modules()

        def score(state: State) -> State:
            seen = Seen(state[name], {other: state[other + LOGITS] for other in node.gate_reads})
            return {name + SCORE: grade(gate, seen, state[name + LOGITS])}

        pieces["gate"] = score
    return Part(step, tuple(dict.fromkeys(reads)), tuple(writes), tuple(modules), pieces)


def _handed(network: Network, name: str) -> str:
    return HANDED if isinstance(network.exit_of(name), Hands) else LOGITS


def _explained(call: Callable[[State], State], name: str) -> Callable[[State], State]:
    def explained(state: State) -> State:
        try:
            return call(state)
        except RuntimeError as problem:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
            brief = str(problem).strip().splitlines()[0]
            raise BadData(
                f"segment {name!r} cannot run on {shapes}: {brief}; give rows of its shape and type"
            ) from problem

    return explained
