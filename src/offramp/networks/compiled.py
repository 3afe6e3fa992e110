"""What is made of a network once and kept: its segments, graphs, compiled calls, the last Runner.

Every network has one `Compiled`, which goes when the network goes. What it keeps is made again when
whoever asks finds that it no longer fits, such as after a module was replaced. Nothing is parked on
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

_EXPORTING = threading.RLock()  # one for the process: torch.export is not made for two
_OWNERS = threading.Lock()
_OF: WeakKeyDictionary[nn.Module, Compiled] = WeakKeyDictionary()


class Compiled:
    """What was made of one network, by keys that say what it is and for what it was made.

    It must hold no reference to the network, and so must nothing that it keeps: it would never go.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def once(
        self, key: Hashable, make: Callable[[], Made], fits: Callable[[Made], bool] | None = None
    ) -> Made:
        """What was made under this key; made now if there is nothing, or if it no longer fits.

        Of threads that ask at the same time one makes it and the others wait. `make` may ask for
        other keys of the same network. If it raises, what was there before is gone.

        Args:
            key: what it is.
            make: makes it.
            fits: whether what is there may still be used; None means for as long as the network
                lives.

        Returns:
            What `make` gave, now or earlier.
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
        """What is there under this key, fitting or not, without waiting for threads that make
        something; else None.
        """
        return self._kept.get(key)

    def forget(self) -> None:
        """Drop all of it: the network is another one now."""
        with undisturbed():
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


def compiled_of(network: nn.Module) -> Compiled:
    """Where that which is made of a network is kept. Hold this, and not the network, to let the
    network go.
    """
    with _OWNERS:
        return _OF.setdefault(network, Compiled())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts no other thread exports, or makes anything of a network: until export ends
    parameters are fake.
    """
    with _EXPORTING:
        yield
