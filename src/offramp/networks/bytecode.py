"""Reads the bytecode of a function: its operations, the names that it reads, and those that it
sets.

All results depend on the code object alone, and are cached for each.
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
    """The operations of a function as a text, in order.

    Local variables count by number. A constant counts where it is loaded, which leaves docstrings
    out.
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
    """The names and texts in a function, and in the functions within it."""
    names = dict.fromkeys(code.co_names)  # a set in order
    for value in code.co_consts:
        if isinstance(value, str):
            names[value] = None
        elif isinstance(value, CodeType):
            names.update(dict.fromkeys(names_in(value)))
    return tuple(names)


@functools.lru_cache(maxsize=8192)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, and the functions within it, look up among globals."""
    return _arguments_of(code, ("LOAD_GLOBAL", "LOAD_NAME"))


@functools.lru_cache(maxsize=8192)
def imported(code: CodeType) -> tuple[str, ...]:
    """The modules that a function imports while it runs."""
    return _arguments_of(code, ("IMPORT_NAME",))


def _arguments_of(code: CodeType, operations: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of some operations, each once, in order."""
    arguments: dict[str, None] = {}  # a set in order
    for step in dis.get_instructions(code):
        if step.opname in operations:
            arguments[step.argval] = None
    for value in code.co_consts:
        if isinstance(value, CodeType):
            arguments.update(dict.fromkeys(_arguments_of(value, operations)))
    return tuple(arguments)


@functools.lru_cache(maxsize=8192)
def stored_by(code: CodeType) -> tuple[tuple[str, bool], ...]:
    """The names that a function sets: attributes, globals, and containers that it changes.

    `self.calls += 1`, `CACHE[key] = value` and `self.log.append(value)` set `calls`, `CACHE` and
    `log`.

    The operations are read in order. Where one stores something, those before it have loaded the
    object in which it is stored, so the search goes backwards from there.

    Returns:
        Pairs of a name, and whether it is an attribute of `self`.
    """
    stored = list[tuple[str, bool]]()
    steps = list[dis.Instruction]()
    for step in dis.get_instructions(code):
        if step.opname not in ("CACHE", "PRECALL", "NOP"):
            steps.append(step)
    self_name = code.co_varnames[0] if code.co_argcount else None
    # By local variable, what it is another name of: `cache = self.cache`.
    aliases: dict[str, list[tuple[str, bool]]] = {}
    for at, step in enumerate(steps):
        if step.opname == "STORE_FAST" and at:
            aliases.setdefault(step.argval, []).extend(_named_by(steps, at - 1, self_name, {}))
        if step.opname == "STORE_ATTR":
            stored.append((step.argval, _is_of_self(steps, at, self_name)))
        elif step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            stored.append((step.argval, False))
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            stored += _container_of(steps, at, self_name, aliases)
        elif step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in CHANGING and at:
            stored += _named_by(steps, at - 1, self_name, aliases)
    # `setattr` may set an attribute under any text in the function.
    by_text = "setattr" in code.co_names or "__setattr__" in code.co_names
    for value in code.co_consts:
        if isinstance(value, CodeType):
            stored += stored_by(value)
        elif by_text and isinstance(value, str):
            stored.append((value, True))
    return tuple(stored)


def _is_of_self(steps: list[dis.Instruction], at: int, self_name: str | None) -> bool:
    """Whether step `at` stores an attribute of `self`, which is loaded right before it."""
    # `x.calls += 1` copies x, adds, and swaps: go back to the copy.
    if at and steps[at - 1].opname.startswith(("SWAP", "ROT")):
        at -= 1
        while at > 0 and not steps[at].opname.startswith(("COPY", "DUP_TOP")):
            at -= 1
    return at > 0 and _loads(steps[at - 1], self_name)


def _container_of(
    steps: list[dis.Instruction],
    at: int,
    self_name: str | None,
    aliases: Mapping[str, list[tuple[str, bool]]],
) -> Iterator[tuple[str, bool]]:
    """The name of the container in which step `at` stores something under an index.

    The container is loaded before the index, and the index can be any expression. So the steps
    before `at` are undone one by one, until the index is no longer on the stack.
    """
    # `x[key] += 1` copies x and the key, adds, and swaps: go back to before the copies.
    if steps[at - 1].opname.startswith(("SWAP", "ROT")):
        while at > 0 and not steps[at].opname.startswith(("COPY", "DUP_TOP_TWO")):
            at -= 1
        while at > 0 and steps[at - 1].opname == "COPY":
            at -= 1
    needed = 1  # values on the stack that the steps passed so far do not provide
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
        yield from _named_by(steps, position, self_name, aliases)


def _named_by(
    steps: list[dis.Instruction],
    at: int,
    self_name: str | None,
    aliases: Mapping[str, list[tuple[str, bool]]],
) -> Iterator[tuple[str, bool]]:
    """The global or attribute that step `at` loads, and whether it is an attribute of `self`."""
    step = steps[at]
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
        yield step.argval, False
    elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        yield step.argval, at > 0 and _loads(steps[at - 1], self_name)
    elif step.opname == "LOAD_FAST":
        yield from aliases.get(step.argval, ())


def _loads(step: dis.Instruction, name: str | None) -> bool:
    return step.opname.startswith("LOAD_FAST") and step.argval == name
