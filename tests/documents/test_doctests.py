"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib

import pytest

import house

EXAMPLES = [
    name for name, file in house.modules().items() if ">>>" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    done = doctest.testmod(
        importlib.import_module(f"offramp.{module}"), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert done.attempted
    assert not done.failed


def test_there_are_examples():
    assert {"plans.plan", "building.cutting", "gates.confidence"} <= set(EXAMPLES)
