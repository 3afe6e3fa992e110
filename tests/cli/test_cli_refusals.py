"""Bad input at the command line: exit code 2, one sentence on standard error, nothing on disk
changed.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.plans.trace import Trace
from typed import CALIBRATION, TEST, contents, offramp

PAIR = ("--model", "offramp:digits_small", "--model", "offramp:digits_large")


def npz(
    name: str,
    shape: tuple[int, ...] = (5, 1, 8, 8),
    labels: list[int] | None = None,
    **fields: object,
) -> str:
    x = np.zeros(shape, fields.get("dtype", np.uint8))
    if "nan_row" in fields:
        x[fields["nan_row"]] = np.nan
    np.savez(name, x=x, y=np.array(labels if labels is not None else [0] * len(x)))
    return f"npz:{name}"


def edited(path: str, old: str, new: str) -> str:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))
    return path


def other_origin(**fields: str) -> str:
    plan = Plan.load("plan.json")
    origin = dataclasses.asdict(plan.origin) | {"probe": None} | fields
    dataclasses.replace(plan, origin=Origin(**origin)).save("other.json")
    return "other.json"


def truncated(path: str, to: str) -> str:
    Path(to).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])
    return to


def pickled(path: str) -> str:
    with open(path, "wb") as file:
        if path.endswith(".pt"):
            torch.save({"weight": Path("x")}, file)
        else:
            pickle.dump({"weight": [1, 2]}, file)
    return path


def a_file(path: str) -> str:
    Path(path).write_text("here already")
    return path


def copied(times: int = 2, *, own_numbers: bool = True, **columns: object) -> str:
    """A trace of rows that repeat, under numbers of their own or under those that they had."""
    trace = Trace.load("calibration.npz")
    rows = trace[np.tile(np.arange(100), times)]
    number = np.arange(100 * times) if own_numbers else rows.columns["row"]
    Trace({**rows.columns, "row": number, **columns}, rows.header).save("copied.npz")
    return "copied.npz"


def other_network() -> str:
    assert offramp("ladder", *PAIR, "-o", "another").exit_code == 0
    return "another"


CASES = {
    "members of different classes, tried": lambda: (
        "ladder --model users_own:three_classes --model users_own:flat --preprocess unit "
        "--preprocess unit --example "
        "digits[0:2] "
        "-o new", "number of classes"),
    "labels out of "
    "range": lambda: (f"record network {npz('a.npz', labels=[0, 1, 2, 11, 3])} -o "
                      f"n.npz", "row 3 has 11"),
    "empty data": lambda: (f"record network {npz('a.npz', shape=(0, 1, 8, 8))} -o n.npz", "0 rows"),
    "images of the wrong "
    "size": lambda: (
        f"record network {npz('a.npz', shape=(5, 1, 9, 9))} -o n.npz",
        "images must be 8x8",
    ),
    "images of the wrong size, "
    "run": lambda: (f"run network plan.json {npz('a.npz', shape=(5, 1, 9, 9))}", "(1, 9, 9)"),
    "NaN rows": lambda: (
        f"record network {npz('a.npz', dtype=np.float32, nan_row=3)} -o "
        f"n.npz", "not finite for rows 3"),
    "too few rows to "
    "certify": lambda: ("calibrate calibration.npz --at-most 0.001 -o n.json", "2,995 rows"),
    "overlapping rows, check": lambda: ("check plan.json calibration.npz", "549 of the 549"),
    "overlapping rows, ways "
    "on": lambda: ("check plan.json calibration.npz", "with --drop-seen, or say --repeats"),
    "overlapping rows, search": lambda: (
        "calibrate calibration.npz --search calibration.npz --at-most 0.1 -o "
        "n.json", "rows that were not used before"),
    "rows that repeat": lambda: (f"calibrate {copied()} --at-most 0.2 -o "
                                 f"n.json", "with --repeats once copies count"),
    "rows that repeat, the other "
    "way": lambda: (f"calibrate {copied()} --at-most 0.2", "with --repeats independent"),
    "rows that repeat, check": lambda: (f"check plan.json {copied()} --drop-seen", "none is left"),
    "rows that repeat, check by hand": lambda: (
        f"check - {copied()} --threshold "
        f"digits_small=1", "100 of the 200 test rows have the same content"),
    "one number twice": lambda: (
        f"calibrate {copied(own_numbers=False)} --at-most 0.2 --repeats "
        f"independent", "have the number of another"),
    "training rows": lambda: (
        f"calibrate {copied(1, learned=np.arange(100) < 3)} --at-most 0.2", "with --drop-seen"),
    "repeats of no kind": lambda: (
        "calibrate calibration.npz --at-most 0.2 --repeats twice", "'independent' or 'once'"),
    "a level of five": lambda: ("calibrate calibration.npz --at-most 5 -o "
                                "n.json", "got 5.0 (5 % is 0.05)"),
    "a level of one": lambda: ("calibrate calibration.npz --at-most 1", "below 1"),
    "a level with a sign": lambda: ("calibrate calibration.npz --at-most 5%", "--at-most"),
    "a level below all": lambda: ("calibrate calibration.npz --at-most -0.1", "at least 0"),
    "a level of five, "
    "check": lambda: ("check plan.json test.npz --at-most 5", "got 5.0 (5 % is 0.05)"),
    "a budget of "
    "forty": lambda: ("calibrate calibration.npz --budget 40 -o n.json", "got 40 (40 % is 0.4)"),
    "a budget of nothing": lambda: ("calibrate calibration.npz --budget 0", "above 0"),
    "a confidence of "
    "95": lambda: ("calibrate calibration.npz --at-most 0.1 --confidence 95", "(95 % is 0.95)"),
    "a confidence of 95, "
    "check": lambda: ("check plan.json test.npz --confidence 95", "(95 % is 0.95)"),
    "rows beyond the "
    "end": lambda: ("calibrate calibration.npz --at-most 0.1 --rows 0:9999 -o n.json", "549 rows"),
    "a plan of another network, "
    "run": lambda: (f"run {other_network()} plan.json {TEST} -o n.csv", "calibrate"),
    "a plan of another network, "
    "check": lambda: (f"check {other_origin(network='0123')} test.npz", "0123"),
    "a plan of another "
    "engine": lambda: (f"run network {other_origin(engine='onnx')} {TEST} -o n.csv", "onnx"),
    "a plan of another "
    "precision": lambda: (f"run network {other_origin(precision='float16')} {TEST}", "float16"),
    "a plan of another precision, report": lambda: (
        f"report test.npz {other_origin(precision='float16')} -o n.html", "float16"),
    "a newer plan": lambda: (f"check {edited('plan.json', 'offramp/plan/1', 'offramp/plan/9')} "
                             f"test.npz", "Upgrade offramp"),
    "a newer network": lambda: (
        f"record {edited('network/network.json', 'network/1', 'network/9').split('/')[0]} {TEST} "
        f"-o n.npz", "Upgrade offramp"),
    "an edited plan": lambda: (f"check {edited('plan.json', '0.95', '0.99')} test.npz", "edited"),
    "an edited network": lambda: (
        f"record {edited('network/network.json', 'margin', 'max_prob').split('/')[0]} {TEST} -o "
        f"n.npz", "edited"),
    "a truncated "
    "plan": lambda: (f"check {truncated('plan.json', 'half.json')} test.npz", "Make it again"),

    "a truncated trace": lambda: (
        f"calibrate {truncated('test.npz', 'half.npz')} --at-most 0.1 -o n.json", "truncated"),
    "truncated weights": lambda: (
        f"ladder {' '.join(PAIR)} --weights "
        f"{truncated('digits_small.safetensors', 'half.safetensors')} --weights - "
        "-o new", "safetensors"),
    "a pickle for safetensors": lambda: (
        f"ladder {' '.join(PAIR)} --weights {pickled('w.safetensors')} --weights - -o "
        f"new", "safetensors"),
    "a pickle that runs code": lambda: (
        f"ladder {' '.join(PAIR)} --weights {pickled('w.pt')} --weights - -o new", "weights_only"),
    "weights of another model": lambda: (
        f"ladder {' '.join(PAIR)} --weights digits_large.safetensors --weights - -o "
        f"new", "does not fit"),

    "an unknown model": lambda: (
        "ladder --model offramp:digits_smal --model offramp:digits_large -o new", "digits_small"),
    "an unknown module": lambda: ("ladder --model nowhere:at_all --model offramp:digits_large -o "
                                  "new", "nowhere"),
    "an unknown gate": lambda: (f"ladder {' '.join(PAIR)} --gate margn -o new", "'margin'"),
    "an unknown preprocessing": lambda: (
        f"ladder {' '.join(PAIR)} --preprocess x --preprocess none -o new", "imagenet"),
    "an unknown risk": lambda: ("calibrate calibration.npz --risk disagrement --at-most "
                                "0.1", "'disagreement'"),
    "no risk at all": lambda: ("calibrate calibration.npz --risk users_own:not_a_risk --at-most "
                               "0.1", "or a Risk with its range"),
    "an unknown bound": lambda: ("calibrate calibration.npz --bound binomal --at-most "
                                 "0.1", "binomial"),
    "an unknown exit": lambda: ("calibrate calibration.npz --max-exit digits_smal --at-most "
                                "0.1", "digits_small"),
    "an unknown unit": lambda: ("calibrate calibration.npz --unit joules --at-most 0.1", "joules"),
    "an unknown gate in a "
    "threshold": lambda: ("check - test.npz --threshold digit=1", "digits_small"),
    "an unknown data source": lambda: ("record network digit -o n.npz", "digits"),
    "one member": lambda: ("ladder --model offramp:digits_small -o new", "at least two"),
    "options that do not pair "
    "up": lambda: (f"ladder {' '.join(PAIR)} --weights - -o new", "must be given once for each"),
    "one name twice": lambda: (
        f"ladder {' '.join(PAIR)} --name a --name a -o new",
        "each --name must be given once",
    ),
    "two aims": lambda: ("calibrate calibration.npz --at-most 0.1 --budget 0.5 -o "
                         "n.json", "exactly one"),
    "no trace": lambda: ("calibrate --at-most 0.1", "TRACE must be a file written"),
    "how many, beside a trace": lambda: ("calibrate test.npz --how-many 0.01", "alone"),
    "how many, for no level": lambda: ("calibrate --how-many 2", "below 1"),
    "no threshold for -": lambda: ("check - test.npz", "--threshold"),
    "a threshold that is no "
    "number": lambda: ("check - test.npz --threshold digits_small=high", "high"),
    "a threshold without a name": lambda: ("check - test.npz --threshold 4", "NAME=VALUE"),
    "preprocessing without its model": lambda: (
        f"record network {TEST} -o n.npz --preprocess-of "
        f"digits_small=none", "--model digits_small"),
    "a missing file": lambda: ("check nothing.json test.npz", "does not exist"),
    "a missing network": lambda: (f"record nowhere {TEST} -o n.npz", "does not exist"),
    "a trace for a plan": lambda: ("check test.npz test.npz", "cannot read"),
    "an output of no known "
    "kind": lambda: (f"run network plan.json {TEST} -o a.txt", ".npz or .csv"),
    "an output that is a folder": lambda: (
        f"record network {TEST} -o {shutil.copytree('network', 'trace.npz')}", "cannot write"),
    "an output under a "
    "file": lambda: (f"record network {TEST} -o {a_file('note')}/t.npz", "cannot write"),
    "a folder where a file "
    "stands": lambda: (f"ladder {' '.join(PAIR)} -o {a_file('note')}", "Not a directory"),
    "too few rows for a batch": lambda: ("bench network plan.json digits[0:5]", "at least 64"),
    "data that is not the "
    "trace's": lambda: (f"report test.npz plan.json --data {CALIBRATION} -o n.html", ""),
    "a bad option": lambda: ("check plan.json test.npz --confidnce 0.9", "--confidence"),
    "a bad value": lambda: (f"record network {TEST} -o n.npz --batch-size many", "integer"),
    "a missing option": lambda: (f"record network {TEST}", "--output"),
    "an unknown command": lambda: ("recrod network", "did you mean 'record'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(workdir, case):
    if "--data" in case or "report" in case:
        pytest.importorskip("plotly")
    command, words = CASES[case]()
    before = contents(workdir)
    done = offramp(*command.split())
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert contents(workdir) == before


@pytest.mark.parametrize(
    "case", ["a truncated trace", "overlapping rows, check", "too few rows to certify"]
)
def test_the_same_with_json(workdir, case):
    done = offramp(*CASES[case]()[0].split(), "--json")
    assert (done.exit_code, done.stdout) == (2, "")


def test_members_of_different_classes_are_noticed_while_recording(workdir):
    made = (
        "ladder --model users_own:three_classes --model offramp:digits_large --preprocess "
        "unit --preprocess auto -o odd"
    )
    assert offramp(*made.split()).exit_code == 0
    done = offramp(
        "record", "odd", TEST, "-o", "n.npz", "--model", "three_classes=users_own:three_classes"
    )
    assert done.exit_code == 2
    assert "number of classes" in done.stderr
    assert not (workdir / "n.npz").exists()


def test_a_file_names_no_code(workdir):
    """A spec of the user's own that stands in a network's file is data, and never imported."""
    config = json.loads(Path("network/network.json").read_text())
    assert config["rungs"][0]["spec"] == "offramp:digits_small"
    made = (
        "ladder --model users_own:flat --model offramp:digits_large --preprocess unit "
        "--preprocess auto -o own"
    )
    assert offramp(*made.split()).exit_code == 0
    done = offramp("record", "own", TEST, "-o", "n.npz")
    assert done.exit_code == 2
    assert "may not name code" in done.stderr


def test_a_bug_keeps_its_traceback(workdir, monkeypatch):
    def broken(path):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Plan, "load", broken)
    done = offramp("check", "plan.json", "test.npz")
    assert isinstance(done.exception, ZeroDivisionError)


# A command whose word in braces is the user's own factory, and what the factory must do.
FACTORIES = {
    "a model": ("ladder --model {} --model offramp:digits_large -o own", "make a model"),
    "preprocessing": (
        "ladder --model offramp:digits_small --model offramp:digits_large --preprocess {} "
        "--preprocess auto -o own",
        "make a torch.nn.Module",
    ),
    "an exit": (
        "cut offramp:digits_large --example digits[0:4] --at 9 --exit {} -o own",
        "make an Exit",
    ),
    "steps": ("route {} --example digits[0:4] -o own", "make a list of steps or a network"),
    "data": ("record network {} -o n.npz", "a function that returns data"),
}


@pytest.mark.parametrize("case", FACTORIES)
@pytest.mark.parametrize(
    ("factory", "got"),
    [
        ("users_own:failing", "ZeroDivisionError: no weights here"),
        ("users_own:ending", "SystemExit: 0"),
    ],
)
def test_a_factory_that_fails_is_one_sentence(workdir, case, factory, got):
    command, wanted = FACTORIES[case]
    before = contents(workdir)
    done = offramp(*command.format(factory).split())
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("offramp: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert wanted in done.stderr
    assert got in done.stderr
    assert factory in done.stderr
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "ladder --model offramp:digits_small --model offramp:digits_large --gate "
            "users_own:failing_gate -o own",
            "'users_own:failing_gate' must make a Gate, got ZeroDivisionError: no weights here",
        ),
        (
            "fit network digits[0:100] --recipe users_own:Failing -o own",
            "'users_own:Failing' must make a Recipe, got ZeroDivisionError: no weights here",
        ),
        (
            "ladder --model broken_own:model --model offramp:digits_large -o own",
            "(ZeroDivisionError: division by zero (broken_own.py:1)). Write module:attribute",
        ),
        (
            "ladder --model ended_own:model --model offramp:digits_large -o own",
            "(SystemExit: 0 (ended_own.py:1)). Write module:attribute as Python would import it",
        ),
        (
            "cut users_own:Ending --example digits[0:4] --preprocess none --at linear -o own",
            "your own code must not end the program, got SystemExit: 0 (users_own.py:",
        ),
    ],
)
def test_users_code_that_fails_is_one_sentence(workdir, command, says):
    Path("broken_own.py").write_text("1 / 0\n")
    Path("ended_own.py").write_text("raise SystemExit(0)\n")
    done = offramp(*command.split())
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not Path("own").exists()
