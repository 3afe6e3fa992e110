"""What remembers the rows that trained a model, and what cannot."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.fitting.training import recipe_of
from offramp.networks import trained
from offramp.networks.recipe import Recipe
from offramp.networks.trained import remember, rows_behind, snapshot
from offramp.plans.provenance import SeenRows
from small import rows_of, seeded

pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.BetterExit")  # made-up models

X = rows_of(40, inputs=6, seed=3)
Y = (X[:, 0] > 0).long()


def model(seed: int = 0) -> nn.Module:
    """A model with room for one cut."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), seed).eval()


# trains the model with its exits; cross_entropy trains the exits alone
JOINT = recipe_of("joint", epochs=1)


def fitted(recipe: str | Recipe = JOINT) -> off.Network:
    """A network that was trained on X."""
    net = off.cut(model(), X[:4], at=["1"], exits="linear")
    off.fit(net, (X, Y), recipe=recipe, progress=False)
    return net


def learned(net: off.Network) -> int:
    """How many rows of X a trace says to have trained a network."""
    trace = off.record(net, (X, Y), timed=False, progress=False)
    return int(trace.columns["learned"].sum()) if "learned" in trace.columns else 0


def stacked(backbone: nn.Module) -> off.Network:
    """A model beside another one in a ladder."""
    return off.ladder({"small": model(9), "large": backbone}).eval()


class Around(nn.Module):
    """A user's own module around a trained one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def other_instance(backbone: nn.Module) -> nn.Module:
    fresh = model(5)
    fresh.load_state_dict(backbone.state_dict())
    return fresh


def pickled(backbone: nn.Module, folder) -> nn.Module:
    torch.save(backbone, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def trained_on(backbone: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in backbone.parameters():
            value.add_(0.01)
    return backbone


WAYS = {
    "the same": lambda backbone: backbone,
    "a deep copy": copy.deepcopy,
    "around it": lambda backbone: Around(backbone).eval(),
    "its layers": lambda backbone: nn.Sequential(*backbone.children()).eval(),
    "one layer": lambda backbone: nn.Sequential(backbone[0], nn.ReLU(), nn.Linear(8, 2)).eval(),
    "its state dict": other_instance,
    "trained on by other code": trained_on,
    "float64": lambda backbone: copy.deepcopy(backbone).double().float(),
    "to the device": lambda backbone: backbone.to("cpu"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_becomes_of_a_trained_model(way):
    backbone = WAYS[way](fitted().backbone)
    assert learned(stacked(backbone)) == len(X)


def test_a_pickled_model(tmp_path):
    assert learned(stacked(pickled(fitted().backbone, tmp_path))) == len(X)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_cast(kind):
    backbone = fitted().backbone
    assert rows_behind(copy.deepcopy(backbone).to(kind)) is not None
    assert rows_behind(backbone.to(kind)) is not None


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rows_that_are_rounded_with_the_network(tmp_path, kind):
    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(kind)

    net = fitted()
    off.save(net, tmp_path / "net")
    for backbone in (net.backbone, off.load(tmp_path / "net", model(3)).backbone):
        cast = copy.deepcopy(backbone).to(kind)
        stack = off.ladder(
            {"small": (cast, Rounding()), "large": (copy.deepcopy(cast), Rounding())}
        ).eval()
        trace = off.record(stack, X.to(kind).float(), timed=False, progress=False)
        assert trace.columns["learned"].all()


def test_a_model_cut_anew_promises_nothing_on_its_training_rows():
    net = fitted()
    anew = off.cut(net.backbone, X[:4], at=["1"], exits={"1": net.exit_of("1")})
    assert len(anew.trained_on.digests) == len(X)
    with pytest.raises(off.errors.OverlappingRows, match="40 of the 40 calibration rows"):
        off.calibrate(off.record(anew, X, timed=False, progress=False), at_most=0.9)


def test_networks_that_were_cut_before_one_of_them_was_fitted():
    backbone = model()
    first, second = (off.cut(backbone, X[:4], at=["1"], exits="linear") for _ in range(2))
    off.fit(first, (X, Y), recipe=JOINT, progress=False)
    off.fit(second, (X + 100, Y), recipe="cross_entropy", progress=False)
    assert second.training_rows() is not None
    assert learned(second) == len(X)


def test_exits_that_were_trained_and_hang_elsewhere():
    net = fitted("cross_entropy")
    other = off.cut(model(4), X[:4], at=["1"], exits={"1": copy.deepcopy(net.exit_of("1"))})
    assert learned(other) == len(X)


def test_a_model_whose_exits_alone_were_trained_is_free():
    backbone = fitted("cross_entropy").backbone
    assert rows_behind(backbone) is None
    assert learned(stacked(backbone)) == 0


def test_weights_from_before_are_free_again():
    before = copy.deepcopy(model().state_dict())
    net = fitted()
    backbone = net.backbone
    assert rows_behind(backbone) is not None
    backbone.load_state_dict(before)
    assert rows_behind(backbone) is None
    assert learned(stacked(model())) == 0


@pytest.mark.parametrize("recipe", [JOINT, "cross_entropy"])
def test_a_file_tells_it_to_another_process(tmp_path, recipe, monkeypatch):
    off.save(fitted(recipe), tmp_path / "net")
    monkeypatch.setattr(trained, "_LIVING", type(trained._LIVING)())
    monkeypatch.setattr(trained, "_VALUES", {})
    net = off.load(tmp_path / "net", model(2))
    assert learned(net) == len(X)
    assert learned(stacked(net.backbone)) == (len(X) if recipe is JOINT else 0)
    assert rows_behind(net.exit_of("1")) is not None


def test_a_run_that_fails_has_trained_all_the_same():
    class Stop(Exception):
        pass

    def stop(x):
        stop.calls += 1
        if stop.calls > 2:
            raise Stop
        return x

    stop.calls = 0
    net = off.cut(model(), X[:4], at=["1"], exits="linear")
    with pytest.raises(Stop):
        off.fit(
            net,
            (X, Y),
            recipe=recipe_of("joint", epochs=2),
            batch_size=8,
            augment=stop,
            progress=False,
        )
    assert learned(stacked(copy.deepcopy(net.backbone))) == len(X)


def test_values_that_stand_everywhere_tell_nothing():
    rows = SeenRows("some", "0" * 16, np.arange(3, dtype=np.uint64))
    norm = nn.BatchNorm1d(8)
    before = snapshot(norm)
    with torch.no_grad():
        norm.weight.fill_(0.5)
    remember(norm, rows, before)
    assert rows_behind(norm) == rows
    halves = nn.BatchNorm1d(8)
    with torch.no_grad():
        halves.weight.fill_(0.5)
    assert rows_behind(halves) is None


def test_a_model_that_is_gone_is_forgotten():
    one = nn.BatchNorm1d(8)
    count = len(trained._LIVING)
    remember(one, SeenRows("some", "0" * 16, np.arange(3, dtype=np.uint64)))
    assert len(trained._LIVING) == count + 2
    del one
    gc.collect()
    assert len(trained._LIVING) <= count
