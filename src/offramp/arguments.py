"""Arguments as they are typed: `epochs=5` of a recipe, `strided?width=64` of an exit, `offramp:alexnet?classes=100`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from offramp.errors import BadInput


def arguments_of(texts: Sequence[str] | None, told: str = "--with") -> dict[str, Any]:
    """NAME=VALUE texts as arguments: numbers, true, false, null and lists as in JSON, anything else as text.

    >>> arguments_of(["epochs=5", "weights=[1, 0.3]", "norm=frozen"])
    {'epochs': 5, 'weights': [1, 0.3], 'norm': 'frozen'}
    """
    found: dict[str, Any] = {}
    for name, value in pairs(texts, told).items():
        if not name.isidentifier():
            raise BadInput(f"got {told} {name}=..., expected the name of an argument before the =; write it so")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping. Raises BadInput."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in found:
            raise BadInput(f"got {option} {text!r}, expected NAME=VALUE, each name once; write it so")
        found[name] = value
    return found


def words(text: str | None) -> list[str] | None:
    """The names in `A,B`."""
    return None if text is None else [word.strip() for word in text.split(",")]


def name_of(spec: str) -> tuple[str, dict[str, Any]]:
    """A name and its arguments: `offramp:msdnet_even?blocks=5&classes=10`. Raises BadInput where one is no NAME=VALUE.

    >>> name_of("strided?width=64")
    ('strided', {'width': 64})
    """
    name, mark, behind = spec.partition("?")
    return name, arguments_of(behind.split("&"), f"{name}?") if mark else {}
