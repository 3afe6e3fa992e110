"""`offramp export`, and `--engine` of the commands that run a network."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import offramp as off
from typed import TEST, contents, offramp

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_the_folder_runs_by_itself(workdir, as_json):
    told = as_json("export", "network", "plan.json", "-o", "out")
    assert told["folder"] == "out"
    rows = off.rows(TEST).take(np.arange(20)).x
    np.save("rows.npy", rows)
    done = subprocess.run(
        [sys.executable, "out/run.py", "rows.npy", "-o", "answers.npz"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    with np.load("answers.npz") as answers:
        exits = answers["exit"]
    expected = off.run(off.load("network"), off.Plan.load("plan.json"), rows)
    assert (exits == expected.exit.numpy()).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "network", "missing.json", "-o", "out"), "does not exist"),
        (("export", "missing", "plan.json", "-o", "out"), "does not exist"),
        (("record", "network", TEST, "-o", "new.npz", "--engine", "onxruntime"), "onnxruntime"),
        (
            ("run", "network", "plan.json", TEST, "-o", "new.npz", "--engine", "onnxruntime"),
            "plan is for network",
        ),
    ],
)
def test_what_is_refused(workdir, words, says):
    before = contents(workdir)
    done = offramp(*words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert contents(workdir) == before
