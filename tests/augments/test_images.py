"""Shifts and mirror images: from torch's generator alone, each row its own, nothing but moved
pixels and zeros.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

import offramp as off
from offramp.augments.images import BORDER, crop_flip, flip
from offramp.errors import BadData, UnknownName

IMAGES = torch.arange(1, 1 + 64 * 2 * 6 * 5).reshape(64, 2, 6, 5)


def test_a_mirror_image_or_the_image_itself():
    torch.manual_seed(0)
    found = flip(IMAGES)
    mirrored = (found == IMAGES.flip(-1)).flatten(1).all(1)
    kept = (found == IMAGES).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48


def test_every_row_is_a_window_of_its_framed_image_or_of_the_windows_mirror():
    torch.manual_seed(1)
    found = crop_flip(IMAGES)
    framed = pad(IMAGES, (BORDER,) * 4)
    places = set()
    for row in range(len(IMAGES)):
        windows = {
            (top, left, mirror): framed[row, :, top : top + 6, left : left + 5].flip(
                -1 if mirror else ()
            )
            for top in range(2 * BORDER + 1)
            for left in range(2 * BORDER + 1)
            for mirror in (False, True)
        }
        fits = [index for index, window in windows.items() if torch.equal(window, found[row])]
        assert fits
        places.add(fits[0])
    assert len(places) > 30
    assert found.dtype == IMAGES.dtype


@pytest.mark.parametrize("draw", [flip, crop_flip])
def test_the_same_seed_the_same_rows(draw):
    first, second = (draw(IMAGES) for _ in range(2) if torch.manual_seed(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(IMAGES))


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), {"ids": torch.zeros(2, 3, 4, 4)}])
def test_rows_that_are_no_images(rows):
    with pytest.raises(BadData, match=r"needs images \[b, C, H, W\]"):
        crop_flip(rows)


def test_fit_takes_the_name_and_refuses_another(monkeypatch):
    layers = (torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3))
    model = torch.nn.Sequential(*layers).eval()
    net = off.cut(model, torch.zeros(2, 1, 8, 8), at=["0"])
    data = (torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    history = off.fit(net, data, recipe="joint", augment="flip", batch_size=4, progress=False)
    assert any("augmented anew" in note for note in history.notes)
    with pytest.raises(UnknownName, match="crop_flip"):
        off.fit(net, data, recipe="joint", augment="crop_flp", progress=False)
