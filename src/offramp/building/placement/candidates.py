"""Where a model is cut, as it was asked for: by names, into even parts, or where exits pay."""

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
    """Raise InvalidArgument unless exactly one thing says where to cut, and what auto needs is
    given for it alone.
    """
    if parts is not None:
        require_count("parts", parts, 2)
    if at == AUTO:
        if labelled is None:
            raise InvalidArgument(
                "got at='auto' without labelled=, expected labelled rows to try places on; give "
                "some"
            )
    elif (at is None) == (parts is None):
        raise InvalidArgument(
            f"got at={at!r} and parts={parts!r}, expected exactly one of them; name modules, or "
            f"give a number"
        )
    elif labelled is not None:
        raise InvalidArgument(
            f"got labelled= and at={at!r}, expected at='auto' with it; leave one of them out"
        )


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
    """The modules to cut after, and what was measured to choose them, if anything. Raises as `cut`
    does.
    """
    if at == AUTO:
        found = placed(
            model,
            preprocess,
            tried,
            labelled,
            exits=exits,
            length=length,
            most=None if parts is None else parts - 1,
        )
        return found.names, found
    if at is not None:
        return (_named(model, at), None)
    return (_even(model, preprocess, tried, length, parts or 0), None)


def _named(model: nn.Module, at: Sequence[str] | str) -> tuple[str, ...]:
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if not isinstance(at, (str, Sequence)):
        raise InvalidArgument(f"got at={at!r}, expected names of modules; see offramp inspect")
    names = [at] if isinstance(at, str) else list(at)
    for name in names:
        if name not in known:
            raise unknown(name, known, "module of this model")
        if name in (*RESERVED, "y") or "/" in name:
            raise InvalidArgument(
                f"a cut is called {name!r}, which has a meaning of its own here; rename that module"
            )
    if not names or len(set(names)) < len(names):
        raise InvalidArgument(
            f"got at={names!r}, expected one or more modules, each once; see offramp inspect"
        )
    return tuple(names)


def _even(
    model: nn.Module, preprocess: nn.Module | None, tried: State, length: Sequence[str], parts: int
) -> tuple[str, ...]:
    points = points_of(model, preprocess, tried, length)
    usable = [
        point for point in points if point.name not in (*RESERVED, "y") and "/" not in point.name
    ]
    names = evenly(usable, parts)
    if (why := unevenness(usable, names)) is not None:
        warnings.warn(f"parts={parts} {why}", UnevenParts, stacklevel=4)
    return names
