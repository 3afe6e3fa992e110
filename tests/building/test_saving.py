"""A network on disk comes back as it was, runs no code, and is refused when it was edited."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import offramp as off
from offramp._support.files import checksum, read_json, write_json
from offramp.building.cutting import ladder
from offramp.building.factories import make_gate
from offramp.contracts import Gate
from offramp.errors import BadFile, InvalidArgument, NewerSchema, OfframpError
from offramp.exits.pooled import linear
from offramp.gates.confidence import margin, max_prob
from offramp.gates.tempered import Tempered
from offramp.layers.preprocess import Preprocess
from offramp.models.digits import digits_large, digits_small
from small import conv, dense, ladder_of, rows_of, seeded


def shelved(seed: int = 0, **options):
    """A ladder of our own shelf's models, which loads without being given anything."""
    models = {"small": seeded(digits_small, seed), "large": seeded(digits_large, seed + 1)}
    fronts = {
        name: (model, Preprocess((0.5,), (2.0,), scale=16.0)) for name, model in models.items()
    }
    specs = {"small": "offramp:digits_small", "large": "offramp:digits_large"}
    return ladder(fronts, sources=specs, **options).eval()


def images(count: int = 5):
    return torch.randint(
        0, 17, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"answer": "mean"},
        {"gate": "max_prob"},
        {"gate": {"small": Tempered(make_gate("neg_entropy"), 1.7)}},
        {"gate": Tempered(Tempered(make_gate("margin"), 0.5), 3.0)},
    ],
)
def test_it_comes_back_without_being_given_anything(tmp_path, options):
    net = shelved(**options)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert again.fingerprint() == net.fingerprint()
    assert json.dumps(again.config()) == json.dumps(net.config())
    assert not any(module.training for module in again.modules())
    for mine, its in zip(net.walk(images()), again.walk(images()), strict=True):
        assert mine[0] == its[0]
        assert torch.equal(mine[1], its[1])
        assert (mine[2] is None and its[2] is None) or torch.equal(mine[2], its[2])


def test_models_of_the_user_are_given_again(tmp_path):
    net = ladder_of(3, seed=4)
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match="give them again"):
        off.load(tmp_path / "net")
    blank = {name: dense(index, seed=99) for index, name in enumerate(net.topology.exits)}
    again = off.load(tmp_path / "net", blank)
    for mine, its in zip(net(rows_of(5)), again(rows_of(5)), strict=True):
        assert torch.equal(mine, its)
    with pytest.raises(BadFile, match="does not fit"):
        off.load(
            tmp_path / "net", {name: conv(index) for index, name in enumerate(net.topology.exits)}
        )
    with pytest.raises(InvalidArgument):
        off.load(tmp_path / "net", dense(0))


class MyFront(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor

    def extra_repr(self):
        return str(self.factor)


def test_preprocessing_of_the_user_is_given_again(tmp_path):
    net = ladder({"a": (dense(0), MyFront()), "b": dense(1)}).eval()
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match="preprocessing of member 'a'"):
        off.load(tmp_path / "net", {"a": dense(0), "b": dense(1)})
    again = off.load(tmp_path / "net", {"a": (dense(0), MyFront()), "b": dense(1)})
    assert torch.equal(again(rows_of(3))[0], net(rows_of(3))[0])
    with pytest.raises(InvalidArgument, match="differs"):
        off.load(tmp_path / "net", {"a": (dense(0), MyFront(3.0)), "b": dense(1)})


def test_gates_of_the_user_are_given_again(tmp_path):
    net = ladder({"a": dense(0), "b": dense(1)}, gate=lambda logits: logits.amax(-1)).eval()
    off.save(net, tmp_path / "net")
    models = {"a": dense(0), "b": dense(1)}
    with pytest.raises(InvalidArgument, match="gates="):
        off.load(tmp_path / "net", models)
    again = off.load(tmp_path / "net", models, gates={"a": net.gates["a"]})
    assert again.fingerprint() == net.fingerprint()
    with pytest.raises(InvalidArgument, match="differs"):
        off.load(tmp_path / "net", models, gates={"a": make_gate("margin")})


def test_state_dict_keys(tmp_path):
    net = ladder_of(2)
    keys = set(net.state_dict())
    assert keys == {f"backbone.small.{key}" for key in dense(0).state_dict()} | {
        f"backbone.middle.{key}" for key in dense(1).state_dict()
    }


def test_the_fingerprint_says_what_is_computed():
    base = shelved().fingerprint()
    assert shelved().fingerprint() == base
    renamed = {"small": seeded(digits_small, 0), "large": seeded(digits_large, 1)}
    preprocessed = {
        name: (model, Preprocess((0.5,), (2.0,), scale=16.0)) for name, model in renamed.items()
    }
    # how a model is built says nothing about what it computes
    assert ladder(preprocessed).eval().fingerprint() == base
    for other in (
        shelved(seed=1),
        shelved(gate="max_prob"),
        shelved(gate=Tempered(make_gate("margin"), 2.0)),
        shelved(answer="mean"),
        shelved().double(),
        ladder(renamed).eval(),
    ):
        assert other.fingerprint() != base
    assert shelved(gate=margin).fingerprint() != shelved(gate=max_prob).fingerprint()


def test_a_network_is_written_over_an_older_one_only(tmp_path):
    off.save(shelved(), tmp_path / "net")
    off.save(shelved(seed=5), tmp_path / "net")
    assert off.load(tmp_path / "net").fingerprint() == shelved(seed=5).fingerprint()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(BadFile, match="not written by offramp"):
        off.save(shelved(), tmp_path / "other")


@pytest.fixture
def saved(tmp_path):
    off.save(shelved(), tmp_path / "net")
    return tmp_path / "net"


def rewrite(folder: Path, change) -> None:
    """Change network.json, with a checksum that fits."""
    _, body = read_json(folder / "network.json", "network", 1)
    change(body)
    write_json(folder / "network.json", "network", 1, body)


def test_weights_of_another_network_are_noticed(saved, tmp_path):
    off.save(shelved(seed=7), tmp_path / "other")
    (saved / "weights.safetensors").write_bytes(
        (tmp_path / "other" / "weights.safetensors").read_bytes()
    )
    with pytest.raises(BadFile, match="not the file"):
        off.load(saved)


def test_newer_and_edited_and_missing(saved):
    text = (saved / "network.json").read_text()
    (saved / "network.json").write_text(text.replace("offramp/network/1", "offramp/network/7"))
    with pytest.raises(NewerSchema, match="network/7"):
        off.load(saved)
    (saved / "network.json").write_text(text.replace("margin", "max_prob"))
    with pytest.raises(BadFile, match="edited"):
        off.load(saved)
    (saved / "network.json").write_text(text)
    (saved / "weights.safetensors").unlink()
    with pytest.raises(BadFile, match="does not exist"):
        off.load(saved)
    with pytest.raises(BadFile, match="does not exist"):
        off.load(saved / "nowhere")


MARK = Path("ran-code")


def put(*path):
    *way, last, value = path

    def change(body):
        for key in way:
            body = body[key]
        body[last] = value

    return change


EVIL = "spy_module:ran"
EDITS = {
    "spec": put("rungs", 0, "spec", EVIL),
    "spec behind our own prefix": put("rungs", 0, "spec", f"offramp:{EVIL}"),
    "spec with two prefixes": put("rungs", 0, "spec", f"offramp:offramp:{EVIL}"),
    "gate": put("gates", "small", "name", EVIL),
    "gate with arguments": put("gates", "small", {"name": EVIL, "a": 1}),
    "wrapped gate": put(
        "gates", "small", {"name": "Tempered", "temperature": 1, "gate": {"name": EVIL}}
    ),
    "exit": put("exits", "small", "name", EVIL),
    "preprocess": put("fronts", "small", {"name": EVIL}),
    "spec is a number": put("rungs", 0, "spec", 5),
    "spec is nothing": put("rungs", 0, "spec", None),
    "spec is no model": put("rungs", 0, "spec", "offramp:Block"),
    "unknown model": put("rungs", 0, "spec", "offramp:digits_smal"),
    "another model": put("rungs", 0, "spec", "offramp:digits_large"),
    "member without name": put("rungs", 0, {}),
    "member with dots": put("rungs", 0, "name", "a.b"),
    "member with another name": put("rungs", 0, "name", "tiny"),
    "members are text": put("rungs", "ab"),
    "no members": put("rungs", []),
    "one member": lambda body: body["rungs"].pop(),
    "no chain": lambda body: body.pop("chain"),
    "chain of others": lambda body: [node.update(name="z") for node in body["chain"][1:]],
    "gate missing": put("gates", {}),
    "gate too many": lambda body: body["gates"].update(large={"name": "margin"}),
    "exit missing": lambda body: body["exits"].pop("small"),
    "exit with arguments": put("exits", "small", {"name": "Own", "a": 5}),
    "exit is a number": put("exits", "small", 5),
    "exit reads nothing": put("exits", "large", {"name": "Mean", "before": "nobody", "visited": 1}),
    "mean that visited nobody": put(
        "exits", "large", {"name": "Mean", "before": "small", "visited": 0}
    ),
    "mean that visited text": put(
        "exits", "large", {"name": "Mean", "before": "small", "visited": "a"}
    ),
    "gate that is no gate": put("gates", "small", {"name": "best_temperature"}),
    "gate that is called": put(
        "gates", "small", {"name": "best_temperature", "logits": [], "labels": []}
    ),
    "gate without arguments": put("gates", "small", {"name": "Tempered"}),
    "temperature": put(
        "gates", "small", {"name": "Tempered", "temperature": 0, "gate": {"name": "margin"}}
    ),
    "temperature text": put(
        "gates", "small", {"name": "Tempered", "temperature": "a", "gate": {"name": "margin"}}
    ),
    "temperature huge": put(
        "gates", "small", {"name": "Tempered", "temperature": 10**400, "gate": {"name": "margin"}}
    ),
    "preprocessing size": put("fronts", "small", "size", [1]),
    "preprocessing size text": put("fronts", "small", "size", ["a", "b"]),
    "preprocessing mean": put("fronts", "small", "mean", [[1], [1, 2]]),
    "preprocessing scale": put("fronts", "small", "scale", "a"),
    "preprocessing is text": put("fronts", "small", "Front"),
    "preprocessing without name": put("fronts", "small", {}),
    "no fronts": put("fronts", {}),
    "another preprocessing": put("fronts", "small", "scale", 255.0),
    "members in another order": lambda body: body["rungs"].reverse(),
    "fingerprint": put("fingerprint", "0" * 16),
    "no fingerprint": lambda body: body.pop("fingerprint"),
    "no weights": lambda body: body.pop("weights"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_refused_and_runs_no_code(saved, edit, monkeypatch):
    monkeypatch.chdir(saved.parent)
    (saved.parent / "spy_module.py").write_text("open('ran-code', 'w').close()\nran = print\n")
    monkeypatch.syspath_prepend(saved.parent)
    monkeypatch.delitem(sys.modules, "spy_module", raising=False)
    rewrite(saved, EDITS[edit])
    with pytest.raises(OfframpError):
        off.load(saved)
    assert not MARK.exists()
    assert "spy_module" not in sys.modules


def test_the_checksum_of_these_edits_does_fit(saved):
    rewrite(saved, lambda body: None)
    assert off.load(saved).topology.exits == ("small", "large")
    assert len(checksum({})) == 16


def saved_again(net, folder, **given):
    """The network, and what is read after it was written."""
    off.save(net, folder)
    again = off.load(folder, **given)
    assert again.fingerprint() == net.fingerprint()
    assert again.topology == net.topology
    return again


IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


def nested(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return nn.Sequential(inner, nn.Linear(3, 2)).eval()


def test_exits_at_nodes_with_dots_share_weights_again(tmp_path):
    head = linear((3,), 2)
    net = off.cut(nested(0), torch.randn(4, 3), at=["0.0", "0.1"], exits={"0.0": head, "0.1": head})
    again = saved_again(net, tmp_path / "net", model=nested(1))
    first = [*again.exit_of("0.0").parameters()]
    second = [*again.exit_of("0.1").parameters()]
    for one, other in zip(first, second, strict=True):
        assert one is other


def test_arms_that_share_weights_share_them_again(tmp_path):
    model = off.make_model("offramp:resnet20")
    preprocess = off.make_preprocess("offramp:resnet20")
    net = off.resolutions(model, IMAGES, [16, 32], preprocess=preprocess, spec="offramp:resnet20")
    again = saved_again(net, tmp_path / "net")
    small, large = again.backbone["r16"][1], again.backbone["r32"][1]
    assert small.conv1.weight is large.conv1.weight
    assert len([*again.parameters()]) == len([*net.parameters()])
    # so that training one arm trains the other
    with torch.no_grad():
        small.conv1.weight.add_(1)
    assert torch.equal(large.conv1.weight, net.backbone["r32"][1].conv1.weight + 1)


def test_pieces_of_a_named_model_are_made_again(tmp_path):
    model = off.make_model("offramp:resnet20")
    preprocess = off.make_preprocess("offramp:resnet20")
    net = off.cut(model, IMAGES, skip="layer3.*", preprocess=preprocess, spec="offramp:resnet20")
    again = saved_again(net, tmp_path / "skip")
    plan = off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.0))
    y = off.run(net, plan, IMAGES).logits
    torch.testing.assert_close(off.run(again, plan, IMAGES).logits, y)
    assert saved_again(again, tmp_path / "twice").whole == net.whole

    spec = "offramp:resnet20|layer3=adaptive_depth?per=sample"
    halting = off.make_model(spec)
    net = off.unrolled(halting, IMAGES, preprocess=preprocess, spec=spec)
    saved_again(net, tmp_path / "unrolled")


def test_pieces_of_the_user_s_model_take_the_model_again(tmp_path):
    x = torch.randn(2, 6)
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).eval()
    net = off.cut(model, x, skip="1", spec="my.module:model")
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match=r"member 'backbone' is 'my\.module:model'"):
        off.load(tmp_path / "net")
    for given in (model, {"backbone": model}):
        assert off.load(tmp_path / "net", given).fingerprint() == net.fingerprint()
    pieces = {member.name: net.model_of(member) for member in net.members}
    assert off.load(tmp_path / "net", pieces).fingerprint() == net.fingerprint()


class OwnGate(Gate):
    """A gate of the user's, which a file may not name."""

    def score(self, seen):
        return seen.features.sum(1)

    def config(self):
        return {"name": "my.module:OwnGate"}


def test_all_that_must_be_given_again_is_in_one_sentence(tmp_path):
    x = torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    gate = OwnGate()
    net = off.cut(model, x, skip="1", preprocess=nn.Identity(), gate=gate, spec="my.module:model")
    off.save(net, tmp_path / "net")
    says = (
        r"member 'backbone' is 'my\.module:model', the preprocessing of member 'backbone' is "
        r".*Identity.*, the gate 'skip-1' is 'my\.module:OwnGate', .*give them again: "
        r"load\(folder, model=\{'backbone': \(model, preprocess\)\}, gates=\{'skip-1': gate\}\)"
    )
    with pytest.raises(InvalidArgument, match=says):
        off.load(tmp_path / "net")
    again = off.load(tmp_path / "net", (model, nn.Identity()), gates={"skip-1": gate})
    assert again.fingerprint() == net.fingerprint()
