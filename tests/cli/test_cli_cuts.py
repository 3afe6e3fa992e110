"""`offramp inspect` and `offramp cut`."""

from __future__ import annotations

import numpy as np
import pytest

import offramp as off
from small import moved
from typed import CALIBRATION, contents, offramp

MODEL = (
    "offramp:digits_large",
    "--weights",
    "digits_large.safetensors",
    "--example",
    "digits[0:4]",
)


def test_inspect_lists_every_module(workdir, as_json):
    points = as_json("inspect", *MODEL)["points"]
    assert [point["name"] for point in points] == [str(n) for n in range(16)]
    assert [point["name"] for point in points if not point["legal"]] == ["15"]
    assert points[15]["why_not"] == "ends where the model does"
    assert points[0]["share"] < points[3]["share"] < points[13]["share"] < points[15]["share"] == 1
    assert (points[0]["carried"], points[0]["row_bytes"]) == ([[64, 8, 8]], 64 * 64 * 4)
    said = offramp("inspect", *MODEL).stdout
    assert "MACs       ms     bytes" in said
    assert "15 legal cuts among 16 modules" in said
    assert "no cut: ends where the model does" in said


def test_inspect_measures_one_forward(workdir, as_json):
    said = as_json("inspect", *MODEL[:-1], "digits[0:70]")
    shares = [point["time_share"] for point in said["points"]]
    assert (said["batch"], said["forward_ms"] > 0) == (64, True)
    assert all(0 < share <= 1 for share in shares)
    assert (shares[-1], shares) == (1, sorted(shares))
    assert as_json("inspect", *MODEL)["batch"] == 4
    assert "ms for a batch of 4, measured once on this machine" in offramp("inspect", *MODEL).stdout


def test_cut_then_train_then_record(workdir, as_json):
    made = as_json("cut", *MODEL, "--at", "2, 5", "-o", "net", "--exit", "linear")
    assert made["untrained"] == ["2", "5"]
    assert made["rungs"][0]["cuts"] == ["2", "5"]
    done = offramp("record", "net", CALIBRATION, "-o", "t.npz", "--no-timed")
    assert (done.exit_code, done.stderr.count("\n")) == (0, 1)
    assert "never trained: 2, 5" in done.stderr
    refused = offramp("calibrate", "t.npz", "--at-most", "0.1")
    assert (refused.exit_code, "never trained" in refused.stderr) == (2, True)
    off.save(moved(off.load("net")), "net")
    trace = as_json("record", "net", CALIBRATION, "-o", "t.npz", "--no-timed")
    assert [each["exit"] for each in trace["exits"]] == ["2", "5", "backbone"]
    assert offramp("calibrate", "t.npz", "--budget", "0.9").exit_code == 0


def test_cut_into_parts(workdir):
    done = offramp("cut", *MODEL, "--parts", 3, "-o", "net")
    assert done.exit_code == 0, done.output
    assert "Network of one model with exits" in done.stdout
    assert "not trained yet" in done.stderr
    assert len(off.load("net").topology.exits) == 3


def test_another_exit_at_one_node(workdir, as_json):
    made = as_json(
        "cut", *MODEL, "--at", "2,5", "-o", "net", "--exit", "linear", "--exit-of", "5=mlp"
    )
    hidden = {name: config.get("hidden") for name, config in made["exits"].items()}
    assert (hidden["2"], hidden["5"]) == (None, [128])


@pytest.mark.slow
def test_cut_where_exits_pay(workdir, as_json):
    words = ("--at", "auto", "--labelled", "digits[0:700]", "-o", "net", "--exit", "linear")
    made = as_json("cut", *MODEL, *words, "--parts", "2")
    taken = [one["name"] for one in made["places"] if one["chosen"]]
    assert (made["rungs"][0]["cuts"], len(taken)) == (taken, 1)
    assert made["estimated_ms"] < made["plain_ms"]
    assert off.load("net").trained_on.data == "digits[0:700]"
    said = offramp("cut", *MODEL, *words).stdout
    assert "could" in said
    assert "chosen" in said
    assert "estimated ms per row" in said


CUT = (
    "cut",
    "texts:encoder",
    "--at",
    "blocks.0",
    "--exit",
    "linear_masked",
    "-o",
    "net",
    "--example",
)
AGAIN = ("--model", "backbone=texts:encoder")


def test_texts_of_any_length_from_a_file(sentences, as_json):
    short, long = sentences
    made = as_json(*CUT, short, "--length", "input_ids, attention_mask")
    assert made["rungs"][0]["length"] == ["x/input_ids", "x/attention_mask"]
    trace = as_json("record", "net", long, "-o", "t.npz", "--no-timed", *AGAIN)
    assert (trace["rows"], trace["labelled"], trace["data"]) == (40, True, long)


@pytest.mark.slow
def test_texts_of_one_length_refuse_others(sentences, as_json):
    short, long = sentences
    said = as_json(
        "inspect", "texts:encoder", "--example", short, "--length", "input_ids,attention_mask"
    )
    assert next(point for point in said["points"] if point["name"] == "blocks.0")["legal"]
    as_json(*CUT, short)
    done = offramp(
        "run", "net", "-", short, "--threshold", "blocks.0=0.1", "-o", "answers.csv", *AGAIN
    )
    assert done.exit_code == 0, done.output
    refused = offramp("record", "net", long, "-o", "t.npz", "--no-timed", *AGAIN)
    assert (refused.exit_code, "length" in refused.stderr) == (2, True)


OWN = {
    "mixes rows": ("cut", "Mixing", "first", "aten.mean.dim mixes rows"),
    "mixes rows, inspected": ("inspect", "Mixing", None, "aten.mean.dim mixes rows"),
    "cannot be compacted": ("cut", "Folded", "fold", "whose first dimension is 2*B"),
    "runs twice": ("cut", "Repeated", "fold", "'fold' runs more than once"),
    "cannot be exported": ("cut", "Branching", "first", "return h if h.sum() > 0 else -h"),
    "cannot be exported, inspected": ("inspect", "Branching", None, "explicit stages"),
    "an unknown module": ("cut", "Halves", "frist", "did you mean 'first'"),
}


@pytest.mark.parametrize("case", OWN)
def test_models_that_are_refused(workdir, case):
    command, model, at, says = OWN[case]
    before = contents(workdir)
    words = (command, f"users_own:{model}", "--example", "digits[0:1]", "--preprocess", "none")
    done = offramp(*words, *(("--at", at, "-o", "net") if at else ()))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert contents(workdir) == before


def test_inspect_says_what_cannot_be_compacted_and_what_runs_twice(workdir, as_json):
    for model, why in (("Folded", "first dimension is 2*B, not B"), ("Repeated", "runs twice")):
        points = as_json(
            "inspect", f"users_own:{model}", "--example", "digits[0:4]", "--preprocess", "none"
        )["points"]
        told = {point["name"]: point["why_not"] for point in points}
        assert told["first"] is None
        assert why in told["fold"]


def test_images_that_do_not_fit_the_model(workdir):
    for words in (("cut", "-o", "net", "--at", "conv1"), ("inspect",)):
        done = offramp(
            *words, "offramp:resnet20", "--preprocess", "none", "--example", "digits[0:2]"
        )
        assert done.exit_code == 2
        assert "the model fails on the example" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--at", "16"), "'15'"),
        (("--at", "15"), "'15' ends where"),
        ((), "exactly one"),
        (("--at", "2", "--parts", "2"), "exactly one"),
        (("--parts", "40"), "got 40"),
        (("--at", "2", "--exit", "linaer"), "linear"),
        (("--at", "2", "--gate", "margn"), "margin"),
        (("--at", "2", "--preprocess", "x"), "imagenet"),
        (("--at", "2", "--example", "digits[5:5]"), "rows"),
        (("--at", "13", "--exit", "branch"), "convolutional"),
        (("--at", "2", "--exit-of", "5=linear"), "a module of --at"),
        (("--parts", "2", "--exit-of", "5=linear"), "a module of --at"),
        (("--at", "2", "--exit-of", "2"), "NAME=VALUE"),
        (("--at", "2", "--exit-of", "2=linaer"), "linear"),
        (("--at", "2", "--length", "words"), "length must name inputs"),
        (("--at", "auto"), "--labelled must be given with --at auto"),
        (("--at", "2", "--labelled", "digits[0:50]"), "with --at auto only"),
        (
            ("--at", "auto", "--labelled", "digits[0:50]", "--parts", "1"),
            "--parts must be at least 2",
        ),
        (("--at", "auto", "--labelled", "digits[0:30]"), "40 labelled rows"),
        (
            ("--at", "auto", "--labelled", "digits[0:50]", "--exit-of", "2=linear"),
            "a module of --at",
        ),
    ],
)
def test_what_is_refused(workdir, words, says):
    before = contents(workdir)
    done = offramp("cut", *MODEL, *words, "-o", "net")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert contents(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "at", "exit_", "classes"),
    [
        ("offramp:alexnet", "conv2,conv3", "b_alexnet", ["Normed", "Normed"]),
        ("offramp:resnet110_branchy", "stem,layer1", "b_resnet", ["Normed", "Residual"]),
    ],
)
def test_branchynets_by_name(workdir, as_json, model, at, exit_, classes):
    np.savez("few.npz", x=np.zeros((2, 3, 32, 32), np.uint8))
    made = as_json(
        "cut", model, "--at", at, "--exit", exit_, "--example", "npz:few.npz", "-o", "net"
    )
    assert [made["exits"][name]["name"] for name in at.split(",")] == classes
    assert made["untrained"] == at.split(",")
    assert off.load("net").topology.exits == (*at.split(","), "backbone")
