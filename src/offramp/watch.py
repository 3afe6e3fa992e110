"""Whether modules are still what they were when a Runner was opened."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from offramp.errors import OpenAgain


class Watch:
    """Notices that modules are no longer what they were: parameters, buffers, submodules, training flags.

    A part is looked at right after it ran, while its tensors are in the cache: four times cheaper than before the
    run, and a change made during the run is noticed as well. It holds the modules' tables and not the modules, so
    that a Runner does not keep its network alive.
    """

    def __init__(self, roots: Sequence[nn.Module], *, deep: bool = True) -> None:
        modules = dict.fromkeys(module for root in roots for module in (root.modules() if deep else [root]))
        tables = [table for module in modules for table in (module._parameters, module._buffers, module._modules)]
        self.states = [vars(module) for module in modules]
        entries = [(table, key, value) for table in tables for key, value in table.items()]
        self.tables = [table for table, _, _ in entries]
        self.keys = [key for _, key, _ in entries]
        self.values: list[Any] = [value for _, _, value in entries]
        self.tensors = [value for value in self.values if isinstance(value, Tensor) and not value.is_inference()]
        self.marks = self._marks()

    def _marks(self) -> tuple[list[int], list[int]]:
        return list(map(attrgetter("_version"), self.tensors)), list(map(Tensor.data_ptr, self.tensors))

    def check(self) -> None:
        """Raise OpenAgain when anything differs."""
        try:
            same = all(map(is_, map(getitem, self.tables, self.keys), self.values)) and self._marks() == self.marks
        except KeyError:
            same = False
        if not same or any(map(itemgetter("training"), self.states)):
            raise OpenAgain(
                "the network was moved, cast, trained or re-assigned after it was opened; call net.eval(), open again"
            )
