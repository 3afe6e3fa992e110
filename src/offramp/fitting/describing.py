"""Descriptions of recipes for users: the docstring, and the arguments with types and defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from offramp.fitting.training import recipe_class


@dataclass(frozen=True)
class Argument:
    """An argument of a recipe.

    Attributes:
        name: its name.
        kind: its type, as written in the code.
        default: its default, as written in the code, or "required".
    """

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
    for parameter in inspect.signature(recipe_class(recipe)).parameters.values():
        kind = ""
        if parameter.annotation is not parameter.empty:
            kind = str(parameter.annotation)
        default = "required"
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
        arguments.append(Argument(parameter.name, kind, default))
    return arguments


def described(recipe: str) -> str:
    """Arguments and docstring as the command line prints them. Raises UnknownName."""
    rows = arguments(recipe)
    lines = [f"Arguments of the recipe {recipe} (--with NAME=VALUE):"]
    # the names are padded to one width, so that the types begin in one column
    width = max([len(row.name) for row in rows], default=0)
    for row in rows:
        lines.append(f"  {row.name:<{width}}  {row.kind} = {row.default}")
    if not rows:
        lines.append("  none")
    return "\n".join([*lines, "", about(recipe)])
