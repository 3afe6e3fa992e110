"""What print(network) shows of a chain."""

from __future__ import annotations

import torch
from torch import nn

import offramp as off
from small import cut_of, ladder_of


def lines_of(net):
    return str(net).splitlines()


def test_a_cut_model_shows_where_its_work_is_done():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    head, names, first, last = lines_of(off.cut(model, torch.zeros(2, 6), at=["1"]))
    assert head == "Network of 2 segments, 1 gate and 2 exits"
    assert names.split() == ["node", "exit", "gate", "work", "up", "to", "here"]
    assert first.split() == ["1", "Pooled", "margin", "67%"]  # 6 * 64 of 6 * 64 + 64 * 3
    assert last.split() == ["backbone", "Own", "answers", "100%"]


def test_a_ladder_has_no_costs_before_it_has_seen_rows():
    head, names, *nodes = lines_of(ladder_of(3))
    assert head.startswith("Network of 3 segments")
    assert "work" not in names
    assert len(nodes) == 3


def test_printing_changes_nothing_and_never_fails():
    net = cut_of()
    before = net.fingerprint()
    hooks = sum(len(module._forward_hooks) for module in net.modules())
    assert len(lines_of(net)) == 2 + len(net.topology.nodes)
    assert net.fingerprint() == before
    assert sum(len(module._forward_hooks) for module in net.modules()) == hooks
    net.train()  # then nothing is run: batch norms would move
    assert "work" not in lines_of(net)[1]
    net.eval()
    net.backbone.register_forward_pre_hook(refuse)
    assert "work" not in lines_of(net)[1]


def refuse(*_):
    raise RuntimeError("not now")
