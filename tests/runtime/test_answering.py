"""Answers for all rows of some data: what run gives batch by batch, as columns and in a file."""

from __future__ import annotations

import csv

import numpy as np
import torch
from torch import nn

import offramp as off
from offramp.runtime.answering import COLUMNS, answer_rows


def network() -> off.Network:
    torch.manual_seed(0)
    return off.ladder({"small": nn.Linear(6, 3), "large": nn.Linear(6, 3)}).eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(1)
    return torch.randn(50, 6, generator=dice), torch.randint(0, 3, (50,), generator=dice)


def test_columns_are_what_run_gives():
    net = network()
    plan = off.Plan.by_hand({"small": 0.5})
    x, y = rows()
    found = answer_rows(net, plan, (x, y), batch_size=7, progress=False)
    answers = off.run(net, plan, x)
    assert len(found) == 50
    assert found.columns["answer"].tolist() == answers.logits.argmax(1).tolist()
    assert found.columns["exit"].tolist() == [
        answers.exits[index] for index in answers.exit.tolist()
    ]
    assert found.columns["why"].tolist() == answers.reasons()
    assert found.accuracy() == int((answers.logits.argmax(1) == y).sum()) / 50
    assert 0 < found.shares()["small"] < 1
    assert sum(found.reasons().values()) == found.to_json()["rows"] == 50


def test_files_hold_the_columns(tmp_path):
    found = answer_rows(network(), off.Plan.by_hand({"small": 0.5}), rows()[0], progress=False)
    assert found.accuracy() is None
    found.save(tmp_path / "a.npz")
    found.save(tmp_path / "a.csv")
    with np.load(tmp_path / "a.npz") as archive, open(tmp_path / "a.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
        assert list(lines[0]) == list(COLUMNS)
        assert archive["answer"].tolist() == [int(line["answer"]) for line in lines]


def test_a_deadline_that_nothing_keeps_is_told_as_the_reason():
    found = answer_rows(
        network(), off.Plan.by_hand({"small": 1e9}), rows()[0], deadline_ms=0.0, progress=False
    )
    assert found.reasons() == {"deadline": 50}
    assert found.shares() == {"small": 1.0, "large": 0.0}
