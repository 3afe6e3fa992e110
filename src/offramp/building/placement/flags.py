"""The flags that say where a model is cut and what hangs there, as they are typed. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from offramp._support.arguments import pairs, words
from offramp.errors import InvalidArgument

AUTO = "auto"


def require_placement_flags(at: str | None, parts: int | None, labelled: str | None) -> None:
    """Raise InvalidArgument unless it is clear where to cut."""
    if at != AUTO and (at is None) == (parts is None):
        raise InvalidArgument(
            f"got --at {at or '-'} and --parts {parts or '-'}, expected exactly one of them; give "
            f"one"
        )
    if (at == AUTO) != (labelled is not None):
        raise InvalidArgument(
            f"got --at {at or '-'} and --labelled {labelled or '-'}, expected --labelled with "
            f"--at auto alone; give "
            "both"
        )
    if at == AUTO and parts is not None and parts < 2:
        raise InvalidArgument(
            f"got --parts {parts}, expected 2 or more; give more, or leave it out"
        )


def exits_at(at: str | None, one: str, others: Sequence[str] | None) -> str | dict[str, str]:
    """The exit of all cuts, or one by cut where `others`, NODE=EXIT, have their own. Raises
    InvalidArgument.
    """
    own = pairs(others, "--exit-of")
    names = [] if at == AUTO else words(at) or []
    if wrong := [name for name in own if name not in names]:
        raise InvalidArgument(
            f"got --exit-of {wrong[0]}=..., expected a module named in --at ({at or '-'}); name "
            f"it there too"
        )
    return {name: own.get(name, one) for name in names} if own else one
