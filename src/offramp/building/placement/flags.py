"""The typed flags for the places and the kinds of exits. This file does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from offramp._support.arguments import pairs, words
from offramp.errors import InvalidArgument

AUTO = "auto"


def require_placement_flags(at: str | None, parts: int | None, labelled: str | None) -> None:
    """Raise InvalidArgument unless the flags say exactly one way to place the exits.

    Args:
        at: of --at: names of modules, or "auto"; None if it is not given.
        parts: of --parts; None if it is not given.
        labelled: of --labelled; None if it is not given.
    """
    if at == AUTO:
        if labelled is None:
            raise InvalidArgument("--labelled must be given with --at auto")
        if parts is not None and parts < 2:
            raise InvalidArgument(f"--parts must be at least 2, got {parts}")
        return
    if at is None and parts is None:
        raise InvalidArgument("exactly one of --at and --parts must be given, got none")
    if at is not None and parts is not None:
        raise InvalidArgument(
            f"exactly one of --at and --parts must be given, got --at {at} and --parts {parts}"
        )
    if labelled is not None:
        raise InvalidArgument(f"--labelled must be given with --at auto only, got {labelled}")


def exits_at(at: str | None, exit_: str, others: Sequence[str] | None) -> str | dict[str, str]:
    """The exits that the flags name.

    Args:
        at: of --at.
        exit_: of --exit, for all cuts.
        others: of --exit-of, as NODE=EXIT: cuts that have another exit.

    Returns:
        One exit for all cuts, or an exit by cut if there are others.

    Raises:
        InvalidArgument: a node in `others` is not in `at`.
    """
    exceptions = pairs(others, "--exit-of")
    names = list[str]()
    if at != AUTO:
        names = words(at) or []
    # Every exception must be one of the cuts.
    for name in exceptions:
        if name not in names:
            raise InvalidArgument(f"--exit-of must name a module of --at ({at or '-'}), got {name}")
    if not exceptions:
        return exit_
    return {name: exceptions.get(name, exit_) for name in names}
