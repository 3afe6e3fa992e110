"""Testing many plans at once, and orders of rows that nobody may choose.

Shapes: P plans, N rows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgument

IndexArray = npt.NDArray[np.intp]


def fixed_sequence(p_values: npt.ArrayLike, delta: float) -> int:
    """Count the leading plans that pass: the first plans of the sequence, all with p <= delta.

    With probability >= 1 - delta every plan counted has a risk <= the level. Proof: the order was
    fixed before the rows were seen. Let s be the first plan whose true risk is above the level. A
    count that includes an unsafe plan includes s, so p[s] <= delta, and a valid p-value does that
    with probability <= delta. The proof assumes nothing about the other plans: neither that risk
    grows along the sequence, nor that rows are fresh for each.

    So a path of one shared threshold t, walked down from +inf on a grid that does not depend on the
    rows, may be tested on all rows: s is the largest t on the grid with R(t) > level. And a
    sequence of plans found on search rows may be tested on rows that the search has not seen: given
    the search, the sequence is fixed.

    Angelopoulos et al., 2021, arXiv 2110.01052. We return a count. The code of Jazbec et al., 2024,
    arXiv 2405.20915 returns the index of the first plan that failed, which is unsafe.

    Args:
        p_values: one per plan, in the order of the sequence. NaN fails.
        delta: 1 - confidence, above 0 and below 1.

    Returns:
        How many plans pass.

    Raises:
        InvalidArgument: `delta` is not between 0 and 1.

    Example:
        >>> fixed_sequence([0.01, 0.04, 0.20, 0.01], delta=0.05)
        2
    """
    if not 0.0 < delta < 1.0:
        raise InvalidArgument(
            f"delta must be above 0 and below 1, got {delta}. It is 1 - confidence."
        )
    # a plan passes if it and all plans before it have p <= delta
    p_P = np.asarray(p_values, dtype=np.float64)
    return int(np.logical_and.accumulate(p_P <= delta).sum())


def order_from(fingerprint: str | bytes, n: int) -> IndexArray:
    """A permutation of n rows, derived from the data's fingerprint.

    A betting bound depends on the order of the rows, which must not be chosen after a look at the
    result. So it is not an argument: the same data has the same order, on every machine and with
    every NumPy. (NumPy guarantees the raw stream of a bit generator, and not the shuffling methods
    on top of it.)

    Args:
        fingerprint: of the data.
        n: how many rows.

    Returns:
        The permutation [n].
    """
    return _shuffled(b"order", fingerprint, n)


def split_from(fingerprint: str | bytes, n: int, share: float) -> tuple[IndexArray, IndexArray]:
    """Split n rows into search rows and certify rows: disjoint, sorted, both non-empty.

    Derived from the data's fingerprint as in `order_from`, by another stream: the choice of search
    rows tells nothing about the order in which the others are bet on.

    Args:
        fingerprint: of the data.
        n: how many rows, at least 2.
        share: the share of search rows, about; above 0 and below 1.

    Returns:
        Numbers of the search rows and of the certify rows.

    Raises:
        InvalidArgument: there are too few rows, or the share is not between 0 and 1.
    """
    if n < 2:
        raise InvalidArgument(f"a split into search rows and others needs 2 rows, got {n}")
    if not 0.0 < share < 1.0:
        raise InvalidArgument(f"the search share must be above 0 and below 1, got {share}")
    shuffled = _shuffled(b"split", fingerprint, n)
    # at least one row on either side
    cut = min(max(round(share * n), 1), n - 1)
    return np.sort(shuffled[:cut]), np.sort(shuffled[cut:])


def _shuffled(stream: bytes, fingerprint: str | bytes, n: int) -> IndexArray:
    """A permutation of n rows from a fingerprint; each stream gives another one."""
    if n < 0:
        raise InvalidArgument(f"the number of rows must be at least 0, got {n} rows")
    data = fingerprint
    if isinstance(data, str):
        data = data.encode()
    # Rows sorted by random keys, from a generator that is seeded by the fingerprint.
    digest = hashlib.sha256(b"offramp/" + stream + b"/" + data).digest()
    words: Any = np.frombuffer(digest, dtype="<u4").tolist()
    keys = np.random.PCG64(np.random.SeedSequence(words)).random_raw(n)
    return np.argsort(keys, kind="stable")
