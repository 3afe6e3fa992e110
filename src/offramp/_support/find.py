"""Find an object by its name on a shelf. The file is the registration.

    find("gates", "margin")              the function of that name in gates/confidence.py
    find("models", "resnet20")           the function of that name in models/cifar_resnet.py
    find("gates", "my.module:Mine")      the user's own; only from a name that the user typed, never
                                         from a file

A shelf is a folder of this package. The names are those in the `__all__` of its files: names that
users type, and names in saved networks. A search reads the sources, and imports only the file that
has the name.
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
SHOWN = 40  # names that a message lists, if none is near


def find(shelf: str, name: str) -> Any:
    """Find an object by its name on a shelf, or by `module:attribute` anywhere.

    Args:
        shelf: a folder of this package, such as "gates".
        name: the name.

    Raises:
        UnknownName: the shelf does not have the name. The message has the nearest names.
        InvalidArgument: the user's module cannot be imported.
    """
    if ":" in name:
        return imported(name)
    return shelved(shelf, name)


def shelved(shelf: str, name: str) -> Any:
    """Find an object on a shelf of this package and nowhere else, for names from a file.

    Raises:
        UnknownName: the shelf does not have the name.
    """
    for file in _files(shelf):
        if name in _public(file):
            module = importlib.import_module(f"offramp.{shelf}.{file.stem}")
            return getattr(module, name)
    raise unknown(name, names(shelf), f"{shelf.rstrip('s')} on the shelf `{shelf}`")


def find_file(shelf: str, name: str) -> ModuleType:
    """Find a module on a shelf whose files are one thing each, such as an engine.

    Raises:
        UnknownName: the shelf does not have the file.
    """
    if name not in files(shelf):
        raise unknown(name, files(shelf), f"{shelf.rstrip('s')} on the shelf `{shelf}`")
    return importlib.import_module(f"offramp.{shelf}.{name}")


def files(shelf: str) -> list[str]:
    """List the files of a shelf, sorted by name, without importing anything."""
    return [file.stem for file in _files(shelf)]


def names(shelf: str) -> list[str]:
    """List every name on a shelf, sorted, without importing anything."""
    public = list[str]()
    for file in _files(shelf):
        public.extend(_public(file))
    return sorted(public)


def imported(dotted: str) -> Any:
    """Import `package.module:attribute`, as the user typed it.

    Raises:
        InvalidArgument: it cannot be imported, or the user's module itself fails.
    """
    module_name, _, attributes = dotted.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            value = getattr(value, attribute)
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
    return value


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
    if frames[-1].filename.startswith("<frozen"):  # Python's import; the text has the place
        return text
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def unknown(name: str, known: Iterable[str], kind: str) -> UnknownName:
    """Make the error for an unknown name, with the nearest known names.

    Args:
        name: the unknown name.
        known: all known names.
        kind: of the name, for the message, such as "gate on the shelf `gates`".
    """
    choices = list(known)
    near = list[str]()
    if isinstance(name, str):
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    if near:
        offer = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        offer = f"known: {', '.join(choices[:SHOWN])}"
        if len(choices) > SHOWN:
            offer += f" and {len(choices) - SHOWN} more"
    return UnknownName(f"there is no {kind} called {name!r}; {offer}")


def _files(shelf: str) -> list[Path]:
    """The source files of a shelf without the private ones, sorted."""
    public = list[Path]()
    for file in (HOUSE / shelf).glob("*.py"):
        if not file.stem.startswith("_"):
            public.append(file)
    return sorted(public)


@cache
def _public(file: Path) -> frozenset[str]:
    """The names in `__all__` of a source file; none if it has no such list."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()
