"""Several processes that do one thing together, as `torchrun` and `accelerate launch` start them.

Every process calls the same verb and gets the same result. What is exchanged goes through
torch.distributed; a process that was started alone exchanges nothing. What one process raises is
raised by all: none waits for it in vain.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from offramp.errors import InvalidArgument

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=3)  # a phase that solves runs in one process, and the others wait for it
LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # what launchers say


@dataclass(frozen=True)
class Processes:
    """One process among `count`; the one at place 0, the main one, writes files. device: where its
    tensors lie.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def turn(self) -> slice:
        """Which of things in a row are this process's: every count-th."""
        return slice(self.rank, None, self.count)

    def share(self, positions: Array) -> Array:
        """This process's part of some rows; the parts differ by one row at most."""
        return np.array_split(positions, self.count)[self.rank]

    def gathered(self, thing: T) -> list[T]:
        """What each process holds, in their order, in every process."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, thing)
        return found

    def woven(self, mine: Sequence[T]) -> list[T]:
        """All things in their order, of which each process holds its `turn`."""
        missing = object()
        turns = zip_longest(*self.gathered(mine), fillvalue=missing)
        return [thing for turn in turns for thing in turn if thing is not missing]  # type: ignore[misc]

    def agreed(self, call: Callable[[], T]) -> T:
        """What `call` gives in this process, once it has ended in all; what it raises in one is
        raised in all.
        """
        if self.count == 1:
            return call()
        result = None
        problem = None
        try:
            result = call()
        except Exception as raised:
            problem = raised
        others = self.gathered(None if problem is None else _packed(problem))
        if problem is None:
            problem = next((pickle.loads(other) for other in others if other is not None), None)
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def alone(self, call: Callable[[], T]) -> T:
        """What `call` gives in the main process, in every one; the others wait."""
        result = self.agreed(lambda: call() if self.main else None)
        return self.gathered(result)[0]  # type: ignore[return-value]

    def require_same(self, mark: str, what: str) -> None:
        """Raise InvalidArgument unless all processes have the same `mark` of something."""
        if len(set(self.gathered(mark))) > 1:
            raise InvalidArgument(
                f"the {self.count} processes must have the same {what}, got different ones. "
                "Load it from a file, or seed what makes it"
            )

    def either(self, *wishes: bool) -> tuple[bool, ...]:
        """Of each wish whether any process has it."""
        if self.count == 1:
            return wishes
        found: list[float] = self.total(torch.tensor(wishes, dtype=torch.float32)).tolist()
        return tuple(value > 0 for value in found)

    def mean(self, figures: Mapping[str, float], weight: float) -> dict[str, float]:
        """Figures that each process has of its share of the rows, over all of them. weight: its
        share of the rows.
        """
        if self.count == 1:
            return dict(figures)
        values = torch.tensor([*figures.values()], dtype=torch.float64) * weight
        return dict(zip(figures, self.total(values).tolist(), strict=True))

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, as a new tensor where their tensors lie."""
        found = value.detach().to(self.device, copy=True).contiguous()
        if self.count > 1:
            distributed.all_reduce(found)
        return found

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their sums over all processes; a parameter that none has a gradient
        for keeps none.

        By hand and not by DistributedDataParallel: that hooks into one forward of one module, and
        recipes call a network in several ways, look at it through hooks, and leave exits out.
        """
        if self.count == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for value in parameters:
            kinds.setdefault(value.dtype, []).append(value)
        for values in kinds.values():
            own = [
                torch.zeros_like(value) if value.grad is None else value.grad for value in values
            ]
            has = torch.tensor(
                [value.grad is not None for value in values],
                dtype=own[0].dtype,
                device=own[0].device,
            )
            found = self.total(torch.cat([*(one.reshape(-1) for one in own), has]))
            start = 0
            for value, known in zip(values, found[-len(values) :].tolist(), strict=True):
                end = start + value.numel()
                value.grad = found[start:end].view_as(value).clone() if known else None
                start = end

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.count == 1:
            return
        with torch.no_grad():
            for value in tensors:
                found = value.detach().to(self.device, copy=True).contiguous()
                distributed.broadcast(found, src=0)
                value.data.copy_(found)


ALONE = Processes()


def here(device: torch.device) -> Processes:
    """The processes among which this one was started; it joins them if nobody has done so. device:
    its network's.

    Every one of them must call what asks for this, or those that do wait for it.
    """
    if not distributed.is_available():
        return Processes(device=device)
    if not distributed.is_initialized():
        if not all(name in os.environ for name in LAUNCHED) or int(os.environ["WORLD_SIZE"]) < 2:
            return Processes(device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_part)
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def _part() -> None:
    """Leave the others in order: a process that ends while it still listens to them may crash, its
    work being done.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _packed(problem: Exception) -> bytes:
    """An exception as bytes from which it can be made again; one that cannot goes as its text."""
    try:
        packed = pickle.dumps(problem)
        pickle.loads(packed)
    except Exception:  # errors that carry more than a sentence
        return pickle.dumps(
            RuntimeError(f"another process stopped: {type(problem).__name__}: {problem}")
        )
    return packed
