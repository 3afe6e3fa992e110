"""`offramp inspect` and `offramp cut`."""

from __future__ import annotations

import pytest
from typed import CALIBRATION, contents, offramp

import offramp as off
from small import moved

MODEL = ("offramp:digits_large", "--weights", "digits_large.safetensors", "--example", "digits[0:4]")


def test_inspect_lists_every_module(place, as_json):
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


def test_inspect_measures_one_forward(place, as_json):
    said = as_json("inspect", *MODEL[:-1], "digits[0:70]")
    shares = [point["time_share"] for point in said["points"]]
    assert (said["batch"], said["forward_ms"] > 0) == (64, True)
    assert all(0 < share <= 1 for share in shares)
    assert (shares[-1], shares) == (1, sorted(shares))
    assert as_json("inspect", *MODEL)["batch"] == 4
    assert "ms for a batch of 4, measured once on this machine" in offramp("inspect", *MODEL).stdout


def test_cut_then_teach_then_record(place, as_json):
    made = as_json("cut", *MODEL, "--at", "2, 5", "-o", "net", "--exit", "linear")
    assert made["untaught"] == ["2", "5"]
    assert made["rungs"][0]["cuts"] == ["2", "5"]
    done = offramp("record", "net", CALIBRATION, "-o", "t.npz", "--no-time")
    assert (done.exit_code, done.stderr.count("\n")) == (0, 1)
    assert "never taught: 2, 5" in done.stderr
    refused = offramp("calibrate", "t.npz", "--at-most", "0.1")
    assert (refused.exit_code, "never taught" in refused.stderr) == (2, True)
    off.save(moved(off.load("net")), "net")
    trace = as_json("record", "net", CALIBRATION, "-o", "t.npz", "--no-time")
    assert [each["exit"] for each in trace["exits"]] == ["2", "5", "backbone"]
    assert offramp("calibrate", "t.npz", "--budget", "0.9").exit_code == 0


def test_cut_into_parts(place):
    done = offramp("cut", *MODEL, "--parts", 3, "-o", "net")
    assert done.exit_code == 0, done.output
    assert "Network of one model with exits" in done.stdout
    assert "not taught yet" in done.stderr
    assert len(off.load("net").chain.exits) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--at", "16"), "'15'"),
        (("--at", "15"), "'15' ends where"),
        ((), "exactly one"),
        (("--at", "2", "--parts", "2"), "exactly one"),
        (("--parts", "40"), "n=40"),
        (("--at", "2", "--exit", "linaer"), "linear"),
        (("--at", "2", "--gate", "margn"), "margin"),
        (("--at", "2", "--front", "x"), "imagenet"),
        (("--at", "2", "--example", "digits[5:5]"), "rows"),
        (("--at", "13", "--exit", "branch"), "convolutional"),
    ],
)
def test_what_is_refused(place, words, says):
    before = contents(place)
    done = offramp("cut", *MODEL, *words, "-o", "net")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert contents(place) == before
