"""Specs of hubs, on a timm that has one model and notes what it is asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.factories import make_model, model_from_file, preprocess_of
from offramp.errors import InvalidArgument, MissingExtra, UnknownName
from offramp.hubs._options import library

CFG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.25, 0.0),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
    "crop_mode": "center",
}


class Timm(ModuleType):
    """What we use of timm."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.online = True
        self.data = SimpleNamespace(resolve_data_config=lambda _args, pretrained_cfg: CFG)

    def is_model(self, name):
        return name in self.list_models()

    def list_models(self):
        return ["tiny", "tiny_wide"]

    def list_pretrained(self, _pattern):
        return ["tiny.a1_in1k", "tiny.b2_in1k"]

    def get_pretrained_cfg(self, _name):
        return SimpleNamespace(to_dict=lambda: CFG)

    def create_model(self, name, *, pretrained, num_classes=10, in_chans=3):
        self.asked.append((name, {"pretrained": pretrained, "num_classes": num_classes}))
        if pretrained and not self.online:
            raise OSError("Name or service not known. Try again.\nand more")
        model = nn.Sequential(
            nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        model.append(nn.Linear(4, num_classes))
        return model.train()


@pytest.fixture
def timm(monkeypatch):
    fake = Timm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_pretrained_unless_weights_are_given_or_it_is_said(timm, tmp_path):
    model = make_model("timm:tiny.a1_in1k")
    assert timm.asked[-1] == ("tiny.a1_in1k", {"pretrained": True, "num_classes": 10})
    assert not model.training
    torch.save(model.state_dict(), tmp_path / "w.pt")
    timm.asked.clear()
    again = make_model("timm:tiny", tmp_path / "w.pt")
    assert torch.equal(again[0].weight, model[0].weight)
    assert make_model("timm:tiny?pretrained=no&num_classes=3")[4].out_features == 3
    make_model("timm:tiny", fetch=False)
    assert [said["pretrained"] for _, said in timm.asked] == [False] * 3


def test_without_a_network_the_sentence_offers_both_ways(timm):
    timm.online = False
    with pytest.raises(
        InvalidArgument,
        match=r"'timm:tiny' cannot be fetched \(Name or service not known\)\. .*pretrained=no",
    ):
        make_model("timm:tiny")


def test_a_file_fetches_nothing_and_passes_nothing_on(timm):
    assert isinstance(model_from_file("timm:tiny.a1_in1k?num_classes=3", "backbone"), nn.Module)
    assert [said["pretrained"] for _, said in timm.asked] == [False]
    timm.asked.clear()
    for spec in (
        "timm:tiny?checkpoint_path=evil.pth",
        "timm:tiny?pretrained_cfg=x",
        "timm:hf-hub:some/one",
    ):
        with pytest.raises(UnknownName):
            model_from_file(spec, "backbone")
    for spec in ("hf:some/one", "hf:folder", "timm.models:create", "timms:tiny"):
        with pytest.raises(InvalidArgument, match="Give it again"):
            model_from_file(spec, "backbone")
    assert timm.asked == []


def test_cut_saved_and_loaded_without_a_network(timm, tmp_path):
    spec = "timm:tiny?num_classes=3"
    preprocess = preprocess_of(spec)
    net = off.cut(
        make_model(spec),
        torch.zeros(2, 3, 40, 40, dtype=torch.uint8),
        at=["1"],
        preprocess=preprocess,
        spec=spec,
    )
    off.save(net, tmp_path / "net")
    timm.online = False
    again = off.load(tmp_path / "net")
    x = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(net(x), again(x), strict=True))


def test_the_preprocessing_is_the_models_own(timm):
    said = preprocess_of("timm:tiny").config()
    assert (said["size"], said["short"], said["interpolation"]) == ((32, 32), 40, "bicubic")
    assert said["mean"] == [0.5, 0.25, 0.0]
    grey = preprocess_of("timm:tiny?in_chans=1&img_size=64").config()
    assert (grey["mean"], grey["size"]) == ([0.25], (64, 64))


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("timm:tony", UnknownName, "did you mean 'tiny'"),
        ("timm:tiny.a1_in2k", UnknownName, "a1_in1k"),
        ("timm:tiny?num_class=3", UnknownName, "num_classes"),
        ("timm:tiny?num_classes=none", InvalidArgument, "whole number"),
        ("timm:tiny?num_classes=0", InvalidArgument, "whole number"),
        ("timm:tiny?pretrained=maybe", InvalidArgument, "yes or no"),
        ("timm:tiny?img_size=8", InvalidArgument, "cannot be built"),
        ("timm:tiny?", InvalidArgument, "option=value"),
        ("timm:", InvalidArgument, "timm:NAME"),
    ],
)
def test_refused_with_a_sentence(timm, spec, error, says):
    with pytest.raises(error, match=says):
        make_model(spec)


@pytest.mark.parametrize(
    ("spec", "package"), [("timm:x", "timm"), ("torchvision:x", "torchvision")]
)
def test_a_missing_package_names_its_extra(monkeypatch, spec, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtra, match=rf"{package}, which is not installed; run: pip install 'offramp\[hub\]'"
    ):
        make_model(spec)


def test_a_torchvision_of_another_torch_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(InvalidArgument, match="operator nms does not exist"):
        make_model("torchvision:resnet18")


def test_a_torchvision_of_another_torch_is_told_with_a_way_on(monkeypatch):
    """PyPI's torchvision beside torch's CPU build, which breaks transformers too."""

    def fails(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(
        InvalidArgument,
        match=r"built for the installed torch, .*Install torch and torchvision from the same index",
    ):
        library("torchvision", "torchvision:resnet18")
