"""A network as recipes look at it: from the input through the models, or from pooled features
through the exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from offramp.networks.inputs import State, given
from offramp.networks.members import values_of
from offramp.networks.network import Network
from offramp.networks.nodes import Exit, Seen, answers
from offramp.networks.recipe import Pools, TrainingOutputs, exits_read, pooled_by

NodeTensors = dict[str, dict[str, Tensor]]
TEACHER = "teacher"


class TrainingForward(nn.Module):
    """Named tensors in, `logits` and `features` by node out.

    `pooled` says that the named tensors are the nodes' pooled features, and the models are not run.
    Exits that cannot pool, or that read one which cannot, are left out then. The last logits of a
    teacher, which looks at inputs alone, come as `teacher`.
    """

    def __init__(self, network: Network, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher

    def forward(self, state: State, pooled: bool) -> NodeTensors:
        """Logits [b, C] and features [b, ...] by node."""
        if not pooled:
            seen = dict(self.network.look(given(state)))
            own = {name: one.own for name, one in seen.items() if one.own is not None}
            return {
                "logits": own,
                "features": {name: one.features for name, one in seen.items()},
            } | self._trained(state)
        logits = dict[str, Tensor]()
        handed = dict[str, Tensor]()
        for name, exit_ in exits_of(self.network):
            if name in state and exits_read(exit_) <= logits.keys():
                kind = next((value.dtype for value in exit_.parameters()), state[name].dtype)
                logits[name], handed[name] = answers(
                    exit_, Seen(state[name].to(kind), handed), name
                )
        return {"logits": logits, "features": {name: state[name] for name in logits}}

    def _trained(self, state: State) -> NodeTensors:
        """The teacher's last logits."""
        if self.teacher is None:
            return {}
        with torch.no_grad():
            return {TEACHER: {TEACHER: self.teacher(given(state))[-1]}}


def outputs_of(
    network: Network, computed: Mapping[str, Mapping[str, Tensor]], state: State, pooled: bool
) -> TrainingOutputs:
    """What `TrainingForward` gave, as a recipe sees it."""
    teacher = computed.get(TEACHER, {}).get(TEACHER)
    return TrainingOutputs(
        computed["logits"], computed["features"], {} if pooled else state, network, teacher
    )


def exits_of(network: Network) -> Iterator[tuple[str, Exit]]:
    """The exits, shallow to deep."""
    for name in network.topology.exits:
        yield name, network.exit_of(name)


def pooled_of(network: Network, state: State, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The pooled features [b, F] of the named exits for a batch, without gradient."""
    pooled: dict[str, Tensor] = {}
    with torch.inference_mode():
        for member in network.members:
            values = values_of(
                network.model_of(member), network.preprocess_of(member), member, state
            )
            for name in names:
                exit_ = network.exit_of(name)
                if name in values and isinstance(exit_, Pools):
                    pooled[name] = pooled_by(exit_, values[name], state)
    return pooled
