"""Converts data frames and lists of labels to arrays, and advises on labels of a wrong shape.

A data frame is recognised by its method `to_numpy` (pandas, polars), so neither library is
imported.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from offramp._support.files import Array
from offramp.errors import BadData

# Among the inputs, a column of this name would give the label away.
LABEL_COLUMNS = ("label", "labels", "target")


def is_frame(value: object) -> bool:
    """Whether a value is a DataFrame or a Series, of any library."""
    return (
        callable(getattr(value, "to_numpy", None))
        and hasattr(value, "shape")
        and not isinstance(value, type)
    )


def of_frame(value: object, what: str) -> Array:
    """Convert a Series to an array [n], or a DataFrame to [n, columns].

    Args:
        value: the Series or DataFrame.
        what: its name in messages.

    Raises:
        BadData: a column does not hold numbers, or is a label.
    """
    frame: Any = value
    if not hasattr(frame, "columns"):
        return _numbers(np.asarray(frame.to_numpy()), what)
    names = [str(name) for name in frame.columns]
    for name in names:
        if name.lower() in LABEL_COLUMNS:
            raise BadData(
                f"{what} is a DataFrame with the column {name!r}; expected inputs alone: hand over "
                f"(df.drop(columns={name!r}), df[{name!r}])"
            )
    # Two columns of one name can only be taken together.
    if len(set(names)) < len(names):
        return np.asarray(frame.to_numpy())
    # Column by column, because pandas makes objects of a frame with booleans and numbers.
    columns = list[Array]()
    wrong = list[str]()
    for name in frame.columns:
        column = np.asarray(frame[name].to_numpy())
        columns.append(column)
        if column.dtype.kind not in "biuf":
            wrong.append(str(name))
    if wrong:
        raise BadData(
            f"{what} is a DataFrame whose columns {wrong} are no numbers; encode them as numbers, "
            f"or drop them"
        )
    if not columns:
        raise BadData(f"{what} is a DataFrame without columns; expected columns of numbers")
    return np.column_stack(columns)  # [n, columns]


def _numbers(array: Array, what: str) -> Array:
    """An array of numbers. A nullable Series of numbers comes as an array of objects."""
    if array.dtype.kind != "O":
        return array
    if not all(isinstance(value, (bool, int, float, np.number)) for value in array):
        return array
    try:
        return np.array(array.tolist())
    except ValueError as problem:
        raise BadData(f"{what} holds {problem}; expected numbers") from problem


def listed(value: object, what: str) -> object:
    """Convert a list or tuple of labels to an array; other labels stay as they are.

    Args:
        value: the labels. Items of a list may be numbers, or tensors of one number.
        what: their name in messages.

    Raises:
        BadData: the labels are texts, which only the user can number.
    """
    labels: Any = value
    if isinstance(value, (list, tuple)):
        labels = _of_list(value, what)
    array = np.asarray(labels.to_numpy()) if is_frame(labels) else labels
    if isinstance(array, np.ndarray) and array.size and array.dtype.kind in "USOT":
        first = array.reshape(-1)[0]
        if isinstance(first, str):
            raise BadData(
                f"{what} have the dtype of text, such as {str(first)!r}; expected class numbers "
                f"of at least 0: number "
                "them by one list of names for all your rows, [names.index(label) for label in "
                "labels]"
            )
    return labels


def _of_list(values: list[Any] | tuple[Any, ...], what: str) -> Array:
    """The items as an array; arrays and tensors of one number become that number."""
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
    """Advise on labels that are not [rows].

    Args:
        y: the labels, of another shape.
        rows: the number of rows.

    Returns:
        What to do, as the last part of a message.
    """
    if y.shape == (1, rows):
        return "hand over y[0]"
    if y.ndim == 0 or len(y) != rows:
        count = "one" if y.ndim == 0 else str(len(y))
        return f"there are {count} for {rows} rows: hand over those of the same rows"
    columns = y.reshape(rows, -1)  # [n, ...] -> [n, columns]
    marks = np.count_nonzero(columns, axis=1)  # [n]
    if y.ndim == 2 and (marks == 1).all() and set(np.unique(columns).tolist()) <= {0, 1}:
        return "these are one-hot, take y.argmax(1)"
    if y.ndim == 2 and y.dtype.kind == "f" and np.allclose(columns.sum(1), 1):
        return "these are probabilities, take the class that each row is of"
    return "choose one column; several inputs go into a dict of named arrays, not into (x, y)"
