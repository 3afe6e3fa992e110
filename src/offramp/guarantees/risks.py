"""Risks: what an early answer may cost, as one loss per row and exit.

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
        name: How a promise names it.
        low: No loss is below this.
        high: No loss is above this.
        needs_labels: Whether the losses need labels.
        zero_at_reference: Whether the losses of the reference are 0 by construction.
        losses: A function of (answers [N, E], labels [N] or None, index of the reference) that
            gives losses [N, E]. With reads="outputs" the first argument is the logits [N, E, C] in
            float32.
        reads: "answers" or "outputs".
        values: The only values that a loss takes, if they are few; None for any in the range.

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
                f"risk {self.name!r} has the range [{self.low}, {self.high}], expected two finite "
                f"numbers, "
                "the lower first; give the smallest and the largest loss that a row can have"
            )
        if self.reads not in ("answers", "outputs"):
            raise InvalidArgument(
                f"risk {self.name!r} reads {self.reads!r}, expected 'answers' or 'outputs'; "
                f"choose one"
            )
        if any(not self.low <= value <= self.high for value in self.values or ()):
            raise InvalidArgument(
                f"risk {self.name!r} names the values {self.values}, expected values inside its "
                f"range "
                f"[{self.low}, {self.high}]; correct one of the two"
            )

    @property
    def binary(self) -> bool:
        """True when a loss is only ever 0 or 1, which admits the exact bound."""
        return self.values is not None and set(self.values) <= {0.0, 1.0}


def disagreement(answers: IntArray, labels: IntArray | None, reference: int) -> FloatArray:
    """1 where an exit answers otherwise than the reference; needs no labels.

    "Consistency" in Jazbec et al., 2024, arXiv 2405.20915. Never below the accuracy gap, row by
    row: a promise on disagreement is one on accuracy too.
    """
    return np.not_equal(answers, answers[:, [reference]]).astype(np.float64)


def accuracy_gap(answers: IntArray, labels: IntArray | None, reference: int) -> FloatArray:
    """1{wrong} - 1{reference wrong}: 1 made worse, -1 made better, 0 otherwise.

    "Performance gap" in Jazbec et al., 2024, arXiv 2405.20915. We keep the sign, where their
    Learn-then-Test clips it at 0: a row made better pays for a row made worse.
    """
    wrong_NE = error(answers, labels, reference, name="accuracy_gap")
    return wrong_NE - wrong_NE[:, [reference]]


def error(
    answers: IntArray, labels: IntArray | None, reference: int, *, name: str = "error"
) -> FloatArray:
    """1 where an exit answers wrongly, whatever the reference says."""
    if labels is None:
        raise _no_labels(name)
    return np.not_equal(answers, labels[:, None]).astype(np.float64)


NAMED = (
    Risk("disagreement", 0.0, 1.0, False, True, disagreement, values=(0.0, 1.0)),
    Risk("accuracy_gap", -1.0, 1.0, True, True, accuracy_gap, values=(-1.0, 0.0, 1.0)),
    Risk("error", 0.0, 1.0, True, False, error, values=(0.0, 1.0)),
)


def find_risk(risk: str | Risk | Callable[..., Any]) -> Risk:
    """The `Risk` behind a name, a named risk's function, or itself."""
    if isinstance(risk, Risk):
        return risk
    for known in NAMED:
        if risk == known.name or risk is known.losses:
            return known
    names = [known.name for known in NAMED]
    if isinstance(risk, str):
        near = difflib.get_close_matches(risk, names, n=1, cutoff=0.4)
        if near:
            hint = f"did you mean {near[0]!r}?"
        else:
            hint = "take one of these, or build a Risk of your own"
        raise UnknownName(f"no risk is called {risk!r}, expected one of {', '.join(names)}; {hint}")
    what = getattr(risk, "__name__", repr(risk))
    raise InvalidArgument(
        f"the risk {what} is not a Risk, expected one of {', '.join(names)} or a Risk that states "
        f"its "
        f"range; wrap it: Risk({what!r}, low=..., high=..., needs_labels=..., "
        f"zero_at_reference=..., losses=...)"
    )


def losses_of(
    risk: Risk,
    answers: IntArray,
    labels: IntArray | None,
    reference: int,
    *,
    outputs: npt.NDArray[np.float32] | None = None,
) -> FloatArray:
    """The checked losses `[N, E]` of a risk, the user's own function included.

    >>> losses_of(find_risk("disagreement"), np.array([[1, 2], [3, 3]]), None, 1)
    array([[1., 0.],
           [0., 0.]])
    """
    _check_rows(answers, labels, reference)
    if labels is None and risk.needs_labels:
        raise _no_labels(risk.name)
    read: npt.NDArray[Any] = answers
    if risk.reads == "outputs":
        if outputs is None or outputs.shape[:2] != answers.shape:
            got = "no logits" if outputs is None else f"logits of shape {outputs.shape}"
            raise InvalidArgument(
                f"got {got}, but the risk {risk.name!r} reads logits [N, E, C] of {answers.shape} "
                f"rows and exits; "
                "record the trace with its logits kept"
            )
        read = outputs
    losses_NE = np.asarray(risk.losses(read, labels, reference))
    _check_losses(losses_NE, risk, answers.shape, reference)
    return losses_NE.astype(np.float64, copy=False)


def _no_labels(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"got rows without labels, but the risk {name!r} compares answers with labels; give "
        f"labels, or take "
        "risk='disagreement', which needs none"
    )


def _check_rows(answers: IntArray, labels: IntArray | None, reference: int) -> None:
    if answers.ndim != 2 or answers.dtype.kind not in "iu":
        raise BadData(
            f"got answers of shape {answers.shape} and type {answers.dtype}, expected integers "
            f"[N, E]; "
            "give the class that each exit answers on each row"
        )
    if labels is not None and labels.shape != answers.shape[:1]:
        raise BadData(
            f"got labels of shape {labels.shape} for {len(answers)} rows, expected one class "
            f"index per row; "
            "give labels [N]"
        )
    if not 0 <= reference < answers.shape[1]:
        raise InvalidArgument(
            f"got exit {reference} as the reference, expected 0 to {answers.shape[1] - 1}; name "
            f"one of the exits"
        )


def _check_losses(
    losses_NE: npt.NDArray[Any], risk: Risk, shape: tuple[int, ...], reference: int
) -> None:
    """Refuse what would break the promise silently: shape, NaN, range, undeclared values."""
    if losses_NE.shape != shape or losses_NE.dtype.kind not in "biuf":
        raise InvalidArgument(
            f"the risk {risk.name!r} returned {losses_NE.dtype} of shape {losses_NE.shape}, "
            f"expected numbers of "
            f"shape {shape}; return one loss per row and exit"
        )
    fits = (losses_NE >= risk.low) & (losses_NE <= risk.high)  # False for NaN
    expected = f"numbers in [{risk.low}, {risk.high}]"
    if risk.values is not None:
        fits &= np.isin(losses_NE, risk.values)
        expected = f"only the values {risk.values}"
    if not fits.all():
        bad = sorted({float(value) for value in losses_NE[~fits][:100]})[:3]
        row, exit_ = (int(at[0]) for at in np.nonzero(~fits))
        raise InvalidArgument(
            f"the risk {risk.name!r} returned {', '.join(map(str, bad))} (first at row {row}, "
            f"exit {exit_}), "
            f"expected {expected}; correct the function or the range that its Risk states"
        )
    if risk.zero_at_reference and losses_NE[:, reference].any():
        row = int(np.flatnonzero(losses_NE[:, reference])[0])
        raise InvalidArgument(
            f"the risk {risk.name!r} returned {losses_NE[row, reference]} at row {row} for the "
            f"reference itself, "
            "expected 0 there; correct the function or state zero_at_reference=False"
        )
