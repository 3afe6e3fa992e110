"""A plain function from arrays to arrays as a member of a ladder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from offramp.members._identity import identity_of
from offramp.members._member import Array, Member

__all__ = ["Function"]


class Function(Member):
    """A callable: NumPy arrays [B, ...] in, logits or probabilities [B, C] out; named inputs come
    by name.

    The answer for a row must not depend on its batch-mates: rows leave, and then others are beside
    it.

    Args:
        call: the function, or any object that can be called.
        gives: "logits" or "probabilities"; see `Member`.
        one_by_one: whether it takes single rows, as batches of one.
        identity: a name and version that stand for what it computes; by default a digest of its
            code, its defaults, and the values that it captures or reads as globals. Give one where
            it reads files or depends on libraries that matter.

    Raises:
        InvalidArgument: something that it captures cannot be hashed, and no identity is given.

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
        """What the function gives [B, C]."""
        count = len(args[0]) if args else len(next(iter(kwargs.values())))
        if not self._one_by_one or not count:
            return np.asarray(self._function(*args, **kwargs))
        found = list[Array]()
        for row in range(count):
            some = [value[row : row + 1] for value in args]
            named = {name: value[row : row + 1] for name, value in kwargs.items()}
            found.append(np.asarray(self._function(*some, **named)))
        return np.concatenate(found)
