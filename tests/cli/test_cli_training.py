"""`offramp fit`."""

from __future__ import annotations

import pytest

import offramp as off
from offramp.networks.recipe import Recipe
from typed import CALIBRATION, TEST, contents, offramp

CUT = (
    "cut",
    "offramp:digits_large",
    "--weights",
    "digits_large.safetensors",
    "--example",
    "digits[0:4]",
)
TRAIN = "digits[0:200]"


@pytest.fixture
def net(workdir):
    done = offramp(*CUT, "--at", "2,5", "-o", "net", "--exit", "linear")
    assert done.exit_code == 0, done.output
    return workdir


def test_fit_then_record_then_calibrate(net, as_json):
    told = as_json(
        "fit",
        "net",
        TRAIN,
        "--recipe",
        "cross_entropy",
        "--with",
        "regularizer=0.01",
        "-o",
        "trained",
    )
    assert told["untrained"] == []
    assert [epoch["phase"] for epoch in told["epochs"]] == ["2", "5"]
    assert told["epochs"][0]["regularizer/2"] == 0.01
    assert told["fingerprint"] == off.load("trained").fingerprint() != off.load("net").fingerprint()
    assert offramp("record", "trained", CALIBRATION, "-o", "t.npz", "--no-timed").exit_code == 0
    assert offramp("calibrate", "t.npz", "--budget", "0.9", "-o", "p.json").exit_code == 0
    assert offramp("record", "trained", TRAIN, "-o", "same.npz", "--no-timed").exit_code == 0
    for words in (("calibrate", "same.npz", "--budget", "0.9"), ("check", "same.npz", "same.npz")):
        if words[0] == "calibrate":
            refused = offramp(*words)
        else:
            refused = offramp("check", "p.json", "same.npz")
        assert (refused.exit_code, "also trained" in refused.stderr) == (2, True)


def test_joint_with_checkpoints_and_development_rows(net, as_json):
    options = (
        "--recipe",
        "joint",
        "--with",
        "epochs=2",
        "--with",
        "norm=frozen",
        "--folder",
        "run",
        "--seed",
        "3",
    )
    told = as_json(
        "fit", "net", TRAIN, *options, "--development", TEST, "-o", "trained", "--batch-size", "50"
    )
    assert [epoch["step"] for epoch in told["epochs"]] == [4, 8]
    assert 0 <= told["epochs"][1]["accuracy/2"] <= 1
    assert (net / "run" / "metrics.csv").is_file()
    again = offramp(
        "fit", "net", TRAIN, *options, "--development", TEST, "-o", "other", "--batch-size", "50"
    )
    assert (again.exit_code, "--resume" in again.stderr or "resume=True" in again.stderr) == (
        2,
        True,
    )
    resumed = as_json(
        "fit",
        "net",
        TRAIN,
        *options,
        "--development",
        TEST,
        "-o",
        "other",
        "--batch-size",
        "50",
        "--resume",
    )
    assert resumed["fingerprint"] == told["fingerprint"]
    words = (
        TRAIN,
        *options[:2],
        "--with",
        "epochs=1",
        "--folder",
        "elsewhere",
        "--resume",
        "-o",
        "other",
    )
    assert "elsewhere has no checkpoint" in offramp("fit", "net", *words).stderr
    part = net / "elsewhere" / ".checkpoint.offramp-abc.part"
    part.mkdir()
    (net / "elsewhere" / "checkpoint").rename(part / "old")  # killed between two renames
    assert "has no checkpoint" not in offramp("fit", "net", *words).stderr


def test_ctrl_c_says_how_to_go_on(net, monkeypatch):
    def interrupted(self, network):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "prepare", interrupted)
    for options, says in (
        (("--folder", "run"), "--folder run --resume"),
        ((), "nothing was written"),
    ):
        done = offramp(
            "fit", "net", TRAIN, "--recipe", f"{__name__}:Nothing", *options, "-o", "trained"
        )
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (130, "", 1)
        assert says in done.stderr


class Nothing(Recipe):
    def phases(self, network):
        return []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--recipe", "hing"), "hinge"),
        (("--recipe", "users_own:three_classes"), "must be a name, a Recipe"),
        (("--with", "epochs"), "NAME=VALUE"),
        (("--with", "epoch=2"), "known: kind, regularizer, gap"),
        (("--with", "a-b=2"), "must be NAME=VALUE"),
        (("--with", "kind=odd"), "one_vs_rest"),
        (("--precision", "int8"), "bf16"),
        (("--resume",), "folder"),
        (("--track", "tensorboard"), "folder"),
        (("--development", TRAIN), "are also among"),
        (
            ("--recipe", "joint", "--with", "epochs=few"),
            "epochs of the recipe 'joint' must be a whole number, got 'few'",
        ),
        (("--folder", "trained/run"), "inside the output"),
        (("--cache", "trained"), "inside the output"),
        (("--folder", "net"), "inside the network"),
        (("--cache", "net/cache"), "inside the network"),
    ],
)
def test_what_is_refused(net, words, says):
    before = contents(net)
    done = offramp("fit", "net", TRAIN, *words, "-o", "trained")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert contents(net) == before


def test_a_ladder_has_nothing_to_train(workdir):
    done = offramp("fit", "network", TRAIN, "-o", "trained")
    assert (done.exit_code, "has parameters to train" in done.stderr) == (2, True)
