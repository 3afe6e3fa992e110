"""What hubs share: the options behind a name, `resnet18?num_classes=10&pretrained=no`, and missing
packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offramp._support.find import unknown
from offramp.errors import InvalidArgument, MissingExtra

Kinds = Mapping[str, Callable[[str], Any]]

EXTRA = "hub"
RANDOM = "give the weights (--weights FILE), or say ?pretrained=no for random ones"


def yes_no(text: str) -> bool:
    """Yes or no; ValueError for anything else."""
    return {"yes": True, "no": False}[text]


def number(text: str) -> int:
    """A whole number of at least 1; ValueError for anything else."""
    found = int(text)
    if found < 1 or not text.isascii():
        raise ValueError(text)
    return found


def read(options: Mapping[str, str], kinds: Kinds, hub: str) -> dict[str, Any]:
    """Options as what they mean. Raises UnknownName and InvalidArgument: nothing but what `kinds`
    lists goes through.
    """
    found = {}
    for name, text in options.items():
        if name not in kinds:
            raise unknown(name, kinds, f"option of {hub} models")
        try:
            found[name] = kinds[name](text)
        except (ValueError, KeyError) as problem:
            raise InvalidArgument(
                f"got {name}={text}, expected "
                f"{'yes or no' if kinds[name] is yes_no else 'a whole number from 1 up'}; "
                "change it"
            ) from problem
    return found


def library(name: str, what_for: str) -> Any:
    """A package that stands behind a hub. Raises MissingExtra, InvalidArgument for one that does
    not suit the rest.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        raise MissingExtra(problem.name or name, EXTRA, f"the model {what_for!r}") from problem
    except (ImportError, RuntimeError, OSError) as problem:  # compiled operations of another torch
        raise InvalidArgument(
            f"{name} cannot be imported ({first_line(problem)}): it was built for another torch. "
            f"Install torch and "
            "torchvision from the same index (pytorch.org), or build the model yourself: "
            "my.module:factory."
        ) from problem


def built(spec: str, call: Callable[[], Any]) -> nn.Module:
    """What a library builds. Raises InvalidArgument with what it says."""
    try:
        model: nn.Module = call()
    except Exception as problem:  # whatever a library raises for options that do not suit a model
        raise InvalidArgument(
            f"{spec!r} cannot be built: {first_line(problem)}; change its options"
        ) from problem
    return model


def unfetched(spec: str, problem: Exception) -> InvalidArgument:
    """The error for weights that could not be had."""
    return InvalidArgument(
        f"the weights of {spec!r} cannot be fetched ({first_line(problem)}); {RANDOM}"
    )


def first_line(problem: BaseException) -> str:
    """What went wrong at first, in one short sentence: libraries wrap errors in errors."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__).partition(". ")[0][:200].rstrip(".;")
