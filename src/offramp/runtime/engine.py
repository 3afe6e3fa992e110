"""An engine by its text: the name of a file on the shelf, and after a colon what its `open` is asked for.

    torch     torch:bf16     torch:bf16,channels_last     onnxruntime:int8=digits[0:200]

An option is a keyword argument of the engine's `open`: alone it is True, after `=` it has a text. Traces and plans
carry the whole text: an option makes another engine, which voids a promise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp._support.find import find_file, unknown
from offramp.errors import BadInput
from offramp.networks.inputs import State
from offramp.networks.network import Network, Part
from offramp.plans.schedule import Schedule


@dataclass(frozen=True)
class Engine:
    """A file of the shelf with the options it is opened with."""

    module: ModuleType
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, network: Network, schedule: Schedule, device: torch.device) -> tuple[Part, ...]:
        """One part per stage; an engine may join stages at which nothing is asked. Raises what it refuses."""
        found: tuple[Part, ...] = self.module.open(network, schedule, device, **self.options)
        return found

    def bare(self, network: Network, schedule: Schedule, state: State) -> Callable[[State], Callable[[], object]]:
        """One node as its engine runs it bare, with nothing of ours around the call: the baseline of timings.

        Args:
            network: whose node it is.
            schedule: of the one stage that is run.
            state: named inputs [B, ...] such as it will be given.

        Returns:
            A function that binds inputs, converted beforehand, and returns the call to time.
        """
        found: Callable[[State], Callable[[], object]] = self.module.bare(network, schedule, state, **self.options)
        return found

    @property
    def identity(self) -> str:
        """What traces and plans remember: the version of what runs, or the file's name; and the options, in order.

        Raises MissingExtra when what it runs on is not installed.
        """
        version, marks = getattr(self.module, "version", None), getattr(self.module, "marks", _marks)
        told = ",".join(marks(**self.options)) if self.options else ""
        return (version() if version else self.module.__name__.rpartition(".")[2]) + (f":{told}" if told else "")

    @property
    def compiles(self) -> bool:
        """Whether its parts are made when their first rows arrive."""
        return hasattr(self.module, "compiles") and bool(self.module.compiles(**self.options))

    @property
    def own_threads(self) -> bool:
        """Whether it computes on other threads than torch (which had better not have woken its own just before), and on
        copies of the weights.
        """
        return bool(getattr(self.module, "OWN_THREADS", False))

    @property
    def learned(self) -> NDArray[np.uint64] | None:
        """The digests of rows that its options were set by, which promise nothing any more; None without."""
        return self.module.learned(**self.options) if self.options and hasattr(self.module, "learned") else None


def engine_of(text: str) -> tuple[Engine, str]:
    """An engine, and what traces and plans remember of it.

    Raises UnknownName for a name or an option that there is not, BadInput for a value that it does not take,
    MissingExtra when what it runs on is not installed.
    """
    name, _, asked = text.partition(":")
    module = find_file("engines", name)
    known = [key for key, one in inspect.signature(module.open).parameters.items() if one.kind is one.KEYWORD_ONLY]
    options: dict[str, Any] = {}
    for option in filter(None, asked.split(",")):
        key, equals, value = option.partition("=")
        if key not in known:
            raise unknown(key, known, f"option of the engine {name!r}")
        flag = inspect.signature(module.open).parameters[key].default is False
        if flag == bool(equals) or (equals and not value):
            raise BadInput(
                f"got the option {option!r} of {name}, expected {key if flag else key + '=...'}; write it so"
            )
        options[key] = True if flag else value
    engine = Engine(module, dict(sorted(options.items())))
    return engine, engine.identity


def _marks(**options: object) -> list[str]:
    return [key if value is True else f"{key}={value}" for key, value in options.items()]
