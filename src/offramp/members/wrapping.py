"""Turns the things that a user passes as members of a ladder into torch modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.errors import InvalidArgument
from offramp.members._member import Member
from offramp.members.estimator import METHODS, Estimator
from offramp.members.function import Function
from offramp.members.onnx_file import SPEC, OnnxFile, onnx_of

__all__ = ["wrapped"]


def wrapped(thing: Any) -> Member | None:
    """Wrap something that computes as a member.

    Args:
        thing: an estimator, the path of an `.onnx` file, `onnx:FILE?gives=...`, or a function.

    Returns:
        The member; None for anything else.

    Raises:
        InvalidArgument: it is a url. Only the user knows the version of its model.
    """
    if isinstance(thing, str):
        if thing.startswith(SPEC):
            return onnx_of(thing)
        if thing.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"{thing} needs the version of its model. Use Endpoint({thing!r}, version='...')"
            )
    if isinstance(thing, (str, Path)):
        if Path(thing).suffix == ".onnx":
            return OnnxFile(thing)
        return None
    if isinstance(thing, type):  # a class is callable, but it is not a function of rows
        return None
    # An estimator may be callable too, so its methods come first.
    for method in METHODS:
        if hasattr(thing, method):
            return Estimator(thing)
    if callable(thing):
        return Function(thing)
    return None
