"""The batches of a training run, and the seeds of everything that is drawn.

All randomness depends on (seed, phase, epoch, step) and on nothing else. So a run that was stopped
in the middle of an epoch continues exactly as if it had not been.
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
LOOKED = 32  # rows that are read twice, to find out whether the data set draws at random
READ = 1024  # rows that are read together in the pass over the data set


@dataclass(frozen=True)
class RowIndex:
    """The labels and identities of a data set's rows, read before training.

    Attributes:
        y: labels [N]; None if there are none.
        row: numbers of the rows [N].
        seen: digests of the rows, to recognise them later.
    """

    y: Array | None
    row: Array
    seen: SeenRows


def index_of(source: Rows, *, progress: bool, processes: Processes = ALONE) -> RowIndex:
    """Read all rows once, without a model.

    Args:
        source: the rows.
        progress: whether to show progress.
        processes: read every count-th batch each, and share the results.

    Returns:
        Labels, numbers and digests of the rows.

    Raises:
        BadData: The rows are a stream, which cannot be shuffled; or they differ between two reads,
            so that training rows could not be recognised later.
    """
    if not source.can_take:
        raise BadData(
            f"{source.name} must give rows by number, to be shuffled, got a stream. Use arrays, or "
            f"the Dataset without its DataLoader"
        )
    total = -(-len(source) // (READ * processes.count))
    show = progress and processes.main
    own_batches = track(
        source.batches(READ, processes.turn), what="reading", total=total, show=show
    )

    def read() -> list[_BatchRead]:
        batches = list[_BatchRead]()
        for batch in own_batches:
            rounded = rounded_digests_of(batch.x, batch.digest)
            batches.append(_BatchRead(batch.y, batch.row, batch.digest, rounded))
        return batches

    # Each process reads its batches; together they are all batches, in their order.
    batches = processes.woven(processes.agreed(read))
    digests = np.concatenate([batch.digest for batch in batches])
    again = source.take(np.arange(min(LOOKED, len(source)))).digest
    if (again != digests[:LOOKED]).any():
        raise BadData(
            f"{source.name} must give the same rows at every read, got other ones. If its "
            f"transforms draw at random, remove them and pass them to fit as augment="
        )
    rounded = np.concatenate([batch.rounded for batch in batches])
    seen = SeenRows(source.name, fingerprint_of(digests), digests, rounded=rounded)
    labels = [batch.y for batch in batches if batch.y is not None]
    y = np.concatenate(labels) if labels else None
    row = np.concatenate([batch.row for batch in batches])
    return RowIndex(y, row, seen)


@dataclass(frozen=True)
class _BatchRead:
    """Labels, numbers and digests of a batch of b rows, each [b, ...]."""

    y: Array | None
    row: Array
    digest: Array
    rounded: Array


def drawn(*draws: int) -> int:
    """A seed for one point of a run.

    Args:
        draws: the seed of the run and the point, such as (seed, phase, epoch, step).

    Returns:
        A seed of 63 bits.
    """
    return int(np.random.SeedSequence(draws).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device` only. torch.manual_seed seeds every kind
    of device, which takes half a millisecond: longer than a small step.

    Args:
        seed: from `drawn`.
        device: where the network is.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class BatchLoader:
    """The batches of a phase. Their sizes differ by at most one row, so a batch has a single row
    only if that cannot be avoided.

    The batches are the same for any number of processes. Draws within a batch, such as dropout, are
    each process's own.

    Args:
        source: the rows.
        index: their labels and numbers, from `index_of`.
        batch_size: largest number of rows of a batch, over all processes.
        draws: the seed of the run and the number of the phase.
        device: where batches are put.
        cache: pooled features [V N, F] by node: V copies of the N rows, one copy after the other.
            None reads the rows.
        augment: applied to the inputs of each training batch.
        processes: that have a share of each batch.
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
        self.keep: Array = np.arange(len(index.row))  # positions of the rows to train on

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return max(1, -(-len(self.keep) // self.batch_size))

    @property
    def smallest(self) -> int:
        """Number of rows of the smallest batch."""
        return len(self.keep) // self.steps

    def size(self, step: int) -> int:
        """Number of rows of one batch, in all processes together."""
        # np.array_split gives the rows that are left over to the first batches, one each
        return self.smallest + (step < len(self.keep) % self.steps)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[State, Array]]:
        """The batches of an epoch in random order; torch's generator is seeded for each one.

        Args:
            number: of the epoch.
            start: first step; earlier ones are skipped.

        Yields:
            Named tensors and the positions [b] of the rows in this process's share of a batch.
        """
        order = np.random.default_rng(drawn(*self.draws, number)).permutation(self.keep)
        # the main process draws as a single one would; the others add their rank
        rank = () if self.processes.main else (self.processes.rank,)
        for step, positions in enumerate(np.array_split(order, self.steps)):
            if step < start:
                continue
            seed_torch(drawn(*self.draws, number, step, *rank), self.device)
            share = self.processes.share(positions)
            yield self.state(share, number), share

    def in_order(self, size: int) -> Iterator[tuple[State, Array]]:
        """All rows in their order, without augmentation. Processes take whole batches in turn.

        Args:
            size: rows of a batch.

        Yields:
            Named tensors and the positions [b] of the rows, for the batches of this process.
        """
        for start in range(0, len(self.index.row), size)[self.processes.turn]:
            positions = np.arange(start, min(start + size, len(self.index.row)))
            yield self.state(positions, 0, plain=True), positions

    def state(self, positions: Array, epoch: int, *, plain: bool = False) -> State:
        """The named tensors of some rows.

        Args:
            positions: of the rows [b].
            epoch: decides which copy of pooled features is read, if there are several.
            plain: leaves inputs without augmentation.
        """
        if self.cache is None:
            augment = None if plain else self.augment
            return augmented(self.source.take_x(positions), augment, self.device)
        state: State = {}
        rows = len(self.index.row)
        for name, column in self.cache.items():
            # [V N, F] holds the copies one after the other: row r of copy v is at v N + r.
            copy = epoch % (len(column) // rows)
            state[name] = torch.from_numpy(column[positions + rows * copy]).to(self.device)
        return state

    def batch(self, positions: Array, phase: str, step: int = 0, steps: int = 1) -> TrainingBatch:
        """The labels and numbers of some rows, as a recipe reads them.

        Args:
            positions: of the rows [b].
            phase: its name.
            step: the number of the step in the phase.
            steps: of the phase.
        """
        if self.index.y is None:
            y = None
        else:
            y = torch.from_numpy(self.index.y[positions]).to(self.device)
        return TrainingBatch(y, torch.from_numpy(self.index.row[positions]), phase, step, steps)


def augmented(x: Any, augment: Augment | None, device: torch.device) -> State:
    """The named tensors of a batch after augmentation, which draws from torch's generator.

    Args:
        x: a batch as the data set gives it.
        augment: the user's function; None changes nothing.
        device: where the tensors are put.

    Raises:
        BadData: The function changed the number of rows.
    """
    state = as_inputs(x, device)
    if augment is None:
        return state
    changed = as_inputs(augment(given(state)), device)
    if count_of(changed) != count_of(state):
        raise BadData(
            f"augment must return {count_of(state)} rows for {count_of(state)}, got "
            f"{count_of(changed)}"
        )
    return changed
