"""The forward pass of training: from the input through the models, or from pooled features through
the exits only.
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
    """Runs a network for a recipe: named tensors in, logits and features by node out.

    If `pooled` is set, the named tensors are the pooled features of the nodes and the models do not
    run. Exits that cannot pool, or that read an exit which cannot, are left out then.

    Args:
        network: the network.
        teacher: a network whose last logits are computed as well; it reads inputs, not pooled
            features.
    """

    def __init__(self, network: Network, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher

    def forward(self, state: State, pooled: bool) -> NodeTensors:
        """Compute logits [b, C] and features [b, ...] by node."""
        logits = dict[str, Tensor]()
        features = dict[str, Tensor]()
        if not pooled:
            for name, node in self.network.look(given(state)):
                features[name] = node.features
                if node.own is not None:
                    logits[name] = node.own
            return {"logits": logits, "features": features} | self._teacher_logits(state)

        handed_on = dict[str, Tensor]()
        for name, exit_ in exits_of(self.network):
            readable = name in state and exits_read(exit_) <= logits.keys()
            if not readable:
                continue
            # Pooled features are float32; the exit may have another type.
            parameter = next(exit_.parameters(), state[name])
            seen = Seen(state[name].to(parameter.dtype), handed_on)
            logits[name], handed_on[name] = answers(exit_, seen, name)
            features[name] = state[name]
        return {"logits": logits, "features": features}

    def _teacher_logits(self, state: State) -> NodeTensors:
        """The last logits of the teacher, if there is one."""
        if self.teacher is None:
            return {}
        with torch.no_grad():
            return {TEACHER: {TEACHER: self.teacher(given(state))[-1]}}


def outputs_of(
    network: Network, computed: Mapping[str, Mapping[str, Tensor]], state: State, pooled: bool
) -> TrainingOutputs:
    """The result of `TrainingForward`, as a recipe reads it.

    Args:
        network: the network that ran.
        computed: logits and features by node.
        state: the named tensors of the batch.
        pooled: whether these are pooled features; then the recipe gets no inputs.
    """
    teacher = computed.get(TEACHER, {}).get(TEACHER)
    inputs = {} if pooled else state
    return TrainingOutputs(computed["logits"], computed["features"], inputs, network, teacher)


def exits_of(network: Network) -> Iterator[tuple[str, Exit]]:
    """The exits, shallow to deep."""
    for name in network.topology.exits:
        yield name, network.exit_of(name)


def pooled_of(network: Network, state: State, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Pool the features of a batch for some exits, without gradient.

    Args:
        network: the network.
        state: the named inputs of the batch.
        names: of the exits; those that cannot pool are left out.

    Returns:
        Features [b, F] by exit.
    """
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
