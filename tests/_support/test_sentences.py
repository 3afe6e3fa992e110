"""Parts of messages."""

from __future__ import annotations

import pytest

from offramp._support.sentences import few, first_line


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one \n"), "one"),
        (RuntimeError(), "RuntimeError"),
        (AssertionError("  "), "AssertionError"),
    ],
)
def test_the_first_line_of_an_error(problem, line):
    assert first_line(problem) == line


@pytest.mark.parametrize(
    ("names", "listed"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (("a", 2, "c"), "a, 2 and 1 more")],
)
def test_a_few_names(names, listed):
    assert few(names, 2) == listed
    assert few(iter(names), 2) == listed
