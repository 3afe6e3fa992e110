"""Preprocessing: cast, resize, normalise, refuse."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from offramp.errors import BadData, InvalidArgument
from offramp.layers.preprocess import Preprocess


def images(*shape):
    return torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_the_formula():
    x = images(2, 3, 4, 5)
    mean = (0.1, 0.2, 0.3)
    std = (0.5, 0.6, 0.7)
    got = Preprocess(mean, std)(x)
    for c in range(3):
        torch.testing.assert_close(got[:, c], (x[:, c].float() / 255 - mean[c]) / std[c])
    torch.testing.assert_close(Preprocess(mean, std)(x.float()), got)
    torch.testing.assert_close(Preprocess(scale=16.0)(x), x.float() / 16)


def test_one_mean_for_all_channels():
    assert Preprocess((0.5,), (0.5,))(images(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_resizing():
    x = images(2, 1, 8, 6)
    assert Preprocess(size=(4, 3))(x).shape == (2, 1, 4, 3)
    assert torch.equal(Preprocess(size=(8, 6))(x), Preprocess()(x))
    flat = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    torch.testing.assert_close(Preprocess(size=(3, 5))(flat), torch.full((1, 1, 3, 5), 100 / 255))
    want = nn.functional.interpolate(x.float(), (4, 3), mode="bilinear", antialias=True) / 255
    torch.testing.assert_close(Preprocess(size=(4, 3))(x), want)


def test_nothing_is_stretched_where_the_middle_is_cut_out():
    x = torch.arange(12.0).repeat(6, 1)[None, None]  # [1, 1, 6, 12]: each column its number
    kept = Preprocess(scale=1, size=(6, 6), short=6)(x)
    assert kept[0, 0, 0].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    half = Preprocess(scale=1, size=(2, 2), short=3)(x)
    assert half.shape == (1, 1, 2, 2)
    assert Preprocess(scale=1, size=(6, 12), short=20)(x).equal(x)  # of its size already


def test_a_cubic_of_bytes_stays_within_them():
    edge = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).repeat(16, 1)[None, None]
    cubic = Preprocess(scale=1, size=(32, 32), interpolation="bicubic")
    assert (cubic(edge).min(), cubic(edge).max()) == (0, 255)
    assert cubic(edge.float()).max() > 255


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"interpolation": "cubic"}, "one of nearest, bilinear, bicubic, got 'cubic'"),
        ({"short": 4}, "short must come with size, got short=4 alone"),
        ({"size": (5, 3), "short": 4}, "short must be at least 5, the longer side of size, got 4"),
    ],
)
def test_sizes_that_do_not_go_together(given, says):
    with pytest.raises(InvalidArgument, match=says):
        Preprocess(**given)


@pytest.mark.parametrize(
    ("preprocess", "shape", "says"),
    [
        (Preprocess((0, 0, 0), (1, 1, 1)), (2, 1, 4, 4), r"images must be \[B, 3, H, W\]"),
        (Preprocess(), (2, 4, 4), r"images must be \[B, 1, H, W\]"),
        (Preprocess(expects=(32, 32)), (2, 3, 32, 28), "images must be 32x32, got 32x28"),
        (Preprocess(expects=(4, 4), size=(8, 8)), (2, 3, 8, 8), "images must be 4x4"),
    ],
)
def test_what_is_refused(preprocess, shape, says):
    with pytest.raises(BadData, match=says):
        preprocess(images(*shape))


def test_an_empty_batch():
    assert Preprocess((0, 0, 0), (1, 1, 1))(images(0, 3, 4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(),
        Preprocess((0.485, 0.456), (0.2, 0.1), size=(3, 4), expects=(5, 6)),
        Preprocess(scale=1),
        Preprocess(size=(3, 3), short=4, interpolation="bicubic"),
    ],
)
def test_it_is_built_again_from_its_config(preprocess):
    plain = json.loads(json.dumps(preprocess.config()))
    again = Preprocess(**{key: value for key, value in plain.items() if key != "name"})
    assert json.dumps(again.config()) == json.dumps(preprocess.config())
    assert (torch.equal(again.mean, preprocess.mean), torch.equal(again.std, preprocess.std)) == (
        True,
        True,
    )
    assert (again.size, again.expects, again.scale) == (
        preprocess.size,
        preprocess.expects,
        preprocess.scale,
    )


def test_its_constants_are_no_state():
    assert Preprocess().state_dict() == {}
    assert Preprocess().double()(images(1, 1, 2, 2)).dtype == torch.float64
