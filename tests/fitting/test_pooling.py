"""Pooled features are computed once, kept while the backbone is what it was, and found again on
disk.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.fitting import pooling
from offramp.fitting.pooling import Pooling
from offramp.networks.recipe import poolable
from small import cut_of, images_of, ladder_of, rows_of

X = images_of(40)


def pooled(net, **options):
    return Pooling(
        net,
        poolable(net),
        options.pop("views", 1),
        options.pop("augment", None),
        progress=False,
        **options,
    )


@pytest.fixture
def passes(monkeypatch):
    """Counts the batches that go through the models."""
    counted = []
    through = pooling.pooled_of
    monkeypatch.setattr(pooling, "pooled_of", lambda *args: counted.append(1) or through(*args))
    return counted


def test_they_are_what_the_exits_read():
    net = cut_of()
    found = pooled(net).features(off.rows(X), "data")
    for name, seen in net.look(X):
        assert torch.allclose(
            torch.from_numpy(found[name]), net.exit_of(name).pool(seen.features), atol=1e-6
        )
    assert list(found) == list(net.topology.exits)


def test_once_per_data_and_backbone(passes):
    net = cut_of()
    some = pooled(net)
    for _ in range(3):
        some.features(off.rows(X), "data")
    assert len(passes) == 1
    some.features(off.rows(X), "other data")
    assert len(passes) == 2
    with torch.no_grad():
        net.exits["stem"].head[0].weight.add_(1)
    some.features(off.rows(X), "data")
    assert len(passes) == 2
    with torch.no_grad():
        net.backbone.head.weight.add_(1)
    some.features(off.rows(X), "data")
    assert len(passes) == 3


def test_a_folder_keeps_them_for_the_next_run(passes, tmp_path):
    one = pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
    other = pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
    assert len(passes) == 1
    for name, column in one.items():
        np.testing.assert_array_equal(column, other[name])
    assert isinstance(other["stem"], np.memmap)
    pooled(cut_of(exits="linear"), folder=tmp_path).features(off.rows(X), "data")
    pooled(cut_of(), folder=tmp_path, views=2).features(off.rows(X), "data")
    pooled(cut_of(), folder=tmp_path, augment=torch.flip, seed=1)._key(["data"])
    assert len(passes) == 4


DAMAGE = {
    "a flipped bit": lambda data: data[:-5] + bytes([data[-5] ^ 8]) + data[-4:],
    "the first byte": lambda data: b"x" + data[1:],
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_damaged_features_are_computed_again_and_kept_anew(passes, tmp_path, damage, ending):
    want = pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
    want = {name: np.array(column) for name, column in want.items()}
    file = sorted(tmp_path.glob(f"*{ending}"))[0]
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for count in (2, 2):  # once more, and then found whole
        found = pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
        assert len(passes) == count
        for name, column in want.items():
            np.testing.assert_array_equal(column, found[name])


def test_features_without_their_digests_are_not_trusted(passes, tmp_path):
    pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
    next(tmp_path.glob("*.json")).unlink()
    pooled(cut_of(), folder=tmp_path).features(off.rows(X), "data")
    assert len(passes) == 2


def test_large_ones_lie_on_disk(monkeypatch):
    small = pooled(cut_of()).features(off.rows(X), "data")
    monkeypatch.setattr(pooling, "LARGE", 1)
    large = pooled(cut_of()).features(off.rows(X), "data")
    assert all(isinstance(column, np.memmap) for column in large.values())
    for name, column in small.items():
        np.testing.assert_array_equal(column, large[name])


def test_views_are_augmented_each_anew_and_looked_at_rows_are_not():
    def shifted(x):
        return x + torch.rand(())

    net = cut_of()
    plain = pooled(net).features(off.rows(X), "data")["stem"]
    some = pooled(net, views=2, augment=shifted)
    two = some.features(off.rows(X), "data")["stem"]
    again = pooled(net, views=2, augment=shifted).features(off.rows(X), "data")["stem"]
    assert len(two) == 80
    np.testing.assert_array_equal(two, again)
    assert not np.allclose(two[:40], two[40:])
    assert not np.allclose(two[:40], plain)
    np.testing.assert_array_equal(some.features(off.rows(X), "data", held=True)["stem"], plain)


def test_exits_that_cannot_pool_and_those_that_read_them_are_left_out():
    assert poolable(cut_of(exits={"stem": "branch", "blocks.0": "linear"})) == (
        "blocks.0",
        "backbone",
    )
    assert poolable(ladder_of(2, answer="mean")) == ("small", "middle")


def test_the_same_weights_in_another_model_have_features_of_their_own(passes, tmp_path):
    found = []
    for act in (torch.nn.ReLU(), torch.nn.Tanh()):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), act, torch.nn.Linear(4, 3)).eval()
        net = off.cut(model, rows_of(4), at=["1"], exits="linear")
        found.append(
            pooled(net, folder=tmp_path).features(off.rows(rows_of(12)), "data")["1"].copy()
        )
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_buffer_that_is_no_state_counts(passes, tmp_path):
    net = cut_of()
    net.backbone.register_buffer("scale", torch.ones(1), persistent=False)
    pooled(net, folder=tmp_path).features(off.rows(X), "data")
    before = len(passes)
    net.backbone.scale.mul_(2)
    pooled(net, folder=tmp_path).features(off.rows(X), "data")
    assert len(passes) > before
