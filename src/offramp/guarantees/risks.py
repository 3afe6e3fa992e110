"""Risks: the loss of an early answer, for each row and exit.

Shapes: N rows, E exits, C classes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from offramp.errors import BadData, InvalidArgument, UnknownName

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Risk:
    """A loss for each row and exit, and the range that the bounds rely on.

    Args:
        name: the name in a promise.
        low: no loss is below this.
        high: no loss is above this.
        needs_labels: whether the losses need labels.
        zero_at_reference: whether the losses of the reference are 0 by construction.
        losses: a function of (answers [N, E], labels [N] or None, index of the reference) that
            gives losses [N, E]. With reads="outputs" the first argument is the logits [N, E, C] in
            float32.
        reads: "answers" or "outputs".
        values: the only values of a loss, if there are few; None for any value in the range.

    Raises:
        InvalidArgument: the range is empty, `reads` is neither word, or a value is outside the
            range.

    Example:
        `Risk("brier", 0.0, 2.0, True, False, my_brier, reads="outputs")`; examples/own_risk.py runs
        one.
    """

    name: str
    low: float
    high: float
    needs_labels: bool
    zero_at_reference: bool
    losses: Callable[..., Any]
    reads: Literal["answers", "outputs"] = "answers"
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InvalidArgument(
                f"low and high of the risk {self.name!r} must be two finite numbers, the lower "
                f"first, got {self.low} and {self.high}. They are the smallest and the largest "
                f"loss that a row can have."
            )
        if self.reads not in ("answers", "outputs"):
            raise InvalidArgument(
                f"reads of the risk {self.name!r} must be 'answers' or 'outputs', got "
                f"{self.reads!r}"
            )
        for value in self.values or ():
            if not self.low <= value <= self.high:
                raise InvalidArgument(
                    f"values of the risk {self.name!r} must be between {self.low} and {self.high}, "
                    f"got {value}"
                )

    @property
    def binary(self) -> bool:
        """Whether a loss can only be 0 or 1. Then the exact bound can be used."""
        return self.values is not None and set(self.values) <= {0.0, 1.0}


def disagreement(answers: IntArray, labels: IntArray | None, reference: int) -> FloatArray:
    """1 where the answers of an exit and the reference differ. It does not need labels.

    "Consistency" in Jazbec et al., 2024, arXiv 2405.20915. It is never below the accuracy gap, row
    by row, so a promise on disagreement is one on accuracy too.
    """
    return np.not_equal(answers, answers[:, [reference]]).astype(np.float64)


def accuracy_gap(answers: IntArray, labels: IntArray | None, reference: int) -> FloatArray:
    """1{wrong} - 1{reference wrong}: 1 made worse, -1 made better, 0 otherwise.

    "Performance gap" in Jazbec et al., 2024, arXiv 2405.20915. We keep the sign, and their
    Learn-then-Test clips it at 0. So here a row made better makes up for a row made worse.
    """
    wrong_NE = error(answers, labels, reference, name="accuracy_gap")
    return wrong_NE - wrong_NE[:, [reference]]  # [N, E] - [N, 1]


def error(
    answers: IntArray, labels: IntArray | None, reference: int, *, name: str = "error"
) -> FloatArray:
    """1 where the answer of an exit is wrong. The reference does not matter."""
    if labels is None:
        raise _no_labels(name)
    return np.not_equal(answers, labels[:, None]).astype(np.float64)


NAMED = (
    Risk("disagreement", 0.0, 1.0, False, True, disagreement, values=(0.0, 1.0)),
    Risk("accuracy_gap", -1.0, 1.0, True, True, accuracy_gap, values=(-1.0, 0.0, 1.0)),
    Risk("error", 0.0, 1.0, True, False, error, values=(0.0, 1.0)),
)


def find_risk(risk: str | Risk | Callable[..., Any]) -> Risk:
    """The `Risk` of a name.

    Args:
        risk: a name, the function of a named risk, or a Risk, which is returned.

    Returns:
        The risk.

    Raises:
        UnknownName: there is no risk of this name.
        InvalidArgument: it is another function, or something different.
    """
    if isinstance(risk, Risk):
        return risk
    # `risk=disagreement` works as well as `risk="disagreement"`
    for known in NAMED:
        if risk == known.name or risk is known.losses:
            return known
    names = [known.name for known in NAMED]
    if isinstance(risk, str):
        near = difflib.get_close_matches(risk, names, n=1, cutoff=0.4)
        if near:
            hint = f"did you mean {near[0]!r}?"
        else:
            hint = "use one of these, or build a Risk of your own"
        raise UnknownName(f"risk must be one of {', '.join(names)}, got {risk!r}; {hint}")
    # a function alone does not declare the range of its losses
    name = getattr(risk, "__name__", repr(risk))
    raise InvalidArgument(
        f"risk must be one of {', '.join(names)} or a Risk with its range, got {name}. Wrap it: "
        f"Risk({name!r}, low=..., high=..., needs_labels=..., zero_at_reference=..., losses=...)"
    )


def losses_of(
    risk: Risk,
    answers: IntArray,
    labels: IntArray | None,
    reference: int,
    *,
    outputs: npt.NDArray[np.float32] | None = None,
) -> FloatArray:
    """The losses of a risk. They are checked, because the function may be the caller's own.

    Args:
        risk: how an answer is judged.
        answers: [N, E].
        labels: [N], or None.
        reference: the index of the exit that the risk compares with.
        outputs: logits [N, E, C], for a risk that reads them.

    Returns:
        [N, E].

    Raises:
        BadData: answers or labels have another shape or type.
        InvalidArgument: the risk needs labels or logits that are missing, or its function gives
            losses that it does not declare.

    Example:
        >>> losses_of(find_risk("disagreement"), np.array([[1, 2], [3, 3]]), None, 1)
        array([[1., 0.],
               [0., 0.]])
    """
    # Everything is checked, because a wrong loss would break the promise without a sign.
    _check_rows(answers, labels, reference)
    if labels is None and risk.needs_labels:
        raise _no_labels(risk.name)
    read: npt.NDArray[Any] = answers
    if risk.reads == "outputs":
        if outputs is None or outputs.shape[:2] != answers.shape:
            got = "None" if outputs is None else f"logits of shape {outputs.shape}"
            raise InvalidArgument(
                f"outputs for the risk {risk.name!r} must be logits [N, E, C] of {answers.shape} "
                f"rows and exits, got {got}; record the trace with its logits kept"
            )
        read = outputs
    losses_NE = np.asarray(risk.losses(read, labels, reference))
    _check_losses(losses_NE, risk, answers.shape, reference)
    return losses_NE.astype(np.float64, copy=False)


def _no_labels(name: str) -> InvalidArgument:
    """The error for a risk that needs labels."""
    return InvalidArgument(
        f"the rows for the risk {name!r} must have labels, got none; use risk='disagreement', "
        f"which does not need labels"
    )


def _check_rows(answers: IntArray, labels: IntArray | None, reference: int) -> None:
    """Refuse answers, labels and a reference that do not fit together."""
    if answers.ndim != 2 or answers.dtype.kind not in "iu":
        raise BadData(
            f"answers must be integers [N, E], the class that each exit answers on each row, got "
            f"{answers.dtype} {list(answers.shape)}"
        )
    if labels is not None and labels.shape != answers.shape[:1]:
        raise BadData(
            f"labels must be one class index per row, got labels of shape {labels.shape} for "
            f"{len(answers)} rows"
        )
    if not 0 <= reference < answers.shape[1]:
        raise InvalidArgument(
            f"reference must be the index of an exit, 0 to {answers.shape[1] - 1}, got {reference}"
        )


def _check_losses(
    losses_NE: npt.NDArray[Any], risk: Risk, shape: tuple[int, ...], reference: int
) -> None:
    """Refuse losses that would break the promise silently: shape, NaN, range, undeclared values."""
    if losses_NE.shape != shape or losses_NE.dtype.kind not in "biuf":
        raise InvalidArgument(
            f"the risk {risk.name!r} must return one loss per row and exit, numbers of shape "
            f"{shape}, got {losses_NE.dtype} of shape {losses_NE.shape}"
        )
    # NaN fails both comparisons
    fits_NE = (losses_NE >= risk.low) & (losses_NE <= risk.high)
    expected = f"numbers in [{risk.low}, {risk.high}]"
    if risk.values is not None:
        fits_NE &= np.isin(losses_NE, risk.values)
        expected = f"only the values {risk.values}"
    if not fits_NE.all():
        # some of the first losses that do not fit, each once
        others = sorted(set(map(float, losses_NE[~fits_NE][:100])))[:3]
        row, exit_ = np.argwhere(~fits_NE)[0]
        raise InvalidArgument(
            f"the risk {risk.name!r} must return {expected}, got {', '.join(map(str, others))} "
            f"(first at row {row}, exit {exit_}). Correct the function or the range of its Risk."
        )
    # "never leave" is not tested where the reference has a loss of 0 by construction
    if risk.zero_at_reference and losses_NE[:, reference].any():
        row = int(np.flatnonzero(losses_NE[:, reference])[0])
        raise InvalidArgument(
            f"the risk {risk.name!r} must return 0 for the reference itself, got "
            f"{losses_NE[row, reference]} at row {row}. Correct the function or set "
            f"zero_at_reference=False."
        )
