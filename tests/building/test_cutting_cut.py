"""One model cut: names, exits, gradients through hooks, inputs of every kind, and what is
refused.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import cut
from offramp.errors import BadData, BadNetwork, InvalidArgument, OfframpError, UnknownName
from offramp.exits.pooled import Pooled, linear
from offramp.layers.preprocess import Preprocess
from offramp.models.cifar_resnet import preprocess, resnet20
from offramp.plans.plan import Plan
from small import Stages, cut_of, images_of, moved, rows_of, seeded, stages


def hooks(net: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()
    )


def test_nodes_are_named_after_the_cuts_in_the_order_in_which_they_run():
    model = stages()
    net = cut(model, images_of(2), at=["blocks.0", "stem"])
    assert net.topology.exits == ("stem", "blocks.0", "backbone")
    assert net.topology.gates == ("stem", "blocks.0")
    assert [node.after for node in net.topology.nodes] == [(), ("stem",), ("blocks.0",)]
    assert cut(model, images_of(2), at="stem").topology.exits == ("stem", "backbone")


def test_the_model_is_neither_copied_nor_changed():
    model = stages()
    before = copy.deepcopy(stages().state_dict())
    net = cut(model, images_of(1), at=["stem"])
    assert net.backbone is model
    assert not net.training
    net.require_eval()
    assert [key for key in net.state_dict() if key.startswith("backbone.")] == [
        f"backbone.{key}" for key in before
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks(net) == 0
    assert {name for name, _ in net.named_children()} == {"backbone", "fronts", "exits", "gates"}


def test_the_logits_are_those_of_exits_on_taps_and_of_the_model():
    net = cut_of("stem", "blocks.0", exits="linear")
    x = images_of(5)
    model = stages()
    first, second, last = net(x)
    assert torch.equal(last, model(x))
    tap = model.stem(x)  # before the next module works on it in place
    torch.testing.assert_close(first, net.exits["stem"].head(tap.mean((2, 3))))
    torch.testing.assert_close(
        second, net.exits["blocks.0"].head(model.blocks[0](tap).mean((2, 3)))
    )


def test_parts_of_about_equal_work():
    model = stages()
    assert cut(model, images_of(2), parts=2).topology.exits == ("blocks.0", "backbone")
    assert len(cut(model, images_of(2), parts=3).topology.exits) == 3
    for wrong in (1, 0, -3):
        with pytest.raises(
            InvalidArgument, match=f"parts must be a whole number of at least 2, got {wrong}"
        ):
            cut(model, images_of(2), parts=wrong)
    with pytest.raises(InvalidArgument, match=r"parts must be between 2 and .*, got 99"):
        cut(model, images_of(2), parts=99)


def test_exits_by_name_as_objects_and_by_functions():
    mine = linear((4, 8, 8), 3)
    net = cut_of(
        "stem",
        "blocks.0",
        exits={"stem": mine, "blocks.0": lambda shape, classes: Pooled("flat", 144, classes)},
    )
    assert net.exits["stem"] is mine
    assert net.exits["blocks.0"].config()["features"] == 144
    assert [
        type(cut_of("stem", exits=name).exits["stem"]).__name__ for name in ("mlp", "branch")
    ] == [
        "Pooled",
        "Branch",
    ]
    assert cut_of("stem", exits="offramp.exits.pooled:linear").exits["stem"].features == 4


def test_gates_for_each_cut():
    net = cut_of(gate={"stem": "max_prob", "blocks.0": lambda logits: logits[:, 0]})
    assert net.gates["stem"].config() == {"name": "max_prob"}
    names, _, scores = zip(*net.walk(images_of(3)), strict=True)
    assert names == ("stem", "blocks.0", "backbone")
    assert [score is None for score in scores] == [False, False, True]


def test_training_through_hooks():
    net = cut_of(trained=False)
    x = images_of(6)
    net.backbone.requires_grad_(False)
    sum(logits.square().sum() for logits in net(x)[:-1]).backward()
    assert all(value.grad is not None for value in net.exits.parameters())
    assert all(value.grad is None for value in net.backbone.parameters())
    net.backbone.requires_grad_(True)
    net.train()
    before = net.backbone.stem[1].running_mean.clone()
    net(x)[0].square().sum().backward()
    assert net.backbone.stem[0].weight.grad.abs().sum() > 0
    assert net.backbone.head.weight.grad is None
    assert not torch.equal(net.backbone.stem[1].running_mean, before)
    assert hooks(net) == 0


def test_hooks_are_gone_after_an_error():
    net = cut_of()
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 9, 8, 8))
    assert hooks(net) == 0


class Two(nn.Module):
    """Two inputs, by place or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(values * mask).relu() + mask[:, :5])


def two() -> nn.Module:
    return seeded(Two, 0).eval()


@pytest.mark.parametrize("form", ["mapping", "another order", "tuple", "one name"])
def test_inputs_of_every_kind(form, tmp_path):
    values = rows_of(40, inputs=6)
    mask = rows_of(40, inputs=6, seed=1) > 0
    x = {
        "mapping": {"values": values, "mask": mask},
        "another order": {"mask": mask, "values": values},
    }.get(form)
    x = {"tuple": (values, mask), "one name": {"input": values}}.get(form, x)
    if form == "one name":
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), 0).eval()
    else:
        model = two()
    if form == "one name":
        model.forward = lambda input: nn.Sequential.forward(model, input)
    net = moved(cut(model, x, at=["0" if form == "one name" else "first"], exits="linear"))
    trace = off.record(
        net, x if isinstance(x, dict) else dict(enumerate_names(x)), timed=False, progress=False
    )
    plan = Plan.by_hand(
        {net.topology.exits[0]: float(trace.columns[f"score/{net.topology.exits[0]}"].mean())}
    )
    answers = off.run(net, plan, x)
    assert answers.exit.tolist() == trace.replay(plan).exit.tolist()
    assert 0 < answers.exit.sum() < 40
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", model)
    assert again.members == net.members
    assert off.run(again, plan, x).exit.tolist() == answers.exit.tolist()


def enumerate_names(parts):
    return [(str(index), part) for index, part in enumerate(parts)]


def test_preprocessing_is_part_of_the_first_segment(tmp_path):
    net = moved(
        seeded(lambda: cut(stages(), raw(4), at=["stem"], preprocess=Preprocess((0.5,), (0.2,))), 0)
    )
    assert torch.equal(net(raw(3))[-1], stages()(Preprocess((0.5,), (0.2,))(raw(3))))
    assert "fronts.backbone" not in " ".join(net.state_dict())
    plan = Plan.by_hand({"stem": 0.0})
    answers = off.run(net, plan, raw(9))
    assert set(answers.exit.tolist()) == {0}
    torch.testing.assert_close(answers.logits, net(raw(9))[0].detach(), atol=1e-5, rtol=1e-5)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", stages(seed=5))
    torch.testing.assert_close(off.run(again, plan, raw(9)).logits, answers.logits)


def raw(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_resnet20_behind_its_preprocessing():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    net = moved(
        cut(
            resnet20().eval(),
            images,
            at=["layer1", "layer2"],
            preprocess=preprocess(),
            spec="offramp:resnet20",
        )
    )
    trace = off.record(net, images.numpy(), timed=False, progress=False)
    macs = [trace.columns[f"cost/segment/{name}"][0] for name in net.topology.exits]
    assert sum(macs) == pytest.approx(40.55e6, rel=2e-3)
    assert net.exits["layer2"].features == 32 * 18
    never = Plan.by_hand({"layer1": float("inf"), "layer2": float("inf")})
    torch.testing.assert_close(
        off.run(net, never, images).logits, net(images)[-1].detach(), atol=1e-4, rtol=1e-4
    )


def test_double_precision_gives_exits_in_double():
    net = cut(stages().double(), images_of(2).double(), at=["stem"])
    assert net.precision() == "float64"


class Twice(Stages):
    def forward(self, x):
        return super().forward(x) + self.head(self.drop(torch.zeros(len(x), 64)))


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h.relu() if h.sum() > -1e9 else self.second(h))


class Batchwise(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Reshaped(nn.Module):
    def forward(self, x):
        return x.reshape(len(x) * 2, 2)


def mlp(*between):
    return nn.Sequential(nn.Linear(4, 4), *between, nn.Linear(4, 3)).eval()


X = images_of(2)
TWICE = seeded(Twice, 0).eval()
SOMETIMES = seeded(Sometimes, 0).eval()
RESHAPED = nn.Sequential(Reshaped(), nn.Linear(2, 2), nn.Unflatten(0, (-1, 2)), nn.Flatten()).eval()
FLAT = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)).eval()
LAST = nn.ModuleDict({"last": nn.Linear(4, 3)}).eval()
REFUSED = {
    "an unknown name": (lambda: cut(stages(), X, at=["blocks.7"]), UnknownName, "blocks.0"),
    "neither at nor n": (lambda: cut(stages(), X), InvalidArgument, "exactly one"),
    "both": (lambda: cut(stages(), X, at=["stem"], parts=2), InvalidArgument, "exactly one"),
    "nothing": (lambda: cut(stages(), X, at=[]), InvalidArgument, "one or more"),
    "one twice": (lambda: cut(stages(), X, at=["stem", "stem"]), InvalidArgument, "each once"),
    "training mode": (lambda: cut(stages().train(), X, at=["stem"]), BadNetwork, "model.eval"),
    "the end": (lambda: cut(stages(), X, at=["head"]), BadNetwork, "'head'"),
    "twice": (
        lambda: cut(TWICE, X, at=["drop"]),
        BadNetwork,
        "'drop' runs more than once",
    ),
    "never": (
        lambda: cut(SOMETIMES, rows_of(2), at=["second"]),
        BadNetwork,
        "'second' did not run",
    ),
    "not exportable": (
        lambda: cut(SOMETIMES, rows_of(2), at=["first"]),
        BadNetwork,
        "h.sum.*stages",
    ),
    "mixes rows": (lambda: cut(mlp(Batchwise()), rows_of(4), at=["0"]), BadNetwork, "mixes rows"),
    "no rows first": (
        lambda: cut(
            nn.Sequential(
                Reshaped(), nn.Linear(2, 2), nn.Unflatten(0, (-1, 2)), nn.Flatten()
            ).eval(),
            rows_of(4),
            at=["1"],
        ),
        BadNetwork,
        "'1'",
    ),
    "reserved": (
        lambda: cut(LAST, rows_of(2), at="last"),
        InvalidArgument,
        "meaning",
    ),
    "no logits": (
        lambda: cut(FLAT, rows_of(2), at="0"),
        BadNetwork,
        "logits",
    ),
    "no exit": (lambda: cut_of("stem", exits="linaer"), UnknownName, "linear"),
    "an exit of another kind": (
        lambda: cut_of("stem", exits="Own"),
        InvalidArgument,
        "function of",
    ),
    "an exit that is none": (
        lambda: cut_of("stem", exits=lambda shape, classes: nn.Linear(2, 2)),
        InvalidArgument,
        "Exit",
    ),
    "exits for others": (
        lambda: cut_of("stem", exits={"head": "linear"}),
        InvalidArgument,
        "one for each",
    ),
    "gates for others": (lambda: cut_of("stem", gate={}), InvalidArgument, "one for each"),
    "other classes": (
        lambda: cut_of("stem", exits=linear((4, 8, 8), 7)),
        BadNetwork,
        "numbers of classes",
    ),
    "a branch on rows": (
        lambda: cut(mlp(nn.ReLU()), rows_of(2), at=["1"], exits="branch"),
        BadNetwork,
        "convolutional",
    ),
    "rows of other lengths": (
        lambda: cut(two(), (rows_of(2), rows_of(3)), at=["first"]),
        BadData,
        "number of rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        call()


def test_every_refusal_is_ours():
    assert all(issubclass(error, OfframpError) for _, error, _ in REFUSED.values())
