"""The network itself: what it holds, what it says of itself, what its parts must give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import ladder
from offramp.building.factories import make_gate
from offramp.errors import BadData, BadNetwork
from offramp.networks.inputs import as_input
from offramp.networks.members import ModelSpec
from offramp.networks.network import Network, described
from offramp.networks.nodes import Seen, answer, grade
from offramp.partition.segmenting import segments_of
from offramp.plans.topology import Node, Topology
from small import dense, ladder_of, rows_of


def test_segments_are_never_registered():
    net = ladder_of(3)
    assert [*segments_of(net)] == list(net.topology.exits)
    assert {name for name, _ in net.named_children()} == {"backbone", "fronts", "exits", "gates"}
    assert len(list(net.parameters())) == sum(
        len(list(dense(index).parameters())) for index in range(3)
    )


def pieces(**changed):
    names = ("a", "b")
    whole = {
        "backbone": nn.ModuleDict({name: dense(0) for name in names}),
        "members": tuple(ModelSpec(name) for name in names),
        "topology": Topology.chain([Node("a"), Node("b")]),
        "fronts": nn.ModuleDict(),
        "exits": nn.ModuleDict(dict(ladder([dense(0), dense(1)]).exits.items())),
        "gates": nn.ModuleDict({"a": make_gate("margin")}),
    }
    whole["exits"] = nn.ModuleDict(dict(zip(names, whole["exits"].values(), strict=True)))
    return {**whole, **changed}


def test_the_parts_must_belong_together():
    Network(**pieces())
    for wrong in (
        {"members": (ModelSpec("b"), ModelSpec("a"))},
        {"members": (ModelSpec("a"),)},
        {"topology": Topology.chain([Node("a"), Node("c")])},
        {"gates": nn.ModuleDict()},
        {"gates": nn.ModuleDict({"a": make_gate("margin"), "b": make_gate("margin")})},
        {"exits": nn.ModuleDict()},
        {"fronts": nn.ModuleDict({"c": nn.Identity()})},
        {"backbone": nn.ModuleDict({"a": dense(0)})},
    ):
        with pytest.raises(BadNetwork):
            Network(**pieces(**wrong))


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(3, 4, 5), torch.zeros(3, 1), (torch.zeros(3, 4),), None]
)
def test_an_exit_gives_logits(bad):
    class Odd(nn.Module):
        def forward(self, seen):
            return bad

    with pytest.raises(BadNetwork, match="'a' must give"):
        answer(Odd(), Seen(torch.zeros(3, 4), {}), "a")


def test_a_score_is_nan_where_a_logit_is_not_finite():
    own = torch.tensor(
        [[1.0, 5.0], [np.nan, 1.0], [np.inf, 0.0], [-np.inf, 0.0], [np.inf, -np.inf], [9.0, 9.0]]
    )
    score = grade(make_gate("max_prob"), Seen(own, {}), own)
    assert score.isnan().tolist() == [False, True, True, True, True, False]


def test_scores_are_float32_and_one_per_row():
    own = rows_of(4).double()
    assert grade(make_gate("margin"), Seen(own, {}), own).dtype == torch.float32
    with pytest.raises(BadNetwork, match="one per row"):
        grade(make_gate(lambda logits: logits), Seen(own, {}), own)


def test_precision_and_device():
    assert ladder_of(2).precision() == "float32"
    assert ladder_of(2).double().precision() == "float64"
    mixed = ladder_of(2)
    mixed.backbone["small"].half()
    assert mixed.precision() == "float16+float32"
    assert ladder([nn.Flatten(), nn.Flatten()]).precision() == "float32"
    mixed.backbone["small"].to("meta")
    with pytest.raises(BadNetwork, match="one device"):
        mixed.device()


def test_training_mode_anywhere_is_noticed():
    net = ladder_of(2)
    net.require_eval()
    net.backbone["middle"][1].train()
    with pytest.raises(BadNetwork, match="eval"):
        net.require_eval()


def test_the_fingerprint_sees_every_weight():
    net = ladder_of(2)
    before = net.fingerprint()
    with torch.no_grad():
        net.backbone["middle"][2].bias[1] += 1e-7 + net.backbone["middle"][2].bias[1].abs() * 1e-6
    assert net.fingerprint() != before
    assert len(before) == 16


def test_a_module_without_config_is_described_by_its_print():
    assert described(nn.ReLU()) == {"name": "torch.nn.modules.activation:ReLU", "repr": "ReLU()"}
    assert described(make_gate("margin")) == {"name": "margin"}


def test_what_is_no_batch():
    assert as_input([[1.0, 2.0]]).shape == (1, 2)
    assert as_input(np.zeros((2, 3), np.uint8)).dtype == torch.uint8
    for wrong in ("rows", None, {"x": np.zeros(3)}, 5.0, np.array(["a"])):
        with pytest.raises(BadData):
            as_input(wrong)


def test_gradients_reach_the_models():
    net = ladder_of(2, answer="mean")
    sum(logits.sum() for logits in net(rows_of(3))).backward()
    net.zero_grad()
    net(rows_of(3))[-1].logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class Masked(nn.Module):
    """Two inputs by name: the mean of what the mask leaves, then a linear rule."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rule = nn.Linear(6, 3)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.rule(values * mask)


def test_several_inputs_go_all_the_way(tmp_path):
    rng = np.random.default_rng(0)
    x = {
        "values": rng.standard_normal((40, 6)).astype(np.float32),
        "mask": rng.integers(0, 2, (40, 6)).astype(bool),
    }
    net = off.ladder({"small": Masked(0), "large": Masked(1)}).eval()
    trace = off.record(net, x, timed=False, progress=False)
    plan = off.calibrate(trace, budget=1.5)
    plan.save(tmp_path / "plan.json")
    plan = off.Plan.load(tmp_path / "plan.json")
    answers = off.run(net, plan, x)
    done = trace.replay(plan)
    assert answers.exit.tolist() == done.exit.tolist()
    assert 0 < answers.exit.sum() < 40
    assert answers.logits.argmax(1).tolist() == done.answer.tolist()
    with pytest.raises(BadData, match="one and the same number of rows"):
        off.run(net, plan, {"values": x["values"], "mask": x["mask"][:3]})
    with pytest.raises(BadData, match="recorded shapes"):
        off.run(net, plan, {"values": x["values"]})
