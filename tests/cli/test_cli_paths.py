"""Networks whose rows take paths of their own, from models to answers at the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from typed import offramp

MODEL = ("offramp:resnet20", "--preprocess", "none")
TRAIN, REST, FEW = "npz:rows.npz[0:32]", "npz:rows.npz[32:96]", "npz:rows.npz[0:4]"
FORKS = """
from torch import nn
import offramp as off


def steps():
    stem = nn.Sequential(nn.Flatten(), nn.Linear(768, 8)).eval()
    arms = {"low": nn.Linear(8, 8).eval(), "high": nn.Sequential(nn.Linear(8, 8)).eval()}
    head = nn.Linear(8, 10).eval()
    return [("stem", stem), off.Leave("early"), off.Fork("size", arms), ("head", head)]


def network():
    import torch
    return off.route(steps(), example=torch.zeros(2, 3, 16, 16))


def broken():
    raise RuntimeError("out of steps")


def number():
    return 3
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """96 images of noise, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((96, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=draw.integers(0, 10, 96))
    (tmp_path / "forks_of_mine.py").write_text(FORKS)
    return tmp_path


def done(*words: object) -> str:
    """What a command prints that goes well."""
    result = offramp(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    """The sentence of a command that is refused."""
    result = offramp(*words)
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.slow
def test_units_that_rows_skip_from_the_model_to_the_answers(rows):
    told = done("cut", *MODEL, "--skip", "layer3.*", "--example", FEW, "-o", "net")
    assert "skip-layer3-1: chooses by controller" in told
    recipe = ("--recipe", "d2nn?warm=1&epochs=1&norm=frozen")
    assert "reward, epoch 1" in done("fit", "net", TRAIN, *recipe, "-o", "trained")
    told = done("record", "trained", REST, "--no-timed", "-o", "t.npz")
    for name in ("end directly", "end via layer3-1", "end via layer3-1 layer3-2"):
        assert name in told
    done("calibrate", "t.npz", "--budget", "0.99", "-o", "p.json")
    assert "64 rows" in done("run", "trained", "p.json", REST, "-o", "a.csv")
    assert len((rows / "a.csv").read_text().splitlines()) == 65


@pytest.mark.slow
def test_more_paths_than_sixteen_at_settings(rows):
    told = done("cut", *MODEL, "--skip", "layer*.*", "--example", FEW, "-o", "net")
    assert "more than sixteen paths: record it with --settings" in told
    assert "more than sixteen paths" in refused("record", "net", REST, "-o", "t.npz", "--no-timed")
    told = done("record", "net", REST, "-o", "t.npz", "--no-timed", "--settings=1,0,-1")
    assert "all gates closed" in told
    assert "setting -1" in told
    assert "no promise" in done("calibrate", "t.npz", "--budget", "0.99")
    assert "must be numbers" in refused("record", "net", REST, "-o", "t.npz", "--settings", "1,b")


@pytest.mark.slow
def test_sizes_and_halting_units(rows):
    told = done("resolutions", *MODEL, "--sizes", "8,16", "--example", FEW, "-o", "sizes",
                "--gate", "predictor?side=8&width=4&scale=1")  # fmt: skip
    assert "r8: answers" in told
    recipe = ("--recipe", "drnet?first=1&epochs=1&norm=frozen")
    done("fit", "sizes", TRAIN, *recipe, "--batch-size", 16, "-o", "sized")
    assert "r16" in done("record", "sized", REST, "--no-timed", "-o", "s.npz")

    layer = "layer3=adaptive_depth?per=sample&bias=-1"
    done("convert", *MODEL, "--layer", layer, "-o", "act")
    done("fit", "act", TRAIN, "--recipe", "pondered?tau=0.02&epochs=1", "-o", "halting")
    assert "layer3-0: chooses by halting" in done(
        "unrolled", "network:halting", "--example", FEW, "-o", "net"
    )
    assert "head via" in done("record", "net", REST, "--no-timed", "-o", "u.npz")


def test_a_fork_of_the_user_s_own_is_given_again_by_its_factory(rows):
    told = done("route", "forks_of_mine:steps", "--example", FEW, "-o", "net")
    assert "size: chooses by controller" in told
    record = ("record", "net", REST, "--no-timed", "-o", "t.npz")
    assert "--model my.module:factory alone is enough" in refused(*record)
    given = ("--model", "forks_of_mine:steps")
    done("fit", "net", TRAIN, *given, "--recipe", "gumbel?epochs=1", "-o", "trained")
    told = done("record", "trained", REST, "--no-timed", "-o", "t.npz", *given)
    for name in ("early", "head via low", "head via high"):
        assert name in told
    done("calibrate", "t.npz", "--budget", "0.995", "-o", "p.json")
    done("run", "trained", "p.json", REST, *given)
    done("run", "trained", "p.json", REST, "--model", "forks_of_mine:network")
    assert "must be given alone" in refused(
        "run", "trained", "p.json", REST, *given, "--model", "low=forks_of_mine:steps"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("route", "steps"), "FACTORY must be my.module:factory, got steps"),
        (("route", "forks_of_mine:broken"), "got RuntimeError: out of steps"),
        (("route", "forks_of_mine:number"), "must give a list of steps or a network, got a int"),
        (("resolutions", *MODEL, "--sizes", "8,large"), "--sizes must be numbers of pixels"),
        (("cut", *MODEL, "--skip", "layer3.*", "--at", "layer1"), "--at must be left out with"),
        (("unrolled", *MODEL), "has no stage of adaptive depth"),
    ],
)
def test_bad_input_is_one_sentence(rows, words, says):
    told = refused(*words, "--example", FEW, "-o", "net")
    assert says in told
    assert len(told.strip().splitlines()) == 1
    assert not (rows / "net").exists()


def test_inspect_wants_one_model(rows):
    done("route", "forks_of_mine:steps", "--example", FEW, "-o", "net")
    told = refused("inspect", "network:net", "--example", FEW)
    assert "Name the model itself instead of network:net" in told
