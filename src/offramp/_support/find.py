"""A name on a shelf -> the thing: the file is the registration.

    find("gates", "margin")              the function of that name in gates/confidence.py
    find("models", "resnet20")           the function of that name in models/cifar_resnet.py
    find("gates", "my.module:Mine")      yours; only ever from a name that the user typed, never
                                         from a file

A shelf is a folder of this package. What a file offers stands in its `__all__`: names that are
typed, and names that saved networks hold. Looking for a name reads sources, and imports only the
file that holds it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from offramp.errors import InvalidArgument, OfframpError, UnknownName

HOUSE = Path(__file__).parents[1]
SHOWN = 40  # of what is known, where nothing is near


def find(shelf: str, name: str) -> Any:
    """The object called `name` on `shelf`, or the user's own for `module:attribute`.

    Raises UnknownName (with the nearest names), InvalidArgument when the user's module cannot be
    imported.
    """
    return imported(name) if ":" in name else shelved(shelf, name)


def shelved(shelf: str, name: str) -> Any:
    """The object called `name` on our own shelf and nowhere else: for names that stand in a
    file.
    """
    for file in _files(shelf):
        if name in _public(file):
            return getattr(importlib.import_module(f"offramp.{shelf}.{file.stem}"), name)
    raise unknown(name, names(shelf), f"{shelf.rstrip('s')} on the shelf `{shelf}`")


def find_file(shelf: str, name: str) -> ModuleType:
    """The module `name` of a shelf whose files each hold one thing, such as an engine."""
    if name not in files(shelf):
        raise unknown(name, files(shelf), f"{shelf.rstrip('s')} on the shelf `{shelf}`")
    return importlib.import_module(f"offramp.{shelf}.{name}")


def files(shelf: str) -> list[str]:
    """The files of a shelf by name, sorted, without importing anything."""
    return [file.stem for file in _files(shelf)]


def names(shelf: str) -> list[str]:
    """Every name that a shelf offers, sorted, without importing anything."""
    return sorted(name for file in _files(shelf) for name in _public(file))


def imported(dotted: str) -> Any:
    """`package.module:attribute`, as the user typed it.

    Raises InvalidArgument if it cannot be imported, also where the user's module itself fails.
    """
    module, _, attribute = dotted.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError) as problem:
        raise InvalidArgument(
            f"cannot import {dotted!r} ({problem}). Write module:attribute as Python would "
            "import it"
        ) from problem
    except (Exception, SystemExit) as problem:  # the user's module can raise anything
        raise InvalidArgument(
            f"cannot import {dotted!r} ({failure(problem)}). Write module:attribute as Python "
            "would import it"
        ) from problem
    return found


@contextlib.contextmanager
def users_code(name: str, wanted: str) -> Iterator[None]:
    """While it is open, an error of the user's own code ends in one sentence.

    Args:
        name: what the user typed, such as `my.module:factory`.
        wanted: what the code must do, such as "make a torch.nn.Module".

    Raises:
        InvalidArgument: the code raises anything but an error of offramp, or ends the program.
    """
    try:
        yield
    except OfframpError:
        raise
    except (Exception, SystemExit) as problem:
        raise InvalidArgument(f"{name!r} must {wanted}, got {failure(problem)}") from problem


def failure(problem: BaseException) -> str:
    """An error of the user's code in one line, with the place where it was raised."""
    text = f"{type(problem).__name__}: {' '.join(str(problem).split())}".rstrip(": ")
    frames = traceback.extract_tb(problem.__traceback__)
    if not frames or Path(frames[-1].filename).is_relative_to(HOUSE):
        return text
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def unknown(name: str, known: Iterable[str], kind: str) -> UnknownName:
    """The error for a name that nothing answers to, with the nearest names."""
    choices = list(known)
    if isinstance(name, str):
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    else:
        near = []
    more = f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else ""
    if near:
        offer = "did you mean " + " or ".join(map(repr, near))
    else:
        offer = "known: " + ", ".join(choices[:SHOWN]) + more
    return UnknownName(
        f"there is no {kind} called {name!r}; {offer}?"
        if near
        else f"there is no {kind} called {name!r}; {offer}"
    )


def _files(shelf: str) -> list[Path]:
    return sorted(file for file in (HOUSE / shelf).glob("*.py") if not file.stem.startswith("_"))


@cache
def _public(file: Path) -> frozenset[str]:
    """The names in `__all__` of a source file; none where it has no such list."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()
