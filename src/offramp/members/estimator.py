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
    """A fitted classifier: the logarithm of `predict_proba` [B, C], or else `decision_function` as
    logits.

    The estimator is copied, so that fitting the original again changes nothing here. A
    `decision_function` of two classes, [B], becomes logits (-d/2, d/2).

    Args:
        model: the fitted estimator.
        classes: the labels in the order of the other members' classes, where they are others than 0
            to C-1; a label that the estimator has never seen gets probability 0.
        flatten: give it rows as vectors [B, F], as scikit-learn wants them.
        identity: a name and version that stand for what it computes; by default a digest of its
            parameters and of what was fitted.

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
        method = next((name for name in METHODS if hasattr(model, name)), None)
        if method is None:
            raise InvalidArgument(
                f"{kind} must have predict_proba or decision_function, got neither"
            )
        known = getattr(model, "classes_", None)
        if known is None:
            raise InvalidArgument(f"{kind} must be fitted, got no classes_")
        columns = _columns(known, classes, kind)
        if method == "decision_function" and -1 in columns:
            raise InvalidArgument(
                f"{kind} has no probabilities, so classes must be those that it has seen, got "
                f"{classes}"
            )
        model = copy.deepcopy(model)
        content = identity_of([model, method, columns, flatten], identity, kind)
        super().__init__(kind, content, "probabilities" if method == "predict_proba" else "logits")
        self._model = model
        self._method = method
        self._columns = columns
        self._flatten = flatten

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """Probabilities or decision values [B, C], in the order of the classes."""
        if len(args) != 1 or kwargs:
            raise BadNetwork(f"{self.outside_torch} takes one input, got {len(args) + len(kwargs)}")
        rows = args[0]
        if self._flatten:
            rows = rows.reshape(len(rows), -1)  # [B, F]
        if not len(rows):
            return np.zeros((0, len(self._columns)), np.float32)
        found = np.asarray(getattr(self._model, self._method)(rows))
        if found.ndim == 1:  # the decision of two classes
            found = np.stack([-found / 2, found / 2], axis=1)
        # column -1: never seen
        padded = np.concatenate([found, np.zeros((len(found), 1), found.dtype)], axis=1)
        return padded[:, self._columns]


def _columns(known: Any, classes: Sequence[Any] | None, kind: str) -> list[int]:
    """The column of each class in what the estimator gives; -1 for one that it has never seen."""
    labels = np.asarray(known).tolist()
    if classes is None:
        if labels != list(range(len(labels))):
            raise InvalidArgument(
                f"{kind} must have the classes 0 to C-1, got {labels[:10]}; give their order with "
                "Estimator(model, classes=[...])"
            )
        return list(range(len(labels)))
    order = list(classes)
    if missing := [label for label in labels if label not in order]:
        raise InvalidArgument(
            f"classes must hold every class of {kind}, got none for {missing[0]!r}"
        )
    return [labels.index(label) if label in labels else -1 for label in order]
