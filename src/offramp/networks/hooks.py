"""The hooks that a forward pass of a module calls, in torch's own tables.

Hooks that only observe do not count. Some verbs of offramp (`print(net)`, `inspect`, `fit`) put
them on for a moment, and so do torch's own tools, such as `FlopCounterMode`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

# Packages whose hooks only observe.
OBSERVERS = ("offramp.", "torch.utils.", "torch.profiler.", "torch.autograd.profiler")
TABLES = ("_forward_pre_hooks", "_forward_hooks")  # in the order in which they are called


def hook_tables(module: nn.Module) -> list[Mapping[int, Any]]:
    """The tables of a module in which torch keeps its forward hooks."""
    return [vars(module)[name] for name in TABLES]


def global_tables() -> list[Mapping[int, Any]]:
    """The tables in which torch keeps the forward hooks of all modules."""
    return [torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks]


def forward_hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """The hooks of a module, in order, each with the name of its table."""
    hooks = list[tuple[str, Any]]()
    for name in TABLES:
        for hook in hooks_in([vars(module)[name]]):
            hooks.append((name, hook))
    return hooks


def global_hooks() -> list[Any]:
    """The hooks that every module calls, in order."""
    return hooks_in(global_tables())


def hooks_in(tables: Iterable[Mapping[int, Any]]) -> list[Any]:
    """The hooks in some tables, in order."""
    hooks = list[Any]()
    for table in tables:
        for hook in list(table.values()):
            if not only_observes(hook):
                hooks.append(hook)
    return hooks


def only_observes(hook: Any) -> bool:
    """Whether a hook is a function or a method of offramp, or of torch's tools that measure."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    module_name = getattr(hook, "__module__", None) or type(hook).__module__
    return bool(module_name.startswith(OBSERVERS))


def code_of(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """In words, the code that runs in a forward pass: that of the model, and of its hooks.

    Args:
        modules: with their names.
    """
    names = list[str]()
    for name, module in modules:
        if forward_hooks(module):
            names.append(repr(name or type(module).__name__))
    if not names:
        return "its code"
    return f"its code, or a forward hook of {', '.join(names)},"
