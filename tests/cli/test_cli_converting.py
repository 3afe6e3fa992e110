"""`offramp convert`, and what follows it: inspect, fit with recover, cut, ladder."""

from __future__ import annotations

import numpy as np
import pytest

import offramp as off
from typed import CALIBRATION, offramp

WEIGHTS = ("--weights", "digits_large.safetensors")
MODEL = ("offramp:digits_large", *WEIGHTS)
LAYER = ("--layer", "Conv2d=low_rank?energy=0.7", "--layer", "0=keep")
TRAIN = "digits[800:1000]"


def made(*more):
    done = offramp("convert", *MODEL, *LAYER, "-o", "cheap", *more)
    assert done.exit_code == 0, done.output
    return done


def test_convert_tells_what_changed(workdir, as_json):
    body = as_json("convert", *MODEL, *LAYER, "--example", "digits[0:16]", "-o", "cheap")
    names = [one["name"] for one in body["changes"]]
    assert names[-1] == ""
    assert "0" not in names
    whole = body["changes"][-1]
    for figure in ("parameters", "stored_bytes", "macs", "bit_operations"):
        assert whole["after"][figure] < whole["before"][figure]
        parts = sum(one["before"][figure] - one["after"][figure] for one in body["changes"][:-1])
        assert parts == pytest.approx(whole["before"][figure] - whole["after"][figure])
    assert whole["after"]["ms"] > 0
    assert body["spec"].startswith("offramp:digits_large|")
    said = made("--example", "digits[0:16]").stdout
    assert "low_rank" in said
    assert "whole" in said  # the table wraps its words


def test_it_is_recovered_cut_stacked_and_recorded(workdir, as_json):
    made()
    done = offramp(
        *(
            "fit",
            "cheap",
            TRAIN,
            "--recipe",
            "recover",
            "--original-weights",
            "digits_large.safetensors",
        ),
        *("--with", "epochs=2", "-o", "recovered"),
    )
    assert done.exit_code == 0, done.output
    x = np.zeros((4, 1, 8, 8), np.float32)
    assert not np.allclose(off.load("cheap")(x)[-1].detach(), off.load("recovered")(x)[-1].detach())
    args = ("--model", "network:recovered", "--model", MODEL[0], "--weights", "-", *WEIGHTS)
    stacked = as_json("ladder", *args, "-o", "net")
    assert [member["name"] for member in stacked["rungs"]] == ["recovered", "digits_large"]
    assert stacked["rungs"][0]["spec"].startswith("offramp:digits_large|")
    net = off.load("net")
    assert np.allclose(net(x)[0].detach(), off.load("recovered")(x)[-1].detach(), atol=1e-6)
    assert net.training_rows() is not None  # those of recover are known
    assert offramp("record", "net", CALIBRATION, "-o", "t.npz", "--no-timed").exit_code == 0
    cut = offramp(
        "cut", "network:recovered", "--at", "2", "--example", "digits[0:4]", "-o", "exits"
    )
    assert cut.exit_code == 0, cut.output
    assert off.load("exits").topology.exits == ("2", "backbone")


def test_inspect_shows_before_and_after(workdir, as_json):
    spec = f"{MODEL[0]}|3=ghost?ratio=2"
    body = as_json("inspect", spec, *WEIGHTS, "--example", "digits[0:16]")
    assert [one["name"] for one in body["changes"]] == ["3", ""]
    assert body["changes"][0]["kind"] == "Ghost"
    assert "3.primary" in [point["name"] for point in body["points"]]
    assert as_json("inspect", *MODEL, "--example", "digits[0:4]")["changes"] == []


def test_converted_twice(workdir, as_json):
    made()
    again = as_json(
        "convert",
        "network:cheap",
        "--layer",
        "0=ternary",
        "-o",
        "packed",
        "--example",
        "digits[0:4]",
    )
    assert "0=ternary" in again["spec"]
    assert "low_rank?rank" in again["spec"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--layer", "layr*=ghost"), "matches no module of this model"),
        (("--layer", "Conv2d=goats"), "did you mean 'ghost'"),
        (("--layer", "Conv2d"), "must be NAME=VALUE"),
        (("--layer", "Conv2d=pruned"), "Torch-Pruning|example must be a small batch|torch-pruning"),
        (
            ("--layer", "3=ghost?ratio=1000"),
            "ratio must be at most .*, the number of channels, got 1000",
        ),
    ],
)
def test_refusals_are_one_sentence(workdir, words, says):
    import re

    done = offramp("convert", *MODEL, *words, "-o", "new")
    assert done.exit_code == 2
    assert re.search(says, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_fit_needs_the_original(workdir):
    made()
    done = offramp("fit", "cheap", TRAIN, "--recipe", "recover", "-o", "new")
    assert (done.exit_code, "--original-weights FILE" in done.stderr) == (2, True)
    done = offramp(
        "fit", "cheap", TRAIN, "--recipe", "joint", "--original", "offramp:x", "-o", "new"
    )
    assert (done.exit_code, "--recipe must be recover for --original" in done.stderr) == (2, True)
    done = offramp("convert", "network:cheap", *WEIGHTS, "--layer", "0=ternary", "-o", "new")
    assert (done.exit_code, "which has its own weights" in done.stderr) == (2, True)
