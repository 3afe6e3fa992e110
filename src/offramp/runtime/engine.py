"""Engines, and how a text names one: a file in `offramp/engines`, and options after a colon.

    torch     torch:bf16     torch:bf16,channels_last     onnxruntime:int8=digits[0:200]

An option is a keyword argument of the engine: alone it is True, after `=` it has a text. Traces and
plans store the whole text. A change of an option makes another engine, and a promise does not hold
for another engine.
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
    """The contract of an engine, which runs segments. A file of `offramp/engines` has one engine,
    and its name is that of the engine.

    The keyword arguments of the constructor are the options. Every method except `open` has a
    default. Code that uses an engine relies on nothing else.

    Args:
        options: those that differ from their defaults, by name.
    """

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = dict(sorted(options.items()))

    @abc.abstractmethod
    def open(
        self, network: Network, schedule: Schedule, device: torch.device
    ) -> tuple[EngineStage, ...]:
        """Open a schedule.

        Args:
            network: in eval mode.
            schedule: the stages to run.
            device: where the network is.

        Returns:
            One stage of the engine per stage of the schedule. An engine may join a stage without an
            open exit with the next one.

        Raises:
            InvalidArgument: the engine does not run on this device, or not with these options.
            BadNetwork: the engine cannot run this network.
        """

    def bare(
        self, network: Network, schedule: Schedule, state: State
    ) -> Callable[[State], Callable[[], object]]:
        """One node without any code of ours around the call. This is the baseline of timings.

        The default is the stage of the node itself, under inference_mode.

        Args:
            network: whose node it is.
            schedule: with this stage alone.
            state: named inputs [B, ...] like those that the call will get.

        Returns:
            A function that converts and binds inputs, and returns the call to time.
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
    ) -> Callable[[Mapping[str, Any]], Sequence[Any] | None]:
        """A whole schedule as one call on arrays, gates and compaction included.

        By default an engine has no such call, and stages run one after the other.

        Args:
            network: whose schedule it is.
            schedule: a chain with an open gate.
            engine_stages: its stages, opened on this engine and compiled.
            rows: named inputs [B, ...] like those that will be served.

        Returns:
            A function of named arrays that returns logits [B, C] and codes [B]: see `one_graph`.
            For rows that only the stages answer right it may return None.

        Raises:
            BadNetwork: the engine has no such call for this schedule; the message has the reason.
        """
        raise BadNetwork("this engine has no single graph for it")

    def version(self) -> str:
        """The name and version of the runtime, for traces and plans. By default this is the name of
        the engine.

        Raises MissingExtra if the runtime is not installed.
        """
        return type(self).__module__.rpartition(".")[2]

    def marks(self) -> list[str]:
        """The options as traces and plans store them, in order. By default this is how they were
        written.
        """
        marks = list[str]()
        for key, value in self.options.items():
            marks.append(key if value is True else f"{key}={value}")
        return marks

    @property
    def identity(self) -> str:
        """The engine as traces and plans store it: `version`, and the `marks` of its options.
        Raises MissingExtra.
        """
        marks = self.marks()
        if not marks:
            return self.version()
        return f"{self.version()}:{','.join(marks)}"

    @property
    def compiles(self) -> bool:
        """Whether its stages are compiled when their first rows arrive."""
        return False

    @property
    def own_threads(self) -> bool:
        """Whether it computes on threads and copies of the weights of its own, and not on those of
        torch. Torch's threads then should not be woken before a call.
        """
        return False

    @property
    def measures_threads(self) -> bool:
        """Whether a Runner chooses, for each stage, between one and all of torch's threads, by
        measuring its batches.
        """
        return False

    @property
    def trained_on(self) -> NDArray[np.uint64] | None:
        """The digests [n] of rows that set some of its options; None without such rows. These rows
        count as training rows.
        """
        return None


def engine_of(text: str) -> tuple[Engine, str]:
    """Make an engine from a text.

    Args:
        text: such as "torch:bf16"; see the top of this file.

    Returns:
        The engine, and the text by which traces and plans store it.

    Raises:
        UnknownName: there is no such engine or option.
        InvalidArgument: an option does not take this value.
        MissingExtra: the runtime is not installed.
    """
    name, _, options_text = text.partition(":")
    kind = kind_of(name)
    known = dict[str, inspect.Parameter]()
    for key, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            known[key] = parameter
    options: dict[str, Any] = {}
    for option in filter(None, options_text.split(",")):
        key, equals, value = option.partition("=")
        if key not in known:
            raise unknown(key, list(known), f"option of the engine {name!r}")
        # An option with the default False stands alone; any other one needs a value.
        is_flag = known[key].default is False
        if is_flag and equals:
            raise InvalidArgument(f"option {key} of {name} must have no value, got {option!r}")
        if not is_flag and not value:
            raise InvalidArgument(f"option {key} of {name} must have a value, got {option!r}")
        options[key] = True if is_flag else value
    engine = kind(**options)
    return engine, engine.identity


def kind_of(name: str) -> type[Engine]:
    """The class of an engine, by the name of its file. Raises UnknownName."""
    module = vars(find_file("engines", name))
    class_name = module["__all__"][0]
    kind: type[Engine] = module[class_name]
    return kind
