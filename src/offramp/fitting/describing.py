"""A recipe as its user needs it: what it is, and its arguments with types and defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from offramp.fitting.training import recipe_class


@dataclass(frozen=True)
class Argument:
    """An argument of a recipe: its name, type and default, as they stand in the code."""

    name: str
    kind: str
    default: str


def about(recipe: str) -> str:
    """The docstring of a recipe. Raises UnknownName."""
    return inspect.getdoc(recipe_class(recipe)) or ""


def source(recipe: str) -> str:
    """The docstring of the recipe's file: the paper, and where ours differs from it."""
    module = inspect.getmodule(recipe_class(recipe))
    return inspect.getdoc(module) or ""


def arguments(recipe: str) -> list[Argument]:
    """The arguments of a recipe, in the order of its signature. Raises UnknownName."""
    arguments: list[Argument] = []
    for one in inspect.signature(recipe_class(recipe)).parameters.values():
        kind = "" if one.annotation is one.empty else str(one.annotation)
        default = "required" if one.default is one.empty else repr(one.default)
        arguments.append(Argument(one.name, kind, default))
    return arguments


def described(recipe: str) -> str:
    """Arguments and docstring as the command line prints them."""
    rows = arguments(recipe)
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"  {row.name:<{width}}  {row.kind} = {row.default}" for row in rows]
    head = f"Arguments of the recipe {recipe} (--with NAME=VALUE):"
    return "\n".join([head, *(lines or ["  none"]), "", about(recipe)])
