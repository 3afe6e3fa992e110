"""A network that was trained with exits of its own: found or named, kept as it is, run with real
skipping.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import offramp as off
from offramp.errors import BadData, BadNetwork, InvalidArgument, StaleRunner, UnknownName

CLASSES = 5


class Own(nn.Module):
    """Three blocks and a head after each; `gives` says what forward returns."""

    def __init__(self, gives: str = "list") -> None:
        super().__init__()
        widths = [3, 4, 6, 8]
        pairs = list(pairwise(widths))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairs
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
            for width in widths[1:]
        )
        self.gives = gives

    def forward(self, x: Tensor) -> object:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        if self.gives == "last":
            return self.heads[-1](x)
        logits = [head(each) for head, each in zip(self.heads, features, strict=True)]
        if self.gives == "backwards":
            return logits[::-1]
        if self.gives == "dict":
            return {f"exit{number}": each for number, each in enumerate(logits)}
        return tuple(logits) if self.gives == "tuple" else logits


NAMED = {"blocks.0": "heads.0", "blocks.1": "heads.1"}


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def own(gives: str = "list") -> Own:
    torch.manual_seed(1)
    return Own(gives).eval()


@pytest.mark.parametrize("gives", ["list", "tuple", "dict", "backwards", "last"])
def test_every_exit_answers_as_it_did(gives):
    model = own(gives)
    net = off.adopt(model, images(), exits=NAMED if gives == "last" else None)
    assert net.topology.exits == ("blocks.0", "blocks.1", "backbone")
    assert net.untrained() == ()
    with torch.no_grad():
        theirs = own()(images())
        for ours, expected in zip(net(images()), theirs, strict=True):
            torch.testing.assert_close(ours, expected)
        assert [type(model(images())), len(model._forward_hooks)] == [type(own(gives)(images())), 0]


def test_the_keys_and_the_tensors_are_the_users():
    model = own()
    net = off.adopt(model, images())
    assert net.backbone is model
    state = net.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[f"backbone.{key}"], value)
    assert net.exit_of("blocks.0").head is model.heads[0]
    again = copy.deepcopy(net)
    assert again.exit_of("blocks.0").head is again.backbone.heads[0]
    assert again.exit_of("blocks.0").head is not model.heads[0]


def test_rows_that_leave_skip_the_rest():
    net = off.adopt(own(), images())
    with torch.no_grad():
        threshold = float(net(images(64))[0].sort(1).values.diff(dim=1)[:, -1].median())
    plan = off.Plan.by_hand({"blocks.0": threshold, "blocks.1": float("inf")})
    trace = off.record(net, images(64), timed=False, progress=False)
    answers = off.run(net, plan, images(64))
    left = int((answers.exit == 0).sum())
    assert 0 < left < 64
    assert trace.replay(plan).exit.tolist() == answers.exit.tolist()
    macs = [trace.prices.plain(name, unit="macs", batch=1) for name in net.topology.exits]
    assert macs == sorted(macs)
    assert macs[0] < 0.3 * macs[-1]
    ran = trace.replay(plan).ran.sum(0).tolist()
    assert ran == [64] + [64 - left] * (len(ran) - 1)  # what stays runs on to the end


def test_a_saved_one_finds_its_heads_in_the_model_that_is_given(tmp_path):
    net = off.adopt(own(), images())
    off.save(net, tmp_path / "net")
    fresh = Own().eval()
    again = off.load(tmp_path / "net", fresh)
    assert again.fingerprint() == net.fingerprint()
    assert again.exit_of("blocks.1").head is fresh.heads[1]
    plan = off.Plan.by_hand({"blocks.0": 0.1, "blocks.1": 0.1})
    torch.testing.assert_close(
        off.run(again, plan, images()).logits, off.run(net, plan, images()).logits
    )


def test_a_model_that_lacks_a_head_is_refused(tmp_path):
    off.save(off.adopt(own(), images()), tmp_path / "net")
    other = Own().eval()
    del other.heads[1:]
    with pytest.raises(BadNetwork, match=r"no module 'heads.1', which is one of its exits"):
        off.load(tmp_path / "net", other)


def test_a_runner_notices_a_head_that_changes():
    net = off.adopt(own(), images())
    runner = off.open(net, off.Plan.by_hand({"blocks.0": 0.1, "blocks.1": 0.1}))
    runner(images())
    with torch.no_grad():
        net.backbone.heads[0][2].bias.add_(1.0)
    with pytest.raises(StaleRunner, match="open again"):
        runner(images())


def test_it_is_calibrated_trained_and_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = off.adopt(own(), images())
    x = images(200)
    y = torch.randint(0, CLASSES, (200,), generator=torch.Generator().manual_seed(3))
    before = net.backbone.heads[0][2].weight.clone()
    off.fit(net, (x, y), recipe="joint?epochs=1", progress=False)
    assert not torch.equal(before, net.backbone.heads[0][2].weight)
    fresh = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    labels = torch.randint(0, CLASSES, (300,), generator=torch.Generator().manual_seed(5))
    trace = off.record(net, (fresh, labels), timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.3)
    folder = off.export(net, plan, tmp_path / "out")
    assert (tmp_path / "out" / "run.py").exists()
    assert folder.plan.thresholds == plan.thresholds


def test_it_is_a_member_of_a_ladder():
    net = off.adopt(own(), images())
    large = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).eval()
    stack = off.ladder({"own": net, "large": large})
    assert stack.topology.exits == ("own/blocks.0", "own/blocks.1", "own", "large")
    with torch.no_grad():
        for ours, theirs in zip(stack(images())[:3], net(images()), strict=True):
            torch.testing.assert_close(ours, theirs)


class Auxiliary(nn.Module):
    """What the last head reads is computed in forward itself."""

    def __init__(self, *, last_first: bool) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.side = nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES))
        self.high = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.top = nn.Linear(4, CLASSES)
        self.last_first = last_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        side = self.side(low)
        top = self.top(self.high(low).mean((2, 3)))
        return (top, side) if self.last_first else (side, top)


@pytest.mark.parametrize("last_first", [True, False])
def test_the_last_answer_is_known_by_its_place_in_the_model(last_first):
    net = off.adopt(Auxiliary(last_first=last_first).eval(), images())
    assert net.topology.exits == ("low", "backbone")
    assert net.members[0].output == ("y/0" if last_first else "y/1")


class Sums(Own):
    """The first head reads a sum that forward makes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        last = self.blocks[2](second)
        return [self.heads[0](first * 2), self.heads[1](second), self.heads[2](last)]


class Functional(Own):
    """The first answer is no module's."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.blocks[0](x)
        last = self.blocks[2](self.blocks[1](first))
        return [self.heads[0](first) * 2, self.heads[2](last)]


class Widths(Own):
    """Two answers of different widths."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.heads[0](self.blocks[0](x)), x.flatten(1)]


class Stops(Own):
    """It decides by the data where to stop."""

    def forward(self, x: Tensor) -> list[Tensor]:
        answers = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            answers.append(head(x))
            if answers[-1].max() > 1e9:
                break
        return answers


@pytest.mark.parametrize(
    ("model", "exits", "error", "said"),
    [
        (
            Sums,
            None,
            BadNetwork,
            r"'heads.0' must read exactly the output of one module of the model",
        ),
        (Functional, None, BadNetwork, r"answer '0' must be the output of a module of the model"),
        (Widths, None, BadNetwork, r"one number of classes, got {'0': 5, '1': 192}"),
        (Stops, None, BadNetwork, r"cannot be exported"),
        (
            lambda: Own("last"),
            None,
            BadNetwork,
            r"logits \[B, C\] of two or more exits, got y \[6, 5\]",
        ),
        (Own, {"blocks.7": "heads.0"}, UnknownName, r"blocks.7"),
        (Own, {"blocks.0": "head.0"}, UnknownName, r"heads.0"),
        (
            Own,
            {"blocks.0": nn.Identity()},
            InvalidArgument,
            r"must name modules of the model, got a Identity",
        ),
        (Own, ["blocks.0"], InvalidArgument, r"must be a mapping of layers to heads"),
        (
            Own,
            {"blocks.0": "heads.1"},
            BadNetwork,
            r"the head 'heads.1' fails on the output of 'blocks.0': mat1",
        ),
    ],
)
def test_what_cannot_be_adopted_is_refused_in_a_sentence(model, exits, error, said):
    with pytest.raises(error, match=said) as refused:
        off.adopt(model().eval(), images(), exits=exits)
    assert "\n" not in str(refused.value).strip()


def test_training_mode_no_module_and_rows_of_another_shape_are_refused():
    with pytest.raises(BadNetwork, match=r"model.eval\(\)"):
        off.adopt(Own(), images())
    with pytest.raises(BadNetwork, match=r"must be a torch\.nn\.Module"):
        off.adopt("resnet20", images())
    with pytest.raises(BadData, match="fails on the example"):
        off.adopt(own(), torch.randn(4, 7))
