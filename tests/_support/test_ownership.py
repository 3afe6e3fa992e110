"""Nothing of a stranger is ever replaced: folders with anything in them but our own, and files of
other kinds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import offramp as off
from offramp._support.files import to_document, write_csv, write_json, write_tensors
from offramp.building.saving import FOLDER
from offramp.deploy import exporting
from offramp.errors import BadFile
from offramp.fitting import checkpoint
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from small import ladder_of

GOLDEN = Path(__file__).parents[1] / "golden"


def texts(**files: str) -> Callable[[Path], None]:
    """What makes a folder of these files; a double underscore in a name is a dot."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)

    return make


def network_and(name: str, text: str = "mine") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copytree(GOLDEN / "network", folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return make


def link(folder: Path) -> None:
    shutil.copytree(GOLDEN / "network", folder.with_name("real"))
    folder.symlink_to("real")


def git_checkout(folder: Path) -> None:
    shutil.copytree(GOLDEN / "network", folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")


def weights_are_a_link(folder: Path) -> None:
    shutil.copytree(GOLDEN / "network", folder)
    (folder / "weights.safetensors").rename(folder.with_name("real.safetensors"))
    (folder / "weights.safetensors").symlink_to(folder.with_name("real.safetensors"))


def edited(folder: Path) -> None:
    shutil.copytree(GOLDEN / "network", folder)
    text = (folder / "network.json").read_text()
    (folder / "network.json").write_text(text.replace("small", "tiny_"))


def newest(folder: Path) -> None:
    """A checkpoint holds a network and more."""
    shutil.copytree(GOLDEN / "network", folder)
    write_json(folder / "training.json", "training", 2, {"files": {}})


def pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "network.json")


STRANGERS = {
    "web application": texts(manifest__json='{"name": "app", "icons": []}', index__html="<html>"),
    "browser extension": texts(manifest__json='{"manifest_version": 3}', background__js="1"),
    "node project": texts(package__json="{}", network__json='{"layers": []}'),
    "export of another tool": texts(manifest__json='{"schema": "other/export/1", "checksum": "0"}'),
    "network.json of another tool": texts(network__json="{}", weights__safetensors=""),
    "almost our schema": texts(network__json='{"schema": "offramp/network/1", "checksum": "0"}'),
    "a list as a manifest": texts(manifest__json="[]", network__json="[1, 2]"),
    "no manifest": texts(weights__safetensors="weights"),
    "thesis": texts(chapter__tex="x"),
    "hidden file": texts(__env="SECRET=1"),
    "ours and notes": network_and("notes.md"),
    "ours and a trace": network_and("trace.npz"),
    "ours and a hidden file": network_and(".DS_Store"),
    "ours and a folder": network_and("plots/accuracy.svg"),
    "ours and code": network_and("__pycache__/mine.pyc"),
    "ours in git": git_checkout,
    "a link to ours": link,
    "ours with a link in it": weights_are_a_link,
    "ours, edited": edited,
    "a file": lambda folder: folder.write_text("mine"),
    "another schema of ours": texts(network__json=to_document("plan", 1, {"a": 1})),
    "a checkpoint": newest,
    "a pipe": pipe,
}


def state(folder: Path) -> dict[str, object]:
    """Every path below a folder with what it holds, links as links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else path.is_dir()
    return found


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_s_folder_is_refused_and_stays_as_it_is(tmp_path, name):
    if name == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes on this system")
    index = tmp_path / "net"
    STRANGERS[name](index)
    before = state(tmp_path)
    with pytest.raises(BadFile, match="net") as problem:
        off.save(ladder_of(2), index)
    assert str(problem.value).count("\n") == 0
    with pytest.raises(BadFile):
        exporting.FOLDER.require_own(index)
    if name != "a checkpoint":
        with pytest.raises(BadFile):
            checkpoint.FOLDER.require_own(index)
    assert state(tmp_path) == before


def test_what_is_foreign_is_named(tmp_path):
    network_and("notes.md")(tmp_path / "net")
    with pytest.raises(BadFile, match=r"net has notes\.md, which offramp did not write"):
        off.save(ladder_of(2), tmp_path / "net")


def test_new_empty_and_earlier_folders_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(GOLDEN / "network", tmp_path / "earlier")
    net = ladder_of(2)
    for name in ("new", "empty", "earlier", "earlier"):
        off.save(net, tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == ["network.json", "weights.safetensors"]
        assert FOLDER.require_own(tmp_path / name) is None
    assert sorted(os.listdir(tmp_path)) == ["earlier", "empty", "new"]


def test_an_export_is_no_network_and_may_hold_what_python_compiled(tmp_path):
    path = tmp_path / "f"
    texts(run__py="1", plan__json="{}")(path)
    (path / "0-small.onnx").touch()
    body = {"files": {}, "parts": [{"file": "0-small.onnx"}], "one_file": None}
    write_json(path / "manifest.json", "export", 2, body)
    exporting.FOLDER.require_own(path)
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "run.cpython-311.pyc").touch()
    exporting.FOLDER.require_own(path)
    with pytest.raises(BadFile, match="not written by offramp as a network"):
        FOLDER.require_own(path)
    (path / "1-other.onnx").touch()
    with pytest.raises(BadFile, match=r"1-other\.onnx"):
        exporting.FOLDER.require_own(path)


# Files


def plan(path: Path) -> None:
    Plan.by_hand({"small": 0.5}).save(path)


def trace(path: Path) -> None:
    Trace.load(GOLDEN / "trace.npz").save(path)


def table(path: Path) -> None:
    write_csv(path, ("row", "answer", "exit"), [(0, 1, "small")], what="table of answers")


def weights(path: Path) -> None:
    write_tensors(path, {"a": torch.ones(1)})


WRITERS = {"plan.json": plan, "trace.npz": trace, "answers.csv": table, "w.safetensors": weights}


def stranger_s(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps({"name": "my-app", "version": "1.0"}))
    elif path.suffix == ".npz":
        np.savez(path, x=np.zeros(3))
    elif path.suffix == ".csv":
        path.write_text("id,price\n1,2\n")
    else:
        save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_stranger_s_file_is_refused_and_an_earlier_one_of_ours_is_replaced(tmp_path, name):
    stranger_s(tmp_path / name)
    before = state(tmp_path)
    with pytest.raises(
        BadFile, match=r"must be a new file or an earlier .* of offramp, got something else"
    ):
        WRITERS[name](tmp_path / name)
    assert state(tmp_path) == before
    (tmp_path / name).write_bytes(b"")  # an empty file is nobody's
    WRITERS[name](tmp_path / name)
    once = state(tmp_path)
    WRITERS[name](tmp_path / name)
    assert state(tmp_path).keys() == once.keys() == {name}


def test_a_document_of_ours_does_not_replace_one_of_another_kind(tmp_path):
    plan(tmp_path / "a.json")
    with pytest.raises(BadFile, match="an earlier places of offramp, got something else"):
        write_json(tmp_path / "a.json", "places", 1, {})
