"""Whether modules are still what they were when a Runner was opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import StaleRunner
from offramp.networks.network import described
from offramp.networks.nodes import Exit, Gate

VALUES: Any = dict.values  # everything below runs in C: a batch of one waits for it
SAMPLED = 8  # values of a tensor that are compared by content
TENSORS = 8  # whose samples one spot check compares: a microsecond
LOOKED_AT = 5  # tensors in a share of `Rounds`: as many as a batch norm has

LAYERS = 8  # whose settings one spot check compares: two microseconds
NAMES = 16  # of attributes and globals that one spot check compares: a microsecond
COMPARED = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
MISSING = object()

OTHER = (
    "{} that the network computes with was changed after it was opened; change it back, or "
    "open again"
)
CHANGED = (
    "the network was moved, cast, trained or re-assigned after it was opened; call "
    "net.eval(), open again"
)

Samples = list[tuple[np.ndarray[Any, np.dtype[np.uint8]], bytes]]


class ChangeDetector:
    """Notices that modules are no longer what they were: parameters, buffers, submodules, training
    flags; of exits and gates also the numbers and texts of their configuration, such as a
    temperature.

    A part is looked at right after it ran, while its tensors are in the cache: four times cheaper
    than before the run, and a change made during the run is noticed as well. It holds the modules'
    tables and not the modules, so that a Runner does not keep its network alive.

    shares: a `spot_check` looks at one of so many shares of the modules, the next one each time,
    and at those in `each_time`. What moves, casts or trains all of them is noticed by any spot
    check, a change of single ones after `shares` at most.

    Identity, version and address of every parameter and buffer are compared: that shows an
    assignment, a step of an optimizer, `load_state_dict`, an operation in place, `.data =`, and
    moving. Two kinds of writes leave all three as they are: those in place through `.data` or
    `.detach()` (`p.data.mul_(2)`), and those through NumPy (`p.detach().numpy()[:] = 0`). On a CPU
    eight values of each tensor are compared as well: by `check` of all tensors, by a `spot_check`
    of eight tensors, the next ones each time. So such a write is noticed late, and one that changes
    none of the eight values of a tensor is not noticed; on a GPU neither is. Hooks, and the code of
    methods, are not looked at.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        *,
        deep: bool = True,
        shares: int = 1,
        each_time: Iterable[nn.Module] = (),
    ) -> None:
        modules = dict.fromkeys(
            module for root in roots for module in (root.modules() if deep else [root])
        )
        first = {module: None for module in each_time if module in modules}
        rest = [module for module in modules if module not in first]
        self._shares = [_Share([*first, *rest[turn::shares]]) for turn in range(shares)]
        self._turn = cycle(self._shares)

    def check(self) -> None:
        """Raise StaleRunner when anything differs, the sampled values of all tensors among it."""
        for share in self._shares:
            share.check()
            share.compare(share.samples)

    def spot_check(self) -> None:
        """Raise StaleRunner when anything differs in the share whose turn it is."""
        share = next(self._turn)
        share.check()
        share.compare(next(share.shares))


class SettingsDetector:
    """Notices that a network computes with other numbers, functions or classes than before.

    Of every module its class, whether it has a forward of its own, and of torch's layers the
    numbers and texts (`eps`, `negative_slope`); of the user's code the attributes and globals that
    it reads. `check` looks at all of it, and `spot_check` at some, the next ones each time. Entries
    of lists and dicts are looked at by `check` alone.

    Args:
        modules: of the network; none of them is kept alive.
        names: tables with a name and a value that the user's code reads.
        containers: lists, dicts and sets that it reads, each with a copy.
        tensors: that it reads and no module registers.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        names: Sequence[tuple[Mapping[str, Any], str, Any]] = (),
        containers: Sequence[tuple[Any, Any]] = (),
        tensors: Sequence[Tensor] = (),
    ) -> None:
        theirs = [
            module
            for module in modules
            if not type(module).__module__.startswith("offramp.networks.")
        ]
        # layers first: they have most settings
        theirs.sort(key=lambda module: bool(module._modules))
        self._layers = [_LayerSettings(module) for module in theirs]
        self._names = list(names)
        self._containers = list(containers)
        self._tensors = [value for value in tensors if not value.is_inference()]
        self._versions = [value._version for value in self._tensors]
        self._some_layers = cycle(_in_groups(self._layers, LAYERS))
        self._some_names = cycle(_in_groups(self._names, NAMES))

    def check(self) -> None:
        """Raise StaleRunner when anything differs."""
        self._compare(self._layers, self._names)
        for now, before in self._containers:
            if not _is_same(now, before):
                raise StaleRunner(OTHER.format(f"a {type(before).__name__}"))

    def spot_check(self) -> None:
        """Raise StaleRunner when anything differs in the share whose turn it is, or a tensor."""
        self._compare(next(self._some_layers), next(self._some_names))

    def _compare(
        self, layers: Sequence[_LayerSettings], names: Sequence[tuple[Mapping[str, Any], str, Any]]
    ) -> None:
        for layer in layers:
            layer.check()
        for table, name, before in names:
            now = table.get(name, MISSING)
            if now is not before and not _is_same(now, before):
                raise StaleRunner(OTHER.format(repr(name)))
        if self._tensors and [value._version for value in self._tensors] != self._versions:
            raise StaleRunner(OTHER.format("a tensor"))


class _LayerSettings:
    """What one module computes with beside its tensors, without keeping it alive."""

    def __init__(self, module: nn.Module) -> None:
        self.of = ref(module)
        self.kind = type(module)
        self.table = vars(module)
        self.forward = self.table.get("forward")
        keys = [
            "_parameters",
            "_parameters",
        ]  # the tables themselves stay: a getter of two names gives a tuple
        if self.kind.__module__.startswith("torch.nn."):
            keys += [
                key
                for key, value in self.table.items()
                if key[0] != "_" and key != "training" and _is_plain(value)
            ]
        self.getter = itemgetter(*keys)
        self.values = self.getter(self.table)

    def check(self) -> None:
        """Raise StaleRunner when anything differs."""
        try:
            same = (
                self.getter(self.table) == self.values and self.table.get("forward") is self.forward
            )
        except KeyError:
            same = False
        module = self.of()
        if not same or (module is not None and type(module) is not self.kind):
            raise StaleRunner(OTHER.format(f"a setting of a {self.kind.__name__}"))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _is_same(now: Any, before: Any) -> bool:
    """Whether values are equal; tensors within are compared by identity."""
    if type(now) is not type(before) or not isinstance(before, COMPARED):
        return now is before
    try:
        return bool(now == before)
    except (RuntimeError, TypeError, ValueError):  # tensors and arrays: no single yes or no
        return False


def _in_groups(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [things[start : start + size] for start in range(0, len(things), size)] or [[]]


class Rounds:
    """Looks at some modules after every batch and so at all of them in turn: a few microseconds a
    batch.

    For engines with copies of the weights: they answer as the network was opened, so a change may
    be noticed late. What moves, casts or trains all modules is noticed after the next batch, a
    change of a single one after `shares` batches at most. See `ChangeDetector` for what cannot be
    noticed.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        """Take in the modules below these roots, in shares of few tensors."""
        groups: list[list[nn.Module]] = [[]]
        tensors = 0
        for module in dict.fromkeys(module for root in roots for module in root.modules()):
            mine = len(module._parameters) + len(module._buffers)
            if mine and tensors and tensors + mine > LOOKED_AT:
                groups.append([])
                tensors = 0
            groups[-1].append(module)
            tensors += mine
        self._shares = [_Share(group) for group in groups]
        self._turn = cycle(self._shares)
        self.shares = len(groups)

    def spot_check(self) -> None:
        """Raise StaleRunner when anything differs in the share whose turn it is."""
        share = next(self._turn)
        share.check()
        share.compare(next(share.shares))


class _Share:
    """Modules that are looked at together."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tables: list[dict[str, Any]] = [
            table
            for module in modules
            for table in (module._parameters, module._buffers, module._modules)
        ]
        self.states = [vars(module) for module in modules if "training" in vars(module)]
        self.tables = [table for table in tables if table]
        self.values: list[Any] = [value for table in self.tables for value in table.values()]
        self.empty = [table for table in tables if not table]
        held = [
            value for table in self.tables for value in table.values() if isinstance(value, Tensor)
        ]
        self.tensors = [value for value in held if not value.is_inference()]
        self.places = [value for value in held if value.layout == torch.strided]
        self.samples: Samples = [sample for value in self.places for sample in _sampled(value)]
        groups = [
            self.samples[start : start + TENSORS] for start in range(0, len(self.samples), TENSORS)
        ]
        self.shares: Iterator[Samples] = cycle(groups or [[]])
        self.settings = [
            setting for module in modules if _ours(module) for setting in _settings(module)
        ]
        self.marks = self._marks()

    def _marks(self) -> tuple[list[int], list[int]]:
        """Versions tell of training, addresses of moving, casting and other data."""
        return list(map(attrgetter("_version"), self.tensors)), list(
            map(Tensor.data_ptr, self.places)
        )

    def check(self) -> None:
        now = list(chain.from_iterable(map(VALUES, self.tables)))
        same = (
            len(now) == len(self.values) and all(map(is_, now, self.values)) and not any(self.empty)
        )
        same = same and self._marks() == self.marks
        same = same and all(table.get(key, self) == value for table, key, value in self.settings)
        if not same or any(map(itemgetter("training"), self.states)):
            raise StaleRunner(CHANGED)

    def compare(self, samples: Samples) -> None:
        """Raise StaleRunner when sampled values are others: versions say nothing of writes through
        NumPy or `.data`.
        """
        for values, before in samples:
            if values.tobytes() != before:
                raise StaleRunner(CHANGED)


def _ours(module: nn.Module) -> bool:
    """Exits, gates, and preprocessing of ours: their configuration says how they compute."""
    return isinstance(module, (Exit, Gate)) or type(module).__module__.startswith("offramp.layers.")


def _settings(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The table of a module with the name and value of each number, text or function that it
    computes with.
    """
    config = described(module)
    for key, value in vars(module).items():
        plain = key in config and isinstance(value, (bool, int, float, str))
        function = callable(value) and not isinstance(value, nn.Module) and not key.startswith("_")
        if plain or function:
            yield vars(module), key, value


def _sampled(value: Tensor) -> Samples:
    """Some values of a tensor on the CPU, evenly spread over its memory, as a view of it; and their
    bytes now.
    """
    if value.device.type != "cpu" or not value.numel():
        return []
    try:
        flat = torch.as_strided(value.detach(), (value.numel(),), (1,), value.storage_offset())
        size = value.element_size()
        every = flat.view(torch.uint8).numpy().reshape(-1, size)  # [numel, bytes of one]
    except (RuntimeError, TypeError):  # no plain memory: expanded, quantised, or of a subclass
        return []
    view = every[:: max(1, len(every) // SAMPLED)]
    return [(view, view.tobytes())]
