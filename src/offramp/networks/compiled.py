"""Caches what is derived from a network: its segments, graphs, compiled calls, the last Runner.

Every network has one `Compiled`, which is freed with the network. A cached value is made again if
its user finds that it no longer fits, for example after a module was replaced. Nothing is stored on
the network or on its modules.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Made = TypeVar("Made")

_EXPORTING = threading.RLock()  # one for the process: torch.export is not thread-safe
_OWNERS = threading.Lock()
_OF: WeakKeyDictionary[nn.Module, Compiled] = WeakKeyDictionary()


class Compiled:
    """The values derived from one network, by key.

    Neither this object nor its values may refer to the network, which would then never be freed.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def once(
        self, key: Hashable, make: Callable[[], Made], fits: Callable[[Made], bool] | None = None
    ) -> Made:
        """Return the value under a key, and make it if there is none or if it no longer fits.

        If several threads ask at the same time, one makes the value and the others wait. `make` may
        ask for other keys of the same network. If it raises, the earlier value is gone.

        Args:
            key: identifies the value and what it was made for.
            make: makes the value.
            fits: whether the earlier value may still be used; None means always.

        Returns:
            The result of `make`, from now or earlier.
        """
        with undisturbed():
            if key in self._kept:
                made: Made = self._kept[key]
                if fits is None or fits(made):
                    return made
                del self._kept[key]
            made = self._kept[key] = make()
            return made

    def found(self, key: Hashable) -> Any:
        """The value under a key, whether it fits or not; None without. It waits for no thread."""
        return self._kept.get(key)

    def forget(self) -> None:
        """Drop all values, because the network has changed."""
        with undisturbed():
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


def compiled_of(network: nn.Module) -> Compiled:
    """The cache of a network. Hold it instead of the network, so that the network can be freed."""
    with _OWNERS:
        return _OF.setdefault(network, Compiled())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While it is open, no other thread exports a network or derives anything from one.

    During an export the parameters are fake.
    """
    with _EXPORTING:
        yield
