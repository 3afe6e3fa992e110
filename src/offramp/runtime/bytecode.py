"""What the bytecode of a function says: its operations, the names that it reads, and those that it
sets.

Everything here depends on the code object alone, and is worked out once for each.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

# methods that change a container
CHANGING = frozenset(
    (
        "append",
        "extend",
        "insert",
        "pop",
        "popitem",
        "clear",
        "update",
        "setdefault",
        "add",
        "discard",
        "remove",
        "appendleft",
        "popleft",
    )
)


@functools.lru_cache(maxsize=8192)
def operations(code: CodeType) -> str:
    """Operations in order. Local variables count by number; a constant counts where it is loaded,
    which leaves docstrings out.
    """
    operations = []
    for step in dis.get_instructions(code):
        argument: object = step.arg
        if step.opcode in dis.hasconst:
            argument = _constant(step.argval)
        elif step.opcode in dis.hasname:
            argument = step.argval
        operations.append(f"{step.opname} {argument}")
    return f"code({operations})"


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return operations(value)
    if isinstance(value, tuple):
        return f"tuple({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return f"set({', '.join(sorted(map(_constant, value)))})"
    return repr(value)


@functools.lru_cache(maxsize=8192)
def names_in(code: CodeType) -> tuple[str, ...]:
    """The names and texts in a function, and in those within it."""
    found = dict.fromkeys(code.co_names)
    for value in code.co_consts:
        if isinstance(value, str):
            found[value] = None
        elif isinstance(value, CodeType):
            found.update(dict.fromkeys(names_in(value)))
    return tuple(found)


@functools.lru_cache(maxsize=8192)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, and those within it, look up among globals."""
    return _arguments_of(code, ("LOAD_GLOBAL", "LOAD_NAME"))


@functools.lru_cache(maxsize=8192)
def imported(code: CodeType) -> tuple[str, ...]:
    """The modules that a function imports while it runs."""
    return _arguments_of(code, ("IMPORT_NAME",))


def _arguments_of(code: CodeType, operations: tuple[str, ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opname in operations:
            found[step.argval] = None
    for value in code.co_consts:
        if isinstance(value, CodeType):
            found.update(dict.fromkeys(_arguments_of(value, operations)))
    return tuple(found)


@functools.lru_cache(maxsize=8192)
def stored_by(code: CodeType) -> tuple[tuple[str, bool], ...]:
    """The names that a function sets, and whether on `self`: attributes, globals, and containers
    that it changes.

    `self.calls += 1`, `CACHE[key] = value` and `self.log.append(value)` set `calls`, `CACHE` and
    `log`.
    """
    found = list[tuple[str, bool]]()
    steps = [
        step
        for step in dis.get_instructions(code)
        if step.opname not in ("CACHE", "PRECALL", "NOP")
    ]
    own = code.co_varnames[0] if code.co_argcount else None
    # `cache = self.cache`: what a local variable is another name of
    called: dict[str, list[tuple[str, bool]]] = {}
    for at, step in enumerate(steps):
        if step.opname == "STORE_FAST" and at:
            called[step.argval] = [*called.get(step.argval, ()), *_named_by(steps, at - 1, own, {})]
        if step.opname == "STORE_ATTR":
            found.append((step.argval, _is_of(steps, at, own)))
        elif step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            found.append((step.argval, False))
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found += _container_of(steps, at, own, called)
        elif step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in CHANGING and at:
            found += _named_by(steps, at - 1, own, called)
    by_text = "setattr" in code.co_names or "__setattr__" in code.co_names
    for value in code.co_consts:
        if isinstance(value, CodeType):
            found += stored_by(value)
        elif by_text and isinstance(value, str):
            found.append((value, True))
    return tuple(found)


def _is_of(steps: list[dis.Instruction], at: int, own: str | None) -> bool:
    """Whether an attribute that is stored is one of `own`, whose load comes right before."""
    if at and steps[at - 1].opname.startswith(("SWAP", "ROT")):  # `x.calls += 1` copies x first
        at -= 1
        while at > 0 and not steps[at].opname.startswith(("COPY", "DUP_TOP")):
            at -= 1
    return at > 0 and _loads(steps[at - 1], own)


def _container_of(
    steps: list[dis.Instruction],
    at: int,
    own: str | None,
    called: Mapping[str, list[tuple[str, bool]]],
) -> Iterator[tuple[str, bool]]:
    """The name of the container at whose index something is stored: its load comes before that of
    the index.
    """
    # `x[key] += 1` copies x and the key before it loads
    if steps[at - 1].opname.startswith(("SWAP", "ROT")):
        while at > 0 and not steps[at].opname.startswith(("COPY", "DUP_TOP_TWO")):
            at -= 1
        while at > 0 and steps[at - 1].opname == "COPY":
            at -= 1
    needed = 1
    position = at - 1
    while position >= 0:
        step = steps[position]
        try:
            needed -= dis.stack_effect(step.opcode, step.arg)
        except ValueError:
            return
        position -= 1
        if needed <= 0:
            break
    if position >= 0:
        yield from _named_by(steps, position, own, called)


def _named_by(
    steps: list[dis.Instruction],
    at: int,
    own: str | None,
    called: Mapping[str, list[tuple[str, bool]]],
) -> Iterator[tuple[str, bool]]:
    """The global or attribute that an operation loads, and whether it is one of `self`."""
    step = steps[at]
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
        yield step.argval, False
    elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        yield step.argval, at > 0 and _loads(steps[at - 1], own)
    elif step.opname == "LOAD_FAST":
        yield from called.get(step.argval, ())


def _loads(step: dis.Instruction, name: str | None) -> bool:
    return step.opname.startswith("LOAD_FAST") and step.argval == name
