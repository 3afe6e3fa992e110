"""A plain function from arrays to arrays as a member of a ladder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from offramp.members._identity import identity_of
from offramp.members._member import Array, Member

__all__ = ["Function"]


class Function(Member):
    """A function as a member: NumPy arrays [B, ...] in, logits or probabilities [B, C] out.

    Named inputs are passed by name. The answer for a row must not depend on the other rows of the
    batch, because these change when rows leave.

    Args:
        call: the function, or any object that can be called.
        gives: "logits" or "probabilities"; see `Member`.
        one_by_one: whether it takes only batches of one row.
        identity: a name and version that identify its computation. By default this is a digest of
            its code, its defaults, and the values that it captures or reads as globals. Set it if
            the function reads files, or depends on libraries that matter.

    Raises:
        InvalidArgument: something that it captures cannot be hashed, and identity is not set.

    Example:
        >>> import torch
        >>> def darkness(x):
        ...     return np.stack([x.mean(1), 1 - x.mean(1)], 1)
        >>> dark = Function(darkness, gives="probabilities")
        >>> dark(torch.tensor([[0.75, 0.75]])).exp()
        tensor([[0.7500, 0.2500]])
    """

    def __init__(
        self,
        call: Callable[..., Any],
        *,
        gives: str | None = None,
        one_by_one: bool = False,
        identity: str | None = None,
    ) -> None:
        kind = f"the function {getattr(call, '__qualname__', type(call).__name__)!r}"
        super().__init__(kind, identity_of([call, gives, one_by_one], identity, kind), gives)
        self._function = call
        self._one_by_one = one_by_one

    def predict(self, args: Sequence[Array], kwargs: dict[str, Array]) -> Array:
        """The values of the function [B, C]."""
        first = next(iter([*args, *kwargs.values()]))
        count = len(first)
        if not self._one_by_one or not count:
            return np.asarray(self._function(*args, **kwargs))
        outputs = list[Array]()
        for row in range(count):
            alone = slice(row, row + 1)  # keeps the batch dimension: [1, ...]
            row_args = [value[alone] for value in args]
            row_kwargs = {name: value[alone] for name, value in kwargs.items()}
            outputs.append(np.asarray(self._function(*row_args, **row_kwargs)))
        return np.concatenate(outputs)  # B times [1, C] -> [B, C]
