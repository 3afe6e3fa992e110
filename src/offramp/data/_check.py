"""What x and y may be, and what identifies a row.

n rows; x is one array [n, ...] or a dict of named arrays [n, ...]; y is int64 [n] or None.
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
    """A numpy array, a torch tensor (torch is asked only where it is loaded already), a DataFrame
    or a Series.
    """
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(value, torch.Tensor)
    return isinstance(value, np.ndarray) or tensor or is_frame(value)


def to_numpy(value: object, what: str) -> Array:
    """A numpy array or torch tensor as a numeric array in native byte order; BadData for anything
    else.
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
            array = tensor.detach().cpu().numpy()
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
    """An array, tensor or dict of either as x; every array has the same number of rows, which are
    not empty.
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
    """Inputs and labels of rows: `label` or `labels` in a mapping of inputs, in any case of
    letters, is the label.

    Raises BadData where a mapping holds nothing else, and where labels come twice and differ.
    """
    if isinstance(value, Mapping):
        names = [name for name in value if is_label(name)]
    else:
        names = []
    if not names:
        return value, labels
    assert isinstance(value, Mapping)
    inputs = {name: part for name, part in value.items() if name not in names}
    if not inputs:
        raise BadData(
            f"{what} holds {', '.join(names)} and no input. {', '.join(names)} is taken as the "
            f"label."
        )
    for name in names:
        given = value[name]
        if labels is not None and given is not None and not _equal(labels, given):
            raise BadData(
                f"{what} has labels twice, and those under {name!r} differ from the others. Give "
                f"them once."
            )
        labels = given if labels is None else labels
    return inputs, labels


def _equal(one: object, other: object) -> bool:
    """Whether two labels, or arrays of them, hold the same values."""
    mine, its = (
        to_numpy(each, "a label") if is_array(each) else np.asarray(each) for each in (one, other)
    )
    return mine.shape == its.shape and bool((mine == its).all())


def _field(value: object, what: str) -> Array:
    array = to_numpy(value, what)
    if array.ndim == 0 or 0 in array.shape[1:]:
        raise BadData(
            f"{what} has shape {list(array.shape)}; expected [rows, ...] with no empty axis: "
            f"reshape it"
        )
    return array


def to_labels(value: object, rows: Sequence[int] | Ints, what: str) -> Ints | None:
    """Labels as int64 [n], n = len(rows); None stays None. BadData names the offending `rows`."""
    if value is None:
        return None
    y = to_numpy(listed(value, what), what)
    if y.shape == (len(rows), 1):
        y = y[:, 0]
    if y.shape != (len(rows),):
        expected = f"expected one class index per row, [{len(rows)}]"
        verb = "have" if what.endswith("labels") else "has"
        raise BadData(
            f"{what} {verb} the shape {list(y.shape)}; {expected}: {labels_advice(y, len(rows))}"
        )
    if y.dtype.kind == "f":
        whole = np.isfinite(y) & (np.floor(y) == y) & (np.abs(y) < 2**53)
    elif y.dtype.kind == "u":
        whole = y <= np.iinfo(np.int64).max
    else:
        whole = np.ones(len(y), dtype=bool)
    wrong = ~whole | (y < 0)
    if wrong.any():
        raise BadData(
            f"{what} holds {y[wrong][0]} at {name_rows(np.asarray(rows)[wrong])}; "
            "expected integers of at least 0: mend or drop these rows"
        )
    return y.astype(np.int64)


def name_rows(rows: Array) -> str:
    """`row 3`, or `rows 3, 5, 8 and 4 more`."""
    shown = ", ".join(str(row) for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def count(x: X) -> int:
    """The number of rows of x."""
    return len(next(iter(x.values()))) if isinstance(x, dict) else len(x)


def pick(x: X, index: Ints | slice) -> X:
    """Rows of x by position."""
    if isinstance(x, dict):
        return {name: part[index] for name, part in x.items()}
    return x[index]


def join(parts: Sequence[X]) -> X:
    """x of equal layout, one after the other."""
    if len(parts) == 1:
        return parts[0]
    named = [part for part in parts if isinstance(part, dict)]
    if named:
        return {name: np.concatenate([part[name] for part in named]) for name in named[0]}
    return np.concatenate([part for part in parts if not isinstance(part, dict)])


def layout(x: X) -> Layout:
    """Name -> (dtype, shape of one row); a plain array has the name ''."""
    fields = x if isinstance(x, dict) else {"": x}
    return {name: (str(part.dtype), part.shape[1:]) for name, part in sorted(fields.items())}


def same_layout(expected: Layout, got: Layout, where: str) -> None:
    """Raise BadData when a row or batch differs in names, dtype or shape from those before it."""
    if expected != got:
        raise BadData(
            f"{where} is {_tell(got)}, the rows before are {_tell(expected)}; "
            "every row must have one type and shape: resize, pad or cast them alike"
        )


def _tell(fields: Layout) -> str:
    told = [
        f"{f'{name}: ' if name else ''}{dtype} {list(shape)}"
        for name, (dtype, shape) in fields.items()
    ]
    return ", ".join(told)


def brief(problem: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}".rstrip(": ")


@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Turn whatever goes wrong while reading `path` into BadFile; damaged files fail anywhere in a
    decoder.

    A device, a pipe or a socket is refused before anything waits for it, or reads it for ever.
    """
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
        # of Rust, no Exception
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        raise BadFile(
            f"{path} cannot be read as {expected} ({brief(problem)}); it is truncated, damaged or "
            f"of another kind: "
            "fetch or make it again"
        ) from problem
