"""Every engine on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import conv, ladder_of, rows_of

from offramp._support import find
from offramp.engines import torch as eager
from offramp.testing import check_engine

ENGINES = sorted(file.stem for file in (find.HOUSE / "engines").glob("*.py") if not file.stem.startswith("_"))


@pytest.mark.parametrize("name", ENGINES)
def test_the_shelf(name):
    engine = find.find_file("engines", name)
    check_engine(engine, ladder_of(3), rows_of(9))
    check_engine(engine, ladder_of(3, answer="mean"), rows_of(9))
    check_engine(engine, ladder_of(2, make=conv), torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0)))


def changed(change):
    """The eager engine, with its parts changed."""
    return SimpleNamespace(open=lambda network, steps, device: change(eager.open(network, steps, device)))


def wrong_logits(parts):
    pieces = {**parts[1].pieces, "exit": lambda state: {"middle/logits": state["middle"] + 0.01}}
    return [parts[0], replace(parts[1], pieces=pieces), *parts[2:]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts[:2], "one part per stage"),
        (lambda parts: parts[::-1], "one part per stage"),
        (lambda parts: [*parts[:2], replace(parts[2], stage=replace(parts[2].stage, reads=("y",)))], "reads"),
        (wrong_logits, "logits of 'middle'"),
    ],
)
def test_the_kit_notices(change, says):
    with pytest.raises(AssertionError, match=says):
        check_engine(changed(change), ladder_of(3), rows_of(9))
