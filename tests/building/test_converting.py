"""Converted copies: what is matched, what is refused, and how a text builds them again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import conversions_of, convert, methods, spec_with, split_spec
from offramp.building.factories import built_from_file, make_model
from offramp.errors import BadNetwork, InvalidArgument, Notice, UnknownName
from offramp.layers.ghost import Ghost
from offramp.layers.low_rank import LowRank
from small import Stages, images_of, seeded, stages

X = torch.randint(0, 255, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)


def resnet():
    return seeded(lambda: make_model("offramp:resnet20"), 0)


def test_patterns_classes_and_the_last_key():
    model = stages()
    before = copy.deepcopy(model.state_dict())
    made = convert(model, {"Conv2d": "ghost", "blocks.*": "keep", nn.Linear: "low_rank?rank=2"})
    assert isinstance(made.stem[0], Ghost)
    assert isinstance(made.blocks[0][1], nn.Conv2d)
    assert isinstance(made.head, LowRank)
    assert made.stem[1] is not model.stem[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert made(images_of(3)).shape == (3, 3)


def test_methods_by_class_by_function_and_of_ones_own():
    made = convert(stages(), {"head": lambda layer: LowRank.from_layer(layer, rank=2)})
    assert made.head.options() == {"rank": 2}
    made = convert(stages(), {"stem.0": Ghost})
    assert made.stem[0].options() == {"ratio": 2, "kernel": 3}
    made = convert(stages(), {"head": "offramp.layers.low_rank:LowRank?rank=1"})
    assert made.head.options() == {"rank": 1}
    with pytest.raises(InvalidArgument, match="must be a subclass"):
        convert(stages(), {"head": "torch.nn:Linear"})


def test_the_shelf_lists_its_methods():
    assert {"adaptive_depth", "ghost", "keep", "low_rank", "pruned", "tucker"} <= set(methods())
    assert "preprocess" not in methods()


@pytest.mark.parametrize(
    ("layers", "error", "says"),
    [
        (
            {"sten.*": "ghost"},
            UnknownName,
            "'sten.*' matches no module of this model; the nearest names are stem",
        ),
        ({nn.LSTM: "ghost"}, UnknownName, "the model has no LSTM; it has BatchNorm2d, Conv2d"),
        ({"head": "goats"}, UnknownName, "called 'goats'; did you mean 'ghost'"),
        (
            {"head": "low_rank?rnk=2"},
            UnknownName,
            "option of low_rank called 'rnk'; did you mean 'rank'",
        ),
        (
            {"head": "ghost"},
            BadNetwork,
            r"ghost replaces Conv2d; the pattern matched only 'head' \(Linear\)",
        ),
        ({"stem.0": "ghost?ratio=9"}, InvalidArgument, "'stem.0': ratio must be at most 4"),
        ({"head": "low_rank?energy=1.0"}, BadNetwork, "saves nothing here: 'head'"),
        ({}, InvalidArgument, "must map patterns to methods"),
        ({1: "ghost"}, InvalidArgument, "a pattern of names or a class of modules, got 1"),
        ({"head": 3}, InvalidArgument, "must be a name, a Layer or a function"),
        ({"head": lambda layer: 3}, InvalidArgument, "must give a module, got int"),
        ({"head": "keep?x=1"}, InvalidArgument, "keep has no options, got 'keep.x=1'"),
        ({"head": "resized"}, InvalidArgument, "'head': resized needs options"),
        (
            {"blocks": lambda layer: nn.Identity(), "blocks.0.1": "ghost"},
            BadNetwork,
            "'blocks.0.1' is inside a module that an earlier key replaced",
        ),
    ],
)
def test_what_is_refused(layers, error, says):
    with pytest.raises(error, match=says):
        convert(stages(), layers)


def test_a_model_is_asked_for():
    with pytest.raises(InvalidArgument, match=r"must be a torch.nn.Module, got str"):
        convert("offramp:resnet20", {"head": "ghost"})


def test_layers_that_save_nothing_are_left_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.ones(40, 40))
    with pytest.warns(Notice, match="low_rank left 0 as they are"):
        made = convert(model, {"Linear": "low_rank?energy=0.99"})
    assert isinstance(made[0], nn.Linear)
    assert made[1].options() == {"rank": 1}


def test_shared_weights_are_refused():
    model = stages()
    model.blocks[0][1].weight = model.blocks[1][1].weight
    with pytest.raises(
        BadNetwork, match=r"are the same weights; replacing 'blocks.0.1' would untie"
    ):
        convert(model, {"blocks.0.1": "ghost"})
    made = convert(model, {"head": "low_rank?rank=1"})  # what is tied stays tied
    assert made.blocks[0][1].weight is made.blocks[1][1].weight
    twice = stages()
    twice.blocks[1] = twice.blocks[0]
    with pytest.raises(BadNetwork, match="would untie"):
        convert(twice, {"blocks.0.1": "ghost"})


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def _with_its_own_forward(layer):
    layer.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_hooked, "'head' has a forward hook, which the layer in its place would not call"),
        (torch.nn.utils.spectral_norm, "'head' has a forward hook"),
        (_with_its_own_forward, "'head' has a forward of its own"),
    ],
)
def test_code_that_would_be_lost_is_refused(change, says):
    model = stages()
    change(model.head)
    with pytest.raises(BadNetwork, match=says):
        convert(model, {"head": "low_rank?rank=1"})
    convert(model, {"stem.0": "ghost"})  # elsewhere it stays


def test_what_was_converted_twice_has_no_text():
    model = stages()
    twice = convert(convert(model, {"head": "low_rank?rank=2"}), {"head.second": "low_rank?rank=1"})
    assert twice(images_of(2)).shape == (2, 3)
    with pytest.raises(InvalidArgument, match="cannot be written as a spec"):
        conversions_of(twice, model)
    for method, part in (("low_rank?rank=2", "first"), ("ghost", "cheap"), ("tucker", "core")):
        layer = "head" if part == "first" else "blocks.1.1"
        if method == "tucker":
            method = "tucker?rank_in=2&rank_out=2"
        once = convert(model, {layer: method})
        twice = convert(once, {f"{layer}.{part}": lambda module: nn.Sequential(module)})
        with pytest.raises(InvalidArgument, match="converted once more, which cannot be written"):
            conversions_of(twice, model)
    replaced = convert(model, {"head": lambda layer: nn.Sequential(layer)})
    with pytest.raises(InvalidArgument, match="cannot be written as a spec"):
        conversions_of(replaced, model)


def test_an_error_in_a_layer_of_the_user_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "mine_that_fails.py").write_text(
        "from torch import nn\n"
        "from offramp.contracts import Layer\n"
        "class Fails(Layer):\n"
        "    kinds = (nn.Linear,)\n"
        "    @classmethod\n"
        "    def from_layer(cls, dense, *, late=False):\n"
        "        return cls() if late else 1 / 0\n"
        "    def cost(self, shape): return None\n"
        "    def forward(self, x): raise KeyError('lost')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    says = r"'head': 'mine_that_fails:Fails' must make a layer, got ZeroDivisionError: .*fails.py:7"
    with pytest.raises(InvalidArgument, match=says):
        convert(stages(), {"head": "mine_that_fails:Fails"})
    with pytest.raises(BadNetwork, match="fails on the example: KeyError: 'lost'"):
        convert(stages(), {"head": "mine_that_fails:Fails?late=true"}, example=images_of(2))


def test_a_copy_that_does_not_run_is_refused():
    with pytest.raises(BadNetwork, match="fails on the example"):
        convert(stages(), {"head": lambda layer: nn.Linear(3, 3)}, example=images_of(2))


def test_the_whole_model_can_be_replaced():
    made = convert(nn.Linear(8, 8).eval(), {"": "low_rank?rank=2"})
    assert made.options() == {"rank": 2}


def test_a_text_builds_it_again():
    model = resnet()
    made = convert(model, {"layer3.*": "ghost?ratio=4", "linear": "low_rank?rank=3"})
    spec = spec_with("offramp:resnet20", conversions_of(made, model))
    base, layers = split_spec(spec)
    assert base == "offramp:resnet20"
    assert layers["layer3.0.conv1"] == "ghost?ratio=4&kernel=3"
    assert built_from_file(spec)
    assert not built_from_file("offramp:resnet20|a=my.module:Mine")
    again = make_model(spec)
    again.load_state_dict(made.state_dict(), strict=True)
    x = X.float() / 255
    assert torch.equal(again(x), made(x))


def test_layers_of_ones_own_have_no_text():
    class Mine(Ghost):
        """Somebody's."""

    made = convert(stages(), {"stem.0": Mine})
    with pytest.raises(
        InvalidArgument, match=r"'stem.0' is a Mine, which cannot be written as a spec"
    ):
        conversions_of(made)


@pytest.mark.parametrize(
    "spec", ["offramp:resnet20|", "offramp:resnet20|layer3", "offramp:resnet20|=ghost"]
)
def test_a_wrong_text(spec):
    with pytest.raises(InvalidArgument, match="must be PATTERN=METHOD"):
        make_model(spec)


def test_weights_of_before_and_after(tmp_path):
    from safetensors.torch import save_file

    spec = "offramp:resnet20|layer3.*=ghost?ratio=2"
    plain = resnet()
    made = convert(plain, {"layer3.*": "ghost?ratio=2"})
    with torch.no_grad():
        made.conv1.weight.add_(1)
    save_file(plain.state_dict(), str(tmp_path / "before.safetensors"))
    save_file(made.state_dict(), str(tmp_path / "after.safetensors"))
    x = X.float() / 255
    after = make_model(spec, tmp_path / "after.safetensors")
    assert torch.equal(after(x), made(x))
    before = make_model(spec, tmp_path / "before.safetensors")
    assert torch.equal(before(x), convert(plain, {"layer3.*": "ghost?ratio=2"})(x))


def test_it_is_a_member_of_a_ladder_is_cut_saved_and_exported(tmp_path):
    plain = resnet()
    made = convert(plain, {"layer3.*": "tucker?rank_in=16&rank_out=16"})
    spec = spec_with("offramp:resnet20", conversions_of(made))
    net = off.ladder(
        {"small": made, "large": plain}, sources={"small": spec, "large": "offramp:resnet20"}
    )
    off.save(net.eval(), tmp_path / "net")
    again = off.load(tmp_path / "net")
    x = X.float() / 255
    for one, other in zip(net(x), again(x), strict=True):
        assert torch.equal(one, other)
    whole = off.cut(made, x, at=["layer2"])
    plan = off.Plan.by_hand({"layer2": float("inf")})
    assert torch.allclose(off.run(whole, plan, x).logits, made(x), atol=1e-4)


def test_a_stage_of_a_model_in_a_wrapper():
    made = convert(nn.DataParallel(Stages()).eval(), {"head": "low_rank?rank=1"})
    assert isinstance(made, Stages)
