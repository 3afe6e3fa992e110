"""The places where a model is cut: by names, into even parts, or where exits pay."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from offramp._support.arguments import require_count
from offramp._support.find import unknown
from offramp.building.placement.flags import AUTO
from offramp.building.placement.measure import Placement, placed
from offramp.errors import InvalidArgument, UnevenParts
from offramp.networks.inputs import State
from offramp.networks.members import RESERVED
from offramp.partition import evenly, unevenness
from offramp.partition.segmenting import points_of


def require_place(at: Sequence[str] | str | None, parts: int | None, labelled: object) -> None:
    """Raise InvalidArgument unless the arguments of `cut` say exactly one way to place the exits.

    Args:
        at: names of modules, or "auto".
        parts: number of parts.
        labelled: labelled rows, for "auto" only.
    """
    if parts is not None:
        require_count("parts", parts, 2)
    if at == AUTO:
        if labelled is None:
            raise InvalidArgument("labelled must be labelled rows for at='auto', got None")
        return
    if (at is None) == (parts is None):
        raise InvalidArgument(
            f"exactly one of at and parts must be given, got at={at!r} and parts={parts!r}"
        )
    if labelled is not None:
        raise InvalidArgument(f"labelled must be None unless at='auto', got rows and at={at!r}")


def where(
    model: nn.Module,
    preprocess: nn.Module | None,
    tried: State,
    *,
    at: Sequence[str] | str | None,
    parts: int | None,
    labelled: object,
    exits: object,
    length: Sequence[str],
) -> tuple[tuple[str, ...], Placement | None]:
    """Find the modules to cut after.

    Args:
        model: the model.
        preprocess: its preprocessing.
        tried: the inputs of the example by name.
        at: as in `cut`; so are all other arguments.
        parts: as in `cut`.
        labelled: as in `cut`.
        exits: as in `cut`.
        length: as in `cut`.

    Returns:
        The names of the modules, and the measurements for at="auto" (None otherwise).

    Raises:
        OfframpError: as `cut` raises.
    """
    if at == AUTO:
        # n parts have n - 1 cuts between them
        most = None if parts is None else parts - 1
        placement = placed(
            model, preprocess, tried, labelled, exits=exits, length=length, most=most
        )
        return placement.names, placement
    if at is not None:
        return _named(model, at), None
    assert parts is not None  # `require_place` has checked it
    return _even(model, preprocess, tried, length, parts), None


def _named(model: nn.Module, at: Sequence[str] | str) -> tuple[str, ...]:
    """The names of `at`, checked."""
    if not isinstance(at, (str, Sequence)):
        raise InvalidArgument(f"at must be names of modules (see offramp inspect), got {at!r}")
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names = [at] if isinstance(at, str) else list(at)
    for name in names:
        if name not in known:
            raise unknown(name, known, "module of this model")
        if not _can_name_a_node(name):
            raise InvalidArgument(
                f"a cut is called {name!r}, which has another meaning here. Rename that module"
            )
    if not names or len(set(names)) < len(names):
        raise InvalidArgument(
            f"at must be one or more modules, each once (see offramp inspect), got {names!r}"
        )
    return tuple(names)


def _can_name_a_node(name: str) -> bool:
    """Whether a node may have the name of a module. Some names are reserved, and a `/` is for the
    nodes of a ladder.
    """
    return name not in (*RESERVED, "y") and "/" not in name


def _even(
    model: nn.Module, preprocess: nn.Module | None, tried: State, length: Sequence[str], parts: int
) -> tuple[str, ...]:
    """The modules after which parts of about equal MACs end. Warns if the parts are uneven."""
    points = points_of(model, preprocess, tried, length)
    usable = [point for point in points if _can_name_a_node(point.name)]
    names = evenly(usable, parts)
    reason = unevenness(usable, names)
    if reason is not None:
        warnings.warn(f"parts={parts} {reason}", UnevenParts, stacklevel=4)
    return names
