"""Detects changes of a network after a Runner was opened on it.

`ChangeDetector` and `Rounds` look at tensors and submodules, `SettingsDetector` at everything else
that a network computes with, and at hooks. A check runs after every batch, so its inner loops run
in C: `map` with functions of `operator`, and no Python code per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, cycle
from operator import attrgetter, eq, is_, itemgetter
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offramp.errors import StaleRunner
from offramp.networks.hooks import global_tables, hook_tables, hooks_in
from offramp.networks.network import described
from offramp.networks.nodes import Exit, Gate

VALUES: Any = dict.values
VERSION = attrgetter("_version")
TRAINING = itemgetter("training")
SAMPLED = 8  # values of a tensor that are compared by content
TENSORS = 8  # tensors whose samples one spot check compares: a microsecond
SHARE_TENSORS = 5  # tensors in a share of `Rounds`: as many as a batch norm has
EVERY = 4  # batches after which `Rounds` compares samples, and settings
TABLES = 16  # tables of hooks that one spot check looks at: a fifth of a microsecond
LAYERS = 8  # layers whose settings one spot check compares: two microseconds
NAMES = 16  # attributes and globals that one spot check compares: a microsecond
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

# some bytes of a tensor, as a view of its memory, with a copy of them
Samples = list[tuple[np.ndarray[Any, np.dtype[np.uint8]], bytes]]


class ChangeDetector:
    """Notices changes of modules: of their parameters, buffers, submodules and training flags.

    For exits and gates, the numbers and texts of their configuration (such as a temperature) are
    compared as well. Check a stage right after it ran, while its tensors are in the cache. That is
    four times cheaper than before the run, and a change made during the run is noticed too. The
    detector holds the modules' tables and not the modules, so a Runner does not keep its network
    alive.

    The identity, version and address of every parameter and buffer are compared. They show an
    assignment, a step of an optimizer, `load_state_dict`, an operation in place, `.data =`, and
    moving. Two kinds of writes change none of the three: in place through `.data` or `.detach()`
    (`p.data.mul_(2)`), and through NumPy (`p.detach().numpy()[:] = 0`). On a CPU, eight values of
    each tensor are therefore compared as well: `check` compares those of all tensors, `spot_check`
    those of the next few tensors. Such a write is noticed late, and a write that leaves the eight
    values unchanged is not noticed. On a GPU, neither kind is noticed. `SettingsDetector` looks at
    hooks. The code of methods is not looked at.

    Args:
        roots: the modules.
        deep: whether to look at the modules inside them as well.
        shares: into how many shares the modules are divided. Each `spot_check` looks at the next
            share. It notices anything that moves, casts or trains all modules; a change of a single
            module is noticed after at most `shares` spot checks.
        each_time: modules that every `spot_check` looks at.
        samples: how many tensors a `spot_check` compares by content.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        *,
        deep: bool = True,
        shares: int = 1,
        each_time: Iterable[nn.Module] = (),
        samples: int = TENSORS,
    ) -> None:
        modules = dict.fromkeys(_distinct(roots, deep=deep))
        always = dict.fromkeys(module for module in each_time if module in modules)
        rest = [module for module in modules if module not in always]
        self._shares = list[_Share]()
        for number in range(shares):
            # modules number, number + shares, number + 2 * shares, ...
            self._shares.append(_Share([*always, *rest[number::shares]], samples))
        self._turn = cycle(self._shares)

    def check(self) -> None:
        """Raise StaleRunner if anything differs, including the sampled values of all tensors."""
        for share in self._shares:
            share.check()
            share.compare(share.samples)

    def spot_check(self) -> None:
        """Raise StaleRunner if anything differs in the next share."""
        share = next(self._turn)
        share.check()
        share.compare(next(share.sample_groups))


def _distinct(roots: Iterable[nn.Module], *, deep: bool) -> list[nn.Module]:
    """Modules, with those inside them if `deep`; each once, in order."""
    modules = dict[nn.Module, None]()
    for root in roots:
        if deep:
            modules.update(dict.fromkeys(root.modules()))
        else:
            modules[root] = None
    return list(modules)


class SettingsDetector:
    """Notices that a network computes with other numbers, functions or classes than before.

    It compares the class of every module and whether the module has a forward of its own; for
    torch's layers, their numbers and texts (`eps`, `negative_slope`); for the user's code, the
    attributes and globals that it reads; and the forward hooks of all modules. `check` looks at all
    of these, `spot_check` at the next few. Only `check` looks at the entries of lists and dicts.

    Args:
        modules: of the network; none of them is kept alive, but their tables of hooks are.
        names: tables with a name and a value that the user's code reads.
        containers: lists, dicts and sets that it reads, each with a copy.
        tensors: tensors that it reads and that no module registers.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        names: Sequence[tuple[Mapping[str, Any], str, Any]] = (),
        containers: Sequence[tuple[Any, Any]] = (),
        tensors: Sequence[Tensor] = (),
    ) -> None:
        every = list(modules)
        self._hooks = _HookDetector(every)
        user_modules = list[nn.Module]()
        for module in every:
            if not type(module).__module__.startswith("offramp.networks."):
                user_modules.append(module)
        # layers first: they have most settings
        user_modules.sort(key=lambda module: bool(module._modules))
        self._layers = [_LayerSettings(module) for module in user_modules]
        self._names = list(names)
        self._containers = list(containers)
        self._tensors = [value for value in tensors if not value.is_inference()]
        self._versions = [value._version for value in self._tensors]
        self._some_layers = cycle(_in_groups(self._layers, LAYERS))
        self._some_names = cycle(_in_groups(self._names, NAMES))

    def see_all_within(self, checks: int) -> None:
        """Let so many spot checks look at everything, with more in each where that is needed."""
        layers = max(LAYERS, math.ceil(len(self._layers) / checks))
        names = max(NAMES, math.ceil(len(self._names) / checks))
        self._some_layers = cycle(_in_groups(self._layers, layers))
        self._some_names = cycle(_in_groups(self._names, names))

    def check(self) -> None:
        """Raise StaleRunner if anything differs."""
        self._compare(self._layers, self._names)
        self._hooks.check()
        for now, before in self._containers:
            if not _is_same(now, before):
                raise StaleRunner(OTHER.format(f"a {type(before).__name__}"))

    def spot_check(self) -> None:
        """Raise StaleRunner if one of the next few settings differs, or a tensor."""
        self._compare(next(self._some_layers), next(self._some_names))
        self._hooks.spot_check()

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


class _HookDetector:
    """Notices that a forward hook or a forward pre-hook was put on modules, or taken off.

    Torch numbers all hooks of the process. While nobody registers one, a spot check compares that
    number and looks at a few tables, which takes a fraction of a microsecond. A new number makes it
    look at all of them. So a new hook is noticed after the next batch, and one that was removed
    after some batches.

    Args:
        modules: whose hooks count, in addition to those of all modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._tables = global_tables()
        for module in modules:
            self._tables += hook_tables(module)
        self._newest = RemovableHandle.next_id
        self._hooks = hooks_in(self._tables)
        # Groups of tables, each with the hooks that are in it now.
        groups = list[tuple[list[Mapping[int, Any]], list[Any]]]()
        for tables in _in_groups(self._tables, TABLES):
            groups.append((tables, hooks_in(tables)))
        self._some_tables = cycle(groups)

    def check(self) -> None:
        """Raise StaleRunner if anything differs."""
        newest = RemovableHandle.next_id  # before the look: a later hook gets another number
        _require_same_hooks(self._tables, self._hooks)
        self._newest = newest

    def spot_check(self) -> None:
        """Raise StaleRunner if one of the next few tables differs, or any after a new hook."""
        if RemovableHandle.next_id != self._newest:
            self.check()
        tables, hooks = next(self._some_tables)
        if hooks or any(tables):
            _require_same_hooks(tables, hooks)


def _require_same_hooks(tables: Iterable[Mapping[int, Any]], before: Sequence[Any]) -> None:
    """Raise StaleRunner unless the hooks in some tables are these."""
    now = hooks_in(tables)
    # A method is another object each time that it is looked up, so `==` and not `is`.
    if len(now) != len(before) or not all(map(eq, now, before)):
        raise StaleRunner(OTHER.format("a hook of a module"))


class _LayerSettings:
    """The settings of one module that are not tensors. The module is not kept alive."""

    def __init__(self, module: nn.Module) -> None:
        self.module_ref = ref(module)
        self.kind = type(module)
        self.table = vars(module)
        self.forward = self.table.get("forward")
        # `itemgetter` returns a tuple only for two keys or more. These two never differ: the table
        # of parameters is always the same object.
        keys = ["_parameters", "_parameters"]
        if self.kind.__module__.startswith("torch.nn."):
            for key, value in self.table.items():
                if key[0] != "_" and key != "training" and _is_plain(value):
                    keys.append(key)
        self.getter = itemgetter(*keys)
        self.values = self.getter(self.table)

    def check(self) -> None:
        """Raise StaleRunner if anything differs."""
        try:
            same = (
                self.getter(self.table) == self.values and self.table.get("forward") is self.forward
            )
        except KeyError:  # a setting was deleted
            same = False
        module = self.module_ref()
        if not same or (module is not None and type(module) is not self.kind):
            raise StaleRunner(OTHER.format(f"a setting of a {self.kind.__name__}"))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _is_same(now: Any, before: Any) -> bool:
    """Whether plain values are equal, or other values are the same object."""
    if type(now) is not type(before) or not isinstance(before, COMPARED):
        return now is before
    try:
        return bool(now == before)
    except (RuntimeError, TypeError, ValueError):  # tensors and arrays: no single yes or no
        return False


def _in_groups(items: list[Any], size: int) -> list[list[Any]]:
    """Lists of `size` items each, the last one shorter. Without items it is one empty list, because
    `cycle` needs something to return.
    """
    groups = list[list[Any]]()
    for start in range(0, len(items), size):
        groups.append(items[start : start + size])
    return groups or [[]]


class Rounds:
    """Looks at a few modules after every batch, and so in turn at all of them.

    It is for engines with copies of the weights: their answers are those of the network as it was
    opened, so a change may be noticed late. A change that moves, casts or trains all modules is
    noticed after the next batch, a change of a single module or setting after at most `shares`
    batches. See `ChangeDetector` for changes that cannot be noticed.

    A check takes a few microseconds if its code and data are in the cache. After a batch of a
    network that is larger than the cache they are not, and the same check takes 100 and more. So a
    batch runs little code: it looks at the tables and tensors of one share. Only every fourth batch
    compares samples, for four shares together, and every fourth one compares settings.

    Args:
        roots: the modules to look at, together with all modules inside them.
        settings: a detector of other changes, to be asked in turn as well.
    """

    def __init__(
        self, roots: Sequence[nn.Module], settings: SettingsDetector | None = None
    ) -> None:
        # A new group begins where the next module would bring more tensors than a share may have.
        groups: list[list[nn.Module]] = [[]]
        in_group = 0
        for module in _distinct(roots, deep=True):
            tensors = len(module._parameters) + len(module._buffers)
            if tensors and in_group and in_group + tensors > SHARE_TENSORS:
                groups.append([])
                in_group = 0
            groups[-1].append(module)
            in_group += tensors
        self.shares = len(groups)

        # The checks of each batch of a round: its share, and what else is due.
        duties = list[tuple[_Share, tuple[Callable[[], None], ...]]]()
        not_compared = list[_Share]()
        settings_checks = 0
        for number, group in enumerate(groups):
            share = _Share(group)
            is_last = number == self.shares - 1
            due = list[Callable[[], None]]()
            not_compared.append(share)
            if number % EVERY == EVERY - 1 or is_last:
                due.append(partial(_compare_next, tuple(not_compared)))
                not_compared.clear()
            if settings is not None and (number % EVERY == 1 or is_last):
                due.append(settings.spot_check)
                settings_checks += 1
            duties.append((share, tuple(due)))
        if settings is not None:
            settings.see_all_within(settings_checks)
        self._duties = cycle(duties)

    def spot_check(self) -> None:
        """Raise StaleRunner if anything differs in what is due after this batch."""
        share, due = next(self._duties)
        share.check()
        for check in due:
            check()


def _compare_next(shares: Sequence[_Share]) -> None:
    """Compare the next samples of each share."""
    for share in shares:
        share.compare(next(share.sample_groups))


class _Share:
    """Modules that are looked at together.

    Attributes:
        states: attributes of the modules, among them the training flag.
        tables: their tables of parameters, buffers and submodules that have entries.
        empty: the tables that have no entries, and must stay so.
        values: all entries of `tables`, in order.
        versioned: tensors with a version number; those made in inference mode have none.
        addressed: tensors with an address; sparse ones have none.
        samples: bytes of the tensors, with a copy.
        sample_groups: yields the samples of the next few tensors, forever.
        settings: of exits, gates and preprocessing: a table, a key in it, and the value.
        marks: versions and addresses of the tensors when this was made.

    Args:
        modules: to look at.
        in_group: how many tensors a group of samples has.
    """

    def __init__(self, modules: Sequence[nn.Module], in_group: int = TENSORS) -> None:
        self.states = list[dict[str, Any]]()
        self.tables = list[dict[str, Any]]()
        self.empty = list[dict[str, Any]]()
        self.settings = list[tuple[dict[str, Any], str, Any]]()
        for module in modules:
            if "training" in vars(module):
                self.states.append(vars(module))
            tables: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]
            for table in tables:
                if table:
                    self.tables.append(table)
                else:
                    self.empty.append(table)
            if _has_settings(module):
                self.settings += _settings(module)

        self.values = list(chain.from_iterable(map(VALUES, self.tables)))
        self.versioned = list[Tensor]()
        self.addressed = list[Tensor]()
        self.samples: Samples = []
        for value in self.values:
            if not isinstance(value, Tensor):
                continue
            if not value.is_inference():
                self.versioned.append(value)
            if value.layout == torch.strided:
                self.addressed.append(value)
                self.samples += _sampled(value)
        self.sample_groups: Iterator[Samples] = cycle(_in_groups(self.samples, in_group))
        self.marks = self._marks()

    def _marks(self) -> tuple[list[int], list[int]]:
        """Versions, which training changes; addresses, which moving and casting change."""
        versions = list(map(VERSION, self.versioned))
        addresses = list(map(Tensor.data_ptr, self.addressed))
        return versions, addresses

    def check(self) -> None:
        """Raise StaleRunner if anything but sampled values differs."""
        now = list(chain.from_iterable(map(VALUES, self.tables)))
        same = (
            len(now) == len(self.values) and all(map(is_, now, self.values)) and not any(self.empty)
        )
        same = same and self._marks() == self.marks
        if self.settings:
            same = same and self._has_same_settings()
        if not same or any(map(TRAINING, self.states)):
            raise StaleRunner(CHANGED)

    def _has_same_settings(self) -> bool:
        # `self` as the default is a value that no setting has, for a setting that was deleted.
        return all(table.get(key, self) == value for table, key, value in self.settings)

    def compare(self, samples: Samples) -> None:
        """Raise StaleRunner if sampled values differ. Writes through NumPy or `.data` change no
        version, but they change values.
        """
        for values, before in samples:
            if values.tobytes() != before:
                raise StaleRunner(CHANGED)


def _has_settings(module: nn.Module) -> bool:
    """Whether a module is an exit, a gate or one of our layers, which compute by their
    configuration.
    """
    return isinstance(module, (Exit, Gate)) or type(module).__module__.startswith("offramp.layers.")


def _settings(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The numbers, texts and functions that a module computes with: its table, and the key and the
    value of each.
    """
    config = described(module)
    for key, value in vars(module).items():
        plain = key in config and isinstance(value, (bool, int, float, str))
        function = callable(value) and not isinstance(value, nn.Module) and not key.startswith("_")
        if plain or function:
            yield vars(module), key, value


def _sampled(value: Tensor) -> Samples:
    """Some values of a tensor on the CPU, evenly spread over its memory: a view, and a copy as
    bytes. The list has one entry, or none for a tensor without plain memory.
    """
    if value.device.type != "cpu" or not value.numel():
        return []
    try:
        # The memory in its own order, whatever the strides: [numel].
        flat = torch.as_strided(value.detach(), (value.numel(),), (1,), value.storage_offset())
        size = value.element_size()
        raw = flat.view(torch.uint8).numpy().reshape(-1, size)  # [numel, bytes of a value]
    except (RuntimeError, TypeError):  # no plain memory: expanded, quantised, or of a subclass
        return []
    step = max(1, len(raw) // SAMPLED)
    view = raw[::step]
    return [(view, view.tobytes())]
