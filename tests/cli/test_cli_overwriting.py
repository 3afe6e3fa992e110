"""No command replaces what is somebody else's, nor what it reads, unless that is asked for."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import offramp as off
from typed import TEST, contents, offramp

CUT = ("offramp:digits_small", "--at", "2", "--example", "digits[0:4]", "--exit", "linear")
LADDER = ("--model", "offramp:digits_small", "--model", "offramp:digits_large")
TOML = """
calibration = "digits[700:1000]"
test = "digits[1000:1200]"
model = "offramp:digits_small"
at = "2"
[method.a]
"""


def stranger_s_folder(name: str) -> None:
    """A web application, and a folder of ours with somebody's notes."""
    Path(name).mkdir()
    for file in (
        "manifest.json",
        "network.json",
        "index.html",
        "results.csv",
        "plan.json",
        "report.html",
    ):
        (Path(name) / file).write_text('{"name": "app"}')
    (Path(name) / "network").mkdir()
    (Path(name) / "network" / "notes.md").write_text("mine")
    shutil.copytree("network", "noted", dirs_exist_ok=True)
    (Path("noted") / "trace.npz").write_bytes(b"mine")


def refused(*words: object) -> str:
    """The sentence; nothing changed."""
    before = contents(Path())
    done = offramp(*words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1
    assert contents(Path()) == before
    return done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("ladder", *LADDER),
        ("cut", *CUT),
        ("fit", "network", "digits[0:50]"),
        ("export", "network", "plan.json"),
        ("compare", "methods.toml"),
        ("demo",),
    ],
    ids=lambda words: words[0],
)
def test_folders_of_a_stranger(workdir, words):
    stranger_s_folder("app")
    Path("methods.toml").write_text(TOML)
    assert "app" in refused(*words, "-o", "app")
    if words[0] not in ("compare", "demo"):  # those write beside what is there
        refused(*words, "-o", "noted")
        refused(*words, "-o", "plan.json")


def test_files_of_a_stranger(workdir):
    np.savez("images.npz", x=np.zeros((20, 1, 8, 8), np.uint8))
    Path("package.json").write_text('{"name": "app"}')
    Path("index.html").write_text("<html>mine</html>")
    Path("prices.csv").write_text("id,price\n")
    for words in (
        ("record", "network", "npz:images.npz", "-o", "images.npz"),
        ("run", "network", "plan.json", TEST, "-o", "images.npz"),
        ("run", "network", "plan.json", TEST, "-o", "test.npz"),
        ("run", "network", "plan.json", TEST, "-o", "prices.csv"),
        ("calibrate", "calibration.npz", "--at-most", "0.2", "-o", "package.json"),
        ("calibrate", "calibration.npz", "--at-most", "0.2", "-o", "network/network.json"),
        ("report", "test.npz", "plan.json", "-o", "index.html"),
    ):
        assert "of offramp, got something else. Name another file" in refused(*words)


def test_what_a_command_reads_is_replaced_only_when_that_is_asked_for(workdir):
    Path("linked").symlink_to("network")
    refused("export", "network", "plan.json", "-o", "network")
    assert offramp("cut", *CUT, "-o", "net").exit_code == 0
    Path("other").symlink_to("net")
    fit = ("fit", "net", "digits[0:100]", "--recipe", "cross_entropy")
    for output in ("net", "net/", "./net", str(Path("net").absolute())):
        assert "allow it with --overwrite" in refused(*fit, "-o", output)
    assert "got a link to one" in refused(*fit, "-o", "other")
    assert "would replace the input" in refused("fit", "other", *fit[2:], "-o", "net")
    assert offramp(*fit, "-o", "net", "--overwrite").exit_code == 0
    assert off.load("net").untrained() == ()


def test_outputs_of_ours_are_replaced(workdir):
    for name in ("answers.csv", "answers.npz", "new.json"):
        for _ in range(2):
            if name.endswith("json"):
                words = ("calibrate", "calibration.npz", "--at-most", "0.2", "-o", name)
            else:
                words = ("run", "network", "plan.json", "digits[0:30]", "-o", name)
            done = offramp(*words)
            assert done.exit_code == 0, done.output
    with Path("answers.csv").open(newline="") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["row", "answer", "exit", "why", "flagged"]
    assert len(rows) == 30
    assert [int(row[0]) for row in rows] == list(range(30))


def test_rows_of_another_shape_are_refused_before_anything_is_trained(workdir):
    assert offramp("cut", *CUT, "-o", "net").exit_code == 0
    np.savez("wide.npz", x=np.zeros((20, 1, 8, 16), np.uint8), y=np.zeros(20, np.int64))
    assert "[1, 8, 16], expected uint8 [1, 8, 8]" in refused(
        "fit", "net", "npz:wide.npz", "-o", "trained"
    )
