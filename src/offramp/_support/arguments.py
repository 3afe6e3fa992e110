"""Arguments as they are typed: `epochs=5` of a recipe, `strided?width=64` of an exit,
`offramp:alexnet?classes=100`.

And values: which numbers, counts, flags and objects are allowed, and how a share is printed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from offramp.errors import InvalidArgument

MOST = 2**31 - 1  # the largest count
LONGEST = 40  # characters of a value in a sentence


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
    """Check one number, and say in one sentence what it must be and what was got.

    Args:
        name: of the argument, as the caller wrote it.
        value: what was given; booleans, texts, NaN and infinities are no numbers.
        low: the smallest number that is allowed.
        high: the largest number that is allowed.
        above: a number that it must be above.
        below: a number that it must be below.
        hint: what to do, where that is not clear from the rest.

    Returns:
        The number.

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
    limits = _limits(low, high, above, below)
    if not is_number or not limits:
        joined = f"of {limits}" if limits.startswith("at ") else limits
        limits = f"a number {joined}".strip()
    is_share = below is not None and below <= 1
    meant = _as_share(value) if is_share or isinstance(value, str) else ""
    ending = f". {hint}" if hint else ""
    raise InvalidArgument(f"{name} must be {limits}, got {value!r}{meant}{ending}")


def _limits(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    """The limits in words: `between 0 and 1`, `at least 0 and below 1`, `above 0`."""
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    limits = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)


def _as_float(value: Any) -> float:
    """A number as Python's own: of NumPy's float32 0.05 this is 0.05 (its shortest text), and no
    zero is negative.
    """
    if type(value).__module__ == "numpy":
        return float(str(value)) + 0.0
    try:
        return float(value) + 0.0
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def require_confidence(value: object) -> float:
    """A confidence above 0 and below 1, also as 1 - confidence. Raises InvalidArgument."""
    confidence = require("confidence", value, above=0, below=1)
    if not 0 < 1 - confidence < 1:  # so close to 0 that 1 - confidence is 1
        raise InvalidArgument(f"confidence must be at least 1e-15 and below 1, got {value!r}")
    return confidence


def require_count(name: str, value: object, low: int = 1, high: int = MOST) -> int:
    """A whole number from `low` to `high`.

    Args:
        name: of the argument, for the sentence.
        value: what was handed over; booleans, texts and fractions are no counts, also not 1.0.
        low: the least.
        high: the most.

    Raises:
        InvalidArgument: it is no whole number, or not within the limits.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        count = int(value)
        if low <= count <= high:
            return count
    limits = f"of at least {low}" if high == MOST else f"from {low} to {high:,}"
    found = repr(value)
    shown = found if len(found) <= LONGEST else f"{found[:LONGEST]}..."
    raise InvalidArgument(f"{name} must be a whole number {limits}, got {shown}")


def require_flag(name: str, value: object) -> bool:
    """True or False, also NumPy's. Raises InvalidArgument for anything else: the text "no" would
    count as True.
    """
    if isinstance(value, bool) or (
        type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    ):
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
        name: of the argument, for the sentence.
        value: what was handed over.
        kind: the class that it must have.
        way: where one comes from, such as "from record or Trace.load".
    """
    if isinstance(value, kind):
        return
    if isinstance(value, str):
        got = f"the text {value!r}: load it first, with {kind.__name__}.load"
    else:
        got = f"a {type(value).__name__}"
    raise InvalidArgument(f"{name} must be a {kind.__name__}, {way}; got {got}")


def _as_share(value: object) -> str:
    """What somebody meant who wrote 5 or "5%" for a share."""
    text = value.strip().removesuffix("%").strip() if isinstance(value, str) else value
    try:
        number = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return ""
    if isinstance(value, str) and not value.strip().endswith("%") and 0 < number < 1:
        return f" (a text: give the number {number:g})"
    meant = 1 < number < 100 or (isinstance(value, str) and 0 < number < 100)
    if meant and not isinstance(value, bool):
        return f" ({number:g} % is {number / 100:g})"
    return ""


def percentage(share: float) -> str:
    """A share with all the digits that it has.

    >>> percentage(0.95), percentage(0.001), percentage(0.9999)
    ('95 %', '0.1 %', '99.99 %')
    """
    text = f"{100 * share:.12g}"
    if text in ("0", "100") and share not in (
        0,
        1,
    ):  # rounded, and a promise of 100 % is another one
        text = f"{(100 * Decimal(repr(share))).normalize()}"
    return f"{text} %"


def arguments_of(texts: Sequence[str] | None, told: str = "--with") -> dict[str, Any]:
    """NAME=VALUE texts as arguments: numbers, true, false, null and lists as in JSON, anything else
    as text.

    >>> arguments_of(["epochs=5", "weights=[1, 0.3]", "norm=frozen"])
    {'epochs': 5, 'weights': [1, 0.3], 'norm': 'frozen'}
    """
    arguments: dict[str, Any] = {}
    for name, value in pairs(texts, told).items():
        if not name.isidentifier():
            raise InvalidArgument(f"{told} must be NAME=VALUE, got {name}=...")
        try:
            arguments[name] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[name] = value
    return arguments


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping. Raises InvalidArgument."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in pairs:
            raise InvalidArgument(f"{option} must be NAME=VALUE with each name once, got {text!r}")
        pairs[name] = value
    return pairs


def words(text: str | None) -> list[str] | None:
    """The names in `A,B`."""
    return None if text is None else [word.strip() for word in text.split(",")]


def name_of(spec: str) -> tuple[str, dict[str, Any]]:
    """A name and its arguments: `offramp:msdnet_even?blocks=5&classes=10`. Raises InvalidArgument
    where one is no NAME=VALUE.

    >>> name_of("strided?width=64")
    ('strided', {'width': 64})
    """
    name, mark, behind = spec.partition("?")
    return name, arguments_of(behind.split("&"), f"{name}?") if mark else {}
