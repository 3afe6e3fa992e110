"""From models to a page at the command line, for people and for machines."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from typed import CALIBRATION, TEST, contents, offramp

MEMBERS = ("--model", "offramp:digits_small", "--weights", "digits_small.safetensors",
         "--model", "offramp:digits_large", "--weights", "digits_large.safetensors")  # fmt: skip


def test_the_whole_way_as_json(workdir, as_json):
    network = as_json("ladder", *MEMBERS, "-o", "net", "--example", "digits[0:2]")
    assert [member["name"] for member in network["rungs"]] == ["digits_small", "digits_large"]
    trace = as_json("record", "net", CALIBRATION, "-o", "c.npz", "--batch-size", 100)
    assert (trace["rows"], trace["network"], trace["labelled"]) == (
        549,
        network["fingerprint"],
        True,
    )
    assert trace["exits"][0]["macs"] == 2432
    plan = as_json("calibrate", "c.npz", "-o", "p.json", "--at-most", 0.1)
    assert plan["promise"]["at_most"] == 0.1
    assert plan["rows"] == {"data": CALIBRATION, "count": 549}
    as_json("record", "net", TEST, "-o", "t.npz", "--no-timed", "--keep", "answers")
    checked = as_json("check", "p.json", "t.npz")
    assert checked["verdict"] in ("holds", "undecided")
    ran = as_json("run", "net", "p.json", TEST, "-o", "a.npz")
    assert ran["shares"] == dict(zip(checked["exits"], checked["shares"], strict=True))
    assert ran["accuracy"] == checked["accuracy"]
    timed = as_json("bench", "net", "p.json", TEST, "--batch", 1, "--batch", 8, "--repeats", 5)
    assert {line["batch"] for line in timed["lines"]} == {1, 8}
    pytest.importorskip("plotly")
    extra = ("--data", TEST, "--title", "Digits", "--other", "b=p.json")
    page = as_json("report", "t.npz", "p.json", "-o", "r.html", *extra)
    assert page == {"report": "r.html"}
    assert "Digits" in (workdir / "r.html").read_text()


def test_people_read_sentences_and_tables(workdir):
    shown = {
        "calibrate": offramp("calibrate", "calibration.npz", "--at-most", "0.1"),
        "check": offramp("check", "plan.json", "test.npz"),
        "run": offramp("run", "network", "plan.json", TEST),
        "bench": offramp("bench", "network", "plan.json", TEST, "--batch", 8, "--repeats", 5),
        "record": offramp("record", "network", TEST, "-o", "t.npz", "--no-timed"),
    }
    assert {done.exit_code for done in shown.values()} == {0}
    assert (
        "Promise: with 95 % confidence, at most 10 % of the answers differ"
        in shown["calibrate"].stdout
    )
    assert "not saved" in shown["calibrate"].stderr
    assert "interval" in shown["check"].stdout
    assert "rows per second" in shown["run"].stdout
    assert "plain/plain" in shown["bench"].stdout
    assert "Trace of 548 labelled rows" in shown["record"].stdout


def test_what_run_writes(workdir, as_json):
    as_json("run", "network", "plan.json", TEST, "-o", "a.npz")
    as_json("run", "network", "plan.json", TEST, "-o", "a.csv")
    replayed = Trace.load("test.npz").replay(Plan.load("plan.json"))
    with np.load("a.npz", allow_pickle=False) as archive, open("a.csv") as file:
        lines = list(csv.DictReader(file))
        assert list(lines[0]) == ["row", "answer", "exit", "why", "flagged"]
        assert (
            archive["row"].tolist()
            == list(range(701, 1797, 2))
            == [int(line["row"]) for line in lines]
        )
        assert (archive["answer"] == replayed.answer).mean() > 0.99
        assert archive["exit"].tolist() == [line["exit"] for line in lines]
        assert archive["why"].tolist() == [line["why"] for line in lines]
        assert not archive["flagged"].any()


def test_plans_by_hand(workdir, as_json):
    never = as_json("run", "network", "-", TEST, "--threshold", "digits_small=inf")
    assert never["shares"] == {"digits_small": 0.0, "digits_large": 1.0}
    changed = as_json("check", "plan.json", "test.npz", "--threshold", "digits_small=-1")
    assert changed["shares"] == [1.0, 0.0]
    assert (changed["verdict"], changed["level"]) == ("no promise", None)
    # without its promise the plan may run on another engine
    elsewhere = ("--threshold", "digits_small=-1", "--engine", "torch:channels_last")
    assert as_json("run", "network", "plan.json", TEST, *elsewhere)["shares"]["digits_small"] == 1.0
    level = ("--risk", "disagreement", "--at-most", 0.01)
    broken = as_json("check", "-", "test.npz", "--threshold", "digits_small=-1", *level, code=1)
    assert broken["verdict"] == "broken"
    kept = as_json("check", "-", "test.npz", "--threshold", "digits_small=inf", *level)
    assert kept["verdict"] == "holds"


def test_rows_of_a_trace(workdir, as_json):
    plan = as_json(
        "calibrate", "calibration.npz", "--at-most", 0.2, "--rows", "0:300", "-o", "some.json"
    )
    assert plan["rows"]["count"] == 300
    assert as_json("check", "some.json", "calibration.npz", "--rows", "300:549")["rows"] == 249
    assert offramp("check", "some.json", "calibration.npz", "--rows", "299:549").exit_code == 2
    assert as_json("check", "some.json", "calibration.npz", "--same-rows")["rows"] == 549


def test_every_way_to_calibrate(workdir, as_json):
    budget = as_json("calibrate", "calibration.npz", "--budget", 0.5)
    assert budget["promise"] is None
    assert budget["price"]["mean"] <= 0.5 * budget["price"]["plain"]
    pareto = as_json(
        "calibrate",
        "calibration.npz",
        "--at-most",
        0.2,
        "--search",
        "test.npz",
        "--bound",
        "binomial",
    )
    assert pareto["promise"]["searched"] == 548
    unit = ("--unit", "ms", "--batch", 1, "--testing", "pareto")
    priced = as_json("calibrate", "calibration.npz", "--at-most", 0.2, *unit)
    assert (priced["price"]["unit"], priced["price"]["batch"]) == ("ms", 1)
    mine = as_json(
        "calibrate",
        "calibration.npz",
        "--at-most",
        0.2,
        "--risk",
        "users_own:mine",
        "-o",
        "mine.json",
    )
    assert mine["promise"]["risk"] == "mine"
    assert (
        as_json("check", "mine.json", "test.npz", "--risk", "users_own:mine")["risk"]["risk"]
        == "mine"
    )


def saved_as(path: str, rows: np.ndarray, **columns: np.ndarray) -> str:
    """Some rows of the calibration trace under numbers of their own."""
    trace = Trace.load("calibration.npz")[rows]
    Trace({**trace.columns, "row": np.arange(len(rows)), **columns}, trace.header).save(path)
    return path


def test_rows_that_repeat_and_rows_that_trained(workdir, as_json):
    twice = saved_as("twice.npz", np.tile(np.arange(200), 2))
    once = as_json("calibrate", twice, "--at-most", 0.2, "--repeats", "once")
    assert [once["promise"][key] for key in ("repeats", "repeated", "rows")] == ["once", 200, 200]
    assert "copies count once: 200 left out" in once["sentence"]
    every = as_json("calibrate", twice, "--at-most", 0.2, "--repeats", "independent")
    assert [every["promise"][key] for key in ("repeats", "repeated", "rows")] == [
        "independent",
        200,
        400,
    ]
    trained = saved_as("trained.npz", np.arange(200), learned=np.arange(200) < 8)
    dropped = offramp("calibrate", trained, "--at-most", 0.2, "--drop-seen")
    assert "8 rows that trained the network were left out" in dropped.stderr
    assert "8 rows that trained the network left out" in dropped.stdout
    mixed = saved_as("mixed.npz", np.append(np.arange(549), np.arange(5)))
    plan = as_json("calibrate", "test.npz", "--at-most", 0.2, "-o", "other.json")
    assert plan["promise"]["rows"] == 548
    found = offramp("check", "other.json", mixed, "--repeats", "once")
    assert found.exit_code == 0
    assert "5 rows have the content of others and were left out" in found.stderr
    assert "549 rows" in found.stdout
    found = as_json("check", "plan.json", saved_as("seen.npz", np.arange(20)), "--same-rows")
    assert (found["rows"], found["dropped"]) == (20, 0)


def test_levels_are_printed_with_the_digits_that_they_have(workdir):
    said = offramp(
        "calibrate", "calibration.npz", "--at-most", 0.2, "--confidence", 0.001, "-o", "low.json"
    ).stdout
    assert "with 0.1 % confidence" in said
    said = offramp(
        "calibrate", "calibration.npz", "--at-most", 0.2, "--confidence", 0.9999, "-o", "high.json"
    ).stdout
    assert "with 99.99 % confidence, at most 20 % of the answers" in said
    assert "(99.99 % interval" in offramp("check", "high.json", "test.npz").stdout
    assert "with 99.99 % confidence on 549 rows" in offramp(
        "calibrate", "calibration.npz", "--at-most", 0.001, "--confidence", 0.9999
    ).stderr  # fmt: skip


def test_a_ladder_with_the_dear_member_first(workdir):
    turned = (*MEMBERS[4:], *MEMBERS[:4])
    assert offramp("ladder", *turned, "-o", "turned").exit_code == 0
    assert offramp("record", "turned", CALIBRATION, "-o", "turned.npz", "--no-timed").exit_code == 0
    done = offramp("calibrate", "turned.npz", "--at-most", 0.3)
    assert done.exit_code == 0, done.output
    assert "costs more than a later one" in done.stderr
    assert "in the order digits_small, digits_large" in done.stderr


def test_how_many(as_json):
    found = as_json("calibrate", "--how-many", 0.01)
    assert [line["rows"] for line in found["rows"]] == [299, 628, 1441, 5088]
    said = offramp("calibrate", "--how-many", 0.01, "--confidence", 0.99).stdout
    assert "99 % confidence" in said
    assert "459" in said


def test_a_deadline(workdir):
    done = offramp(
        "run", "network", "-", TEST, "--threshold", "digits_small=1e9", "--deadline-ms", 0
    )
    assert done.exit_code == 0
    assert "548 deadline" in done.stdout
    assert "ran out of time" in done.stderr


def test_models_of_the_users_own(workdir, as_json):
    made = (
        "--model",
        "users_own:flat",
        "--model",
        "offramp:digits_large",
        "--preprocess",
        "users_own:scaled",
        "--preprocess",
        "auto",
        "--gate",
        "users_own:spread",
        "--name",
        "mine",
        "--name",
        "large",
    )
    as_json("ladder", *made, "-o", "own", "--answer", "mean")
    own = {"--model": "flat", "--preprocess-of": "scaled", "--gate-of": "spread"}
    again = [word for option, name in own.items() for word in (option, f"mine=users_own:{name}")]
    refused = offramp("record", "own", TEST, "-o", "own.npz")
    assert refused.exit_code == 2
    assert "--model" in refused.stderr
    assert as_json("record", "own", TEST, "-o", "own.npz", "--no-timed", *again)["rows"] == 548
    assert (
        as_json("run", "own", "-", "users_own:noise", "--threshold", "mine=0", *again)["accuracy"]
        is None
    )
    assert offramp("run", "own", "-", TEST, "--threshold", "mine=0", *again[2:]).exit_code == 2


def test_gates_temperatures_and_names(workdir, as_json):
    twins = (
        "--model",
        "offramp:digits_small",
        "--model",
        "offramp:digits_small",
        "--model",
        "offramp:digits_large",
    )
    made = as_json("ladder", *twins, "-o", "hot", "--gate", "max_prob", "--temperature", 2)
    assert [member["name"] for member in made["rungs"]] == [
        "digits_small",
        "digits_small-2",
        "digits_large",
    ]
    assert {gate["temperature"] for gate in made["gates"].values()} == {2.0}
    as_json("record", "hot", "digits[0:20]", "-o", "hot.npz", "--no-timed")


def test_an_earlier_network_is_replaced_and_nothing_else_is(workdir):
    assert offramp("ladder", *MEMBERS, "-o", "network").exit_code == 0
    (workdir / "mine").mkdir()
    (workdir / "mine" / "diary.txt").write_text("dear diary")
    before = contents(workdir)
    assert offramp("ladder", *MEMBERS, "-o", "mine").exit_code == 2
    assert contents(workdir) == before


def test_doctor(as_json):
    found = as_json("doctor")
    assert "offramp:resnet56" in found["shelves"]["models"]
    assert {"margin", "max_prob", "neg_entropy"} <= set(found["shelves"]["gates"])
    assert {"hinge", "joint"} <= set(found["shelves"]["recipes"])
    assert {"linear", "sdn"} <= set(found["shelves"]["exits"])
    assert {"ghost", "keep", "low_rank"} <= set(found["shelves"]["layers"])
    for names in found["shelves"].values():  # what can be typed, and no classes beside it
        assert not [name for name in names if name[:1].isupper() or name == "offramp:preprocess"]
    assert found["versions"]["torch"]
    said = offramp("doctor").stdout
    assert "processor" in said
    assert "cifar10" in said


def test_doctor_says_what_to_install(monkeypatch):
    from offramp.cli import home

    monkeypatch.setattr(home, "_version", lambda package: None)
    said = offramp("doctor").stdout
    assert "pip install 'offramp[report]'" in said
    assert "plotly" in said


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    done = offramp("demo", "-o", "here")
    assert done.exit_code == 0, done.output
    assert "offramp calibrate here/calibration.npz" in done.stderr
    assert "The page: here/report.html" in done.stdout
    assert (tmp_path / "here" / "report.html").stat().st_size > 10_000
    for line in done.stderr.splitlines():  # the commands that it shows do what they say
        if line.startswith(
            ("$ offramp ladder", "$ offramp record", "$ offramp calibrate", "$ offramp check")
        ):
            again = offramp(*line.replace("'", "").split()[2:])
            assert again.exit_code == 0, again.output
