"""Models, preprocessing and gates from what the user typed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.building.factories import (
    make_exit,
    make_gate,
    make_model,
    make_preprocess,
    model_from_file,
    preprocess_of,
)
from offramp.errors import InvalidArgument, UnknownName
from offramp.gates.confidence import margin
from offramp.gates.tempered import Tempered
from offramp.layers.preprocess import Preprocess
from offramp.models.cifar_resnet import CifarResNet
from offramp.networks.nodes import Scorer


def small_model():
    return nn.Linear(4, 3)


def needs_arguments(width):
    return nn.Linear(4, width)


def no_model():
    return 5


HERE = __name__


def test_a_model_of_ours_is_in_eval_mode():
    model = make_model("offramp:resnet20")
    assert isinstance(model, CifarResNet)
    assert not model.training


def test_a_model_of_the_user(tmp_path):
    model = make_model(f"{HERE}:small_model")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = make_model(f"{HERE}:small_model", tmp_path / "w.pt")
    assert torch.equal(again.weight, model.weight)


def test_a_spec_may_have_arguments_in_what_is_typed_and_in_files():
    assert make_model(f"{HERE}:needs_arguments?width=7").out_features == 7
    spec = "offramp:resnet20?classes=100"
    assert make_model(spec).linear.out_features == 100
    assert model_from_file(spec, "member").linear.out_features == 100
    assert isinstance(preprocess_of(spec), Preprocess)


def test_an_exit_may_have_arguments():
    assert make_exit("strided?width=5", (3, 8, 8), 4).width == 5
    for name, error, says in (
        ("strided?widht=5", UnknownName, "'width'"),
        ("strided?classes=5", UnknownName, "argument of the exit 'strided'"),
        ("strided?width=-3", InvalidArgument, "cannot be called with these arguments"),
        ("strided?width", InvalidArgument, "NAME=VALUE"),
        ("stridet?width=5", UnknownName, "strided"),
    ):
        with pytest.raises(error, match=says):
            make_exit(name, (3, 8, 8), 4)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("offramp:resnet21", UnknownName, "resnet20"),
        (f"offramp:{HERE}:small_model", UnknownName, "no model"),
        ("resnet20", InvalidArgument, "offramp:NAME"),
        (f"{HERE}:nothing", InvalidArgument, "cannot import"),
        (f"{HERE}:needs_arguments", InvalidArgument, "without arguments"),
        (f"{HERE}:needs_arguments?with=4", InvalidArgument, "with these arguments"),
        ("offramp:resnet20?klasses=4", InvalidArgument, "klasses"),
        ("offramp:resnet20?classes", InvalidArgument, "NAME=VALUE"),
        ("offramp:resnet20?classes=-1", InvalidArgument, "cannot be called with these arguments"),
        (
            "offramp:resnet20?classes=" + "[" * 100_000,
            InvalidArgument,
            "cannot be called with these arguments",
        ),
        (f"{HERE}:no_model", InvalidArgument, "must make a torch.nn.Module"),
    ],
)
def test_specs_that_are_refused(spec, error, says):
    with pytest.raises(error, match=says):
        make_model(spec)


@pytest.mark.parametrize(
    "spec", [None, f"{HERE}:small_model", f"offramp:{HERE}:small_model", "os:abort"]
)
def test_a_name_in_a_file_runs_no_code_of_others(spec):
    with pytest.raises(InvalidArgument):
        model_from_file(spec, "small")
    assert isinstance(model_from_file("offramp:digits_small", "small"), nn.Module)


def test_preprocessing():
    assert make_preprocess("none") is None
    assert make_preprocess("unit").config() == Preprocess().config()
    assert make_preprocess("imagenet").config()["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert isinstance(make_preprocess(f"{HERE}:small_model"), nn.Linear)
    for wrong in ("units", f"{HERE}:no_model"):
        with pytest.raises(InvalidArgument):
            make_preprocess(wrong)
    assert preprocess_of("offramp:resnet20").config()["expects"] == (32, 32)
    assert preprocess_of(f"{HERE}:small_model") is None


def test_gates():
    named = make_gate("margin")
    own = make_gate(margin)
    assert named.config() == {"name": "margin"}
    assert own.config() == {"name": "offramp.gates.confidence:margin"}
    gate = Tempered(named, 2.0)
    assert make_gate(gate) is gate
    assert make_gate(gate.config()).config() == gate.config()
    assert isinstance(make_gate(lambda logits: logits.amax(-1)), Scorer)


@pytest.mark.parametrize(
    ("gate", "error", "says"),
    [
        ("margn", UnknownName, "margin"),
        ("Tempered", InvalidArgument, "arguments"),
        (5, InvalidArgument, "must be a name"),
        (None, InvalidArgument, "must be a name"),
        ({"name": f"{HERE}:small_model"}, InvalidArgument, "gates="),
        (
            {"name": "Tempered", "temperature": 2.0, "gate": {"name": "os:abort"}},
            InvalidArgument,
            "gates=",
        ),
    ],
)
def test_gates_that_are_refused(gate, error, says):
    with pytest.raises(error, match=says):
        make_gate(gate)
