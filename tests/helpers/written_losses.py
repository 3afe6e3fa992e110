"""The losses of linear exits as their formulas say, a row at a time."""

from __future__ import annotations

import numpy as np


def loss_of(name, s, y):
    """The losses as the formulas say, a row at a time."""
    total = 0.0
    for row, label in zip(s, y, strict=True):
        others = [c for c in range(len(row)) if c != label]
        if name == "one_vs_rest":
            total += max(0, 1 - row[label]) + sum(max(0, 1 + row[c]) for c in others)
        elif name == "crammer_singer":
            total += max(0, 1 + max(row[c] for c in others) - row[label])
        else:
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
    return total / len(y)
