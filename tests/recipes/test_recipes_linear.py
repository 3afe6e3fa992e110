"""Which rows choose a regularizer, and which train."""

from __future__ import annotations

import pytest
import torch

from offramp.errors import GapNotReached
from offramp.networks.recipe import FeatureTable
from offramp.recipes import _linear
from offramp.recipes._linear import solve_exit
from small import cut_of


def whole(rows, copies=1):
    net = cut_of(trained=False)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(copies * rows, net.exit_of("stem").features, generator=draw)
    # nothing to be learnt: only strong is right
    y = torch.randint(0, 3, (rows,), generator=draw).repeat(copies)
    return FeatureTable({"stem": net.exit_of("stem")}, {"stem": features}, y, copies)


def test_without_development_rows_those_that_choose_were_not_trained(monkeypatch):
    seen = {}

    def chosen(features, y, classes, *, dev, **options):
        seen.update(trained=features, dev=dev[0])
        return through(features, y, classes, dev=dev, **options)

    through = _linear.choose
    monkeypatch.setattr(_linear, "choose", chosen)
    some = whole(33, copies=2)
    figures = solve_exit("stem", some, None, "cross_entropy", [1e-1, 1e-3], 1e-3)
    # both copies of a row, wherever 33 falls
    held = [row + copy for copy in (0, 33) for row in (9, 19, 29)]
    assert torch.equal(seen["dev"], some.features["stem"][held])
    assert len(seen["trained"]) == 60
    assert figures["gap/stem"] <= 1e-3


def test_so_few_rows_that_none_can_be_held_out_choose_themselves():
    figures = solve_exit("stem", whole(4), None, "cross_entropy", [1e-1, 1e-2], 1e-3)
    assert figures["regularizer/stem"] in (1e-1, 1e-2)


def test_a_gap_that_is_not_reached_is_said(monkeypatch):
    through = _linear.solve
    monkeypatch.setattr(
        _linear, "solve", lambda *rows, **options: through(*rows, **options, limit=1)
    )
    with pytest.warns(
        GapNotReached, match=r"exit 'stem' was solved to a duality gap of .* asked for 1e-06"
    ):
        figures = solve_exit("stem", whole(40), None, "cross_entropy", 1e-3, 1e-6)
    assert figures["gap/stem"] > 1e-6
