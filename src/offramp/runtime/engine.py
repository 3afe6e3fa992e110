"""An engine by its text: the name of a file on the shelf, and after a colon what its `open` is
asked for.

    torch     torch:bf16     torch:bf16,channels_last     onnxruntime:int8=digits[0:200]

An option is a keyword argument of the engine: alone it is True, after `=` it has a text. Traces and
plans carry the whole text: an option makes another engine, which voids a promise.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp._support.find import find_file, unknown
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage, Network
from offramp.plans.schedule import Schedule


class Engine(abc.ABC):
    """Contract of what runs segments. A file on the shelf holds one, and its name there is the
    engine's.

    The keyword arguments of the constructor are the options; those that are given reach `options`.
    Every method below but `open` has a default, and whoever uses an engine asks for nothing that
    does not stand here.
    """

    def __init__(self, **options: Any) -> None:
        """Keep the options that differ from their defaults, by name."""
        self.options: dict[str, Any] = dict(sorted(options.items()))

    @abc.abstractmethod
    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """One part per stage; an engine may join stages at which nothing is asked. Raises what it
        refuses.
        """

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """One node as its engine runs it bare, with nothing of ours around the call: the baseline
        of timings.

        By default the node's part itself, under inference_mode.

        Args:
            network: whose node it is.
            schedule: of the one stage that is run.
            state: named inputs [B, ...] such as it will be given.

        Returns:
            A function that binds inputs, converted beforehand, and returns the call to time.
        """
        (engine_stage,) = self.open(network, schedule, network.device())

        def call(rows: State) -> State:
            state = dict(rows)
            with torch.inference_mode():
                engine_stage.call(state)
            return state

        return lambda rows: partial(call, rows)

    def in_one(
        self,
        network: Network,
        schedule: Schedule,
        engine_stages: Sequence[EngineStage],
        rows: State,
    ) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
        """A schedule lowered to one call on arrays, with gates, compaction and order inside.

        By default an engine has none, and stages run one after the other.

        Args:
            network: whose schedule it is.
            schedule: a chain with a gate that is open.
            parts: its stages, opened on this engine and compiled.
            rows: named inputs [B, ...] such as will be served.

        Returns:
            A function of named arrays that gives logits [B, C] and codes [B]: see `one_graph`.

        Raises:
            BadNetwork: it cannot be had; the sentence says why.
        """
        raise BadNetwork("this engine has no single graph for it")

    def version(self) -> str:
        """What runs and in which version, for traces and plans; by default the name on the shelf.

        Raises MissingExtra when what it runs on is not installed.
        """
        return type(self).__module__.rpartition(".")[2]

    def marks(self) -> list[str]:
        """What traces and plans remember of the options, in order; by default as they were
        written.
        """
        return [key if value is True else f"{key}={value}" for key, value in self.options.items()]

    @property
    def identity(self) -> str:
        """What traces and plans remember: `version`, and the options by their `marks`. Raises
        MissingExtra.
        """
        told = ",".join(self.marks())
        return self.version() + (f":{told}" if told else "")

    @property
    def compiles(self) -> bool:
        """Whether its parts are made when their first rows arrive."""
        return False

    @property
    def own_threads(self) -> bool:
        """Whether it computes on other threads than torch (which had better not have woken its own
        just before), and on copies of the weights.
        """
        return False

    @property
    def trained_on(self) -> NDArray[np.uint64] | None:
        """The digests of rows [n] that its options were set by, which promise nothing any more;
        None without.
        """
        return None


def engine_of(text: str) -> tuple[Engine, str]:
    """An engine, and what traces and plans remember of it.

    Raises UnknownName for a name or an option that there is not, InvalidArgument for a value that
    it does not take, MissingExtra when what it runs on is not installed.
    """
    name, _, asked = text.partition(":")
    kind = kind_of(name)
    takes = inspect.signature(kind).parameters
    known = [key for key, one in takes.items() if one.kind is one.KEYWORD_ONLY]
    options: dict[str, Any] = {}
    for option in filter(None, asked.split(",")):
        key, equals, value = option.partition("=")
        if key not in known:
            raise unknown(key, known, f"option of the engine {name!r}")
        flag = takes[key].default is False
        if flag == bool(equals) or (equals and not value):
            raise InvalidArgument(
                f"got the option {option!r} of {name}, expected {key if flag else key + '=...'}; "
                f"write it so"
            )
        options[key] = True if flag else value
    engine = kind(**options)
    return engine, engine.identity


def kind_of(name: str) -> type[Engine]:
    """The engine that a file on the shelf holds. Raises UnknownName."""
    offered = vars(find_file("engines", name))
    found: list[type[Engine]] = [offered[each] for each in offered["__all__"]]
    return found[0]
