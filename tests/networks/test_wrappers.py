"""Models in the wrappers of their users: compiled, in parallel, averaged, scripted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import offramp as off
from offramp.building.cutting import cut, ladder
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.wrappers import deep_copy, unwrapped
from offramp.plans.plan import Plan
from small import dense, ladder_of, rows_of


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled and parallel": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_what_they_wrap(wrapper):
    x = rows_of(6)
    model = dense(2)
    wrapped = WRAPPERS[wrapper](dense(2)).eval()
    inner, prefix = unwrapped(wrapped)
    assert isinstance(inner, nn.Sequential)
    want = off.run(ladder({"small": dense(0), "large": model}), Plan.by_hand({"small": 0.5}), x)
    net = ladder({"small": dense(0), "large": wrapped})
    assert net.backbone["large"] is inner
    got = off.run(net, Plan.by_hand({"small": 0.5}), x)
    assert torch.equal(got.logits, want.logits)
    for names in (["0"], [f"{prefix}0"]):
        assert cut(wrapped, x, at=names, exits="linear").topology.exits == ("0", "backbone")


def test_a_model_compiled_in_place_runs_as_it_was_written(monkeypatch):
    model = in_place(dense(2))
    monkeypatch.setattr(
        model, "_compiled_call_impl", lambda *_: pytest.fail("compiled while it serves")
    )
    net = ladder({"small": dense(0), "large": model})
    x = rows_of(6)
    off.record(net, x, timed=False, progress=False)
    want = off.run(ladder({"small": dense(0), "large": dense(2)}), Plan.by_hand({}), x)
    assert torch.equal(off.run(net, Plan.by_hand({}), x).logits, want.logits)


def test_a_compiled_network_is_opened_recorded_and_saved(tmp_path):
    net = ladder_of(2)
    x = rows_of(30)
    wrapped = compiled(net)
    plan = Plan(
        thresholds={"small": (0.4,)},
        origin=off.record(wrapped, x, timed=False, progress=False).header.origin,
    )
    assert torch.equal(off.open(wrapped, plan)(x).logits, off.run(net, plan, x).logits)
    assert torch.equal(off.run(wrapped, plan, x).logits, off.run(net, plan, x).logits)
    off.save(wrapped, tmp_path / "net")


def traced() -> nn.Module:
    return torch.jit.trace(dense(1), rows_of(2))


def partly(make) -> nn.Module:
    return nn.Sequential(make(), nn.Tanh()).eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (traced, "the member 'large' is traced or scripted"),
        (lambda: torch.jit.script(dense(1)), "the member 'large' is traced or scripted"),
        (lambda: partly(traced), "'0' in the member 'large' is traced or scripted"),
        (
            lambda: partly(lambda: compiled(dense(1))),
            "'0' in the member 'large' is compiled by torch.compile",
        ),
        (
            lambda: partly(lambda: in_place(dense(1))),
            "'0' in the member 'large' is compiled by torch.compile",
        ),
    ],
)
def test_what_cannot_be_unwrapped_is_refused_in_a_sentence(model, says):
    with pytest.raises(BadNetwork, match=says):
        ladder({"small": dense(0), "large": model()})
    with pytest.raises(BadNetwork, match=says.replace("member 'large'", "model")):
        cut(model(), rows_of(4), at=["0"])


@pytest.mark.parametrize("verb", ["open", "run", "record", "save", "bench", "export", "fit"])
@pytest.mark.parametrize(
    ("thing", "told"), [("net", "the text 'net': load it first"), (dense(0), "got a Linear")]
)
def test_what_is_no_network_is_told_so(verb, thing, told, tmp_path):
    plan = Plan.by_hand({})
    x = rows_of(4)
    from offramp.runtime.benching import bench

    calls = {
        "open": lambda: off.open(thing, plan),
        "run": lambda: off.run(thing, plan, x),
        "record": lambda: off.record(thing, x),
        "save": lambda: off.save(thing, tmp_path / "net"),
        "bench": lambda: bench(thing, plan, x),
        "export": lambda: off.export(thing, plan, tmp_path / "out"),
        "fit": lambda: off.fit(thing, (x, torch.zeros(4))),
    }
    with pytest.raises(InvalidArgument, match=told):
        calls[verb]()


def _masked(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, _masked])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_that_a_hook_computes_is_copied(change):
    """After a forward with gradients such a weight belongs to a graph of autograd."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    change(model[0])
    x = torch.randn(5, 4)
    before = model(x)
    copy = deep_copy(model)
    assert torch.equal(copy(x), before)
    with torch.no_grad():
        for value in copy.parameters():
            value.zero_()
    assert torch.equal(model(x), before)
    # the verbs that copy a user's model
    cheaper = off.convert(model, {"2": "low_rank?rank=1"})
    assert cheaper(x).shape == (5, 3)
    first, same, none = deep_copy((model, model, None))
    assert first is same
    assert none is None
