"""Rows in the order in which they are trained, and what every draw of a run depends on.

All that is random comes from (seed, phase, epoch, step) and nothing else: a run that was stopped
goes on in the middle of an epoch as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp._support.processes import ALONE, Processes
from offramp._support.progress import track
from offramp.data.rows import Rows, fingerprint_of, rounded_digests_of
from offramp.errors import BadData
from offramp.networks.inputs import State, as_inputs, count_of, given
from offramp.networks.recipe import TrainingBatch
from offramp.plans.provenance import SeenRows

Array = np.ndarray[Any, np.dtype[Any]]
Augment = Callable[[Any], Any]
LOOKED = 32  # rows that are read twice, to see whether the data set draws at random


@dataclass(frozen=True)
class RowIndex:
    """What is known of a data set before it is trained: labels [N] or None, rows' numbers [N], and
    their digests.
    """

    y: Array | None
    row: Array
    seen: SeenRows


def index_of(source: Rows, *, progress: bool, processes: Processes = ALONE) -> RowIndex:
    """One pass over the rows, without a model.

    Raises BadData for a stream, which cannot be shuffled, and for rows that differ from one look to
    the next: which of them trained the network could not be known again.
    """
    if not source.can_take:
        raise BadData(
            f"{source.name} is a stream, expected rows by number to shuffle; give arrays, or the "
            f"Dataset without a "
            "DataLoader around it"
        )
    total = -(-len(source) // (1024 * processes.count))
    show = progress and processes.main
    own = track(source.batches(1024, processes.turn), what="reading", total=total, show=show)
    read = processes.agreed(
        lambda: [
            (batch.y, batch.row, batch.digest, rounded_digests_of(batch.x, batch.digest))
            for batch in own
        ]
    )
    batches = processes.woven(read)
    labels = [y for y, _, _, _ in batches if y is not None]
    digests = np.concatenate([digest for _, _, digest, _ in batches])
    if (source.take(np.arange(min(LOOKED, len(source)))).digest != digests[:LOOKED]).any():
        raise BadData(
            f"{source.name} gives other rows at every look, expected the same (transforms that "
            f"draw at random?); take "
            "them out of the data, and give them to fit as augment="
        )
    rounded = np.concatenate([each for _, _, _, each in batches])
    seen = SeenRows(source.name, fingerprint_of(digests), digests, rounded=rounded)
    return RowIndex(
        np.concatenate(labels) if labels else None,
        np.concatenate([row for _, row, _, _ in batches]),
        seen,
    )


def drawn(*draws: int) -> int:
    """A seed from a seed and a place in the run, such as (seed, phase, epoch, step)."""
    return int(np.random.SeedSequence(draws).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`. torch.manual_seed prepares every kind of
    device there is: half a millisecond, and so more than a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class BatchLoader:
    """The batches of a phase: about equal in size, so that none holds a single row unless it must.

    cache: pooled features [V N, F] by node, V copies of the N rows one after the other; without it
    rows are read.
    processes: those that have a share of each batch. The batches are the same whatever their
    number; what is drawn within one, such as dropout, is each process's own.
    """

    def __init__(
        self,
        source: Rows,
        index: RowIndex,
        *,
        batch_size: int,
        draws: tuple[int, int],
        device: torch.device,
        cache: Mapping[str, Array] | None = None,
        augment: Augment | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.source = source
        self.index = index
        self.cache = cache
        self.augment = augment
        self.processes = processes
        self.batch_size = batch_size
        self.draws = draws
        self.device = device
        self.keep: Array = np.arange(len(index.row))

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return max(1, -(-len(self.keep) // self.batch_size))

    @property
    def smallest(self) -> int:
        """The number of rows of the smallest batch."""
        return len(self.keep) // self.steps

    def size(self, step: int) -> int:
        """The number of rows of a batch, in all processes together."""
        return self.smallest + (step < len(self.keep) % self.steps)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[State, Array]]:
        """Named tensors and the rows' positions, from step `start` on; torch's generator is seeded
        for each step.
        """
        order = np.random.default_rng(drawn(*self.draws, number)).permutation(self.keep)
        own = () if self.processes.main else (self.processes.rank,)
        for step, positions in enumerate(np.array_split(order, self.steps)):
            if step >= start:
                seed_torch(drawn(*self.draws, number, step, *own), self.device)
                mine = self.processes.share(positions)
                yield self.state(mine, number), mine

    def in_order(self, size: int) -> Iterator[tuple[State, Array]]:
        """All rows as they come, not augmented; where there are several processes, the batches
        whose turn it is.
        """
        for start in range(0, len(self.index.row), size)[self.processes.turn]:
            positions = np.arange(start, min(start + size, len(self.index.row)))
            yield self.state(positions, 0, plain=True), positions

    def state(self, positions: Array, epoch: int, *, plain: bool = False) -> State:
        """The named tensors of some rows; of several copies of pooled features the epoch's own."""
        if self.cache is not None:
            count = len(self.index.row)
            return {
                name: torch.from_numpy(
                    column[positions + count * (epoch % (len(column) // count))]
                ).to(self.device)
                for name, column in self.cache.items()
            }
        return augmented(
            self.source.take_x(positions), None if plain else self.augment, self.device
        )

    def batch(self, positions: Array, phase: str, step: int = 0, steps: int = 1) -> TrainingBatch:
        """Labels and numbers of some rows."""
        if self.index.y is None:
            y = None
        else:
            y = torch.from_numpy(self.index.y[positions]).to(self.device)
        return TrainingBatch(y, torch.from_numpy(self.index.row[positions]), phase, step, steps)


def augmented(x: Any, augment: Augment | None, device: torch.device) -> State:
    """Named tensors of a batch, after the user's augmentation (which draws from torch's own
    generator).
    """
    state = as_inputs(x, device)
    if augment is None:
        return state
    found = as_inputs(augment(given(state)), device)
    if count_of(found) != count_of(state):
        raise BadData(
            f"augment made {count_of(found)} rows of {count_of(state)}, expected one of each; "
            f"mend it"
        )
    return found
