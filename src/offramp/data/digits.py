"""Reads scikit-learn's 1,797 handwritten digits: uint8 [1, 8, 8] with values 0 to 16."""

from __future__ import annotations

import numpy as np

from offramp.data._sources import arrays
from offramp.data.rows import Rows
from offramp.errors import BadData, MissingExtra


def load(path: str, split: str) -> Rows:
    """Read the digits, which have neither a place nor a split.

    Args:
        path: must be "".
        split: must be "".

    Raises:
        BadData: there is a place or a split.
        MissingExtra: scikit-learn is not installed.
    """
    if path or split:
        raise BadData(
            f"digits got {path or split!r}; expected no place and no split: write digits or "
            f"digits[a:b]"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        raise MissingExtra("scikit-learn", "demo", "the digits") from problem
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]  # [n, 8, 8] -> [n, 1, 8, 8]
    return Rows(arrays(images, bunch.target), name="digits", class_names=tuple("0123456789"))
