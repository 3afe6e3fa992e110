"""A supernet: many networks that share weights. At some places of a model there is a choice of
layers, and each task has its own head.

After Peng et al., 2021, arXiv 2112.03456 (RSBNet; only its abstract could be read) and its nearest
published relative, Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, arXiv
1904.00420. Shapes: B rows, C classes.
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
from offramp._support.sentences import first_line
from offramp.building.converting import convert
from offramp.building.cutting import cut
from offramp.building.factories import make_exit
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Exit, Seen
from offramp.networks.taps import listening, logits_in
from offramp.networks.wrappers import deep_copy

Option = str | Mapping[Any, Any] | nn.Module | Callable[[nn.Module], nn.Module]
DENSE = "dense"
SKIP = "skip"
NARROW = "narrow"


@dataclass(frozen=True)
class Subnet:
    """One network within a supernet.

    Args:
        options: the number of the option at each place, in the order of `Supernet.places`.
        exits: the modules that have an exit, shallow to deep; some of `Supernet.taps`.
    """

    options: tuple[int, ...]
    exits: tuple[str, ...] = ()


class Supernet(nn.Module):
    """A copy of a model with a choice of layers at some places, and a head for each task.

    Args:
        model: a classifier; it is not changed.
        choices: the options at each place, by the name of the module there: "dense" (the module
            itself), "skip" (nothing, if the shapes allow it), "narrow?by=2" (a residual block with
            fewer channels inside), a method of `convert` for all convolutions and linear layers
            inside ("ghost?ratio=2", "low_rank?energy=0.8"), a mapping as `convert` takes it, a
            module, or a function of the module.
        example: images or rows as the model takes them, [B, ...].
        head: the name of the linear layer that gives the logits.
        heads: by task, the number of its classes, or None for a copy of the model's own head.
        exits: names of modules that an exit may follow.
        exit: the kind of the exits, as `cut` takes it.
        preprocess: turns rows into the model's input; None if rows are that input.

    Attributes:
        places: names of the modules with a choice.
        names: by place, the names of its options.
        taps: names of the modules that an exit may follow, in the order in which they run.
        order: places and taps in the order in which they run.
        classes: by task, the number of classes.

    Raises:
        UnknownName: a module or a method does not exist.
        InvalidArgument: a place has no options, a task has too few classes, or a module is inside
            a place.
        BadNetwork: an option does not fit at its place.
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
        if not choices:
            raise InvalidArgument("choices must have at least one place, got none")
        if not heads:
            raise InvalidArgument("heads must have at least one task, got none")
        self.model = deep_copy(model).eval()
        self.preprocess = copy.deepcopy(preprocess).eval() if preprocess is not None else None

        # 1. Check the names of places, taps and head. The options of a place replace the modules
        # inside it, so none of these may be a place, a tap or the head itself.
        known = dict(self.model.named_modules())
        for name in (*choices, *exits, head):
            if name not in known:
                raise unknown(name, list(filter(None, known)), "module of this model")
        for name in (*choices, *exits, head):
            for place in choices:
                if name.startswith(f"{place}.") or name == place == head:
                    raise InvalidArgument(
                        f"{name!r} must not be inside the place {place!r}, whose options have "
                        f"modules of their own"
                    )
        model_head = known[head]
        if not isinstance(model_head, nn.Linear):
            raise InvalidArgument(
                f"head must name a linear layer, got {head!r}, a {type(model_head).__name__}"
            )

        # 2. Make the heads and the options.
        self.head = head
        self.heads = nn.ModuleDict()
        self.classes = dict[str, int]()
        for task, count in heads.items():
            task_head = _head_of(task, count, model_head)
            self.heads[task] = task_head
            self.classes[task] = task_head.out_features
        self.places = tuple(choices)
        self.names = tuple(tuple(map(str, options)) for options in choices.values())
        self.options = nn.ModuleList()
        for place, options in choices.items():
            if not options:
                raise InvalidArgument(
                    f"the place {place!r} must have at least one option, got none"
                )
            layers = [option_of(known[place], place, option) for option in options]
            self.options.append(nn.ModuleList(layers))

        # 3. Empty the places of the model. The options and the heads hold the weights; `along` puts
        # those of one network into the places while it runs.
        for name in (*self.places, head):
            _put(self.model, name, nn.Identity())

        # 4. Try every option on two rows, and hang on the exits.
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
        """How many networks the supernet has: the choices of options times the choices of exits."""
        total: int = 2 ** len(self.taps)
        for options in self.options:
            total *= _count(options)
        return total

    def drawn(self, rng: np.random.Generator) -> Subnet:
        """Draw a network with all exits. All options of a place are equally likely."""
        numbers = []
        for options in self.options:
            numbers.append(int(rng.integers(_count(options))))
        return Subnet(tuple(numbers), self.taps)

    @contextlib.contextmanager
    def along(self, subnet: Subnet, task: str) -> Iterator[nn.Module]:
        """Put the options of a network and the head of a task into the model, and yield the model.
        At the end the places are emptied again.
        """
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
        tapped = dict[str, Tensor]()
        with self.along(subnet, task) as model:
            taps = {name: model.get_submodule(name) for name in subnet.exits}
            with listening(taps, lambda name, value: tapped.update({name: _tensor(value)})):
                last = logits_in(model(self.prepared(x)))
        logits = []
        for name in subnet.exits:
            exit = self.exit_of(name, task)
            logits.append(exit(Seen(tapped[name], {})))
        return (*logits, last)

    def prepared(self, x: Tensor) -> Tensor:
        """Preprocess rows x [B, ...] into the model's input."""
        if self.preprocess is None:
            return x
        prepared: Tensor = self.preprocess(x)
        return prepared

    def exit_of(self, tap: str, task: str) -> Exit:
        """The exit of a task after a module."""
        exit = self.exits[_exit_key(tap, task)]
        assert isinstance(exit, Exit)
        return exit

    def extract(self, subnet: Subnet, task: str) -> nn.Module:
        """Make a separate model of a network, with copies of the weights, in eval mode."""
        with self.along(subnet, task) as model:
            return deep_copy(model).eval()

    def network(
        self,
        subnet: Subnet,
        task: str,
        *,
        model: nn.Module | None = None,
        gate: str = "margin",
        spec: str | None = None,
    ) -> Network:
        """Make a network with exits, to be trained, recorded and calibrated like any that `cut`
        makes.

        Args:
            subnet: a network with at least one exit.
            task: the task of the head and of the exits.
            model: the model from `extract`, for example after more training; None for a new copy.
            gate: as `cut` takes it.
            spec: how to build the model again, as `cut` takes it.

        Raises:
            InvalidArgument: the subnet has no exits.
        """
        if not subnet.exits:
            raise InvalidArgument("subnet must have at least one exit, got none. Use extract")
        if model is None:
            model = self.extract(subnet, task)
        exits = {name: copy.deepcopy(self.exit_of(name, task)).eval() for name in subnet.exits}
        return cut(
            model,
            self.example,
            at=list(subnet.exits),
            exits=exits,
            gate=gate,
            preprocess=self.preprocess,
            spec=spec,
        )

    def told(self, subnet: Subnet) -> str:
        """Describe a network in words: its options by place, and its exits."""
        words = []
        for place, names, number in zip(self.places, self.names, subnet.options, strict=True):
            words.append(f"{place}: {names[number]}")
        for name in subnet.exits:
            words.append(f"exit after {name}")
        return ", ".join(words)

    def require(self, subnet: Subnet, task: str) -> None:
        """Check that this supernet has a network and a task.

        Raises:
            UnknownName: it does not have the task.
            InvalidArgument: it does not have the network.
        """
        if task not in self.heads:
            raise unknown(task, list(self.heads), "task of this supernet")
        fits = len(subnet.options) == len(self.options)
        for options, number in zip(self.options, subnet.options, strict=False):
            fits = fits and 0 <= number < _count(options)
        exits_in_order = [name for name in self.taps if name in subnet.exits]
        if not fits or exits_in_order != list(subnet.exits):
            raise InvalidArgument(
                f"subnet must be a network of this supernet, got {subnet}. See its places, names "
                f"and taps"
            )

    def _order(self, exits: Sequence[str]) -> tuple[str, ...]:
        """Run the network of first options, and each network with one other option. Return places
        and taps in the order in which they run. Raise BadNetwork for an option that does not fit.
        """
        task = next(iter(self.heads))
        order = list[str]()
        first_shapes = dict[str, tuple[int, ...]]()
        for position, place in enumerate(self.places):
            for number, name in enumerate(self.names[position]):
                options = [0] * len(self.places)
                options[position] = number
                outputs = list[tuple[str, tuple[int, ...]]]()  # name and shape, as they run
                with self.along(Subnet(tuple(options)), task) as model:
                    watched = dict[str, nn.Module]()
                    for key in (*self.places, *exits):
                        watched[key] = model.get_submodule(key)
                    try:
                        with torch.no_grad(), _recording_shapes(watched, outputs):
                            model(self.prepared(self.example))
                    except Exception as problem:  # whatever the user's code raises
                        why = first_line(problem)
                        raise BadNetwork(
                            f"the option {name!r} does not fit at {place!r} ({why})"
                        ) from problem
                shapes = dict(outputs)
                if not order:  # the network of first options, which all others must match
                    order = [key for key, _ in outputs]
                    first_shapes = shapes
                if shapes != first_shapes:
                    raise BadNetwork(
                        f"the option {name!r} must give {first_shapes.get(place)} at {place!r}, as "
                        f"the first one does, got {shapes.get(place)}"
                    )
        if sorted(order) != sorted({*self.places, *exits}):
            raise BadNetwork(
                f"every place and exit must run once for a row, got the runs {', '.join(order)}"
            )
        return tuple(order)

    def _hang_exits(self, exit: str) -> None:
        """An exit for each tap and task."""
        outputs = list[tuple[str, tuple[int, ...]]]()
        with self.along(self.dense, next(iter(self.heads))) as model:
            watched = {name: model.get_submodule(name) for name in self.taps}
            with torch.no_grad(), _recording_shapes(watched, outputs):
                model(self.prepared(self.example))
        like = next(self.heads.parameters())  # its device and dtype
        for tap, shape in outputs:
            for task, classes in self.classes.items():
                new_exit = make_exit(exit, shape, classes, ())
                self.exits[_exit_key(tap, task)] = new_exit.to(like)


def _exit_key(tap: str, task: str) -> str:
    """The name of an exit in a ModuleDict, which takes no dots."""
    return f"{tap}@{task}".replace(".", "/")


@contextlib.contextmanager
def _recording_shapes(
    modules: Mapping[str, nn.Module], outputs: list[tuple[str, tuple[int, ...]]]
) -> Iterator[None]:
    """Append the name and the output shape of one row to `outputs`, whenever a module runs."""

    def note(name: str, value: object) -> None:
        row_shape = tuple(_tensor(value).shape[1:])
        outputs.append((name, row_shape))

    with listening(modules, note):
        yield


def _tensor(value: object) -> Tensor:
    """The output of a place or a tap, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise BadNetwork(f"a place or a tap must give one tensor, got a {type(value).__name__}")
    return value


def _head_of(task: str, count: int | None, model_head: nn.Linear) -> nn.Linear:
    """The head of a task; a copy of the model's own if `count` is None."""
    if count is None:
        return copy.deepcopy(model_head)
    if count < 2:
        raise InvalidArgument(
            f"the task {task!r} must have 2 or more classes, or None for the model's own "
            f"head, got {count}"
        )
    return nn.Linear(model_head.in_features, count).to(model_head.weight)


def option_of(dense: nn.Module, path: str, option: Option) -> nn.Module:
    """Make the module of an option at a place.

    Args:
        dense: the module at the place; it is not changed.
        path: its name, for messages.
        option: one of the options that `Supernet` takes.

    Raises:
        UnknownName: a method does not exist.
        InvalidArgument: a function returned something else than a module.
        BadNetwork: a method has nothing to replace there.
    """
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
    module = option(copy.deepcopy(dense))
    if not isinstance(module, nn.Module):
        raise InvalidArgument(
            f"an option at {path!r} must give a torch.nn.Module, got a {type(module).__name__}"
        )
    return module.eval()


def _converted(dense: nn.Module, path: str, method: str) -> nn.Module:
    """A place whose convolutions and linear layers are all replaced by one method."""
    inside = {type(module) for module in dense.modules()}
    kinds = [kind for kind in (nn.Conv2d, nn.Conv1d, nn.Linear) if _has_kind(inside, kind)]
    if not kinds:
        raise BadNetwork(
            f"{path!r} must have a convolution or a linear layer that {method!r} can replace"
        )
    if not list(dense.children()):  # the place is a single layer, and `convert` replaces children
        wrapped = convert(nn.Sequential(dense), {"0": method})
        return wrapped.get_submodule("0").eval()
    return convert(dense, dict.fromkeys(kinds, method)).eval()


def _has_kind(types: set[type], kind: type) -> bool:
    """Whether one of some classes is a kind, or derived from it."""
    return any(issubclass(cls, kind) for cls in types)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a model, under a name such as `body.0`."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def _at(options: nn.Module, number: int) -> nn.Module:
    """One option of a place."""
    assert isinstance(options, nn.ModuleList)
    return options[number]


def _count(options: nn.Module) -> int:
    """The number of options at a place."""
    assert isinstance(options, nn.ModuleList)
    return len(options)
