"""Blocks trained one after the other, each on the rows that the earlier ones did not settle
(QuickNets).

Patel and Siegelmann, 2022, arXiv 2212.12866, of which the abstract alone was at hand: block n and
its classifier learn by cross-entropy on D_n while all earlier blocks stay fixed, and D_{n+1} holds
the rows of D_n that are not settled. All else is ours. Settled means answered right with a
probability of at least `confidence`. One row in `held` trains no block but the gates: a block that
knows its rows by heart is right on them, and would train its `Commitment` to trust it. One settled
row in `replay` stays, so that later blocks see easy rows too and none runs dry. Which rows these
are follows from their numbers. Commitments learn by binary cross-entropy whether the exit is right.
Adam, as in `joint`.
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
SPREAD, FIRST, SECOND = (
    2654435761,
    7,
    19,
)  # Knuth's multiplier; two places among its bits, for two choices of rows


class Cascaded(Recipe):
    """A phase per block and one per gate, from the first to the last.

    confidence: the probability from which on a right answer is settled. epochs, rate: of Adam, in
    each phase. held: one row in so many is kept for the gates. replay: one settled row in so many
    is trained all the same.
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
        """Hang a `Commitment` on every node but the last, unless there is one.

        Raises InvalidArgument for arguments out of their range, BadNetwork where there is nothing
        to train, and for a ladder.
        """
        require("confidence", self.confidence, above=0, high=1)
        require_count("held", self.held, 2)
        require_count("replay", self.replay)
        trainable_exits(network)
        require_one_model(network, "cascaded")
        commit(network)

    def phases(self, network: Network) -> list[Phase]:
        """Block, its gate, next block."""
        adam = partial(torch.optim.Adam, lr=self.rate)
        phases = list[Phase]()
        before = list[str]()
        for name, own in blocks_of(network).items():
            values = (*own, *network.exit_of(name).parameters())
            rows = partial(self._unsettled, tuple(before))
            if values:
                still = still_beside(network, own)
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
        kind = BLOCK if batch.phase.startswith(BLOCK) else GATE
        name = batch.phase.removeprefix(kind)
        y = batch.labels()
        own = outputs.logits[name]
        if kind == BLOCK:
            return {name: cross_entropy(own, y)}
        gate = outputs.network.gate_of(name)
        assert isinstance(gate, Commitment)
        right = (own.argmax(1) == y).to(own.dtype)
        return {
            name: binary_cross_entropy_with_logits(gate.odds(outputs.features[name], own), right)
        }

    def _held(self, _view: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """Rows [b] that train gates."""
        return _drawn(batch.row, self.held, FIRST)

    def _unsettled(
        self, before: Sequence[str], outputs: TrainingOutputs, batch: TrainingBatch
    ) -> Tensor:
        """Rows [b] that train the block behind the exits `before`."""
        settled = torch.zeros(len(batch.row), dtype=torch.bool)
        for name in before:
            sure, answer = outputs.logits[name].softmax(1).max(1)
            settled |= ((answer == batch.labels()) & (sure >= self.confidence)).cpu()
        return ~_drawn(batch.row, self.held, FIRST) & (
            ~settled | _drawn(batch.row, self.replay, SECOND)
        )


def commit(network: Network) -> None:
    """Hang a new `Commitment` on every node but the last that has none, in place; always the same
    one.
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
    """The model's parameters by the node behind which they lie; those of several pieces belong to
    the first.
    """
    blocks = dict[str, tuple[nn.Parameter, ...]]()
    known = set[int]()
    for name, segment in segments_of(network).items():
        own = [value for module in segment.modules for value in module.parameters(recurse=False)]
        blocks[name] = tuple(value for value in dict.fromkeys(own) if id(value) not in known)
        known |= {id(value) for value in own}
    return blocks


def still_beside(network: Network, trained: Sequence[nn.Parameter]) -> tuple[nn.Module, ...]:
    """The model's modules that hold parameters and none of those trained: they keep eval mode, and
    their norms.
    """
    mine = {id(value) for value in trained}
    return tuple(
        part
        for part in network.backbone.modules()
        if (own := {id(value) for value in part.parameters()}) and not own & mine
    )


def _drawn(row: Tensor, one_in: int, index: int) -> Tensor:
    """One row [b] in so many, by its number: spread evenly, and differently for another place among
    the bits.
    """
    mixed = (row.cpu().long() * SPREAD) % 2**32
    return (mixed >> index) % one_in == 0
