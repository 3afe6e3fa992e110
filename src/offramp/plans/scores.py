"""The scores that a gate can give: the ends of their range, and values that many rows share. Does
not import torch.

Calibration fixes its thresholds before it sees a row, so it must know beforehand where scores pile
up. A row whose score is within the float band of a threshold counts with the worse of its outcomes,
and half of all rows may share one score where the softmax saturates (a probability of exactly 1.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from offramp._support.arguments import require_flag
from offramp.errors import InvalidArgument

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True)
class ScoreRange:
    """The scores that a gate can give. By default any real number.

    Args:
        low: no score is below it (up to rounding).
        high: no score is above it (up to rounding).
        saturates: values that many rows may share exactly or almost, such as 1.0 for a probability.
        whole: all scores are whole numbers, as those of a counter.

    Raises:
        InvalidArgument: a value is not a number, or the range is empty.
    """

    low: float = -math.inf
    high: float = math.inf
    saturates: tuple[float, ...] = ()
    whole: bool = False

    def __post_init__(self) -> None:
        saturates = self.saturates
        if not isinstance(saturates, (tuple, list)):
            raise InvalidArgument(f"saturates must be a tuple of numbers, got {saturates!r}")
        values = {"low": self.low, "high": self.high}
        for index, saturated in enumerate(saturates):
            values[f"saturates[{index}]"] = saturated
        for name, value in values.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise InvalidArgument(f"{name} must be a number, got {value!r}")
        # plain numbers: a trace writes them as JSON, and a range must be hashable
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        object.__setattr__(self, "saturates", tuple(map(float, saturates)))
        object.__setattr__(self, "whole", require_flag("whole", self.whole))
        has_nan = bool([value for value in self.saturates if math.isnan(value)])
        if has_nan or not self.low < self.high:  # a NaN end is not below the other one
            raise InvalidArgument(
                f"a score range must be two numbers, the lower first, got {self.low} and "
                f"{self.high} with the saturation values {self.saturates}"
            )
        if not all(map(math.isfinite, self.saturates)):
            raise InvalidArgument(f"saturation values must be finite, got {self.saturates}")
        is_bounded = math.isfinite(self.low) and math.isfinite(self.high)
        if self.whole and is_bounded and math.floor(self.high) < math.ceil(self.low):
            raise InvalidArgument(
                f"whole scores must have a whole number in their range, got {self.low:g} to "
                f"{self.high:g}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data. An open end is None, because JSON does not have infinities."""
        return {
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "saturates": list(self.saturates),
            "whole": self.whole,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> ScoreRange:
        """The range written by `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the fields do not make a range.
        """
        low = -math.inf
        if body["low"] is not None:
            low = float(body["low"])
        high = math.inf
        if body["high"] is not None:
            high = float(body["high"])
        return ScoreRange(low, high, tuple(map(float, body["saturates"])), bool(body["whole"]))


def scores_in(score_range: ScoreRange) -> Callable[[FunctionT], FunctionT]:
    """A decorator that writes a score function's range into its attribute `score_range`.

    Args:
        score_range: the scores that the function can give.

    Returns:
        The decorator.

    Example:
        >>> @scores_in(ScoreRange(0.0, 1.0, saturates=(1.0,)))
        ... def certainty(logits):
        ...     return logits.softmax(-1).amax(-1)
        >>> certainty.score_range.high
        1.0
    """

    def declared(function: FunctionT) -> FunctionT:
        function.score_range = score_range  # type: ignore[attr-defined]
        return function

    return declared


def spreads_nan(function: FunctionT) -> FunctionT:
    """A decorator for a score that is NaN by itself wherever a logit is NaN or infinite.

    Rows with such logits must never leave. Scores of other gates are wrapped in a check of three
    more operations, and a batch of one waits for each of them.
    """
    function.spreads_nan = True  # type: ignore[attr-defined]
    return function
