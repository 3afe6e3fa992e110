"""Several processes that work together, started by `torchrun` or `accelerate launch`.

Every process calls the same verb and gets the same result. They exchange values through
torch.distributed; a process that was started alone exchanges nothing. If one process raises an
exception, all of them raise it, so that none waits in vain.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from offramp.errors import InvalidArgument

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=3)  # the longest wait, for a phase that only the main process runs
LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that launchers set


@dataclass(frozen=True)
class Processes:
    """One process among several. The main one, with rank 0, writes the files.

    Args:
        rank: of this process, from 0.
        count: number of processes.
        device: of this process's tensors.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def turn(self) -> slice:
        """Selects this process's items of a list: every count-th one, from its rank on."""
        return slice(self.rank, None, self.count)

    def share(self, positions: Array) -> Array:
        """This process's part of some rows. The sizes of the parts differ by at most one row."""
        return np.array_split(positions, self.count)[self.rank]

    def gathered(self, thing: T) -> list[T]:
        """Collect a value of every process, in the order of their ranks. All of them get the
        list.
        """
        if self.count == 1:
            return [thing]
        things: list[Any] = [None] * self.count
        distributed.all_gather_object(things, thing)
        return things

    def woven(self, mine: Sequence[T]) -> list[T]:
        """Join the lists of all processes, each of which has the items of its `turn`."""
        lists = self.gathered(mine)
        longest = max(len(items) for items in lists)
        woven = list[T]()
        for index in range(longest):
            for items in lists:
                if index < len(items):
                    woven.append(items[index])
        return woven

    def agreed(self, call: Callable[[], T]) -> T:
        """Call a function in every process, and wait until all of them have finished.

        Returns:
            The result in this process.

        Raises:
            Exception: whatever it raises in any process.
        """
        if self.count == 1:
            return call()
        result = None
        problem: Exception | None = None
        packed: bytes | None = None
        try:
            result = call()
        except Exception as raised:
            problem = raised
            packed = _packed(raised)
        # Every process takes part in the exchange, also one that failed; otherwise others would
        # wait for it.
        for other in self.gathered(packed):
            if problem is None and other is not None:
                problem = pickle.loads(other)
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def alone(self, call: Callable[[], T]) -> T:
        """Call a function in the main process alone. The others wait, and get its result."""
        result = self.agreed(lambda: call() if self.main else None)
        return self.gathered(result)[0]  # type: ignore[return-value]

    def require_same(self, mark: str, what: str) -> None:
        """Raise InvalidArgument if the processes have different marks, such as digests.

        Args:
            mark: of something in this process.
            what: the thing, for the message.
        """
        if len(set(self.gathered(mark))) > 1:
            raise InvalidArgument(
                f"the {self.count} processes must have the same {what}, got different ones. "
                "Load it from a file, or set a seed before it is made"
            )

    def either(self, *wishes: bool) -> tuple[bool, ...]:
        """For each of some flags, whether it is set in any process."""
        if self.count == 1:
            return wishes
        counts: list[float] = self.total(torch.tensor(wishes, dtype=torch.float32)).tolist()
        return tuple(count > 0 for count in counts)

    def mean(self, figures: Mapping[str, float], weight: float) -> dict[str, float]:
        """Average figures over all processes.

        Args:
            figures: of this process's share of the rows.
            weight: its share of the rows, from 0 to 1.
        """
        if self.count == 1:
            return dict(figures)
        values = torch.tensor(list(figures.values()), dtype=torch.float64) * weight
        return dict(zip(figures, self.total(values).tolist(), strict=True))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, as a new tensor on this process's device."""
        total = value.detach().to(self.device, copy=True).contiguous()
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their sums over all processes. A parameter without a gradient in
        every process still has none afterwards.

        DistributedDataParallel is not used, because it hooks into one forward of one module.
        Recipes call a network in several ways, observe it through hooks, and leave exits out.
        """
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            self._add_gradients_of(group)

    def _add_gradients_of(self, parameters: Sequence[Tensor]) -> None:
        """The same for parameters of one dtype, in one exchange.

        All gradients are put into one flat tensor, followed by a number for each parameter: whether
        this process has a gradient for it. After the sum this is the number of processes that have
        one.
        """
        flat = list[Tensor]()
        present = list[bool]()
        for parameter in parameters:
            gradient = parameter.grad
            present.append(gradient is not None)
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            flat.append(gradient.reshape(-1))
        flags = torch.tensor(present, dtype=flat[0].dtype, device=flat[0].device)
        total = self.total(torch.cat([*flat, flags]))
        counts = total[-len(parameters) :].tolist()
        start = 0
        for parameter, count in zip(parameters, counts, strict=True):
            end = start + parameter.numel()
            parameter.grad = None
            if count:
                parameter.grad = total[start:end].view_as(parameter).clone()
            start = end

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values into the tensors of every process, in place."""
        if self.count == 1:
            return
        with torch.no_grad():
            for value in tensors:
                received = value.detach().to(self.device, copy=True).contiguous()
                distributed.broadcast(received, src=0)
                value.data.copy_(received)


ALONE = Processes()


def here(device: torch.device) -> Processes:
    """The processes that were started together with this one. This one joins them, if nothing has
    done so before.

    Every process must call this at the same point, because those that call it wait for the others.

    Args:
        device: of the network in this process.
    """
    if not distributed.is_available():
        return Processes(device=device)
    if not distributed.is_initialized():
        launched = set(LAUNCHED) <= set(os.environ)
        if not launched or int(os.environ["WORLD_SIZE"]) < 2:
            return Processes(device=device)
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type != "cpu":
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_part)
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def _part() -> None:
    """Leave the group. A process that ends without it may crash after its work is done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _packed(problem: Exception) -> bytes:
    """An exception as bytes. If it cannot be restored from them, its text is sent instead."""
    try:
        packed = pickle.dumps(problem)
        pickle.loads(packed)
    except Exception:  # errors that carry more than a sentence
        return pickle.dumps(
            RuntimeError(f"another process stopped: {type(problem).__name__}: {problem}")
        )
    return packed
