"""The tree in the docstring is the tree in the code, and every error can be caught by its root."""

from __future__ import annotations

import re

import pytest

from offramp import errors
from offramp.errors import MissingExtra, NoSafePlan, OfframpError, OfframpWarning
from offramp.plans.plan import Plan

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def drawn() -> dict[str, str | None]:
    """Name -> parent, from the indentation of the drawing."""
    found: dict[str, str | None] = {}
    way: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(\s|$)", line)
        if match:
            depth = len(match[1])
            name = match[2]
            way = [step for step in way if step[0] < depth]
            found[name] = way[-1][1] if way else None
            way.append((depth, name))
    return found


def test_the_drawing_is_complete():
    assert drawn().keys() == CLASSES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_the_drawing_is_true(name):
    parents = [base.__name__ for base in CLASSES[name].__bases__ if base.__name__ in CLASSES]
    assert parents == ([drawn()[name]] if drawn()[name] else [])
    assert issubclass(CLASSES[name], (OfframpError, OfframpWarning))
    assert (CLASSES[name].__doc__ or "").strip()


def test_builtin_parents_are_said():
    for name, kind in (("InvalidArgument", ValueError), ("MissingExtra", ImportError)):
        assert issubclass(CLASSES[name], kind)
        assert kind.__name__ in (errors.__doc__ or "")


def test_what_errors_carry():
    never = Plan.by_hand({})
    problem = NoSafePlan("no plan", smallest_level=0.2, never=never)
    assert (str(problem), problem.smallest_level, problem.never) == ("no plan", 0.2, never)
    missing = MissingExtra("pyarrow", "data", "reading parquet")
    assert (
        str(missing)
        == "reading parquet needs pyarrow, which is not installed; run: pip install 'offramp[data]'"
    )
    assert missing.extra == "data"
