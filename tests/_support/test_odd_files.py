"""Whatever stands at a path, or in a document, is read or refused in one sentence, and never waited
for.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import offramp as off
from offramp._support.files import (
    digest_file,
    read_arrays,
    read_json,
    read_tensors,
    read_text,
    to_document,
    write_csv,
    write_json,
    write_tensors,
)
from offramp.building.weights import load_weights
from offramp.comparing.reading import read_settings
from offramp.errors import BadData, BadFile, InvalidArgument, OfframpError
from offramp.fitting.checkpoint import load_checkpoint
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from offramp.runtime.answering import answer_rows
from small import cut_of, ladder_of, rows_of

GOLDEN = Path(__file__).parents[1] / "golden"

READERS = {
    "plan": Plan.load,
    "trace": Trace.load,
    "weights": read_tensors,
    "settings": read_settings,
    "text": read_text,
    "npz": lambda path: off.rows(f"npz:{path}"),
    "tsv": lambda path: off.rows(f"tsv:{path}?tokenizer={path}"),
    "mnist": lambda path: off.rows(f"mnist:{path}"),
    "parquet": lambda path: off.rows(f"parquet:{path}"),
    "imagefolder": lambda path: off.rows(f"imagefolder:{path}"),
}


def at(kind: str, folder: Path) -> str:
    """Something at a path that is no regular file."""
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))  # the path of a socket must be short
    elif kind == "zeros":
        return "/dev/zero"
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        return f"{path}\0"
    return str(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
@pytest.mark.parametrize("kind", ["pipe", "socket", "zeros", "folder", "loop", "nul", "nothing"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, reader, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OfframpError) as problem:
        READERS[reader](at(kind, tmp_path))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("reader", ["text", "settings", "plan"])
def test_a_file_without_end_is_not_read(tmp_path, reader):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(BadFile, match="must have at most"):
        READERS[reader](tmp_path / "large")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "{b=" * 5000,
        "a = " + "9" * 5000,
        "a = 0x" + "f" * 50_000,
        "[" + "a." * 5000 + "b]",
        "a = 1e999999",
        "budgets = [nan]",
        "budgets = [inf]",
        "at-most = nan",
        "a = '\ud7ff'\x00",
        "[method",
        "\ufeff",
    ],
    ids=lambda text: text[:12],
)
def test_settings_that_no_parser_likes(tmp_path, text):
    whole = (
        text + "\ncalibration = 'digits[0:5]'\ntest = 'digits[5:9]'\n[method.a]\nmodel = "
        "'offramp:digits_small'\n"
    )
    (tmp_path / "a.toml").write_text(whole, encoding="utf-8")
    with pytest.raises(OfframpError) as problem:
        read_settings(tmp_path / "a.toml")
    assert len(str(problem.value)) < 500


@pytest.mark.parametrize(
    "value",
    [
        "[" * 5000,
        "[" * 900 + "]" * 900,
        "9" * 5000,
        "NaN",
        '{"a": 1, "a": 2}',
        '"\\ud800"',
        "1e999",
        "-" * 50,
    ],
    ids=lambda value: value[:8],
)
def test_documents_that_no_parser_likes(tmp_path, value):
    text = to_document("plan", 1, {"a": 0}).replace('"a": 0', f'"a": {value}')
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadFile):
        read_json(tmp_path / "a.json", "plan", 1)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + to_document("plan", 1, {}).encode())
    with pytest.raises(BadFile):
        read_json(tmp_path / "a.json", "plan", 1)


ODD_TENSORS = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_without_plain_values_are_refused_everywhere(name):
    net = ladder_of(2)
    x = rows_of(6)
    odd = ODD_TENSORS[name](x)
    y = torch.zeros(6, dtype=torch.int64)
    runner = off.open(net, Plan.by_hand({"small": 0.5}))
    for call in (
        lambda: runner(odd),
        lambda: runner({"x": odd}),
        lambda: off.record(net, (odd, y), timed=False, progress=False),
        lambda: off.rows((odd, y)),
        lambda: off.rows((x, y.to("meta"))),
        lambda: off.cut(cut_of().backbone, odd, at=["stem"]),
        lambda: off.fit(cut_of(trained=False), (odd, y), progress=False),
    ):
        with pytest.raises(InvalidArgument) as problem:
            call()
        assert isinstance(problem.value, BadData)


def test_a_network_of_two_thousand_models_is_refused_before_any_is_built(tmp_path):
    body = read_json(GOLDEN / "network" / "network.json", "network", 1)[1]
    off.save(off.load(GOLDEN / "network"), tmp_path / "net")
    body["weights"] = digest_file(tmp_path / "net" / "weights.safetensors")
    member = body["rungs"][0]
    body["rungs"] = [
        {**member, "name": f"m{number}", "spec": "offramp:no_such_model"} for number in range(2000)
    ]
    write_json(tmp_path / "net" / "network.json", "network", 1, body)
    with pytest.raises(BadFile, match="at most 256 models, got 2,000"):
        off.load(tmp_path / "net")


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0,x", "a b", "a/b", "", "last", "backbone", "half", "a\nb", "é", 5]
)
def test_names_in_a_file_keep_the_rule_of_the_ladder(tmp_path, name):
    off.save(off.load(GOLDEN / "network"), tmp_path / "net")
    _, body = read_json(tmp_path / "net" / "network.json", "network", 1)
    body["rungs"][0]["name"] = name
    write_json(tmp_path / "net" / "network.json", "network", 1, body)
    with pytest.raises(InvalidArgument, match="a member is called"):
        off.load(tmp_path / "net")


def test_tables_hold_no_formulas_and_their_numbers_stay(tmp_path):
    odd = ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "a,b", 'say "x"', "plain", -1.5, 3, None, True]
    write_csv(
        tmp_path / "a.csv", ("row", "name", "=x"), [(1, each, -2) for each in odd], what="table"
    )
    import csv

    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["row", "name", "'=x"]
    assert [row[1] for row in rows[:6]] == ["'=1+1", "'+1", "'-1", "'@a", "'\t=1", "'\r=1"]
    assert [row[1] for row in rows[6:]] == ["a,b", 'say "x"', "plain", "-1.5", "3", "", "True"]
    assert {row[2] for row in rows} == {"-2"}


def test_a_checkpoint_that_is_none(tmp_path):
    for kind in ("nothing", "folder"):
        with pytest.raises(BadFile):
            load_checkpoint(Path(at(kind, tmp_path)), cut_of(), {})
    (tmp_path / "c").mkdir()
    write_json(tmp_path / "c" / "training.json", "training", 2, {"begun": [], "files": 5})
    with pytest.raises(BadFile, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "c", cut_of(), {"recipe": "x"})


def test_arrays_that_are_none(tmp_path):
    np.save(tmp_path / "a.npz", np.zeros(3))
    with pytest.raises(BadFile):
        read_arrays(tmp_path / "a.npz")


@functools.cache
def things():
    """A network, a plan and a trace, with the rows."""
    x = rows_of(40)
    net = ladder_of(2)
    return net, Plan.by_hand({"small": 0.5}), off.record(net, x, timed=False, progress=False), x


def answers_saved(path):
    net, plan, _, x = things()
    answer_rows(net, plan, x, progress=False).save(path)


SAVED = {
    "save a network": lambda path: off.save(things()[0], path),
    "save a plan": lambda path: things()[1].save(path),
    "save a trace": lambda path: things()[2].save(path),
    "export": lambda path: off.export(*things()[:2], path, example=things()[3][:4]),
    "report": lambda path: off.report(things()[2], things()[1], path),
    "save answers": answers_saved,
    "save a table": lambda path: write_csv(path, ["a"], [[1]], what="table"),
    "save tensors": lambda path: write_tensors(path, {"a": torch.zeros(1)}),
}
LOADED = {
    "load a network": off.load,
    "load a plan": Plan.load,
    "load a trace": Trace.load,
    "load weights": lambda path: load_weights(torch.nn.Linear(2, 2), path),
    "load settings": read_settings,
}


@pytest.mark.parametrize("path", [None, 3, b"file", ["file"], ""], ids=repr)
@pytest.mark.parametrize("what", [*SAVED, *LOADED])
def test_what_is_no_path(what, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = (SAVED | LOADED)[what]
    with pytest.raises(InvalidArgument, match=r"must be a path \(a text or a pathlib.Path\), got"):
        call(path)
    assert not list(tmp_path.iterdir())
