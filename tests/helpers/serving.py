"""A model that serves in another thread while it is exported."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn


class Service:
    """What another thread does in the middle of an export.

    A queue holds the function, because a Runner looks at the values that its network's code reads,
    and refuses batches after one of them has changed.
    """

    def __init__(self) -> None:
        self.functions: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.results: SimpleQueue[Any] = SimpleQueue()
        self.exporter = threading.get_ident()

    def __deepcopy__(self, memo: object) -> Service:
        return self

    def meet(self) -> None:
        """Run the function once in a new thread, and wait for it, if this is an export."""
        is_exporter = threading.get_ident() == self.exporter
        if is_exporter and torch.compiler.is_exporting() and not self.functions.empty():
            thread = threading.Thread(target=self._run, args=(self.functions.get(),))
            thread.start()
            thread.join()

    def during_export(self, function: Callable[[], object]) -> None:
        """Run a function whenever the model is called in the next export."""
        for _ in range(8):  # more than torch's passes over a model
            self.functions.put(function)

    def all_results(self) -> list[Any]:
        """What the function gave, or the errors that it raised."""
        results = []
        while not self.results.empty():
            results.append(self.results.get())
        return results

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self.results.put(function())
        except Exception as problem:
            self.results.put(problem)


class Exporting(nn.Module):
    """A model whose forward meets its service.

    Attributes:
        service: shared by copies of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.service = Service()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 3]."""
        h = self.stem(x)
        self.service.meet()
        return self.head(h)
