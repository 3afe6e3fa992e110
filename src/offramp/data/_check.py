"""Checks the inputs x and the labels y of rows, and converts them to numpy arrays.

n is the number of rows. x is one array [n, ...] or a dict of named arrays [n, ...]. y is int64 [n]
or None.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp._support.files import Array
from offramp.data._given import is_frame, labels_advice, listed, of_frame
from offramp.errors import BadData, BadFile, OfframpError
from offramp.plans.signature import is_label

Ints: TypeAlias = NDArray[np.int64]
X: TypeAlias = Array | dict[str, Array]
Layout: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]


def is_array(value: object) -> bool:
    """Whether a value is a numpy array, a torch tensor, a DataFrame or a Series."""
    # If torch is not loaded, then the value is not a tensor.
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(value, torch.Tensor)
    return isinstance(value, np.ndarray) or tensor or is_frame(value)


def to_numpy(value: object, what: str) -> Array:
    """Convert an array, tensor or data frame to a numeric array in native byte order.

    Args:
        value: to convert.
        what: its name in messages.

    Raises:
        BadData: it is something else, or does not hold numbers.
    """
    if not is_array(value):
        raise BadData(
            f"{what} is a {type(value).__name__}; expected a numpy array or a torch tensor: "
            f"convert it"
        )
    if is_frame(value):
        array: Array = of_frame(value, what)
    elif isinstance(value, np.ndarray):
        array = np.asarray(value)
    else:
        tensor: Any = value
        try:
            array = tensor.detach().cpu().numpy()  # fails for bfloat16 and for sparse tensors
        except (TypeError, RuntimeError) as problem:
            raise BadData(
                f"{what} is a {tensor.dtype} tensor that numpy cannot hold ({brief(problem)}); "
                "hand over a dense tensor of another type, x.float() for instance"
            ) from problem
    if array.dtype.kind not in "biuf":
        raise BadData(
            f"{what} has dtype {array.dtype}; expected booleans, integers or floats: convert it"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def to_x(value: object, what: str) -> X:
    """Convert an array or tensor, or a dict of them, to x.

    Args:
        value: to convert.
        what: its name in messages.

    Raises:
        BadData: an array has no rows or empty ones, or numbers of rows differ.
    """
    if not isinstance(value, Mapping):
        return _field(value, what)
    if not value or not all(isinstance(name, str) for name in value):
        raise BadData(
            f"{what} is a dict without names for its arrays; expected names to arrays: name each "
            f"array"
        )
    x = {name: _field(part, f"{what}[{name!r}]") for name, part in value.items()}
    counts = {name: len(part) for name, part in x.items()}
    if len(set(counts.values())) > 1:
        raise BadData(
            f"{what} has arrays of different lengths {counts}; expected one row count: cut them "
            f"to match"
        )
    return x


def parted(value: object, labels: object, what: str) -> tuple[object, object]:
    """Separate the inputs of rows from their labels.

    `label` or `labels` in a mapping of inputs, in any case of letters, is the label.

    Args:
        value: the inputs, perhaps with labels among them.
        labels: the labels, if they are separate; else None.
        what: the name of the inputs in messages.

    Returns:
        The inputs without labels, and the labels.

    Raises:
        BadData: a mapping holds only labels, or there are labels twice and they differ.
    """
    if not isinstance(value, Mapping):
        return value, labels
    names = [name for name in value if is_label(name)]
    if not names:
        return value, labels
    inputs = dict(value)
    for name in names:
        del inputs[name]
    if not inputs:
        raise BadData(
            f"{what} holds {', '.join(names)} and no input. {', '.join(names)} is taken as the "
            f"label."
        )
    # The same labels may be there twice, for example in a mapping and next to it.
    for name in names:
        inner = value[name]
        if labels is not None and inner is not None and not _equal(labels, inner):
            raise BadData(
                f"{what} has labels twice, and those under {name!r} differ from the others. Give "
                f"them once."
            )
        if labels is None:
            labels = inner
    return inputs, labels


def _equal(one: object, other: object) -> bool:
    """Whether two labels, or arrays of them, hold the same values."""
    first = _label_array(one)
    second = _label_array(other)
    return first.shape == second.shape and bool((first == second).all())


def _label_array(value: object) -> Array:
    if is_array(value):
        return to_numpy(value, "a label")
    return np.asarray(value)


def _field(value: object, what: str) -> Array:
    """One array [n, ...] of x. Raises BadData if it has no rows or empty ones."""
    array = to_numpy(value, what)
    if array.ndim == 0 or 0 in array.shape[1:]:
        raise BadData(
            f"{what} has shape {list(array.shape)}; expected [rows, ...] with no empty axis: "
            f"reshape it"
        )
    return array


def to_labels(value: object, rows: Sequence[int] | Ints, what: str) -> Ints | None:
    """Convert labels to int64 [n].

    Args:
        value: labels [n] or [n, 1]; None stays None.
        rows: numbers of the n rows, for messages.
        what: their name in messages.

    Raises:
        BadData: there is not one integer of at least 0 for each row; the message names the rows.
    """
    if value is None:
        return None
    y = to_numpy(listed(value, what), what)
    if y.shape == (len(rows), 1):
        y = y[:, 0]  # [n, 1] -> [n]
    if y.shape != (len(rows),):
        expected = f"expected one class index per row, [{len(rows)}]"
        verb = "have" if what.endswith("labels") else "has"
        raise BadData(
            f"{what} {verb} the shape {list(y.shape)}; {expected}: {labels_advice(y, len(rows))}"
        )
    if y.dtype.kind == "f":
        # Above 2**53 a float no longer distinguishes neighbouring integers.
        is_integer = np.isfinite(y) & (np.floor(y) == y) & (np.abs(y) < 2**53)
    elif y.dtype.kind == "u":
        is_integer = y <= np.iinfo(np.int64).max
    else:
        is_integer = np.ones(len(y), dtype=bool)
    wrong = ~is_integer | (y < 0)
    if wrong.any():
        raise BadData(
            f"{what} holds {y[wrong][0]} at {name_rows(np.asarray(rows)[wrong])}; "
            "expected integers of at least 0: correct or drop these rows"
        )
    return y.astype(np.int64)


def name_rows(rows: Array) -> str:
    """Rows in words: `row 3`, or `rows 3, 5, 8 and 4 more`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(str(row) for row in rows[:3])
    if len(rows) <= 3:
        return f"rows {shown}"
    return f"rows {shown} and {len(rows) - 3} more"


def count(x: X) -> int:
    """The number of rows of x."""
    if isinstance(x, dict):
        return len(next(iter(x.values())))
    return len(x)


def pick(x: X, index: Ints | slice) -> X:
    """Rows of x by position."""
    if isinstance(x, dict):
        return {name: part[index] for name, part in x.items()}
    return x[index]


def join(parts: Sequence[X]) -> X:
    """Concatenate parts of equal layout along their rows."""
    if len(parts) == 1:
        return parts[0]
    # All parts have the same layout: either all are dicts of arrays, or all are arrays.
    by_name = dict[str, list[Array]]()
    plain = list[Array]()
    for part in parts:
        if not isinstance(part, dict):
            plain.append(part)
            continue
        for name, array in part.items():
            by_name.setdefault(name, []).append(array)
    if plain:
        return np.concatenate(plain)
    return {name: np.concatenate(arrays) for name, arrays in by_name.items()}


def layout(x: X) -> Layout:
    """The type and the shape of one row of each array, by name; a plain array has the name ''."""
    fields = x if isinstance(x, dict) else {"": x}
    result = Layout()
    for name, part in sorted(fields.items()):
        result[name] = (str(part.dtype), part.shape[1:])
    return result


def same_layout(expected: Layout, got: Layout, where: str) -> None:
    """Raise BadData if a row or batch has other names, types or shapes than those before it."""
    if expected != got:
        raise BadData(
            f"{where} is {_in_words(got)}, the rows before are {_in_words(expected)}; "
            "every row must have one type and shape: resize, pad or cast them"
        )


def _in_words(fields: Layout) -> str:
    """A layout in words: `x: float32 [3, 8, 8], mask: int64 [8]`."""
    texts = list[str]()
    for name, (dtype, shape) in fields.items():
        label = f"{name}: " if name else ""
        texts.append(f"{label}{dtype} {list(shape)}")
    return ", ".join(texts)


def brief(problem: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}".rstrip(": ")


@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """While it is open, turn every error into BadFile: damaged files fail anywhere in a decoder.

    A device, a pipe or a socket is refused at once, because reading it could wait for ever.

    Args:
        path: of the file.
        expected: what it should be, in messages.

    Raises:
        BadFile: the file is missing, damaged or of another kind.
    """
    # A path that does not exist, or is not valid, gets its message below.
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BadFile(
                f"{path} is a device, a pipe or a socket, expected {expected}; copy what it gives "
                f"to a file"
            )
    try:
        yield
    except OfframpError:
        raise
    except FileNotFoundError as problem:
        raise BadFile(f"{path} does not exist; expected {expected}: check the place") from problem
    except BaseException as problem:
        # A panic in a library written in Rust is not an Exception, but counts as one here.
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        raise BadFile(
            f"{path} cannot be read as {expected} ({brief(problem)}); it is truncated, damaged or "
            f"of another kind: "
            "fetch or make it again"
        ) from problem
