"""What engines keep on disk: used again by the next process, made again where it is damaged or of
another version, and never worth an error.
"""

from __future__ import annotations

import os
import shutil
import stat
from importlib.util import find_spec

import pytest
import torch

import offramp as off
from offramp._support import cache
from offramp._support.find import find_file
from offramp.networks.compiled import compiled_of
from offramp.plans.plan import Plan
from offramp.runtime import graphs
from small import ladder_of, rows_of

pytest.importorskip("onnxscript")
ENGINES = [name for name in ("onnxruntime", "openvino") if find_spec(name) is not None]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "offramp"


@pytest.fixture
def compiled(monkeypatch):
    """The names of what was made anew: graphs that were written, and models that OpenVINO
    compiled.
    """
    found = []
    written = graphs.written

    def write(part, *rest):
        found.append(f"graph {part.name}")
        return written(part, *rest)

    monkeypatch.setattr(graphs, "written", write)
    if "openvino" in ENGINES:
        package = find_file("engines", "openvino")._package()
        whole = package.Core.compile_model

        def compile_model(core, *rest):
            found.append("model")
            return whole(core, *rest)

        monkeypatch.setattr(package.Core, "compile_model", compile_model)
    return found


def answers(net, plan, x, engine):
    """As a new process opens it: nothing was made of the network yet."""
    compiled_of(net).forget()
    runner = off.open(net, plan, engine=engine, example=x)
    return runner(x)


def small_case():
    return ladder_of(2), Plan.by_hand({"small": 0.5}), rows_of(20)


@pytest.fixture
def case():
    return small_case()


@pytest.fixture(scope="module")
def first_of(tmp_path_factory):
    """By engine: the answers of the first process, and the folder that it left behind."""
    made = {}

    def first(engine):
        if engine not in made:
            home = tmp_path_factory.mktemp(engine)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(home))
                made[engine] = (answers(*small_case(), engine), home / "offramp")
        return made[engine]

    return first


@pytest.fixture
def first(first_of, folder):
    """By engine: the answers of the first process, whose files are in the folder of this test."""

    def first(engine):
        want, filled = first_of(engine)
        shutil.copytree(filled, folder)
        return want

    return first


def assert_same(got, want):
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.exit, want.exit)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_next_process_makes_nothing(case, first, engine, compiled):
    want = first(engine)
    compiled.clear()
    assert_same(answers(*case, engine), want)
    assert compiled == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["flipped", "swapped"])
def test_damaged_files_are_made_again_and_serve_afterwards(
    case, first, engine, damage, compiled, folder
):
    want = first(engine)
    compiled.clear()
    files = sorted(folder.glob("*.bin"))
    if damage == "swapped":  # each is whole, under the name of another
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, contents[1:] + contents[:1], strict=True):
            file.write_bytes(content)
    else:
        for file in files:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_same(answers(*case, engine), want)
    assert compiled
    compiled.clear()
    assert_same(answers(*case, engine), want)
    assert compiled == []


@pytest.mark.parametrize("engine", ENGINES)
def test_files_of_another_edition_are_not_read(case, first, engine, compiled, monkeypatch):
    want = first(engine)
    compiled.clear()
    monkeypatch.setattr(graphs, "edition", lambda: "another edition")
    assert_same(answers(*case, engine), want)
    assert any(name.startswith("graph") for name in compiled)


@pytest.mark.parametrize("engine", ENGINES)
def test_content_that_only_looks_valid_is_made_again(case, first, engine, monkeypatch, compiled):
    """Its digest is right, but the runtime cannot read it."""
    want = first(engine)
    compiled.clear()
    monkeypatch.setattr(cache, "read", lambda key: b"[1, 2]\nneither a graph nor a model")
    assert_same(answers(*case, engine), want)
    assert compiled


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_folder_to_write_into_it_opens_all_the_same(
    case, first_of, engine, compiled, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    want, _ = first_of(engine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    compiled.clear()
    assert_same(answers(*case, engine), want)
    assert compiled
    assert blocked.read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_only_folder_is_read(case, first, engine, compiled, folder):
    want = first(engine)
    compiled.clear()
    before = sorted(folder.iterdir())
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_same(answers(*case, engine), want)
        assert compiled == []
        answers(ladder_of(2, seed=1), *case[1:], engine)
        assert compiled
    finally:
        folder.chmod(stat.S_IRWXU)
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
@pytest.mark.parametrize("changed", ["version", "processor", "threads"])
def test_a_compiled_model_belongs_to_its_build_processor_and_threads(
    case, first, compiled, changed, monkeypatch
):
    engine = find_file("engines", "openvino")
    want = first("openvino")
    compiled.clear()
    if changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    else:
        monkeypatch.setattr(engine, "_kind", lambda: f"openvino of another {changed}")
    got = answers(*case, "openvino")
    assert set(compiled) == {"model"}
    torch.testing.assert_close(got.logits, want.logits)


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_the_build_and_the_processor_are_in_the_key():
    engine = find_file("engines", "openvino")
    assert engine._package().__version__ in engine._kind()
    assert engine._core().get_property("CPU", "FULL_DEVICE_NAME") in engine._kind()
