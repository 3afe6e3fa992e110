"""`offramp search`: a network within a budget, and what follows it: fit, load, another budget."""

from __future__ import annotations

import re

import numpy as np
import pytest

import offramp as off
from typed import offramp

WEIGHTS = ("--weights", "digits_large.safetensors")
MODEL = ("offramp:digits_large", "digits[800:900]", *WEIGHTS)
CHOICES = ("--choice", "3=dense,low_rank?rank=8", "--choice", "[46]=dense,skip")
JUDGE = ("--development", "digits[900:950]")
QUICK = (
    *("--steps", "2", "--batch-size", "16", "--population", "4", "--generations", "2"),
    *("--folder", "search"),
)
SEARCH = ("search", *MODEL, *CHOICES, *JUDGE, *QUICK)


def test_a_network_is_found_trained_on_and_loaded(workdir, as_json):
    body = as_json(*SEARCH, "--budget", "0.95", "--at", "8", "-o", "found")
    assert body["networks"] == 2 * 2 * 2 * 2
    assert body["cost"] <= 0.95 * body["dense_cost"] == pytest.approx(body["budget"])
    assert body["front"][-1]["accuracy"] == body["accuracy"]
    net = off.load("found")
    assert net.members[0].spec == body["spec"]
    assert body["spec"].startswith("offramp:digits_large|")
    done = offramp("fit", "found", "digits[800:900]", "--recipe", "joint", "-o", "trained")
    assert done.exit_code == 0, done.output
    x = np.zeros((4, 1, 8, 8), np.float32)
    assert not np.allclose(net(x)[-1].detach(), off.load("trained")(x)[-1].detach())


def test_another_budget_and_task_from_the_same_folder(workdir, as_json):
    more = ("--other-task", "odd=users_own:odd_digits")
    first = as_json(*SEARCH, *more, "--budget", "0.95", "-o", "found")
    second = as_json(*SEARCH, *more, "--limit", first["dense_cost"], "--resume", "-o", "other")
    assert second["dense_cost"] == first["dense_cost"] == second["budget"]
    assert second["accuracy"] >= first["accuracy"]
    other = offramp(
        *("search", *MODEL, *CHOICES, *QUICK, *more, "--development", "users_own:odd_digits"),
        *("--budget", "0.95", "--task", "odd", "--resume", "-o", "odd"),
    )
    assert other.exit_code == 0, other.output
    assert "judged for 'odd'" in other.stdout
    assert "of dense" in other.stdout  # the table of the Pareto front
    x = np.zeros((4, 1, 8, 8), np.float32)
    assert off.load("odd")(x)[-1].shape == (4, 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "exactly one of budget= and limit= must be given, got neither"),
        (("--budget", "50"), r"budget must be above 0 and at most 1, got 50"),
        (("--budget", "0.5", "--unit", "joules"), "unit must be one of macs, ms, got 'joules'"),
        (("--budget", "0.5", "--choice", "9x=dense"), "'9x' matches no module"),
        (("--budget", "0.5", "--choice", "3=gost"), "did you mean 'ghost'"),
        (("--budget", "0.5", "--other-task", "task=digits"), "another name than 'task'"),
        (("--budget", "0.5", "--task", "odd"), "no task of this search called 'odd'"),
        (("--budget", "1e-9"), "no network is within the budget of"),
    ],
)
def test_refusals_are_one_sentence(workdir, words, says):
    start = ("search", *MODEL, *JUDGE, *QUICK)
    if "--choice" not in words:
        start = SEARCH
    done = offramp(*start, *words, "-o", "new")
    assert done.exit_code == 2
    assert re.search(says, done.stderr.replace("\n", " ")), done.stderr


def test_ctrl_c_says_how_to_go_on(workdir, monkeypatch):
    import offramp.designing.single_path as training

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "loss_of", stopped)
    done = offramp(*SEARCH, "--budget", "0.9", "-o", "found")
    assert done.exit_code == 130
    assert "go on with --folder search --resume" in done.stderr
