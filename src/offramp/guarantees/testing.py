"""Testing many plans at once, and the orders that nobody may choose.

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
    """How many leading plans are safe: the first `count` of the sequence, all with p <= delta.

    With probability >= 1 - delta every plan counted has a risk <= the level. Proof: the order was
    fixed before the rows were seen. Let s be the first plan whose true risk is above the level. A
    count that includes an unsafe plan includes s, so p[s] <= delta, and a valid p-value does that
    with probability <= delta. Nothing was asked of the other plans: neither that risk grows along
    the sequence, nor that rows are fresh for each.

    So a path of one shared threshold t, walked down from +inf on a grid that does not depend on the
    rows, may be tested on all rows: s is the largest t on the grid with R(t) > level. And a
    topology of plans found on search rows may be tested on rows that the search has not seen: given
    the search, the topology is fixed.

    A NaN p-value fails. Angelopoulos et al., 2021, arXiv 2110.01052. We return a count, where the
    code of Jazbec et al., 2024, arXiv 2405.20915 returns the index of the first plan that failed,
    which is unsafe.

    >>> fixed_sequence([0.01, 0.04, 0.20, 0.01], delta=0.05)
    2
    """
    if not 0.0 < delta < 1.0:
        raise InvalidArgument(
            f"got delta={delta}, expected a number between 0 and 1; give 1 - confidence"
        )
    p_P = np.asarray(p_values, dtype=np.float64)
    return int(np.logical_and.accumulate(p_P <= delta).sum())


def order_from(fingerprint: str | bytes, n: int) -> IndexArray:
    """A permutation of n rows, derived from the data's fingerprint.

    A betting bound depends on the order of the rows, which must not be chosen after a look at the
    result. So it is nobody's argument: same data, same order, on every machine and numpy (the raw
    stream of a numpy bit generator is frozen, the shuffling methods on top of it are not).
    """
    return _shuffled(b"order", fingerprint, n)


def split_from(fingerprint: str | bytes, n: int, share: float) -> tuple[IndexArray, IndexArray]:
    """Search rows (about `share` of n) and certify rows: disjoint, sorted, both non-empty.

    Derived from the data's fingerprint as `order_from` is, by another stream: which rows are
    searched tells nothing about the order in which the others are bet on.
    """
    if n < 2 or not 0.0 < share < 1.0:
        raise InvalidArgument(
            f"got {n} rows and a search share of {share}, expected at least 2 rows and a share "
            f"between 0 and 1; "
            "give more rows or another share"
        )
    shuffled = _shuffled(b"split", fingerprint, n)
    cut = min(max(round(share * n), 1), n - 1)
    return np.sort(shuffled[:cut]), np.sort(shuffled[cut:])


def _shuffled(stream: bytes, fingerprint: str | bytes, n: int) -> IndexArray:
    if n < 0:
        raise InvalidArgument(f"got {n} rows, expected 0 or more; give the number of rows")
    data = fingerprint.encode() if isinstance(fingerprint, str) else fingerprint
    digest = hashlib.sha256(b"offramp/" + stream + b"/" + data).digest()
    words: Any = np.frombuffer(digest, dtype="<u4").tolist()
    keys = np.random.PCG64(np.random.SeedSequence(words)).random_raw(n)
    return np.argsort(keys, kind="stable")
