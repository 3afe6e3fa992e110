"""Marks of the user's code in a network, so that changed code under the same names is noticed.

The fingerprint of a network covers weights and names. Two functions with the same name, or two
classes with the same keys, may compute differently. So the bytecode of the user's gates, exits,
preprocessing and models is hashed: `forward` and `score`, the methods and functions that they call,
the user's decorators around them, the constants in them, and the attributes and globals that they
read, private ones too. An attribute or a global that the forward pass sets itself is a counter or a
cache and does not count. Comments, docstrings, names of local variables, line numbers and methods
that no forward pass names do not count either. Bytecode depends on the version of Python. Marks are
therefore compared only if Python, its -O flag, torch and the version of the marks are the same.

A forward pass enters a module by `forward` or `score`. From there names are followed: everything
that is called `scale` counts as soon as any reached code names `scale`. So marks are made in
rounds, each with the names of the last one, until there are no new names.

Forward hooks and forward pre-hooks count like code, those of a package by their name.

Code of installed packages, and of offramp itself, does not count. Otherwise an update would void
every promise, although it computes the same. Of their layers in a model, the numbers and texts
count as settings (`negative_slope`, `eps`). docs/concepts/promises.md lists changes that only the
probe can notice.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence, Set
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
from offramp.networks.bytecode import global_names, imported, names_in, operations, stored_by
from offramp.networks.compiled import Compiled, compiled_of, undisturbed
from offramp.networks.hooks import forward_hooks, global_hooks
from offramp.networks.network import Network
from offramp.plans.provenance import MADE_WITH, MARKS, SETTINGS

PLAIN = (bool, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(...))
ENTRIES = ("forward", "score", "both", "__call__")  # where a forward pass enters modules
# methods that Python calls outside of a forward pass
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
# modules whose classes call only those of the user's methods that are listed above
BASES = ("torch.nn.", "offramp.networks.nodes", "abc", "typing", "builtins", "enum", "collections")
TORCHS = frozenset(vars(nn.Module()))  # torch's own attributes of a module, private ones among them
LONGEST = 100_000  # entries of a container that count
DEEPEST = 100  # levels of objects within objects that count
OURS = Path(__file__).resolve().parents[1]
SCHEMES = ("stdlib", "platstdlib", "purelib", "platlib")
# folders without code of the user
INSTALLED = [Path(sysconfig.get_path(scheme)).resolve() for scheme in SCHEMES]


@dataclass
class CodeReads:
    """The values that the user's code in a network reads, as they are now.

    Attributes:
        names: a table (of attributes or globals), a name in it, and the value.
        containers: lists, dicts and sets that are read, each with a copy.
        tensors: plain attributes, globals, and weights of modules that are not registered.
    """

    names: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def code_reads(network: Network) -> CodeReads:
    """The values that the code under `code_marks` reads, except for attributes in slots."""
    reads = CodeReads()
    for module in _parts(network).values():
        _, walk = _walked(module)
        reads.names += walk.reads.names
        reads.containers += walk.reads.containers
        reads.tensors += walk.reads.tensors
    return reads


def refuse_hidden(network: Network) -> None:
    """Raise BadNetwork if code reads a module or a parameter that no module registers.

    Its weights would not be in the fingerprint, and would not be saved, moved or trained.
    """
    registered = (*network.modules(), *network.parameters(), *network.buffers())
    known = set(map(id, registered))
    for what, module in _parts(network).items():
        _, walk = _walked(module)
        for name, thing in walk.hidden:
            if id(thing) in known:
                continue
            if isinstance(thing, nn.Module):
                if not _has_state(thing):  # such as a global nn.ReLU()
                    continue
                kind = "module"
                way = "an attribute of a torch.nn.Module, nn.ModuleList or nn.ModuleDict"
            else:
                kind = "trainable tensor"
                way = "an nn.Parameter or, with register_buffer, a buffer of a torch.nn.Module"
            raise BadNetwork(
                f"{what} reads the {kind} {name!r}, which no module registers. It is in a plain "
                "list, dict, closure, global or object, so its weights cannot be saved or moved, "
                f"and its training rows are unknown. Make it {way}."
            )


def _has_state(module: nn.Module) -> bool:
    """Whether a module has weights or buffers, which would have to be saved and moved."""
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def code_marks(network: Network) -> tuple[tuple[str, str], ...]:
    """Marks of the user's code, and of the settings of torch's layers, in every gate, exit,
    preprocessing and model.

    Returns:
        Pairs of a description, such as "gate 'small'", and a mark. The first pair says with which
        versions of Python and torch the marks can be compared. A part without such code or layers
        has no mark.
    """
    marks = [(MADE_WITH, _made_with())]
    for what, module in _parts(network).items():
        mark = _mark(module)
        if mark is not None:
            marks.append((what, mark))
        mark = _settings_mark(module)
        if mark is not None:
            marks.append((SETTINGS + what, mark))
    everywhere = global_hooks()
    if everywhere:
        lines, _ = _walked(nn.Module(), everywhere)
        marks.append(("the hooks of all modules", _hashed(lines)))
    return tuple(marks)


def cache_of(network: Network) -> Compiled:
    """The cache of a network, emptied if its code or its hooks have changed since the last call.

    What is derived from a network (the pieces of a cut model, graphs, the last Runner) was made
    with its code. Modules and tensors can stay the same objects while the code changes: an
    attribute that `forward` reads, a setting of a layer, a hook.
    """
    kept = compiled_of(network)
    with undisturbed():
        marks = code_marks(network)
        before = kept.found("code")
        if before is not None and before != marks:
            kept.forget()
        kept.once("code", lambda: marks)
    return kept


def _parts(network: Network) -> dict[str, nn.Module]:
    """Gates, exits, preprocessing and models, by a description for messages."""
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
    """A mark of the numbers and texts of torch's layers in a module; None without such layers."""
    lines = []
    for name, part in module.named_modules():
        if type(part).__module__.startswith("torch.nn."):
            lines.append(f"{name}: {type(part).__name__} {_settings(part)}")
    return _hashed(lines) if lines else None


def _made_with() -> str:
    """The versions of Python, torch and marks, which must be equal when marks are compared."""
    optimized = f" -O{sys.flags.optimize}" if sys.flags.optimize else ""
    python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}{optimized}"
    return f"{python}, torch {torch.__version__}{MARKS}"


def _hashed(lines: Iterable[str]) -> str:
    """Sixteen hex digits over some lines."""
    text = "\n".join(lines).encode("utf-8", "backslashreplace")
    return hashlib.sha256(text).hexdigest()[:16]


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
    """A mark of the user's code in a module and the modules within it; None without such code."""
    lines, _ = _walked(module)
    return _hashed(lines) if lines else None


def _walked(module: nn.Module, functions: Sequence[Any] = ()) -> tuple[list[str], _Walk]:
    """Texts of the user's code in a module and in some functions, and the last round of the walk.

    A round follows the names known before it, and finds new ones. The last round finds none.
    """
    names = frozenset[str]()
    stored = frozenset[str]()
    while True:
        walk = _Walk(module, names, stored)
        lines = _lines(module, walk)
        lines += map(walk.text_of, functions)
        if walk.names <= names and walk.stored <= stored:
            return lines, walk
        names |= walk.names
        stored |= walk.stored


def _lines(module: nn.Module, walk: _Walk) -> list[str]:
    """Texts of the modules within it that have code of the user, and of all forward hooks."""
    lines = []
    for name, part in module.named_modules():
        if _users(type(part)):
            lines.append(f"{name}: {walk.object(part)}")
        # Functions of the user in attributes: that of a `Scorer` or of a member, and a forward
        # that replaces the one of the class.
        for key, value in sorted(vars(part).items()):
            kind = type(part).__module__
            ours = kind.startswith("offramp.") and not key.startswith("_")
            ours = ours or (kind == "offramp.members.function" and key == "_function")
            if (ours or key == "forward") and callable(value) and not isinstance(value, nn.Module):
                text = walk.text_of(value)
                if text != _name(value):
                    lines.append(f"{name}.{key}: {text}")
        for table, hook in forward_hooks(part):
            lines.append(f"{name}.{table}: {walk.text_of(hook)}")
    return lines


def _users(thing: Any) -> bool:
    """Whether a class or function was written by the user, and not installed with a package."""
    module_name = getattr(thing, "__module__", None)
    module = sys.modules.get(module_name or "")
    if isinstance(thing, FunctionType):
        file: str | None = thing.__code__.co_filename
    else:
        file = getattr(module, "__file__", None)
    if module is None and file is None:
        return not (module_name or "builtins").startswith(("builtins", "offramp.", "torch."))
    if file is None:  # built into Python, or typed into a shell
        return module_name == "__main__"
    return not _installed(file)


@functools.lru_cache(maxsize=4096)
def _installed(file: str) -> bool:
    """Whether a file belongs to Python, to a package or to offramp."""
    if file.startswith("<frozen"):
        return True
    if file.startswith("<"):  # typed, or made by exec
        return False
    path = Path(file).resolve()
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return True
    for folder in (OURS, *INSTALLED):
        if path.is_relative_to(folder):
            return True
    return False


class _Walk:
    """One round: turns the user's code and the values that it reads into texts.

    Each function, class and object is written once, and by its number when it comes again. This
    also ends cycles.

    Args:
        root: the module whose code is walked. Modules that are registered within it are written by
            their names.
        known_names: names in the code that the rounds before have found.
        known_stored: globals, and attributes of other objects, that the code sets, as far as the
            rounds before have found them.

    Attributes:
        names: names in the code that this round has found.
        stored: globals and attributes set by the code that this round has found.
        reads: values that the code reads.
        hidden: modules and trainable tensors that are not registered, with the names under which
            the code reads them.
    """

    def __init__(
        self, root: nn.Module, known_names: frozenset[str], known_stored: frozenset[str]
    ) -> None:
        self.known_names = known_names
        self.known_stored = known_stored
        self.names = set[str]()
        self.stored = set[str]()
        self.reads = CodeReads()
        self.hidden: list[tuple[str, nn.Module | Tensor]] = []
        self.name = ""  # under which the current value is read
        self.numbers: dict[int, int] = {}  # of things written so far, by id
        self.kept: list[Any] = []  # these things, so that no id is used twice
        self.depth = 0
        self.registered = {id(part): name for name, part in root.named_modules()}
        self.classes: dict[type, _Reach] = {}

    def named(self, name: str, thing: Any) -> str:
        """The text of something that is read under this name."""
        before = self.name
        self.name = name
        try:
            return self.text_of(thing)
        finally:
            self.name = before

    def text_of(self, thing: Any) -> str:
        """The text of something: code of the user, a value, or the name of anything else."""
        thing = _undecorated(thing)
        # Plain values are written out, however often they come.
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
        # Everything else is written once.
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
            return self._text_once(thing)
        finally:
            self.depth -= 1

    def _text_once(self, thing: Any) -> str:
        if isinstance(thing, (tuple, list, frozenset, set, dict, MappingProxyType)):
            text = self._container(thing)
            return f"{text} {self._object(thing)}" if _users(type(thing)) else text
        if isinstance(thing, BuiltinFunctionType):
            owner = thing.__self__
            owner_text = ""
            if owner is not None and not isinstance(owner, ModuleType):
                owner_text = self.text_of(owner)
            return f"{owner_text}.{thing.__name__}"
        if isinstance(thing, functools.partial):
            return f"partial({self._joined(thing.func, thing.args, thing.keywords)})"
        if isinstance(thing, functools.partialmethod):
            return f"partialmethod({self._joined(thing.func, thing.args, thing.keywords)})"
        if isinstance(thing, MethodType):
            return f"method({self._joined(thing.__func__, thing.__self__)})"
        if isinstance(thing, (staticmethod, classmethod)):
            return f"{type(thing).__name__}({self.text_of(thing.__func__)})"
        if isinstance(thing, property):
            return f"property({self._joined(thing.fget, thing.fset)})"
        if isinstance(thing, functools.cached_property):
            return f"property({self.text_of(thing.func)})"
        if isinstance(thing, FunctionType):
            return self._function(thing) if _users(thing) else _name(thing)
        if isinstance(thing, type):
            return self._class(thing) if _users(thing) else _name(thing)
        if isinstance(thing, nn.Module):
            return self._hidden(thing)
        return self._object(thing)

    def _joined(self, *things: Any) -> str:
        return ", ".join(map(self.text_of, things))

    def object(self, thing: Any) -> str:
        """The text of a registered module: its class and its attributes."""
        return self._object(thing)

    def _container(self, thing: Any) -> str:
        if type(thing) in (list, dict, set):
            self.reads.containers.append((thing, thing.copy()))
        texts = list[str]()
        if isinstance(thing, (dict, MappingProxyType)):
            # A subclass may make a new object each time that it is asked, as the table of
            # activations in transformers does: what counts is what it holds.
            pairs = dict.items(thing) if isinstance(thing, dict) else thing.items()
            for key, value in list(pairs)[:LONGEST]:
                texts.append(f"{self.text_of(key)}: {self.text_of(value)}")
            return f"dict({', '.join(texts)})"
        if isinstance(thing, (set, frozenset)):
            for item in thing:
                texts.append(repr(item) if isinstance(item, PLAIN) else _name(type(item)))
            # Sorted, because the order of a set differs from process to process.
            return f"set({', '.join(sorted(texts)[:LONGEST])})"
        kind = "tuple" if isinstance(thing, tuple) else "list"
        return f"{kind}({self._joined(*thing[:LONGEST])})"

    def _function(self, function: FunctionType) -> str:
        """A function: its operations, and the values that it reads of globals, closure and
        defaults.
        """
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
        defaults = (self.text_of(function.__defaults__), self.text_of(function.__kwdefaults__))
        read = self._globals(code, function.__globals__)
        return f"function({operations(code)}, {read}, {values}, {defaults})"

    def _globals(self, code: CodeType, table: dict[str, Any]) -> list[str]:
        """The values that a function reads by global names. A module counts by the values in it
        that the code names.
        """
        texts = []
        named = frozenset(names_in(code))
        for name in global_names(code):
            if name in table and name not in self.known_stored:
                value = table[name]
                self.reads.names.append((table, name, value))
                if isinstance(value, ModuleType):
                    text = self._module(value, named)
                else:
                    text = self.named(name, value)
                texts.append(f"{name}={text}")
        for name in imported(code):
            module = sys.modules.get(name)
            if module is not None:
                texts.append(f"import {name}={self._module(module, named)}")
        return texts

    def _module(self, module: ModuleType, names: Set[str]) -> str:
        """A module: its name, or if the user wrote it, the values in it that are named."""
        if _installed(getattr(module, "__file__", None) or "<frozen"):
            return module.__name__
        if id(module) in self.numbers:
            return f"#{self.numbers[id(module)]}"
        self.numbers[id(module)] = len(self.numbers)
        texts = []
        for key, value in sorted(vars(module).items()):
            if key in names and not _is_dunder(key) and key not in self.known_stored:
                self.reads.names.append((vars(module), key, value))
                if isinstance(value, ModuleType):
                    text = self._module(value, names)
                else:
                    text = self.named(key, value)
                texts.append(f"{key}={text}")
        del self.numbers[id(module)]  # another function may name other values in it
        return f"module({'; '.join(texts)})"

    def _reach(self, kind: type) -> _Reach:
        if kind not in self.classes:
            self.classes[kind] = _Reach(kind, self.known_names)
            self.stored |= self.classes[kind].elsewhere
        return self.classes[kind]

    def _class(self, kind: type) -> str:
        """A class: the entries of it and of the user's classes above it that a forward pass
        names.
        """
        reach = self._reach(kind)
        texts = []
        for user_class in _user_classes(kind):
            for key, value in sorted(vars(user_class).items()):
                if not reach.has(key) or key == "_abc_impl":
                    continue
                if _is_method(value) or not (_is_dunder(key) or key in reach.changing):
                    self.reads.names.append((vars(user_class), key, value))
                    texts.append(f"{key}={self.named(key, value)}")
        return f"class({'; '.join(texts)})"

    def _object(self, thing: Any) -> str:
        """An object: its class, and the attributes that a forward pass names."""
        kind = type(thing)
        users = _users(kind)
        reach = self._reach(kind) if users else None
        texts = []
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
                texts.append(f"{key}={self.named(key, value)}")
        # Buffers that are not saved are not in the fingerprint, so they count here.
        if isinstance(thing, nn.Module) and reach is not None:
            for key in sorted(thing._non_persistent_buffers_set):
                buffer = thing._buffers.get(key)
                if buffer is not None and reach.has(key) and key not in reach.changing:
                    texts.append(f"{key}={self.text_of(buffer)}")
        name = self.text_of(kind) if users else _name(kind)
        return f"object({name}, {'; '.join(texts)})"

    def _hidden(self, module: nn.Module) -> str:
        """A module that is not registered: its weights, code and settings."""
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
    """The names that a forward pass may read on a class and its objects, and those that it sets.

    This is a search. It starts at `forward`, `score`, the operators that Python calls itself, and
    the names in other code. From every method that is reached, all names and texts in it are
    reached as well. If the class is below a class of a package whose methods may call those of the
    user by any name, all methods count. They also count if code looks up attributes by texts that
    it computes.

    Args:
        kind: the class.
        names: names in other code.

    Attributes:
        everything: whether all methods count.
        module: whether it is a torch module.
        reached: names that a forward pass may read.
        changing: attributes of the object that reached methods set.
        elsewhere: attributes of other objects, and globals, that reached methods set.
        said: names in any method.
    """

    def __init__(self, kind: type, names: frozenset[str]) -> None:
        user_classes = _user_classes(kind)
        others = [base for base in kind.__mro__ if not _users(base) and base is not object]
        unknown = [base for base in others if not base.__module__.startswith(BASES)]
        self.everything = bool(unknown)
        self.module = issubclass(kind, nn.Module)
        self.reached = set[str]()
        self.changing = set[str]()
        self.elsewhere = set[str]()

        # Where the search starts, and the functions behind each name.
        waiting = [*ENTRIES, *names]
        methods: dict[str, list[FunctionType]] = {}
        for user_class in user_classes:
            for key, value in vars(user_class).items():
                if _is_dunder(key) and key not in IMPLICIT:
                    waiting.append(key)
                methods.setdefault(key, []).extend(_functions(value))
        if self.everything:
            for base in others:
                if base is not nn.Module:
                    waiting += _called_in(base)

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
                    stored = self.changing if of_self else self.elsewhere
                    stored.add(key)
        self.said = set[str]()
        for functions in methods.values():
            for function in functions:
                self.said.update(names_in(function.__code__))
        if not self.reached.isdisjoint(BY_NAME):
            for name in self.reached.intersection(methods):
                for function in methods[name]:
                    if not set(BY_NAME).isdisjoint(names_in(function.__code__)):
                        self.everything = True  # it looks up attributes by texts

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
    """The names in the methods of a class."""
    names = set[str]()
    for value in vars(kind).values():
        for function in _functions(value):
            names.update(names_in(function.__code__))
    return tuple(names)


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object, also those in slots."""
    attributes: dict[str, Any] = {}
    for base in type(thing).__mro__:
        slots = vars(base).get("__slots__", ())
        if isinstance(slots, str):
            slots = [slots]
        for key in slots:
            if key not in ("__dict__", "__weakref__") and hasattr(thing, key):
                attributes[key] = getattr(thing, key)
    table = getattr(thing, "__dict__", None)
    if isinstance(table, Mapping):
        for key, value in table.items():
            if isinstance(key, str):
                attributes[key] = value
    return attributes


def _is_dunder(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")


def _is_method(value: Any) -> bool:
    kinds = (FunctionType, property, staticmethod, classmethod, functools.cached_property)
    return isinstance(_undecorated(value), (*kinds, functools.partialmethod))


def _undecorated(thing: Any) -> Any:
    """A function without the decorators of packages, such as `torch.no_grad()`.

    The user's decorators stay. Their code counts, and the decorated function is in their closure.
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
    """The functions behind a method: itself, the function that it decorates, and those in its
    closure.
    """
    functions: dict[int, FunctionType] = {}  # by id
    waiting = [value]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, property):
            waiting += [thing.fget, thing.fset]
        elif isinstance(thing, (staticmethod, classmethod, MethodType)):
            waiting.append(thing.__func__)
        elif isinstance(
            thing, (functools.partial, functools.partialmethod, functools.cached_property)
        ):
            waiting.append(thing.func)
        elif isinstance(thing, FunctionType):
            if id(thing) in functions:
                continue
            functions[id(thing)] = thing
            for cell in thing.__closure__ or ():
                try:
                    waiting.append(cell.cell_contents)
                except ValueError:  # not set yet
                    continue
        if callable(thing) and not isinstance(thing, type) and hasattr(thing, "__wrapped__"):
            waiting.append(thing.__wrapped__)
    return list(functions.values())


def _user_classes(kind: type) -> list[type]:
    """A class and those above it that the user wrote."""
    return [base for base in kind.__mro__ if _users(base)]


def _numbers(value: Any) -> str:
    """The text of an array or a tensor: its type, its shape, and a hash of its values."""
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
    """The name of something. A name of the user's code comes without its module, because the module
    has another name when it runs as a script.
    """
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return name if _users(thing) else f"{getattr(thing, '__module__', '?')}.{name}"
