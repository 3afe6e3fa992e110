"""What is kept of a run."""

from __future__ import annotations

import csv

import pytest

from offramp.fitting.history import Epoch, History

EPOCHS = (
    Epoch("one", 0, 4, 1.5, 0.1, {"loss": 2.0}),
    Epoch("one", 1, 8, 1.0, 0.05, {"loss": 1.0, "accuracy/a": 0.5}),
    Epoch("two", 0, 0, 3.0, None, {"gap/a": 1e-4}),
)


def test_it_prints_the_last_epoch_of_every_phase():
    said = str(History(EPOCHS, ("a note",))).splitlines()
    assert said == ["one, epoch 2: loss 1, accuracy/a 0.5", "two, epoch 1: gap/a 0.0001", "a note"]
    assert str(History()) == ""


def test_seconds_add_up():
    assert History(EPOCHS).seconds == pytest.approx(5.5)
    assert History(EPOCHS).last is EPOCHS[-1]


def test_csv_has_a_column_for_every_figure(tmp_path):
    History(EPOCHS).save_csv(tmp_path / "m.csv")
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["2.0", "1.0", ""]
    assert rows[2]["gap/a"] == "0.0001"
    assert rows[2]["rate"] == ""


def test_an_epoch_comes_back_from_json():
    from dataclasses import asdict

    assert [Epoch.from_json(asdict(epoch)) for epoch in EPOCHS] == list(EPOCHS)
