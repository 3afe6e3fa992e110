"""Shared by the hubs: options after a name, as in `resnet18?num_classes=10&pretrained=no`, and the
errors of the libraries that build models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offramp._support.find import unknown
from offramp._support.sentences import first_line
from offramp.errors import InvalidArgument, MissingExtra

Kinds = Mapping[str, Callable[[str], Any]]

EXTRA = "hub"
RANDOM = "Use --weights FILE, or ?pretrained=no for random weights"


def yes_no(text: str) -> bool:
    """Read yes or no. Raises KeyError for anything else."""
    return {"yes": True, "no": False}[text]


def number(text: str) -> int:
    """Read a whole number of at least 1. Raises ValueError for anything else."""
    value = int(text)
    if value < 1 or not text.isascii():  # int() also takes digits of other scripts
        raise ValueError(text)
    return value


def read(options: Mapping[str, str], kinds: Kinds, hub: str) -> dict[str, Any]:
    """Read the options after a name.

    Args:
        options: texts by name.
        kinds: by name, the function that reads the text. Other names are refused.
        hub: for the message.

    Raises:
        UnknownName: `kinds` does not have an option.
        InvalidArgument: a text cannot be read.
    """
    values = dict[str, Any]()
    for name, text in options.items():
        if name not in kinds:
            raise unknown(name, kinds, f"option of {hub} models")
        try:
            values[name] = kinds[name](text)
        except (ValueError, KeyError) as problem:
            allowed = "a whole number of at least 1"
            if kinds[name] is yes_no:
                allowed = "yes or no"
            raise InvalidArgument(f"{name} must be {allowed}, got {text}") from problem
    return values


def library(name: str, what_for: str) -> Any:
    """Import the package of a hub.

    Args:
        name: of the package.
        what_for: the model, for the message.

    Raises:
        MissingExtra: the package is not installed.
        InvalidArgument: the package does not work with the installed torch.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        raise MissingExtra(problem.name or name, EXTRA, f"the model {what_for!r}") from problem
    except (ImportError, RuntimeError, OSError) as problem:  # compiled operations of another torch
        raise InvalidArgument(
            f"{name} must be built for the installed torch, but its import fails "
            f"({root_cause(problem)}). Install torch and torchvision from the same index "
            f"(pytorch.org), or build the model yourself, with my.module:factory"
        ) from problem


def built(spec: str, call: Callable[[], Any]) -> nn.Module:
    """Build a model with a library. Raises InvalidArgument with the library's reason."""
    try:
        model: nn.Module = call()
    except Exception as problem:  # whatever a library raises for options that do not suit a model
        raise InvalidArgument(
            f"{spec!r} cannot be built ({root_cause(problem)}). Change its options"
        ) from problem
    return model


def unfetched(spec: str, problem: Exception) -> InvalidArgument:
    """The error for weights that cannot be downloaded."""
    return InvalidArgument(
        f"the weights of {spec!r} cannot be fetched ({root_cause(problem)}). {RANDOM}"
    )


def root_cause(problem: BaseException) -> str:
    """The first sentence of the first error: libraries wrap errors in errors."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    sentence = first_line(problem).partition(". ")[0]
    return sentence[:200].rstrip(".;")
