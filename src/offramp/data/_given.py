"""What people hand over as arrays: data frames, lists of labels; and advice for labels of another
shape.

Data frames are known by their method `to_numpy` alone (pandas, polars): none of these libraries is
imported.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from offramp._support.files import Array
from offramp.errors import BadData

LABEL_COLUMNS = (
    "label",
    "labels",
    "target",
)  # in a data frame of inputs they would give the answer away


def is_frame(value: object) -> bool:
    """A DataFrame or a Series, of whatever library."""
    return (
        callable(getattr(value, "to_numpy", None))
        and hasattr(value, "shape")
        and not isinstance(value, type)
    )


def of_frame(value: object, what: str) -> Array:
    """A Series as an array [n], a DataFrame as [n, columns]. Raises BadData for columns that are no
    numbers.
    """
    frame: Any = value
    if not hasattr(frame, "columns"):
        return _numbers(np.asarray(frame.to_numpy()), what)
    names = [str(name) for name in frame.columns]
    if leaks := [name for name in names if name.lower() in LABEL_COLUMNS]:
        raise BadData(
            f"{what} is a DataFrame with the column {leaks[0]!r}; expected inputs alone: hand over "
            f"(df.drop(columns={leaks[0]!r}), df[{leaks[0]!r}])"
        )
    if len(set(names)) < len(names):
        return np.asarray(frame.to_numpy())
    # column by column: pandas makes objects of booleans beside numbers
    columns = [np.asarray(frame[name].to_numpy()) for name in frame.columns]
    wrong = [
        name for name, column in zip(names, columns, strict=True) if column.dtype.kind not in "biuf"
    ]
    if wrong:
        raise BadData(
            f"{what} is a DataFrame whose columns {wrong} are no numbers; encode them as numbers, "
            f"or drop them"
        )
    if not columns:
        raise BadData(f"{what} is a DataFrame without columns; expected columns of numbers")
    return np.column_stack(columns)


def _numbers(array: Array, what: str) -> Array:
    """The same; a nullable Series of numbers comes as objects."""
    if array.dtype.kind != "O" or not all(
        isinstance(one, (bool, int, float, np.number)) for one in array
    ):
        return array
    try:
        return np.array(array.tolist())
    except ValueError as problem:
        raise BadData(f"{what} holds {problem}; expected numbers") from problem


def listed(value: object, what: str) -> object:
    """Labels as they came; a list or tuple of numbers, or of tensors of one number, as an array.

    Raises BadData for strings, which nobody but the user can number.
    """
    found = value
    if isinstance(value, (list, tuple)):
        found = _of_list(value, what)
    array = np.asarray(found.to_numpy()) if is_frame(found) else found  # type: ignore[attr-defined]
    if isinstance(array, np.ndarray) and array.size and array.dtype.kind in "USOT":
        first = array.reshape(-1)[0]
        if isinstance(first, str):
            raise BadData(
                f"{what} have the dtype of text, such as {str(first)!r}; expected class numbers "
                f"of at least 0: number "
                "them by one list of names for all your rows, [names.index(label) for label in "
                "labels]"
            )
    return found


def _of_list(values: list[Any] | tuple[Any, ...], what: str) -> Array:
    """Numbers and texts as they are, arrays and tensors of one number as that number."""
    plain = []
    for number, value in enumerate(values):
        single = value
        if hasattr(value, "item") and hasattr(value, "shape"):
            if math.prod(value.shape) != 1:
                shape = list(value.shape)
                raise BadData(
                    f"{what} are a list with {shape} at place {number}; expected one class index "
                    f"per row"
                )
            single = value.item()
        if not isinstance(single, (bool, int, float, str)):
            kind = type(value).__name__
            raise BadData(
                f"{what} are a list with a {kind} at place {number}; expected one class index per "
                f"row"
            )
        plain.append(single)
    return np.array(plain)


def labels_advice(y: Array, rows: int) -> str:
    """What to do about labels that are not [rows]."""
    if y.shape == (1, rows):
        return "hand over y[0]"
    if y.ndim == 0 or len(y) != rows:
        count = "one" if y.ndim == 0 else f"{len(y)}"
        return f"there are {count} for {rows} rows: hand over those of the same rows"
    columns = y.reshape(rows, -1)
    marks = np.count_nonzero(columns, axis=1)
    if y.ndim == 2 and (marks == 1).all() and set(np.unique(columns).tolist()) <= {0, 1}:
        return "these are one-hot, take y.argmax(1)"
    if y.ndim == 2 and y.dtype.kind == "f" and np.allclose(columns.sum(1), 1):
        return "these are probabilities, take the class that each row is of"
    return "choose one column; several inputs go into a dict of named arrays, not into (x, y)"
