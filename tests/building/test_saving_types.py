"""Networks in half, double and mixed precision on disk, and weights that are tied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp._support.files import read_json, write_json
from offramp.building.cutting import cut
from offramp.errors import BadFile, InvalidArgument
from offramp.layers.preprocess import Preprocess
from offramp.plans.plan import Plan
from small import NAMES, cut_of, dense, images_of, ladder_of, moved, rows_of, seeded, stages

KINDS = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("given_in", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_network_comes_back_in_its_precision(tmp_path, kind, given_in):
    net = cut_of().to(kind)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", stages(seed=7).to(given_in))
    assert again.precision() == str(kind).removeprefix("torch.")
    assert again.fingerprint() == net.fingerprint()
    x = images_of(7).to(kind)
    plan = Plan.by_hand({"stem": 0.3})
    assert torch.equal(off.run(again, plan, x).logits, off.run(net, plan, x).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_cut_in_another_precision(tmp_path, kind):
    net = moved(cut(stages().to(kind), images_of(4).to(kind), at="stem"))
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", stages())
    torch.testing.assert_close(again(images_of(3).to(kind))[1], net(images_of(3).to(kind))[1])
    assert off.run(again, Plan.by_hand({"stem": 0.0}), images_of(3).to(kind)).exit.tolist() == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("given_in", [torch.float32, torch.float16])
def test_preprocessing_in_half_precision_and_one_member_of_another(tmp_path, given_in):
    """Preprocessing's constants are no state, and `half()` rounds them all the same."""
    preprocess = Preprocess((0.3,), (0.7,))
    mixed = off.ladder(
        {
            "low": (stages().half(), Preprocess((0.3,), (0.7,)).half()),
            "full": (stages(seed=1), preprocess),
        }
    )
    x = (images_of(5) * 90).clamp(0, 255).byte()
    off.save(mixed, tmp_path / "net")
    again = off.load(tmp_path / "net", {name: stages().to(given_in) for name in ("low", "full")})
    assert again.precision() == mixed.precision() == "float16+float32"
    assert [again.fronts[name].mean.dtype for name in ("low", "full")] == [
        torch.float16,
        torch.float32,
    ]
    for want, got in zip(mixed(x), again(x), strict=True):
        assert torch.equal(want, got)


def test_full_precision_stays_what_it_was(tmp_path):
    net = ladder_of(2)
    off.save(net, tmp_path / "net")
    again = off.load(
        tmp_path / "net", {name: dense(index).half() for index, name in enumerate(NAMES[:2])}
    )
    assert again.precision() == "float32"
    assert torch.equal(again(rows_of(4))[1], net(rows_of(4))[1])


def test_files_without_types_are_read_and_types_that_are_none_are_refused(tmp_path):
    net = cut_of("stem", preprocess=Preprocess((0.3,), (0.7,)))
    off.save(net, tmp_path / "net")
    index = tmp_path / "net" / "network.json"
    body = read_json(index, "network", 1)[1]
    assert body["types"] == {"fronts.backbone.mean": "float32", "fronts.backbone.std": "float32"}
    del body["types"]
    write_json(index, "network", 1, body)
    assert off.load(tmp_path / "net", stages()).fingerprint() == net.fingerprint()
    for types in ({"fronts.backbone.mean": "int8"}, {"fronts.backbone.mean": 3}, 3, ["float16"]):
        write_json(index, "network", 1, body | {"types": types})
        with pytest.raises(BadFile, match="not a complete network"):
            off.load(tmp_path / "net", stages())


class Shared(nn.Module):
    """Two layers that share a weight, or do not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


def shared(tied: bool, seed: int) -> nn.Module:
    return seeded(lambda: Shared(tied), seed).eval()


def test_tied_weights_stay_tied_and_right_in_half_precision(tmp_path):
    net = moved(cut(shared(True, 0), rows_of(4), at=["first"], exits="linear")).half()
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", shared(True, 1))
    assert again.backbone.second.weight is again.backbone.first.weight
    assert again.precision() == "float16"
    for mine, its in zip(net(rows_of(5).half()), again(rows_of(5).half()), strict=True):
        assert torch.equal(mine, its)


def test_a_model_that_ties_what_was_apart_is_refused(tmp_path):
    net = moved(cut(shared(False, 0), rows_of(4), at=["first"], exits="linear"))
    off.save(net, tmp_path / "net")
    with pytest.raises(
        InvalidArgument,
        match=r"ties weights that were saved apart \(such as backbone.first.weight\)",
    ):
        off.load(tmp_path / "net", shared(True, 1))


def test_a_model_that_keeps_apart_what_was_tied_computes_the_same(tmp_path):
    net = moved(cut(shared(True, 0), rows_of(4), at=["first"], exits="linear"))
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", shared(False, 1))
    assert torch.equal(again(rows_of(5))[1], net(rows_of(5))[1])
