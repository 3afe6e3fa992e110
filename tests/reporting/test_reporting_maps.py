"""Maps over real inputs: their colours, their groups in the gallery, and maps that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

import offramp as off
from offramp.errors import BadData, BadNetwork
from offramp.layers.adaptive_depth import PonderMaps
from offramp.models.cifar_resnet import CifarResNet
from offramp.plans.plan import Plan
from offramp.reporting.gallery import gallery
from offramp.reporting.maps import HIGH, LOW, SHOWN, over
from offramp.reporting.page import report
from offramp.reporting.view import view_of
from reported import images, made
from small import seeded

pytest.importorskip("PIL.Image")

PLAN = Plan.by_hand({"small": 5.0})


def halves(pictures):
    """A map of two values: 1 on the left and 3 on the right."""
    return {"halves": np.tile(np.array([[1.0, 3.0]]), (len(pictures), 2, 1))}


def test_colours_by_hand():
    image = np.full((1, 4, 4), 100, np.uint8)
    found = over(image, np.array([[0.0, 1.0]]))
    assert found.shape == (3, 4, 4)
    assert found[:, 0, 0].tolist() == (0.4 * 100 + 0.6 * LOW).round().tolist()
    assert found[:, 3, 3].tolist() == (0.4 * 100 + 0.6 * HIGH).round().tolist()
    assert (found[:, :, 0] == found[:, :, 1]).all()


def test_the_gallery_shows_maps_over_its_pictures():
    parts = gallery(view_of(made(), PLAN), images(300), halves)
    assert len(parts) == 6
    assert "halves: blue 1, red 3" in parts[4]
    assert parts[5].count("<img") == SHOWN
    assert parts[5].count("mean 2") == SHOWN
    closed = gallery(view_of(made(), Plan.by_hand({})), images(300), halves)
    assert closed[2].count("<img") == SHOWN
    assert gallery(view_of(made(), PLAN), images(300)) == parts[:4]


def test_a_report_shows_ponder_maps(tmp_path):
    x = images(300)
    model = seeded(
        lambda: off.halting(CifarResNet(2).eval(), ["layer1", "layer3"], per="position"), 0
    )

    class Scaled(type(model.layer1.ponder)):
        def forward(self, pictures):
            return pictures.float().expand(-1, 3, -1, -1) / 255

    page = report(made(), PLAN, tmp_path / "page.html", data=x, maps=PonderMaps(model, Scaled()))
    text = page.read_text("utf-8")
    assert "layer1, units: blue" in text
    assert "layer3, units: blue" in text


def test_what_does_not_fit():
    for wrong in (
        lambda some: {"flat": np.zeros(len(some))},
        lambda some: {"odd": np.full((len(some), 2, 2), np.nan)},
    ):
        with pytest.raises(BadData, match="must be finite numbers"):
            gallery(view_of(made(), PLAN), images(300), wrong)
    with pytest.raises(BadNetwork, match="no stage of adaptive depth"):
        PonderMaps(CifarResNet(2).eval())
