"""A mark of the code that a network computes with, so that other code under the same names is noticed.

The fingerprint of a network is about weights and names. Two functions of one name, or two classes with the same keys,
may compute differently. So the bytecode of what the user wrote is hashed, of gates, exits, preprocessing and models:
`forward` and `score`, the methods and the functions of the user's that they call, the constants in them, and the plain
attributes and global values that they read. Comments, docstrings, names of local variables, line numbers and methods
that no forward pass calls do not count. Bytecode depends on the version of Python: marks are compared only where
Python, its -O flag and torch are the same.

Code of installed packages, and of offramp itself, does not count: an update would void every promise, though it
computes the same. What is left to the probe: such updates, code in C, hooks, what a method reads at run time (files,
the clock), attributes that are no number, text or tuple of these, and those that a method other than `__init__` sets.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from offramp.networks.network import Network
from offramp.plans.provenance import MADE_WITH

PLAIN = (bool, int, float, complex, str, bytes, type(None))
ENTRIES = ("forward", "score", "both", "__call__")  # where a forward pass enters exits, gates and models
BASES = ("torch.nn.", "offramp.networks.nodes", "abc", "typing")  # modules of classes that call no method but these
OURS = Path(__file__).resolve().parents[1]
INSTALLED = [
    Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")
]  # of which none holds what the user wrote


def code_marks(network: Network) -> tuple[tuple[str, str], ...]:
    """Marks of every gate, exit, preprocessing and model that has code of the user's, by what they are of."""
    optimized = f" -O{sys.flags.optimize}" if sys.flags.optimize else ""
    python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}{optimized}"
    parts: dict[str, nn.Module] = {}
    for name, gate in network.gates.items():
        parts[f"gate {name!r}"] = gate
    for name, exit_ in network.exits.items():
        parts[f"exit {name!r}"] = exit_
    for name, front in network.fronts.items():
        parts[f"the preprocessing of {name!r}"] = front
    for rung in network.rungs:
        parts[f"model {rung.name!r}"] = network.model_of(rung)
    found = [(MADE_WITH, f"{python}, torch {torch.__version__}")]
    for what, module in parts.items():
        mark = _mark(module)
        if mark is not None:
            found.append((what, mark))
    return tuple(found)


def _mark(module: nn.Module) -> str | None:
    """Sixteen hex digits over the user's code in a module and in all modules within it; None without such code."""
    walk = _Walk()
    lines = []
    for name, part in module.named_modules():
        if _users(type(part)):
            lines.append(f"{name}: {walk.told(part)}")
        for key, value in sorted(vars(part).items()):
            # The function of a `Scorer`, and a forward that stands before that of the class
            ours = type(part).__module__.startswith("offramp.") and not key.startswith("_")
            if (ours or key == "forward") and callable(value) and not isinstance(value, nn.Module):
                text = walk.told(value)
                if text != _name(value):
                    lines.append(f"{name}.{key}: {text}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else None


def _users(thing: Any) -> bool:
    """Whether a class or function was written by the user, and not installed with a package."""
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if isinstance(thing, FunctionType):
        file: str | None = thing.__code__.co_filename
    else:
        file = getattr(module, "__file__", None)
    if module is None and file is None:
        return not getattr(thing, "__module__", "builtins").startswith(("builtins", "offramp.", "torch."))
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
        or any(path.is_relative_to(place) for place in (OURS, *INSTALLED))
    )


class _Walk:
    """Texts that say what code does; each function and class is told once, which also ends circles."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no address is used twice

    def told(self, thing: Any) -> str:
        """What something computes, as far as the user wrote it."""
        thing = _undecorated(thing)
        if isinstance(thing, PLAIN):
            return repr(thing)
        if isinstance(thing, (tuple, list)):
            return f"{type(thing).__name__}({', '.join(map(self.told, thing))})"
        if isinstance(thing, (frozenset, set)):
            return f"set({', '.join(sorted(map(self.told, thing)))})"
        if isinstance(thing, dict):
            return f"dict({', '.join(f'{self.told(key)}: {self.told(value)}' for key, value in thing.items())})"
        if isinstance(thing, Tensor):
            return _numbers(thing)
        if isinstance(thing, (ModuleType, BuiltinFunctionType)):
            return getattr(thing, "__name__", "?")
        if id(thing) in self.known:
            return f"#{self.known[id(thing)]}"
        self.known[id(thing)] = len(self.known)
        self.kept.append(thing)
        if isinstance(thing, functools.partial):
            return f"partial({self.told(thing.func)}, {self.told(thing.args)}, {self.told(thing.keywords)})"
        if isinstance(thing, MethodType):
            return f"method({self.told(thing.__func__)}, {self.told(thing.__self__)})"
        if isinstance(thing, (staticmethod, classmethod)):
            return f"{type(thing).__name__}({self.told(thing.__func__)})"
        if isinstance(thing, property):
            return f"property({self.told(thing.fget)})"
        if isinstance(thing, FunctionType):
            return self._function(thing) if _users(thing) else _name(thing)
        if isinstance(thing, type):
            return self._class(thing) if _users(thing) else _name(thing)
        return self._object(thing)

    def _function(self, function: FunctionType) -> str:
        values = []
        for cell in function.__closure__ or ():
            try:
                values.append(self.told(cell.cell_contents))
            except ValueError:  # not set yet
                values.append("-")
        defaults = self.told(function.__defaults__), self.told(function.__kwdefaults__)
        return f"function({self._code(function.__code__, function.__globals__)}, {values}, {defaults})"

    def _code(self, code: CodeType, names: dict[str, Any]) -> str:
        """Operations in order. Local variables count by number; a constant counts where it is loaded, which leaves
        docstrings out.
        """
        operations = []
        for step in dis.get_instructions(code):
            argument: object = step.arg
            if step.opcode in dis.hasconst:
                value = step.argval
                argument = self._code(value, names) if isinstance(value, CodeType) else self.told(value)
            elif step.opcode in dis.hasname:
                argument = step.argval
            operations.append(f"{step.opname} {argument}")
        read = [f"{name}={self._global(name, code, names)}" for name in code.co_names if name in names]
        return f"code({operations}, {read})"

    def _global(self, name: str, code: CodeType, names: dict[str, Any]) -> str:
        """What a function reads by a global name: the user's code and plain values, of modules what is named in it."""
        value = names[name]
        if isinstance(value, ModuleType):
            if _installed(getattr(value, "__file__", None) or "<frozen"):
                return value.__name__
            inner = {key: getattr(value, key) for key in code.co_names if hasattr(value, key)}
            return self.told({key: thing for key, thing in inner.items() if _tellable(thing)})
        return self.told(value) if _tellable(value) else _name(type(value))

    def _class(self, kind: type) -> str:
        """What a class and the user's classes above it define: of modules as far as a forward pass reads it."""
        reached = _reached(kind)
        changing = _set_later(kind)
        found = []
        for one in _own_classes(kind):
            for key, value in sorted(vars(one).items()):
                if reached is not None and key not in reached:
                    continue
                method = isinstance(_undecorated(value), (FunctionType, property, staticmethod, classmethod))
                if method or not (key.startswith("_") or key in changing):
                    found.append(f"{key}={self.told(value) if _tellable(value) else _name(type(value))}")
        return f"class({'; '.join(found)})"

    def _object(self, thing: Any) -> str:
        """The class of an object, and its plain attributes."""
        kind = type(thing)
        if not _users(kind):
            return _name(kind)
        changing = _set_later(kind)
        reached = _reached(kind)
        plain = {
            key: value
            for key, value in sorted(getattr(thing, "__dict__", {}).items())
            if not key.startswith("_") and key != "training" and key not in changing and _tellable(value)
        }
        if reached is not None:
            plain = {key: value for key, value in plain.items() if key in reached}
        return f"object({self.told(kind)}, {self.told(plain)})"


def _undecorated(thing: Any) -> Any:
    """A function without decorators such as `torch.no_grad()`, whose own code belongs to others."""
    while callable(thing) and not isinstance(thing, type) and hasattr(thing, "__wrapped__"):
        thing = thing.__wrapped__
    return thing


def _tellable(value: Any) -> bool:
    """Whether a value says how something computes, and says the same tomorrow."""
    value = _undecorated(value)
    if isinstance(value, (tuple, list, frozenset)):
        return all(map(_tellable, value))
    simple = isinstance(value, (*PLAIN, staticmethod, classmethod, property, functools.partial, BuiltinFunctionType))
    return simple or inspect.isfunction(value) or inspect.isclass(value)


def _own_classes(kind: type) -> list[type]:
    """A class and those above it, as far as the user wrote them."""
    return [one for one in kind.__mro__ if _users(one)]


def _reached(kind: type) -> set[str] | None:
    """The names that a forward pass of a module may read on it: methods, and attributes of the class and the object.

    Starting at `forward` and `score`, every name and text in a method that is reached counts. None stands for all
    names: for what is no module, and below classes of packages, whose methods call those of the user's by any name.
    """
    others = (one for one in kind.__mro__ if not _users(one) and one is not object)
    if not issubclass(kind, nn.Module) or not all(one.__module__.startswith(BASES) for one in others):
        return None
    reached, waiting = set[str](), list(ENTRIES)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for one in _own_classes(kind):
            value = vars(one).get(name)
            inner = [value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)]
            for function in map(_undecorated, inner):
                if isinstance(function, FunctionType):
                    waiting += _names(function.__code__)
    return reached


def _names(code: CodeType) -> Iterator[str]:
    """The names and texts in a function, and in those within it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, CodeType):
            yield from _names(value)


def _set_later(kind: type) -> set[str]:
    """Names of attributes that a method other than `__init__` sets: counters and caches, which differ for nothing."""
    found = set[str]()
    for one in _own_classes(kind):
        for key, value in vars(one).items():
            if key != "__init__" and isinstance(value, FunctionType):
                found.update(_stored(value.__code__))
    return found


def _stored(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR":
            yield step.argval
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _stored(value)


def _numbers(value: Tensor) -> str:
    try:
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError):  # on no device, or sparse
        return str(value.dtype)
    return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(raw).hexdigest()[:16]}"


def _name(thing: Any) -> str:
    """A name; of what the user wrote without its module, which is another one where it runs as a script."""
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return name if _users(thing) else f"{getattr(thing, '__module__', '?')}.{name}"
