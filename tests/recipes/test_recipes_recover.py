"""`recover` brings a converted model nearer to its original, layer by layer and as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import convert
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.recipes.recover import Recover, changed_children, relative_error, replaced_names
from small import images_of, seeded

X = images_of(64)
Y = torch.arange(64) % 3


class Net(nn.Module):
    """Two stages and a head on images [B, 1, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def original():
    """Its batch norms know these rows, as those of a trained model do."""
    model = seeded(Net, 0).train()
    with torch.no_grad():
        for _ in range(60):
            model(X)
        model.head.weight.mul_(5)
    return model.eval()


def converted():
    return convert(original(), {"second.0": "low_rank?rank=2"})


def distance(model):
    with torch.no_grad():
        return (model(X) - original()(X)).pow(2).mean().item()


@pytest.mark.parametrize("by", ["layers", "whole", "both"])
def test_it_comes_nearer_to_the_original(by):
    model = converted()
    before = converted()
    teacher = original()
    weights = copy.deepcopy(teacher.state_dict())
    options = {"by": by, "epochs": 15, "layer_epochs": 15, "rate": 1e-3, "layer_rate": 1e-2}
    history = off.fit(
        model, X, recipe="recover", original=teacher, batch_size=16, progress=False, **options
    )
    assert distance(model) < 0.7 * distance(before)
    assert not model.training
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())
    phases = {epoch.phase for epoch in history.epochs}
    assert phases == {"both": {"layers", "whole"}}.get(by, {by})
    others = [key for key in before.state_dict() if not key.startswith("second.0")]
    same = [torch.equal(model.state_dict()[key], before.state_dict()[key]) for key in others]
    assert all(same) == (by == "layers")


def test_the_error_of_a_layer_falls_on_its_own_inputs():
    model = converted()
    teacher = original()
    with torch.no_grad():
        x = teacher.first(X)
        wanted = teacher.second[0](x)
        before = relative_error(model.second[0](x), wanted)
    off.fit(
        model,
        X,
        recipe=Recover(teacher, by="layers", layer_epochs=20, layer_rate=1e-2),
        batch_size=16,
        progress=False,
    )
    with torch.no_grad():
        assert relative_error(model.second[0](x), wanted) < 0.9 * before


def test_a_model_behind_its_preprocessing_and_a_cut_one():
    preprocess = nn.Hardtanh()
    model = converted()
    off.fit((model, preprocess), X, recipe="recover", original=original(), epochs=1, progress=False)
    net = seeded(lambda: off.cut(converted(), X[:4], at=["first"]), 0)
    before = net(X)
    off.fit(net, X, recipe="recover", original=original(), epochs=2, progress=False)
    assert net.untrained() == ()
    assert not torch.equal(net(X)[0], before[0])


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    from offramp.testing import check_same, stopping

    def make():
        return Recover(original(), epochs=2, layer_epochs=2, labels=0.5)

    networks = [seeded(lambda: off.cut(converted(), X[:4], at=["first"]), 0) for _ in range(2)]
    options = {"batch_size": 16, "progress": False}
    off.fit(networks[0], (X, Y), recipe=make(), **options)
    for steps in (3, 10):
        stopped = seeded(lambda: off.cut(converted(), X[:4], at=["first"]), 0)
        with pytest.raises(KeyboardInterrupt):
            off.fit(
                stopped,
                (X, Y),
                recipe=stopping(make(), steps),
                folder=tmp_path / str(steps),
                **options,
            )
        off.fit(
            stopped, (X, Y), recipe=make(), folder=tmp_path / str(steps), resume=True, **options
        )
        check_same(networks[0], stopped, "stopped and not")


def test_the_rows_are_remembered_by_the_models_weights():
    model = converted()
    off.fit(model, X, recipe="recover", original=original(), epochs=1, progress=False)
    net = off.ladder({"small": model, "large": original()})
    rows = net.training_rows()
    assert rows is not None
    assert len(rows.digests) == 64


def test_which_modules_are_compared():
    model = converted()
    teacher = original()
    assert replaced_names(model, teacher) == ["second.0"]
    assert changed_children(model, teacher) == ["second"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"by": "turns"}, InvalidArgument, "by must be one of both, layers, whole"),
        ({"temperature": 0.0}, InvalidArgument, "temperature must be above 0"),
        ({"labels": 2.0}, InvalidArgument, "labels must be a share"),
        ({"original": None}, InvalidArgument, "recover needs original="),
        ({"at": "secund"}, UnknownName, "did you mean 'second'"),
    ],
)
def test_what_it_refuses(options, error, says):
    given = {"original": original(), **options}
    with pytest.raises(error, match=says):
        off.fit(converted(), (X, Y), recipe="recover", progress=False, **given)


def test_a_ladder_and_a_model_without_new_layers_are_refused():
    net = off.ladder({"small": converted(), "large": original()}).eval()
    with pytest.raises(BadNetwork, match="got a ladder of 2"):
        off.fit(net, X, recipe="recover", original=original(), progress=False)
    with pytest.raises(
        BadNetwork, match="by='layers' needs replaced layers with parameters, whose"
    ):
        off.fit(original(), X, recipe="recover", original=original(), by="layers", progress=False)


def test_only_models_and_networks_are_fitted():
    with pytest.raises(InvalidArgument, match="must be a Network"):
        off.fit("a text", X, recipe="recover", progress=False)


class Flat(nn.Sequential):
    """Convolutions as children of the model: a pruned one is a feature of its own."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
        )


def test_where_channels_were_taken_out_no_features_are_compared():
    teacher = seeded(Flat, 0).eval()
    narrow = {"0": "resized?inputs=1&outputs=4", "2": "resized?inputs=4&outputs=8"}
    model = seeded(lambda: convert(teacher, narrow), 1)
    before = copy.deepcopy(model)
    options = {"epochs": 10, "rate": 1e-2, "progress": False, "batch_size": 16}
    off.fit(model, X, recipe="recover", original=teacher, **options)
    with torch.no_grad():
        errors = [(one(X) - teacher(X)).pow(2).mean().item() for one in (model, before)]
    assert errors[0] < errors[1]
    with pytest.raises(BadNetwork, match=r"'0' gives \(4, 8, 8\) and gave \(8, 8, 8\)"):
        off.fit(model, X, recipe="recover", original=teacher, at="0", **options)


def test_a_layer_beside_one_with_fewer_channels_cannot_learn_alone():
    teacher = seeded(Flat, 0).eval()
    narrow = {"0": "resized?inputs=1&outputs=4", "2": "resized?inputs=4&outputs=8"}
    model = convert(convert(teacher, narrow), {"2": "low_rank?rank=2"})
    options = {"epochs": 1, "original": teacher, "progress": False}
    with pytest.raises(BadNetwork, match=r"'2' takes or gives other shapes .* use by='whole'"):
        off.fit(model, X, recipe="recover", **options)
    off.fit(model, X, recipe="recover", by="whole", **options)


def test_a_layer_without_parameters_has_nothing_to_learn_alone():
    teacher = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), 0)
    model = convert(teacher.eval(), {"1": "skip"})
    x = torch.randn(16, 4)
    options = {"recipe": "recover", "original": teacher, "epochs": 2, "progress": False}
    history = off.fit(model, x, **options)
    assert {epoch.phase for epoch in history.epochs} == {"whole"}
    with pytest.raises(BadNetwork, match="needs replaced layers with parameters"):
        off.fit(model, x, by="layers", **options)
