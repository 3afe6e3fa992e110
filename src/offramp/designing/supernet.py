"""Many networks that share weights: at some places of a model several layers could stand, and each
task has its head.

After Peng et al., 2021, arXiv 2112.03456 (RSBNet), of which only the abstract could be read, and
its nearest published relative, Guo et al., Single Path One-Shot Neural Architecture Search, ECCV
2020, arXiv 1904.00420. Shapes: B rows, C classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.arguments import name_of
from offramp._support.find import find, unknown
from offramp.building.converting import convert
from offramp.building.cutting import cut
from offramp.building.factories import make_exit
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Exit, Seen
from offramp.networks.taps import listening, logits_in

Option = str | Mapping[Any, Any] | nn.Module | Callable[[nn.Module], nn.Module]
DENSE = "dense"
SKIP = "skip"
NARROW = "narrow"


@dataclass(frozen=True)
class Subnet:
    """One network within a supernet.

    Args:
        options: the number of the option at each place, in the order of `Supernet.places`.
        exits: where exits stand, shallow to deep; some of `Supernet.taps`.
    """

    options: tuple[int, ...]
    exits: tuple[str, ...] = ()


class Supernet(nn.Module):
    """A copy of a model in which several layers could stand at some places, with a head for each
    task.

    Args:
        model: a classifier; it stays as it is.
        choices: by the name of a module, what could stand there: "dense" (the module itself),
            "skip" (nothing, where shapes allow it), "narrow?by=2" (a residual block with fewer
            channels within), a method of `convert` for all convolutions and linear layers within
            ("ghost?ratio=2", "low_rank?energy=0.8"), a mapping as `convert` takes it, a module, or
            a function of the module.
        example: images or rows as the model takes them, [B, ...].
        head: the name of the module that gives the logits; a linear layer.
        heads: by task, the number of its classes, or None for the head that the model has.
        exits: names of modules after which an exit may stand.
        exit: what stands there, as `cut` takes it.
        preprocess: makes the model's input of the rows; None where they are ready.

    Raises:
        UnknownName: a name of no module, or of no method.
        InvalidArgument: a place without options, a task without classes, a name within a place.
        BadNetwork: an option that does not fit its place.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, Sequence[Option]],
        example: Tensor,
        *,
        head: str,
        heads: Mapping[str, int | None],
        exits: Sequence[str] = (),
        exit: str = "linear",
        preprocess: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not choices or not heads:
            raise InvalidArgument("a supernet needs at least one place and one task")
        self.model = copy.deepcopy(model).eval()
        self.preprocess = copy.deepcopy(preprocess).eval() if preprocess is not None else None
        known = dict(self.model.named_modules())
        for name in (*choices, *exits, head):
            if name not in known:
                raise unknown(name, [each for each in known if each], "module of this model")
        for name in (*choices, *exits, head):
            inside = [
                index for index in choices if name.startswith(f"{index}.") or name == index == head
            ]
            if inside:
                raise InvalidArgument(
                    f"{name!r} is within the place {inside[0]!r}, whose options have modules of "
                    f"their own"
                )
        last = known[head]
        if not isinstance(last, nn.Linear):
            raise InvalidArgument(
                f"head must name a linear layer, and {head!r} is a {type(last).__name__}"
            )
        self.head = head
        self.heads = nn.ModuleDict(
            {task: _head_of(task, count, last) for task, count in heads.items()}
        )
        self.classes = {
            task: part.out_features
            for task, part in self.heads.items()
            if isinstance(part, nn.Linear)
        }
        self.places = tuple(choices)
        self.names = tuple(tuple(map(str, options)) for options in choices.values())
        self.options = nn.ModuleList()
        for index, options in choices.items():
            if not options:
                raise InvalidArgument(
                    f"the place {index!r} must have at least one option, got none"
                )
            self.options.append(
                nn.ModuleList([option_of(known[index], index, option) for option in options])
            )
        for name in (*self.places, head):
            _put(self.model, name, nn.Identity())  # each weight belongs to one list alone
        self.example = example[:2]
        self.taps: tuple[str, ...] = ()
        self.order = self._order(exits)
        self.taps = tuple(name for name in self.order if name in exits)
        self.exits = nn.ModuleDict()
        self._hang_exits(exit)

    @property
    def dense(self) -> Subnet:
        """The first option at every place, and no exits."""
        return Subnet((0,) * len(self.places))

    @property
    def size(self) -> int:
        """How many networks it holds, exits counted too."""
        total: int = 2 ** len(self.taps)
        for options in self.options:
            total *= _count(options)
        return total

    def drawn(self, rng: np.random.Generator) -> Subnet:
        """A network of which every option is as likely as the others, with all exits."""
        options = []
        for index in self.options:
            options.append(int(rng.integers(_count(index))))
        return Subnet(tuple(options), self.taps)

    @contextlib.contextmanager
    def along(self, subnet: Subnet, task: str) -> Iterator[nn.Module]:
        """While it lasts, the options of a network and the head of a task stand in the model."""
        self.require(subnet, task)
        try:
            for name, options, number in zip(
                self.places, self.options, subnet.options, strict=True
            ):
                _put(self.model, name, _at(options, number))
            _put(self.model, self.head, self.heads[task])
            yield self.model
        finally:
            for name in (*self.places, self.head):
                _put(self.model, name, nn.Identity())

    def forward(self, x: Tensor, subnet: Subnet, task: str) -> tuple[Tensor, ...]:
        """Logits [B, C] of the exits of a network, shallow to deep, and of the task's head."""
        heard = dict[str, Tensor]()
        with self.along(subnet, task) as model:
            taps = {name: model.get_submodule(name) for name in subnet.exits}
            with listening(taps, lambda name, value: heard.update({name: _tensor(value)})):
                last = logits_in(model(self.prepared(x)))
        found = []
        for name in subnet.exits:
            found.append(self.exit_of(name, task)(Seen(heard[name], {})))
        return (*found, last)

    def prepared(self, x: Tensor) -> Tensor:
        """The model's input of some rows: x [B, ...] behind the preprocessing."""
        if self.preprocess is None:
            return x
        prepared: Tensor = self.preprocess(x)
        return prepared

    def exit_of(self, tap: str, task: str) -> Exit:
        """The exit of a task after a module."""
        found = self.exits[f"{tap}@{task}".replace(".", "/")]
        assert isinstance(found, Exit)
        return found

    def extract(self, subnet: Subnet, task: str) -> nn.Module:
        """A network of its own, with copies of the weights: a model as any other, in eval mode."""
        with self.along(subnet, task) as model:
            return copy.deepcopy(model).eval()

    def network(
        self,
        subnet: Subnet,
        task: str,
        *,
        model: nn.Module | None = None,
        gate: str = "margin",
        spec: str | None = None,
    ) -> Network:
        """A network with its exits, to be trained on, recorded and calibrated like any that was
        cut.

        Args:
            subnet: with at least one exit.
            task: whose head and exits.
            model: what `extract` gave, such as one trained since; None: a new copy.
            gate: as `cut` takes it.
            spec: how to build the model again, as `cut` takes it.
        """
        if not subnet.exits:
            raise InvalidArgument("the subnet has no exits, and a network needs one; use extract")
        body = self.extract(subnet, task) if model is None else model
        exits = {name: copy.deepcopy(self.exit_of(name, task)).eval() for name in subnet.exits}
        return cut(
            body,
            self.example,
            at=list(subnet.exits),
            exits=exits,
            gate=gate,
            preprocess=self.preprocess,
            spec=spec,
        )

    def told(self, subnet: Subnet) -> str:
        """A network in words: its options by place, and its exits."""
        parts = []
        for index, names, number in zip(self.places, self.names, subnet.options, strict=True):
            parts.append(f"{index}: {names[number]}")
        return ", ".join([*parts, *(f"exit after {name}" for name in subnet.exits)])

    def require(self, subnet: Subnet, task: str) -> None:
        """Raise UnknownName for another task, InvalidArgument for a network that this supernet does
        not hold.
        """
        if task not in self.heads:
            raise unknown(task, list(self.heads), "task of this supernet")
        fits = len(subnet.options) == len(self.options)
        for options, number in zip(self.options, subnet.options, strict=False):
            fits = fits and 0 <= number < _count(options)
        if not fits or [name for name in self.taps if name in subnet.exits] != list(subnet.exits):
            raise InvalidArgument(
                f"this supernet holds no {subnet}; see its places, options and taps"
            )

    def _order(self, exits: Sequence[str]) -> tuple[str, ...]:
        """Places and taps as they run, each with all of its options. Raises BadNetwork for one that
        does not fit.
        """
        task = next(iter(self.heads))
        order = list[str]()
        shapes = dict[str, tuple[int, ...]]()
        for position, index in enumerate(self.places):
            for number, name in enumerate(self.names[position]):
                options = [0] * len(self.places)
                options[position] = number
                heard = list[tuple[str, tuple[int, ...]]]()
                with self.along(Subnet(tuple(options)), task) as model:
                    watched = {
                        key: model.get_submodule(key)
                        for key in dict.fromkeys((*self.places, *exits))
                    }
                    try:
                        with torch.no_grad(), _hearing(watched, heard):
                            model(self.prepared(self.example))
                    except Exception as problem:  # whatever the user's code raises
                        why = str(problem).strip().partition("\n")[0]
                        raise BadNetwork(
                            f"the option {name!r} does not fit at {index!r} ({why})"
                        ) from problem
                if not order:
                    order = [key for key, _ in heard]
                    shapes = dict(heard)
                if dict(heard) != shapes:
                    got = dict(heard).get(index)
                    want = shapes.get(index)
                    raise BadNetwork(
                        f"the option {name!r} must give {want} at {index!r}, as the first one "
                        f"does, got {got}"
                    )
        if sorted(order) != sorted({*self.places, *exits}):
            raise BadNetwork(
                "every place and exit must run once for a row; one of these runs never or several "
                "times"
            )
        return tuple(order)

    def _hang_exits(self, exit: str) -> None:
        """An exit for each tap and task."""
        heard = list[tuple[str, tuple[int, ...]]]()
        with self.along(self.dense, next(iter(self.heads))) as model:
            watched = {name: model.get_submodule(name) for name in self.taps}
            with torch.no_grad(), _hearing(watched, heard):
                model(self.prepared(self.example))
        like = next(self.heads.parameters())
        for tap, shape in heard:
            for task, classes in self.classes.items():
                made = make_exit(exit, shape, classes, ())
                self.exits[f"{tap}@{task}".replace(".", "/")] = made.to(like)


@contextlib.contextmanager
def _hearing(
    modules: Mapping[str, nn.Module], heard: list[tuple[str, tuple[int, ...]]]
) -> Iterator[None]:
    """While it lasts, name and shape of one row of what each module gives are noted, in order."""
    with listening(
        modules, lambda name, value: heard.append((name, tuple(_tensor(value).shape[1:])))
    ):
        yield


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise BadNetwork(f"a place or a tap must give one tensor, got a {type(value).__name__}")
    return value


def _head_of(task: str, count: int | None, last: nn.Linear) -> nn.Linear:
    """The head of a task; the model's own where no count is given."""
    if count is None:
        return copy.deepcopy(last)
    if count < 2:
        raise InvalidArgument(
            f"the task {task!r} must have 2 or more classes, or None for the model's own "
            f"head, got {count}"
        )
    return nn.Linear(last.in_features, count).to(last.weight)


def option_of(dense: nn.Module, path: str, option: Option) -> nn.Module:
    """What an option stands for at a place."""
    if isinstance(option, nn.Module):
        return option.eval()
    if isinstance(option, str):
        name, arguments = name_of(option)
        if name == DENSE:
            return copy.deepcopy(dense)
        if name == SKIP:
            skipped: nn.Module = find("layers", "Skip").from_layer(dense)
            return skipped
        if name == NARROW:
            block: nn.Module = find("layers", NARROW)(dense, **arguments)
            return block
        return _converted(dense, path, option)
    if isinstance(option, Mapping):
        return convert(dense, option).eval()
    made = option(copy.deepcopy(dense))
    if not isinstance(made, nn.Module):
        raise InvalidArgument(
            f"an option at {path!r} must give a torch.nn.Module, got a {type(made).__name__}"
        )
    return made.eval()


def _converted(dense: nn.Module, path: str, method: str) -> nn.Module:
    """A place whose convolutions and linear layers are all replaced by one method."""
    inside = [
        kind
        for kind in (nn.Conv2d, nn.Conv1d, nn.Linear)
        if any(isinstance(p, kind) for p in dense.modules())
    ]
    if not inside:
        raise BadNetwork(
            f"{path!r} has no convolution or linear layer that {method!r} could replace"
        )
    if not list(dense.children()):  # a layer itself
        alone = convert(nn.Sequential(dense), {"0": method})
        return alone.get_submodule("0").eval()
    return convert(dense, dict.fromkeys(inside, method)).eval()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def _at(options: nn.Module, number: int) -> nn.Module:
    assert isinstance(options, nn.ModuleList)
    return options[number]


def _count(options: nn.Module) -> int:
    assert isinstance(options, nn.ModuleList)
    return len(options)
