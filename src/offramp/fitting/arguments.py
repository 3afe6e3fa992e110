"""Arguments of a recipe as they are typed: `epochs=5`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from offramp.errors import BadInput


def arguments_of(texts: Iterable[str] | None) -> dict[str, Any]:
    """NAME=VALUE texts as arguments: numbers, true, false, null and lists as in JSON, anything else as text.

    >>> arguments_of(["epochs=5", "weights=[1, 0.3]", "norm=frozen"])
    {'epochs': 5, 'weights': [1, 0.3], 'norm': 'frozen'}
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value) or name in found:
            raise BadInput(f"got --with {text!r}, expected NAME=VALUE, each name of an argument once; see the recipe")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
