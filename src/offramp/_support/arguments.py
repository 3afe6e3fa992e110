"""Arguments as users type them: `epochs=5` of a recipe, `strided?width=64` of an exit,
`offramp:alexnet?classes=100`.

Also checks of values: numbers, counts, flags and objects. And the text of a share.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from offramp.errors import InvalidArgument

MOST = 2**31 - 1  # the largest count
LONGEST = 40  # characters of a value in a message
# Numbers and words that Python reads and JSON does not.
DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
PYTHON_WORDS = {"True": True, "False": False, "None": None}


def require(
    name: str,
    value: object,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> float:
    """Check one number.

    Args:
        name: of the argument, as the caller wrote it.
        value: of the argument. Booleans, texts, NaN and infinities are not numbers.
        low: the smallest allowed number.
        high: the largest allowed number.
        above: a number below all allowed ones.
        below: a number above all allowed ones.
        hint: what to do, if that is not clear from the limits.

    Returns:
        The number as a float.

    Raises:
        InvalidArgument: it is not a number, or not within the limits.

    >>> require("keep", 0.5, low=0, high=1)
    0.5
    >>> require("keep", 2, low=0, high=1)
    Traceback (most recent call last):
    offramp.errors.InvalidArgument: keep must be between 0 and 1, got 2
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number:
        number = _as_float(value)
        fits_low = (low is None or number >= low) and (above is None or number > above)
        fits_high = (high is None or number <= high) and (below is None or number < below)
        if math.isfinite(number) and fits_low and fits_high:
            return number
    # "between 0 and 1", or "a number between 0 and 1" if the value is not a number at all
    limits = _limits(low, high, above, below)
    if not is_number or not limits:
        if limits.startswith("at "):
            limits = f"of {limits}"
        limits = f"a number {limits}".strip()
    message = f"{name} must be {limits}, got {value!r}"
    is_share = below is not None and below <= 1
    if is_share or isinstance(value, str):
        message += _as_share(value)
    if hint:
        message += f". {hint}"
    raise InvalidArgument(message)


def _limits(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    """The limits in words: `between 0 and 1`, `at least 0 and below 1`, `above 0`."""
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    texts = list[str]()
    limits = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    for words, limit in limits:
        if limit is not None:
            texts.append(f"{words} {limit:g}")
    return " and ".join(texts)


def _as_float(value: Any) -> float:
    """A number as Python's float. NumPy's float32 0.05 becomes 0.05, by its shortest text. Adding
    0.0 turns -0.0 into 0.0.
    """
    if type(value).__module__ == "numpy":
        return float(str(value)) + 0.0
    try:
        return float(value) + 0.0
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def require_confidence(value: object) -> float:
    """Check that a confidence, and 1 - confidence, are above 0 and below 1. Raises
    InvalidArgument.
    """
    confidence = require("confidence", value, above=0, below=1)
    if not 0 < 1 - confidence < 1:  # so close to 0 that 1 - confidence is 1
        raise InvalidArgument(f"confidence must be at least 1e-15 and below 1, got {value!r}")
    return confidence


def require_count(name: str, value: object, low: int = 1, high: int = MOST) -> int:
    """Check a whole number.

    Args:
        name: of the argument, for the message.
        value: of the argument. Booleans, texts and fractions (also 1.0) are not whole numbers.
        low: the smallest allowed number.
        high: the largest allowed number.

    Raises:
        InvalidArgument: it is not a whole number, or not within the limits.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        count = int(value)
        if low <= count <= high:
            return count
    limits = f"of at least {low}"
    if high != MOST:
        limits = f"from {low} to {high:,}"
    got = repr(value)
    if len(got) > LONGEST:
        got = f"{got[:LONGEST]}..."
    raise InvalidArgument(f"{name} must be a whole number {limits}, got {got}")


def require_flag(name: str, value: object) -> bool:
    """Check that a flag is True or False, also NumPy's. Raises InvalidArgument for anything else,
    because the text "no" would count as True.
    """
    cls = type(value)
    is_numpy_bool = cls.__module__ == "numpy" and cls.__name__ in ("bool", "bool_")
    if isinstance(value, bool) or is_numpy_bool:
        return bool(value)
    raise InvalidArgument(f"{name} must be True or False, got {value!r}")


def in_order(names: Iterable[Any]) -> list[Any]:
    """Names in the order in which they were given; those of a set, which has none, sorted.

    Python orders the texts of a set anew in every process.
    """
    if isinstance(names, (set, frozenset)):
        return sorted(names, key=str)
    return list(names)


def require_path(name: str, value: object) -> Path:
    """The path of a file or folder.

    Args:
        name: of the argument, for the sentence.
        value: a text that is not empty, or an object with such a path.

    Raises:
        InvalidArgument: it is anything else, such as None, a number or bytes.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, str) and path:
        return Path(path)
    shown = repr(value)
    if len(shown) > LONGEST:
        shown = f"a {type(value).__name__}"
    raise InvalidArgument(f"{name} must be a path (a text or a pathlib.Path), got {shown}")


def require_kind(name: str, value: object, kind: type, way: str) -> None:
    """Raise InvalidArgument for a value of another class.

    Args:
        name: of the argument, for the message.
        value: of the argument.
        kind: the class that it must have.
        way: what makes such an object, such as "from record or Trace.load".
    """
    if isinstance(value, kind):
        return
    if isinstance(value, str):
        got = f"the text {value!r}: load it first, with {kind.__name__}.load"
    else:
        got = f"a {type(value).__name__}"
    raise InvalidArgument(f"{name} must be a {kind.__name__}, {way}; got {got}")


def _as_share(value: object) -> str:
    """An addition to the message for somebody who wrote 5, "5%" or "0.05" for a share."""
    text: Any = value
    if isinstance(value, str):
        text = value.strip().removesuffix("%").strip()
    try:
        number = float(text)
    except (TypeError, ValueError, OverflowError):
        return ""
    if isinstance(value, bool):
        return ""
    if isinstance(value, str) and not value.strip().endswith("%") and 0 < number < 1:
        return f" (a text, not the number {number:g})"
    is_percentage = 1 < number < 100 or (isinstance(value, str) and 0 < number < 100)
    if is_percentage:
        return f" ({number:g} % is {number / 100:g})"
    return ""


def percentage(share: float) -> str:
    """Write a share as a percentage, with all its digits.

    >>> percentage(0.95), percentage(0.001), percentage(0.9999)
    ('95 %', '0.1 %', '99.99 %')
    """
    text = f"{100 * share:.12g}"
    is_rounded = text in ("0", "100") and share not in (0, 1)
    if is_rounded:  # a promise of 99.9999999999999 % is not one of 100 %
        text = f"{(100 * Decimal(repr(share))).normalize()}"
    return f"{text} %"


def arguments_of(texts: Sequence[str] | None, told: str = "--with") -> dict[str, Any]:
    """Read NAME=VALUE texts as arguments. Numbers, true, false, null and lists are read as JSON or
    as Python writes them (`.5`, `True`, `None`), anything else as text.

    Args:
        texts: the texts; None for none.
        told: the option that they come from, for messages.

    Raises:
        InvalidArgument: a text is not NAME=VALUE.

    >>> arguments_of(["epochs=5", "weights=[1, 0.3]", "norm=frozen"])
    {'epochs': 5, 'weights': [1, 0.3], 'norm': 'frozen'}
    """
    arguments: dict[str, Any] = {}
    for name, value in pairs(texts, told).items():
        if not name.isidentifier():
            raise InvalidArgument(f"{told} must be NAME=VALUE, got {name}=...")
        arguments[name] = _value(value)
    return arguments


def _value(text: str) -> Any:
    """The value that a text writes."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    if DECIMAL.fullmatch(text):
        return float(text)
    return PYTHON_WORDS.get(text, text)


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """Read NAME=VALUE texts as a mapping.

    Args:
        texts: the texts; None for none.
        option: the option that they come from, for messages.

    Raises:
        InvalidArgument: a text is not NAME=VALUE, or a name is repeated.
    """
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in pairs:
            raise InvalidArgument(f"{option} must be NAME=VALUE with each name once, got {text!r}")
        pairs[name] = value
    return pairs


def words(text: str | None) -> list[str] | None:
    """Split `A,B` into names; None for None."""
    if text is None:
        return None
    return [word.strip() for word in text.split(",")]


def name_of(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a text such as `offramp:msdnet_even?blocks=5&classes=10` into a name and its arguments.
    Raises InvalidArgument for an argument that is not NAME=VALUE.

    >>> name_of("strided?width=64")
    ('strided', {'width': 64})
    """
    name, mark, arguments = spec.partition("?")
    if not mark:
        return name, {}
    return name, arguments_of(arguments.split("&"), f"{name}?")
