"""Whether modules are still what they were when a Runner was opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, cycle
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from offramp.errors import OpenAgain
from offramp.network import described
from offramp.nodes import Exit, Gate

VALUES: Any = dict.values  # everything below runs in C: a batch of one waits for it


class Watch:
    """Notices that modules are no longer what they were: parameters, buffers, submodules, training flags; of exits and
    gates also the numbers and texts of their configuration, such as a temperature.

    A part is looked at right after it ran, while its tensors are in the cache: four times cheaper than before the
    run, and a change made during the run is noticed as well. It holds the modules' tables and not the modules, so
    that a Runner does not keep its network alive.

    turns: a `glance` looks at one of so many shares of the modules, the next one each time, and at those in `always`.
    What moves, casts or trains all of them is noticed by any glance, a change of single ones after `turns` at most.
    """

    def __init__(
        self, roots: Sequence[nn.Module], *, deep: bool = True, turns: int = 1, always: Iterable[nn.Module] = ()
    ) -> None:
        modules = dict.fromkeys(module for root in roots for module in (root.modules() if deep else [root]))
        first = {module: None for module in always if module in modules}
        rest = [module for module in modules if module not in first]
        self._shares = [_Share([*first, *rest[turn::turns]]) for turn in range(turns)]
        self._turn = cycle(self._shares)

    def check(self) -> None:
        """Raise OpenAgain when anything differs."""
        for share in self._shares:
            share.check()

    def glance(self) -> None:
        """Raise OpenAgain when anything differs in the share whose turn it is."""
        next(self._turn).check()


class _Share:
    """Modules that are looked at together."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tables: list[dict[str, Any]] = [
            table for module in modules for table in (module._parameters, module._buffers, module._modules)
        ]
        self.states = [vars(module) for module in modules]
        self.tables = [table for table in tables if table]
        self.values: list[Any] = [value for table in self.tables for value in table.values()]
        self.empty = [table for table in tables if not table]
        buffers = [next(iter(module._buffers.values()), None) for module in modules]
        tensors = [value for module in modules for value in module._parameters.values()] + buffers
        self.tensors = [value for value in tensors if isinstance(value, Tensor) and not value.is_inference()]
        firsts = [next(iter(module._parameters.values()), None) for module in modules]
        self.places = [first for first in firsts if isinstance(first, Tensor)]
        configured = [(vars(module), described(module)) for module in modules if isinstance(module, (Exit, Gate))]
        self.settings = [
            (table, key, value)
            for table, config in configured
            for key, value in table.items()
            if key in config and isinstance(value, (bool, int, float, str))
        ]
        self.marks = self._marks()

    def _marks(self) -> tuple[list[int], list[int]]:
        """Versions of parameters and of each module's first buffer tell of training, where first parameters lie of
        moving and casting.
        """
        return list(map(attrgetter("_version"), self.tensors)), list(map(Tensor.data_ptr, self.places))

    def check(self) -> None:
        now = list(chain.from_iterable(map(VALUES, self.tables)))
        same = len(now) == len(self.values) and all(map(is_, now, self.values)) and not any(self.empty)
        same = same and self._marks() == self.marks
        same = same and all(table.get(key, self) == value for table, key, value in self.settings)
        if not same or any(map(itemgetter("training"), self.states)):
            raise OpenAgain(
                "the network was moved, cast, trained or re-assigned after it was opened; call net.eval(), open again"
            )
