"""run.py answers only from the files that were exported: every flipped bit and every edit is
refused in a sentence.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import offramp as off
from offramp._support.files import checksum, digest_file, read_json, write_json
from offramp.plans.plan import Plan
from small import ladder_of, rows_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

KINDS = ("parts", "one file")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of each kind, and rows."""
    home = tmp_path_factory.mktemp("exported")
    rows = rows_of(8)
    np.save(home / "rows.npy", rows.numpy())
    plan = Plan.by_hand({"small": 0.5})
    for kind in KINDS:
        off.export(ladder_of(2), plan, home / kind, example=rows[:4], one_file=kind == "one file")
    return home


@pytest.fixture(params=KINDS)
def folder(exported, request, tmp_path):
    """A copy of a folder, with the rows beside it."""
    shutil.copy(exported / "rows.npy", tmp_path)
    shutil.copytree(exported / request.param, tmp_path / "f")
    return tmp_path / "f"


def said_by(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int | str, str, str]:
    """Exit code, output and errors of the run.py of a folder on its rows, in this process.

    The code is the name of the exception where Python cannot even read the program.
    """
    spec = importlib.util.spec_from_file_location("run_in_a_folder", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile((folder / "run.py").read_bytes(), folder / "run.py", "exec"), module.__dict__)
    except Exception as problem:
        return type(problem).__name__, "", ""
    try:
        code = module.main([str(folder.parent / "rows.npy")])
    except SystemExit as problem:  # of a damaged command line
        code = problem.code
    except Exception as problem:
        code = type(problem).__name__
    out, errors = capsys.readouterr()
    return code, out, errors


def refused(found: tuple[int | str, str, str]) -> bool:
    code, out, errors = found
    return code == 2 and out == "" and errors.startswith("run.py: ") and errors.count("\n") == 1


def test_it_answers_as_it_was_exported(folder, capsys):
    code, out, errors = said_by(folder, capsys)
    assert (code, errors) == (0, "")
    want = off.run(ladder_of(2), Plan.by_hand({"small": 0.5}), rows_of(8))
    lines = [line.split(",") for line in out.splitlines()]
    assert lines[0] == ["row", "answer", "exit", "flagged"]
    assert [int(line[1]) for line in lines[1:]] == want.logits.argmax(1).tolist()
    assert [line[2] for line in lines[1:]] == [want.exits[index] for index in want.exit]


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_refused(folder, capsys, count):
    """Of run.py itself: Python refuses to read it, or it refuses itself. It never answers."""
    dice = np.random.default_rng(0)
    seen = Counter()
    files = sorted(folder.glob("*.*"))
    for _ in range(count):
        file = files[dice.integers(len(files))]
        sound = file.read_bytes()
        damaged = bytearray(sound)
        damaged[dice.integers(len(sound))] ^= 1 << int(dice.integers(8))
        file.write_bytes(damaged)
        found = said_by(folder, capsys)
        file.write_bytes(sound)
        if file.name == "run.py" and not refused(found):
            # A text that is not a program, whose imports and decorators fail before anything could
            # be checked, or whose own options have another name.
            usage = found[0] == 2 and found[2].startswith("usage:")
            assert isinstance(found[0], str) or usage, found
            assert found[1] == ""
            seen["a program that cannot start"] += 1
        else:
            assert refused(found), (file.name, found)
            seen["refused"] += 1
    assert seen["refused"] > 0.8 * count, seen
    assert said_by(folder, capsys)[0] == 0


EDITS = {
    "another exit answers": lambda body: body["exits"].reverse(),
    "another threshold's gate": lambda body: body["gates"].clear(),
    "more classes": lambda body: body.update(classes=body["classes"] + 1),
    "a number as a text": lambda body: body.update(classes=str(body["classes"])),
    "another type": lambda body: body.update(logits="float64"),
    "other inputs": lambda body: body["inputs"][0].update(shape=[5]),
    "another input type": lambda body: body["inputs"][0].update(dtype="float64"),
    "no stages": lambda body: body["stages"].clear(),
    "a stage less": lambda body: body["stages"].pop(),
    "stages in another order": lambda body: body["stages"].reverse(),
    "no gate": lambda body: body["stages"][0].update(gate=False),
    "the first is the last": lambda body: body["stages"][0].update(
        edges=[{"to": None, "carries": []}]
    ),
    "another place": lambda body: body["stages"][0].update(exit=1),
    "another reason": lambda body: body["stages"][-1].update(why=0),
    "another graph": lambda body: body["stages"][0].update(file=body["stages"][-1]["file"]),
    "the other kind": lambda body: body.update(
        one_file=None if body["one_file"] else "network.onnx"
    ),
    "a promise": lambda body: body.update(promise={"risk": "error", "at_most": 0}),
    "no files": lambda body: body["files"].clear(),
    "a file less": lambda body: body["files"].pop("plan.json"),
    "another digest": lambda body: body["files"].update({"plan.json": "0" * 64}),
    "one more file": lambda body: body["files"].update({"rows.npy": "0" * 64}),
    "a newer schema": lambda body: body.update(schema="offramp/export/9"),
    "an older schema": lambda body: body.update(schema="offramp/export/1"),
    "no checksum": lambda body: body.pop("checksum"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(folder, capsys, name):
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    EDITS[name](document)
    file.write_text(json.dumps(document, indent=1) + "\n")
    assert refused(found := said_by(folder, capsys)), found


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "7", "{}", "[" * 100_000, '{"schema": "offramp/export/3"}', "\ufeff{}"],
)
def test_what_is_no_manifest_is_refused(folder, capsys, text):
    (folder / "manifest.json").write_text(text)
    assert refused(found := said_by(folder, capsys)), found


def test_white_space_and_keys_that_stand_twice_are_edits_too(folder, capsys):
    text = (folder / "manifest.json").read_text()
    for edited in (
        text + "\n",
        text.replace("\n ", "\n  ", 1),
        text.replace("{", '{"classes": 1,', 1),
    ):
        (folder / "manifest.json").write_text(edited)
        assert refused(found := said_by(folder, capsys)), found


def signed(folder: Path, change) -> None:
    """A manifest that somebody wrote with the right checksum and digests."""
    _, body = read_json(folder / "manifest.json", "export", 3)
    change(body)
    write_json(folder / "manifest.json", "export", 3, body)


OUTSIDE = [
    "../x.onnx",
    "/x.onnx",
    "sub/x.onnx",
    "..",
    ".",
    "",
    "sub\\x.onnx",
    "..\\x.onnx",
    "C:x.onnx",
    "file:x",
    5,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_folder_is_opened(folder, capsys, name):
    def change(body):
        graph = body["one_file"] or body["stages"][0]["file"]
        digest = body["files"].pop(graph)
        body["files"][str(name)] = digest
        body["stages"][0]["file"] = name
        body["one_file"] = name if body["one_file"] else None

    graph = next(folder.glob("*.onnx"))
    (folder / "sub").mkdir()
    for copy in (folder.parent / "x.onnx", folder / "sub" / "x.onnx"):
        shutil.copy(graph, copy)
    signed(folder, change)
    assert refused(found := said_by(folder, capsys)), found


@pytest.mark.parametrize("name", ["plan.json", "graph", "manifest.json", "run.py"])
def test_no_link_is_followed(folder, capsys, name):
    file = next(folder.glob("*.onnx")) if name == "graph" else folder / name
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")
    assert refused(found := said_by(folder, capsys)), found


def test_a_missing_file_and_a_folder_in_its_place(folder, capsys):
    graph = next(folder.glob("*.onnx"))
    graph.unlink()
    assert refused(found := said_by(folder, capsys)), found
    graph.mkdir()
    assert refused(found := said_by(folder, capsys)), found


def test_another_plan_with_a_right_checksum_of_its_own(folder, capsys):
    Plan.by_hand({"small": 0.1}).save(folder / "plan.json")
    code, _, errors = found = said_by(folder, capsys)
    assert refused(found), (code, errors)
    assert "plan.json was changed after the export" in errors


def test_an_export_that_replaces_another_while_it_is_read(exported, tmp_path):
    """The program reads the manifest again where files do not fit it."""
    shutil.copytree(exported / "parts", tmp_path / "f")
    spec = importlib.util.spec_from_file_location("run_of_f", tmp_path / "f" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain_file = module.plain_file
    turns = []

    def replaced(name):
        found = plain_file(name)
        if name == "manifest.json" and not turns:
            turns.append(1)
            off.export(ladder_of(2, seed=3), Plan.by_hand({}), tmp_path / "f", example=rows_of(4))
        return found

    module.plain_file = replaced
    assert module.run(rows_of(3).numpy())["exit"].tolist() == [1, 1, 1]


def test_names_that_a_spreadsheet_would_compute(folder, capsys):
    """The manifest is signed again: no network has such names."""
    signed(folder, lambda body: body.update(exits=["=cmd|' /C calc'!A0", "-1,2"]))
    code, out, _ = said_by(folder, capsys)
    assert code == 0
    cells = {line.split(",", 2)[2].rsplit(",", 1)[0] for line in out.splitlines()[1:]}
    assert cells <= {"'=cmd|' /C calc'!A0", '"\'-1,2"'}


def test_the_output_replaces_nothing_but_answers(folder, capsys):
    spec = importlib.util.spec_from_file_location("run_for_output", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = str(folder.parent / "rows.npy")
    named = folder.parent / "x.npz"
    np.savez(named, x=np.load(rows))
    mine = folder.parent / "mine.npz"
    np.savez(mine, a=np.zeros(2))
    before = {path: path.read_bytes() for path in (named, mine)}
    for words in (
        [str(named), "-o", str(named)],
        [rows, "-o", str(mine)],
        [rows, "-o", "answers.csv"],
    ):
        assert module.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):
        assert module.main([str(named), "-o", str(folder.parent / "y.npz")]) == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "f",
        "mine.npz",
        "rows.npy",
        "x.npz",
        "y.npz",
    ]


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.npy", "f", "gone.npy", "rows.npy\0"])
def test_rows_that_are_no_file(folder, capsys, path):
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes on this system")
    os.mkfifo(folder.parent / "pipe.npy")
    spec = importlib.util.spec_from_file_location("run_for_rows", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(folder.parent / path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_flip_in_a_process_of_its_own(folder):
    """As operations would see it: exit code 2 and one line."""
    graph = next(folder.glob("*.onnx"))
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 4
    graph.write_bytes(data)
    words = [sys.executable, str(folder / "run.py"), str(folder.parent / "rows.npy")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"{graph.name} was changed after the export" in done.stderr


def test_the_checksum_is_the_package_s(folder):
    document = json.loads((folder / "manifest.json").read_text())
    body = {key: value for key, value in document.items() if key not in ("schema", "checksum")}
    assert checksum(body) == document["checksum"]
    assert {name: digest_file(folder / name) for name in body["files"]} == body["files"]
    assert set(body["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
