"""What a user hands over as a member of a ladder, as a torch module."""

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
    """An estimator, the path of an `.onnx` file, `onnx:FILE?gives=...` or a function as a member;
    None for others.

    Raises:
        InvalidArgument: a url, whose version only its user knows.
    """
    if isinstance(thing, str) and thing.startswith(SPEC):
        return onnx_of(thing)
    if isinstance(thing, str) and thing.startswith(("http://", "https://")):
        raise InvalidArgument(
            f"{thing} must come with the version of its model: Endpoint({thing!r}, version='...')"
        )
    if isinstance(thing, (str, Path)):
        return OnnxFile(thing) if Path(thing).suffix == ".onnx" else None
    if isinstance(thing, type):
        return None
    if any(hasattr(thing, method) for method in METHODS):
        return Estimator(thing)
    return Function(thing) if callable(thing) else None
