"""A scikit-learn estimator, or anything with its `predict_proba` or `decision_function`, as a
member of a ladder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.errors import BadNetwork, InvalidArgument
from offramp.members._identity import identity_of
from offramp.members._member import Array, Member

__all__ = ["Estimator"]

METHODS = ("predict_proba", "decision_function")


class Estimator(Member):
    """A fitted classifier as a member.

    The logits are the logarithm of `predict_proba` [B, C]. If the estimator has no such method,
    they are its `decision_function`; for two classes this is d [B], and the logits are (-d/2, d/2).
    The estimator is copied, so fitting the original again changes nothing here.

    Args:
        model: the fitted estimator.
        classes: the labels in the order of the other members' classes, unless they are 0 to C-1. A
            label that the estimator has never seen gets probability 0.
        flatten: pass rows as vectors [B, F], as scikit-learn needs them.
        identity: a name and version that identify its computation. By default this is a digest of
            its parameters and of its fitted values.

    Raises:
        InvalidArgument: it has neither method, is not fitted, has other labels than 0 to C-1, or
            cannot be hashed.

    Example:
        >>> import torch
        >>> from sklearn.linear_model import LogisticRegression
        >>> model = LogisticRegression().fit([[0.0], [1.0], [2.0]], [0, 1, 1])
        >>> Estimator(model)(torch.tensor([[5.0]])).argmax(1).tolist()
        [1]
    """

    def __init__(
        self,
        model: Any,
        *,
        classes: Sequence[Any] | None = None,
        flatten: bool = True,
        identity: str | None = None,
    ) -> None:
        kind = f"a scikit-learn estimator ({type(model).__name__})"
        available = [name for name in METHODS if hasattr(model, name)]
        if not available:
            raise InvalidArgument(
                f"{kind} must have predict_proba or decision_function, got neither"
            )
        method = available[0]
        known = getattr(model, "classes_", None)
        if known is None:
            raise InvalidArgument(f"{kind} must be fitted, got no classes_")
        columns = _columns(known, classes, kind)
        if method == "decision_function" and -1 in columns:
            raise InvalidArgument(
                f"classes must be those that {kind} has seen, because it has no probabilities, "
                f"got {classes}"
            )
        model = copy.deepcopy(model)  # so that fitting the original again changes nothing
        content = identity_of([model, method, columns, flatten], identity, kind)
        gives = "probabilities" if method == "predict_proba" else "logits"
        super().__init__(kind, content, gives)
        self._model = model
        self._method = method
        self._columns = columns
        self._flatten = flatten

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """Probabilities or decision values [B, C], in the order of `classes`."""
        if len(args) != 1 or kwargs:
            raise BadNetwork(f"{self.outside_torch} takes one input, got {len(args) + len(kwargs)}")
        rows = args[0]
        if self._flatten:
            rows = rows.reshape(len(rows), -1)  # [B, ...] -> [B, F]
        if not len(rows):
            return np.zeros((0, len(self._columns)), np.float32)
        values = np.asarray(getattr(self._model, self._method)(rows))
        if values.ndim == 1:  # decisions between two classes: [B] -> [B, 2]
            values = np.stack([-values / 2, values / 2], axis=1)
        # A last column of zeros, which index -1 picks for classes that it has never seen.
        zeros = np.zeros((len(values), 1), values.dtype)
        padded = np.concatenate([values, zeros], axis=1)  # [B, seen + 1]
        return padded[:, self._columns]  # [B, C]


def _columns(known: Any, classes: Sequence[Any] | None, kind: str) -> list[int]:
    """The column of each class in the estimator's values; -1 for a class that it has never seen."""
    labels = np.asarray(known).tolist()
    if classes is None:
        if labels != list(range(len(labels))):
            raise InvalidArgument(
                f"{kind} must have the classes 0 to C-1, got {labels[:10]}. Set their order with "
                "Estimator(model, classes=[...])"
            )
        return list(range(len(labels)))
    order = list(classes)
    for label in labels:
        if label not in order:
            raise InvalidArgument(
                f"classes must have every class of {kind}, got none for {label!r}"
            )
    columns = list[int]()
    for label in order:
        columns.append(labels.index(label) if label in labels else -1)
    return columns
