"""What only a process of its own can show: start-up without torch, the current folder, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from offramp.plans.trace import Trace
from typed import TEST, contents

WAIT = 900  # seconds: against hanging, not against slow machines

TELL = """
import sys
from offramp.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""

ENDLESS = """
import time
import numpy as np

def rows():
    while True:
        open("started", "w").close()
        time.sleep(0.05)
        yield np.zeros((4, 1, 8, 8), np.uint8)
"""


def start(*words: str, code: str = "from offramp.cli import main; main()") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("record", "--help"),
        ("calibrate", "--how-many", "0.01"),
        ("calibrate", "calibration.npz", "--at-most", "0.1", "--testing", "pareto"),
        ("check", "plan.json", "test.npz"),
        ("report", "test.npz", "plan.json", "-o", "r.html", "--data", TEST),
    ],
    ids=" ".join,
)
def test_without_torch(workdir, words):
    if words[0] == "report":
        pytest.importorskip("plotly")
    process = start(*words, code=TELL)
    _, said = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == "False"


def test_the_current_folder_holds_the_users_modules(workdir):
    process = start("calibrate", "calibration.npz", "--at-most", "0.2", "--risk", "users_own:mine")
    out, said = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    assert "the mean of mine against digits_large is at most 0.2" in " ".join(out.split())


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("command", ["record", "run"])
def test_ctrl_c_leaves_nothing_half_written(workdir, command):
    Path("endless.py").write_text(ENDLESS)
    rest = ("plan.json", "endless:rows") if command == "run" else ("endless:rows",)
    before = contents(workdir)
    process = start(command, "network", *rest, "-o", "new.npz")
    deadline = time.monotonic() + 120
    while not Path("started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (130, ""), said
    assert said.splitlines()[-1] == "offramp: interrupted; nothing was written"
    Path("started").unlink()
    assert contents(workdir) == before


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("part", range(3))
def test_ctrl_c_while_the_command_line_is_imported(part):
    """However early: one sentence, and the code of an interruption."""
    process = start(
        "--help", code=INTERRUPTED_IN.format(module=("typer", "offramp.cli.cuts", "rich")[part])
    )
    out, said = process.communicate()
    if process.returncode == 0:  # this version of typer does not need it
        pytest.skip("not imported")
    assert (process.returncode, out, said) == (
        130,
        "",
        "offramp: interrupted; nothing was written\n",
    )


INTERRUPTED_IN = """
import os, signal, sys

def heard(event, arguments):
    if event == "import" and arguments[0] == "{module}":
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(heard)
from offramp.cli import main
main()
"""


def test_a_reader_that_goes_away(workdir):
    process = start("check", "plan.json", "test.npz")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.wait(timeout=WAIT)
    process.stderr.close()
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        ("torch.distributed.run",),
        (
            "accelerate.commands.launch",
            "--cpu",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_cpu_threads_per_process",
            "1",
        ),
    ],
    ids=lambda words: words[0],
)
def test_launched_in_two_processes_it_answers_once(workdir, launch):
    """The digits of the demo: the same trace and the same weights as from one process."""
    if launch[0].startswith("torch"):
        count = ("--nproc-per-node", "2")
    else:
        count = ("--num_processes", "2")
    several = (sys.executable, "-m", *launch, *count, "-m", "offramp.cli")
    cut = (
        "cut",
        "offramp:digits_small",
        "--weights",
        "digits_small.safetensors",
        "--example",
        "digits[0:4]",
    )
    alone = (sys.executable, "-m", "offramp.cli")
    run(*alone, *cut, "--at", "2", "-o", "net", "--exit", "linear")
    options = ("--with", "epochs=1", "--with", "norm=frozen", "--batch-size", "50")
    fit = ("fit", "net", "digits[0:200]", "--recipe", "joint", *options, "-o")
    run(*alone, *fit, "one")
    assert run(*several, *fit, "two", "--folder", "run").count("Trained in") == 1
    run(*alone, "record", "one", TEST, "--no-timed", "-o", "one.npz")
    assert (
        run(*several, "record", "two", TEST, "--no-timed", "-o", "two.npz").count("Trace of") == 1
    )
    one = Trace.load("one.npz")
    two = Trace.load("two.npz")
    assert (one.columns["digest"] == two.columns["digest"]).all()
    for name in ("logits/2", "logits/backbone"):
        np.testing.assert_allclose(two.columns[name], one.columns[name], atol=1e-3)


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
