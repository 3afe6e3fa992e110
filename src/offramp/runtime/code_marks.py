"""A mark of the code that a network computes with, so that other code under the same names is
noticed.

The fingerprint of a network is about weights and names. Two functions of one name, or two classes
with the same keys, may compute differently. So the bytecode of what the user wrote is hashed, of
gates, exits, preprocessing and models: `forward` and `score`, the methods and functions that they
call, the user's decorators around them, the constants in them, and the attributes and global values
that they read, private ones too. An attribute or a global that the forward pass sets itself is a
counter or a cache and does not count. Comments, docstrings, names of local variables, line numbers
and methods that no forward pass names do not count. Bytecode depends on the version of Python:
marks are compared only where Python, its -O flag, torch and the kind of marks are the same.

A forward pass enters a module by `forward` or `score`. From there on names are followed: whatever
is called `scale` counts once any code that was reached says `scale`. So marks are made in rounds,
each with the names of the last one, until no name is new.

Code of installed packages, and of offramp itself, does not count: an update would void every
promise, though it computes the same. Of their layers in a model the numbers and texts count
(`negative_slope`, `eps`), as its settings. docs/concepts/promises.md lists what is left to the
probe.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.network import Network
from offramp.plans.provenance import MADE_WITH, MARKS, SETTINGS
from offramp.runtime.bytecode import global_names, imported, names_in, operations, stored_by

PLAIN = (bool, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(...))
ENTRIES = ("forward", "score", "both", "__call__")  # where a forward pass enters modules
# methods that Python calls itself, and no forward pass
IMPLICIT = (
    "__init__",
    "__post_init__",
    "__new__",
    "__repr__",
    "__str__",
    "__eq__",
    "__hash__",
    "__setstate__",
    "__getstate__",
    "__reduce__",
    "__reduce_ex__",
    "__init_subclass__",
)
BY_NAME = ("getattr", "vars", "__dict__", "methodcaller", "attrgetter", "__getattribute__")
# modules of classes that call no method of the user's but those above
BASES = ("torch.nn.", "offramp.networks.nodes", "abc", "typing", "builtins", "enum", "collections")
TORCHS = frozenset(vars(nn.Module()))  # torch's own attributes of a module, private ones among them
LONGEST = 100_000  # entries of a container that are looked at
DEEPEST = 100  # objects within objects that are looked at
OURS = Path(__file__).resolve().parents[1]
INSTALLED = [
    Path(sysconfig.get_path(kind)).resolve()
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
]  # of which none holds what the user wrote


@dataclass
class CodeReads:
    """What the user's code in a network reads, and stands for now.

    Attributes:
        names: a table (of attributes or globals), a name in it, and the value.
        containers: lists, dicts and sets that are read, each with a copy.
        tensors: that are plain attributes, globals or weights of modules that nothing registers.
    """

    names: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def code_reads(network: Network) -> CodeReads:
    """What the code that `code_marks` covers reads; of slots nothing is listed."""
    found = CodeReads()
    for module in _parts(network).values():
        _, walk = _walked(module)
        found.names += walk.reads.names
        found.containers += walk.reads.containers
        found.tensors += walk.reads.tensors
    return found


def refuse_hidden(network: Network) -> None:
    """Raise BadNetwork where code reads a module or a parameter that no module registers.

    Its weights would be in no fingerprint, would keep no training rows, and would not be saved,
    moved or trained.
    """
    known = {id(one) for one in (*network.modules(), *network.parameters(), *network.buffers())}
    for what, module in _parts(network).items():
        _, walk = _walked(module)
        for name, thing in walk.hidden:
            if id(thing) in known:
                continue
            kind = "module" if isinstance(thing, nn.Module) else "trainable tensor"
            index = f"{what} reads the {kind} {name!r}"
            if isinstance(thing, nn.Module):
                way = "an attribute of a torch.nn.Module, nn.ModuleList or nn.ModuleDict"
            else:
                way = "an nn.Parameter or, with register_buffer, a buffer of a torch.nn.Module"
            raise BadNetwork(
                f"{index}, which no module registers: it is in a plain list, dict, closure, "
                f"global or object. Its "
                f"weights could not be saved or moved, nor its training rows known. Make it {way}."
            )


def code_marks(network: Network) -> tuple[tuple[str, str], ...]:
    """Marks of the user's code, and of the settings of torch's layers, in every gate, exit,
    preprocessing and model.

    By what they are of; where there is no such code or layer, there is no mark.
    """
    found = [(MADE_WITH, _made_with())]
    for what, module in _parts(network).items():
        mark = _mark(module)
        if mark is not None:
            found.append((what, mark))
        mark = _settings_mark(module)
        if mark is not None:
            found.append((SETTINGS + what, mark))
    return tuple(found)


def _parts(network: Network) -> dict[str, nn.Module]:
    """Gates, exits, preprocessing and models by what they are."""
    parts: dict[str, nn.Module] = {}
    for name, gate in network.gates.items():
        parts[f"gate {name!r}"] = gate
    for name, exit_ in network.exits.items():
        parts[f"exit {name!r}"] = exit_
    for name, preprocess in network.fronts.items():
        parts[f"the preprocessing of {name!r}"] = preprocess
    for member in network.members:
        parts[f"model {member.name!r}"] = network.model_of(member)
    return parts


def _settings_mark(module: nn.Module) -> str | None:
    """A mark of the numbers and texts of torch's layers within a module; None where it has none."""
    lines = []
    for name, part in module.named_modules():
        if type(part).__module__.startswith("torch.nn."):
            lines.append(f"{name}: {type(part).__name__} {_settings(part)}")
    return _hashed(lines) if lines else None


def _made_with() -> str:
    """What marks can be compared under."""
    optimized = f" -O{sys.flags.optimize}" if sys.flags.optimize else ""
    python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}{optimized}"
    return f"{python}, torch {torch.__version__}{MARKS}"


def _hashed(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _settings(part: nn.Module) -> list[str]:
    """The public numbers and texts of a layer, in order of their names."""
    settings = []
    for key, value in sorted(vars(part).items()):
        if not key.startswith("_") and key != "training" and _is_setting(value):
            settings.append(f"{key}={value!r}")
    return settings


def _is_setting(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_setting, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _mark(module: nn.Module) -> str | None:
    """Sixteen hex digits over the user's code in a module and in all modules within it; None
    without such code.
    """
    lines, _ = _walked(module)
    return _hashed(lines) if lines else None


def _walked(module: nn.Module) -> tuple[list[str], _Walk]:
    """What the user's code in a module says, and the last round that found it."""
    names = frozenset[str]()
    stored = frozenset[str]()
    while True:
        walk = _Walk(module, names, stored)
        lines = _lines(module, walk)
        if walk.names <= names and walk.stored <= stored:
            return lines, walk
        names |= walk.names
        stored |= walk.stored


def _lines(module: nn.Module, walk: _Walk) -> list[str]:
    lines = []
    for name, part in module.named_modules():
        if _users(type(part)):
            lines.append(f"{name}: {walk.object(part)}")
        for key, value in sorted(vars(part).items()):
            # The function of a `Scorer` or of a member, and a forward that stands before that of
            # the class
            kind = type(part).__module__
            ours = kind.startswith("offramp.") and not key.startswith("_")
            ours = ours or (kind == "offramp.members.function" and key == "_function")
            if (ours or key == "forward") and callable(value) and not isinstance(value, nn.Module):
                text = walk.told(value)
                if text != _name(value):
                    lines.append(f"{name}.{key}: {text}")
    return lines


def _users(thing: Any) -> bool:
    """Whether a class or function was written by the user, and not installed with a package."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if isinstance(thing, FunctionType):
        file: str | None = thing.__code__.co_filename
    else:
        file = getattr(module, "__file__", None)
    if module is None and file is None:
        known = getattr(thing, "__module__", None) or "builtins"
        return not known.startswith(("builtins", "offramp.", "torch."))
    if file is None:  # built into Python, or typed into a shell
        return getattr(thing, "__module__", "") == "__main__"
    return not _installed(file)


@functools.lru_cache(maxsize=4096)
def _installed(file: str) -> bool:
    if file.startswith("<") and not file.startswith("<frozen"):  # typed, or made by exec
        return False
    path = Path(file).resolve()
    places = {"site-packages", "dist-packages"}
    return (
        file.startswith("<frozen")
        or not places.isdisjoint(path.parts)
        or any(path.is_relative_to(index) for index in (OURS, *INSTALLED))
    )


class _Walk:
    """Texts that say what code does; each function, class and object is told once, which also ends
    circles.

    Args:
        root: the module whose code is walked; modules that are registered within it are told by
            their names.
        known_names: that the code is known to say, from the round before.
        known_stored: globals, and attributes of other objects, that the code is known to set.

    Attributes:
        names: that the code says, found in this round.
        stored: what the code sets, found in this round.
        reads: what it reads, found in this round.
    """

    def __init__(
        self, root: nn.Module, known_names: frozenset[str], known_stored: frozenset[str]
    ) -> None:
        self.known_names = known_names
        self.known_stored = known_stored
        self.names = set[str]()
        self.stored = set[str]()
        self.reads = CodeReads()
        self.hidden: list[tuple[str, nn.Module | Tensor]] = []  # by the name under which it is read
        self.name = ""
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no address is used twice
        self.depth = 0
        self.registered = {id(part): name for name, part in root.named_modules()}
        self.classes: dict[type, _Reach] = {}

    def named(self, name: str, thing: Any) -> str:
        """What something computes that is read by this name."""
        before = self.name
        self.name = name
        try:
            return self.told(thing)
        finally:
            self.name = before

    def told(self, thing: Any) -> str:
        """What something computes, as far as the user wrote it."""
        thing = _undecorated(thing)
        if isinstance(thing, enum.Enum):
            return f"{_name(type(thing))}.{thing.name}={thing.value!r}"
        if type(thing) in PLAIN:
            return repr(thing)
        if isinstance(thing, (torch.dtype, np.dtype, np.generic)):
            return f"{type(thing).__name__} {thing!r}"
        if isinstance(thing, (Tensor, np.ndarray)):
            if isinstance(thing, Tensor):
                self.reads.tensors.append(thing)
                if thing.requires_grad and thing.is_leaf:
                    self.hidden.append((self.name, thing))
            return _numbers(thing)
        if isinstance(thing, ModuleType):
            return self._module(thing, self.known_names)
        if id(thing) in self.registered:
            return f"registered {self.registered[id(thing)]!r}"
        if id(thing) in self.numbers:
            return f"#{self.numbers[id(thing)]}"
        self.numbers[id(thing)] = len(self.numbers)
        self.kept.append(thing)
        if self.depth >= DEEPEST:
            return _name(type(thing))
        self.depth += 1
        try:
            return self._told_once(thing)
        finally:
            self.depth -= 1

    def _told_once(self, thing: Any) -> str:
        if isinstance(thing, (tuple, list, frozenset, set, dict, MappingProxyType)):
            text = self._container(thing)
            return f"{text} {self._object(thing)}" if _users(type(thing)) else text
        if isinstance(thing, BuiltinFunctionType):
            owner = thing.__self__
            if owner is None or isinstance(owner, ModuleType):
                of = ""
            else:
                of = self.told(owner)
            return f"{of}.{thing.__name__}"
        if isinstance(thing, functools.partial):
            return (
                f"partial({self.told(thing.func)}, {self.told(thing.args)}, "
                f"{self.told(thing.keywords)})"
            )
        if isinstance(thing, functools.partialmethod):
            return (
                f"partialmethod({self.told(thing.func)}, {self.told(thing.args)}, "
                f"{self.told(thing.keywords)})"
            )
        if isinstance(thing, MethodType):
            return f"method({self.told(thing.__func__)}, {self.told(thing.__self__)})"
        if isinstance(thing, (staticmethod, classmethod)):
            return f"{type(thing).__name__}({self.told(thing.__func__)})"
        if isinstance(thing, property):
            return f"property({self.told(thing.fget)}, {self.told(thing.fset)})"
        if isinstance(thing, functools.cached_property):
            return f"property({self.told(thing.func)})"
        if isinstance(thing, FunctionType):
            return self._function(thing) if _users(thing) else _name(thing)
        if isinstance(thing, type):
            return self._class(thing) if _users(thing) else _name(thing)
        if isinstance(thing, nn.Module):
            return self._hidden(thing)
        return self._object(thing)

    def object(self, thing: Any) -> str:
        """A module that is registered: its class and its attributes."""
        return self._object(thing)

    def _container(self, thing: Any) -> str:
        if type(thing) in (list, dict, set):
            self.reads.containers.append((thing, thing.copy()))
        if isinstance(thing, (dict, MappingProxyType)):
            entries = [
                f"{self.told(key)}: {self.told(thing[key])}" for key in list(thing)[:LONGEST]
            ]
            return f"dict({', '.join(entries)})"
        if isinstance(thing, (set, frozenset)):
            # in the order of their texts: that of a set is another one in each process
            plain = [repr(one) if isinstance(one, PLAIN) else _name(type(one)) for one in thing]
            return f"set({', '.join(sorted(plain)[:LONGEST])})"
        kind = "tuple" if isinstance(thing, tuple) else "list"
        return f"{kind}({', '.join(map(self.told, thing[:LONGEST]))})"

    def _function(self, function: FunctionType) -> str:
        values = []
        free = function.__code__.co_freevars
        for name, cell in zip(free, function.__closure__ or (), strict=True):
            if name in self.known_stored:  # a counter or a cache of its own
                values.append("-")
                continue
            try:
                values.append(self.named(name, cell.cell_contents))
            except ValueError:  # not set yet
                values.append("-")
        code = function.__code__
        self.names.update(names_in(code))
        for name, of_self in stored_by(code):
            if not of_self:
                self.stored.add(name)
        defaults = self.told(function.__defaults__), self.told(function.__kwdefaults__)
        read = self._globals(code, function.__globals__)
        return f"function({operations(code)}, {read}, {values}, {defaults})"

    def _globals(self, code: CodeType, table: dict[str, Any]) -> list[str]:
        """What a function reads by global names: the user's code and values; of modules what the
        code names in them.
        """
        found = []
        named = frozenset(names_in(code))
        for name in global_names(code):
            if name in table and name not in self.known_stored:
                value = table[name]
                self.reads.names.append((table, name, value))
                if isinstance(value, ModuleType):
                    text = self._module(value, named)
                else:
                    text = self.named(name, value)
                found.append(f"{name}={text}")
        for name in imported(code):
            module = sys.modules.get(name)
            if module is not None:
                found.append(f"import {name}={self._module(module, named)}")
        return found

    def _module(self, module: ModuleType, names: Set[str]) -> str:
        """A module by its name; one of the user's with the values in it that are named."""
        if _installed(getattr(module, "__file__", None) or "<frozen"):
            return module.__name__
        if id(module) in self.numbers:
            return f"#{self.numbers[id(module)]}"
        self.numbers[id(module)] = len(self.numbers)
        found = []
        for key, value in sorted(vars(module).items()):
            if key in names and not _is_dunder(key) and key not in self.known_stored:
                self.reads.names.append((vars(module), key, value))
                if isinstance(value, ModuleType):
                    text = self._module(value, names)
                else:
                    text = self.named(key, value)
                found.append(f"{key}={text}")
        del self.numbers[id(module)]  # another function may name other values in it
        return f"module({'; '.join(found)})"

    def _reach(self, kind: type) -> _Reach:
        if kind not in self.classes:
            self.classes[kind] = _Reach(kind, self.known_names)
            self.stored |= self.classes[kind].elsewhere
        return self.classes[kind]

    def _class(self, kind: type) -> str:
        """What a class and the user's classes above it define, as far as a forward pass names
        it.
        """
        reach = self._reach(kind)
        found = []
        for one in _own_classes(kind):
            for key, value in sorted(vars(one).items()):
                if not reach.has(key) or key == "_abc_impl":
                    continue
                if _is_method(value) or not (_is_dunder(key) or key in reach.changing):
                    self.reads.names.append((vars(one), key, value))
                    found.append(f"{key}={self.named(key, value)}")
        return f"class({'; '.join(found)})"

    def _object(self, thing: Any) -> str:
        """The class of an object, and its attributes as far as a forward pass names them."""
        kind = type(thing)
        users = _users(kind)
        reach = self._reach(kind) if users else None
        found = []
        for key, value in sorted(_attributes(thing).items()):
            if _is_dunder(key) and key != "__wrapped__":
                continue
            if isinstance(thing, nn.Module) and key in TORCHS:
                continue
            if key in self.known_stored:
                continue
            if reach is None:
                counts = key in self.known_names and not key.startswith("_")
            else:
                counts = reach.has_attribute(key)
            if counts:
                table = getattr(thing, "__dict__", {})
                if key in table:
                    self.reads.names.append((table, key, value))
                found.append(f"{key}={self.named(key, value)}")
        if isinstance(thing, nn.Module):
            for key in sorted(thing._non_persistent_buffers_set):
                buffer = thing._buffers.get(key)
                if (
                    buffer is not None
                    and reach is not None
                    and reach.has(key)
                    and key not in reach.changing
                ):
                    found.append(f"{key}={self.told(buffer)}")
        name = self.told(kind) if users else _name(kind)
        return f"object({name}, {'; '.join(found)})"

    def _hidden(self, module: nn.Module) -> str:
        """A module that no module registers: its weights, code and settings."""
        self.hidden.append((self.name, module))
        lines = []
        for name, part in module.named_modules():
            self.registered.setdefault(id(part), f"hidden {name}")
            self.kept.append(part)
            lines.append(f"{name}: {self._object(part)} {_settings(part)}")
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            lines.append(f"{name}: {_numbers(value)}")
            self.reads.tensors.append(value)
        return f"hidden({'; '.join(lines)})"


class _Reach:
    """What a forward pass may read on a class and its objects, and what it sets on them.

    Starting at `forward`, `score`, the operators that Python calls itself, and the names that other
    code says, every name and text in a method that is reached counts. Below classes of packages,
    whose methods call those of the user's by any name, all methods count, and so they do where the
    code looks up attributes by texts that it computes.
    """

    def __init__(self, kind: type, names: frozenset[str]) -> None:
        own = _own_classes(kind)
        others = [one for one in kind.__mro__ if not _users(one) and one is not object]
        self.everything = not all(one.__module__.startswith(BASES) for one in others)
        self.module = issubclass(kind, nn.Module)
        self.reached = set[str]()
        self.changing = set[str]()
        self.elsewhere = set[str]()  # attributes of other objects, and globals, that methods set
        waiting = [*ENTRIES, *names]
        for one in own:
            waiting += [key for key in vars(one) if _is_dunder(key) and key not in IMPLICIT]
        if self.everything:
            for one in others:
                if one is not nn.Module:
                    waiting += _called_in(one)
        methods: dict[str, list[FunctionType]] = {}
        for one in own:
            for key, value in vars(one).items():
                methods.setdefault(key, []).extend(_functions(value))
        while waiting:
            name = waiting.pop()
            if name in self.reached:
                continue
            self.reached.add(name)
            if name in IMPLICIT:
                continue
            for function in methods.get(name, ()):
                waiting += names_in(function.__code__)
                for key, of_self in stored_by(function.__code__):
                    (self.changing if of_self else self.elsewhere).add(key)
        self.said = set[str]()  # by any method, for what is below classes of packages
        for functions in methods.values():
            for function in functions:
                self.said.update(names_in(function.__code__))
        if not self.reached.isdisjoint(BY_NAME):
            self.everything = self.everything or any(
                not set(BY_NAME).isdisjoint(names_in(function.__code__))
                for name in self.reached.intersection(methods)
                for function in methods[name]
            )

    def has(self, key: str) -> bool:
        """Whether a forward pass may read this name on the class."""
        return self.everything or key in self.reached

    def has_attribute(self, key: str) -> bool:
        """Whether a forward pass may read this attribute of an object, and does not set it
        itself.
        """
        if key in self.changing:
            return False
        if not self.everything:
            return key in self.reached or key == "__wrapped__"
        public = self.module and not key.startswith("_")
        return public or key in self.said or key in self.reached


@functools.lru_cache(maxsize=1024)
def _called_in(kind: type) -> tuple[str, ...]:
    """The names that the methods of a class say."""
    found = set[str]()
    for value in vars(kind).values():
        for function in _functions(value):
            found.update(names_in(function.__code__))
    return tuple(found)


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots among them."""
    attributes: dict[str, Any] = {}
    for one in type(thing).__mro__:
        slots = vars(one).get("__slots__", ())
        for key in [slots] if isinstance(slots, str) else list(slots):
            if key not in ("__dict__", "__weakref__") and hasattr(thing, key):
                attributes[key] = getattr(thing, key)
    table = getattr(thing, "__dict__", None)
    if isinstance(table, Mapping):
        attributes.update((key, value) for key, value in table.items() if isinstance(key, str))
    return attributes


def _is_dunder(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")


def _is_method(value: Any) -> bool:
    kinds = (FunctionType, property, staticmethod, classmethod, functools.cached_property)
    return isinstance(_undecorated(value), (*kinds, functools.partialmethod))


def _undecorated(thing: Any) -> Any:
    """A function without decorators such as `torch.no_grad()`, whose own code belongs to others.

    The user's decorators stay: what they compute counts, and the function within is in their
    closure.
    """
    while callable(thing) and not isinstance(thing, type) and hasattr(thing, "__wrapped__"):
        if isinstance(thing, (FunctionType, MethodType)):
            if _users(getattr(thing, "__func__", thing)):
                return thing
        elif _users(type(thing)):
            return thing
        thing = thing.__wrapped__
    return thing


def _functions(value: Any) -> list[FunctionType]:
    """The user's functions behind a method: itself, what it decorates, and those in its closure."""
    found: dict[int, FunctionType] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, property):
            waiting += [one.fget, one.fset]
        elif isinstance(one, (staticmethod, classmethod, MethodType)):
            waiting.append(one.__func__)
        elif isinstance(
            one, (functools.partial, functools.partialmethod, functools.cached_property)
        ):
            waiting.append(one.func)
        elif isinstance(one, FunctionType):
            if id(one) in found:
                continue
            found[id(one)] = one
            for cell in one.__closure__ or ():
                try:
                    waiting.append(cell.cell_contents)
                except ValueError:  # not set yet
                    continue
        if callable(one) and not isinstance(one, type) and hasattr(one, "__wrapped__"):
            waiting.append(one.__wrapped__)
    return list(found.values())


def _own_classes(kind: type) -> list[type]:
    """A class and those above it, as far as the user wrote them."""
    return [one for one in kind.__mro__ if _users(one)]


def _numbers(value: Any) -> str:
    """An array by its values."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return f"array {value.shape}"
        return f"array {value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    try:
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError):  # on no device, or sparse
        return str(value.dtype)
    return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(raw).hexdigest()[:16]}"


def _name(thing: Any) -> str:
    """A name; of what the user wrote without its module, which is another one where it runs as a
    script.
    """
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return name if _users(thing) else f"{getattr(thing, '__module__', '?')}.{name}"
