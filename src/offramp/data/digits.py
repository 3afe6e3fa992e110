"""scikit-learn's 1,797 handwritten digits, which come with it: uint8 [1, 8, 8] with values 0 to
16.
"""

from __future__ import annotations

import numpy as np

from offramp.data._sources import arrays
from offramp.data.rows import Rows
from offramp.errors import BadData, MissingExtra


def load(path: str, split: str) -> Rows:
    """The one set there is: no place, no split. The values stay 0 to 16 as they are."""
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
    images = bunch.images.astype(np.uint8)[:, None]
    return Rows(arrays(images, bunch.target), name="digits", class_names=tuple("0123456789"))
