"""Blocks trained one after the other, each on the rows that the earlier ones did not settle
(QuickNets).

Patel and Siegelmann, 2022, arXiv 2212.12866; only the abstract was available. Block n and
its classifier learn by cross-entropy on D_n while all earlier blocks stay fixed, and D_{n+1} holds
the rows of D_n that are not settled. Everything else is ours. A row is settled if an exit is right
on it with a probability of at least `confidence`. One row in `held` trains the gates and no block:
a block is right on rows that it has memorized, and they would train its `Commitment` to trust it.
One settled row in `replay` stays, so that later blocks see easy rows too and none runs out of rows.
Row numbers decide which rows these are. Commitments learn by binary cross-entropy whether the exit
is right. The optimizer is Adam, as in `joint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from offramp._support.arguments import require, require_count
from offramp.gates.commitment import Commitment, _averaged
from offramp.networks.network import Network
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.partition.segmenting import segments_of
from offramp.recipes._equilibrium import require_one_model
from offramp.recipes._together import seen_of

__all__ = ["Cascaded"]

BLOCK = "block "
GATE = "commitment "
# Knuth's multiplier mixes the bits of a row's number; two positions among them make two choices.
SPREAD = 2654435761
FIRST = 7
SECOND = 19


class Cascaded(Recipe):
    """A phase per block and one per gate, from the first to the last.

    Args:
        confidence: a right output with at least this probability settles its row.
        epochs: of each phase.
        rate: of Adam.
        held: one row in `held` trains the gates and no block.
        replay: one settled row in `replay` trains later blocks all the same.
    """

    def __init__(
        self,
        confidence: float = 0.9,
        *,
        epochs: int = 10,
        rate: float = 1e-3,
        held: int = 5,
        replay: int = 10,
    ) -> None:
        self.confidence = confidence
        self.epochs = epochs
        self.rate = rate
        self.held = held
        self.replay = replay

    def prepare(self, network: Network) -> None:
        """Add a `Commitment` to every node but the last, unless there is one.

        Args:
            network: one model with exits.

        Raises:
            InvalidArgument: an argument is out of range.
            BadNetwork: there is nothing to train, or there are several models.
        """
        require("confidence", self.confidence, above=0, high=1)
        require_count("held", self.held, 2)
        require_count("replay", self.replay)
        trainable_exits(network)
        require_one_model(network, "cascaded")
        commit(network)

    def phases(self, network: Network) -> list[Phase]:
        """A block, its gate, the next block."""
        adam = partial(torch.optim.Adam, lr=self.rate)
        phases = list[Phase]()
        before = list[str]()
        for name, block in blocks_of(network).items():
            values = (*block, *network.exit_of(name).parameters())
            rows = partial(self._unsettled, tuple(before))
            if values:
                still = still_beside(network, block)
                phases.append(
                    Phase(BLOCK + name, values, self.epochs, adam, rows=rows, still=still)
                )
            if name in network.gates:
                gate = tuple(network.gate_of(name).parameters())
                phases.append(Phase(GATE + name, gate, self.epochs, adam, rows=self._held))
            before.append(name)
        return phases

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy of the block's exit, or of its gate's belief in it."""
        y = batch.labels()
        if batch.phase.startswith(BLOCK):
            name = batch.phase.removeprefix(BLOCK)
            return {name: cross_entropy(outputs.logits[name], y)}
        name = batch.phase.removeprefix(GATE)
        logits = outputs.logits[name]  # [b, C]
        gate = outputs.network.gate_of(name)
        assert isinstance(gate, Commitment)
        is_right = (logits.argmax(1) == y).to(logits.dtype)  # [b]
        odds = gate.odds(outputs.features[name], logits)  # [b]
        return {name: binary_cross_entropy_with_logits(odds, is_right)}

    def _held(self, _outputs: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """Which rows [b] train gates."""
        return _drawn(batch.row, self.held, FIRST)

    def _unsettled(
        self, before: Sequence[str], outputs: TrainingOutputs, batch: TrainingBatch
    ) -> Tensor:
        """Which rows [b] train the block behind the exits `before`."""
        settled = torch.zeros(len(batch.row), dtype=torch.bool)
        for name in before:
            confidence, predicted = outputs.logits[name].softmax(1).max(1)  # [b] each
            is_settled = (predicted == batch.labels()) & (confidence >= self.confidence)
            settled |= is_settled.cpu()
        is_held = _drawn(batch.row, self.held, FIRST)
        is_replayed = _drawn(batch.row, self.replay, SECOND)
        return ~is_held & (~settled | is_replayed)


def commit(network: Network) -> None:
    """Add a new `Commitment` to every node but the last that has none, in place.

    The seed is fixed, so its first weights are always the same.
    """
    device = network.device()
    gates = dict[str, Commitment]()
    for name, seen in seen_of(network).items():
        if name in network.gates and not isinstance(network.gate_of(name), Commitment):
            assert seen.own is not None
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                gate = Commitment(_averaged(seen.features).shape[1], seen.own.shape[1])
            gates[name] = gate.to(device, seen.own.dtype).eval()
    network.hang_gates(gates)


def blocks_of(network: Network) -> dict[str, tuple[nn.Parameter, ...]]:
    """The model's parameters by the node whose segment they are in.

    A parameter that several segments share belongs to the first of them.
    """
    blocks = dict[str, tuple[nn.Parameter, ...]]()
    known = set[int]()  # ids, because == of tensors compares elementwise
    for name, segment in segments_of(network).items():
        block = list[nn.Parameter]()
        for module in segment.modules:
            for value in module.parameters(recurse=False):
                if id(value) not in known:
                    known.add(id(value))
                    block.append(value)
        blocks[name] = tuple(block)
    return blocks


def still_beside(network: Network, trained: Sequence[nn.Parameter]) -> tuple[nn.Module, ...]:
    """The model's modules whose parameters are all untrained in a phase.

    They keep eval mode, and so the statistics of their norms.

    Args:
        network: one model with exits.
        trained: the parameters that are trained.

    Returns:
        Modules with at least one parameter, and without a trained one.
    """
    trained_ids = set(map(id, trained))
    still = list[nn.Module]()
    for module in network.backbone.modules():
        ids = set(map(id, module.parameters()))
        if ids and not ids & trained_ids:
            still.append(module)
    return tuple(still)


def _drawn(row: Tensor, one_in: int, index: int) -> Tensor:
    """Whether each row [b] is one in `one_in`, decided by its number.

    The rows are spread evenly. Another `index` among the bits draws other rows.
    """
    mixed = (row.cpu().long() * SPREAD) % 2**32
    return (mixed >> index) % one_in == 0
