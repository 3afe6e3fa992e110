"""Atomic writes, safe reads, and refusals in one sentence."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offramp._support import files
from offramp._support.files import (
    checksum,
    digest_file,
    from_document,
    read_arrays,
    read_json,
    read_tensors,
    to_document,
    write_arrays,
    write_json,
    write_tensors,
)
from offramp.errors import BadFile, NewerSchema


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_documents_come_back(tmp_path):
    body = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "a.json", "plan", 3, body)
    assert read_json(tmp_path / "a.json", "plan", 3) == (3, body)
    assert read_json(tmp_path / "a.json", "plan", 9) == (3, body)
    with pytest.raises(NewerSchema, match=r"at most offramp/plan/2, got offramp/plan/3\. Upgrade"):
        read_json(tmp_path / "a.json", "plan", 2)
    with pytest.raises(BadFile, match="must be an offramp trace"):
        read_json(tmp_path / "a.json", "trace", 3)


def test_a_checksum_does_not_depend_on_the_order_of_keys():
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
    assert checksum({"a": 1}) != checksum({"a": 2})
    assert len(checksum([1])) == 16


@pytest.mark.parametrize("depth", [10, 100, 900, 990, 3000, 100_000])
def test_deep_documents(depth):
    text = to_document("plan", 1, {"a": 0}).replace('"a": 0', '"a": ' + "[" * depth + "]" * depth)
    with pytest.raises(BadFile):
        from_document(text, "plan", 1, "this text")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        '"a"',
        "{}",
        '{"schema": 5}',
        '{"schema": "a/b/c/d"}',
        '{"schema": "offramp/plan/1"}',
    ],
)
def test_what_is_no_document(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadFile, match=r"a\.json"):
        read_json(tmp_path / "a.json", "plan", 1)


def test_missing_files_and_folders(tmp_path):
    for read in (lambda p: read_json(p, "plan", 1), read_arrays, read_tensors):
        with pytest.raises(BadFile, match="does not exist"):
            read(tmp_path / "nothing")
        with pytest.raises(BadFile):
            read(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(BadFile, match="as text"):
        read_json(tmp_path / "latin", "plan", 1)


def test_arrays_come_back(tmp_path):
    columns = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.uint64),
        "bools": np.array([True, False]),
    }
    write_arrays(tmp_path / "a.npz", "a header: ü", columns)
    header, again = read_arrays(tmp_path / "a.npz")
    assert header == "a header: ü"
    assert again.keys() == columns.keys()
    for name, column in columns.items():
        np.testing.assert_array_equal(again[name], column)
        assert again[name].dtype == column.dtype


def test_pickles_are_not_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(
        tmp_path / "a.npz", **{files.HEADER: np.zeros(3, np.uint8), "x": np.array([Evil()], object)}
    )
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    np.save(tmp_path / "d.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("header.json.npy", pickle.dumps(Evil()))
    for name in ("a.npz", "b.npz", "c.npz", "d.npy", "e.npz"):
        with pytest.raises(BadFile, match="Make it again"):
            read_arrays(tmp_path / name)
    with pytest.raises(ValueError, match="pickle"):
        write_arrays(tmp_path / "f.npz", "", {"x": np.array([Evil()], object)})
    assert not Path("ran-code").exists()
    assert "f.npz" not in left(tmp_path)


def test_tensors_come_back(tmp_path):
    tensors = {"a.b": torch.randn(2, 3), "count": torch.tensor(5), "half": torch.ones(2).bfloat16()}
    write_tensors(
        tmp_path / "w.safetensors", {**tensors, "view": tensors["a.b"].T, "same": tensors["a.b"]}
    )
    again = read_tensors(tmp_path / "w.safetensors")
    assert again.keys() == tensors.keys() | {"view", "same"}
    for name, value in tensors.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value)
    assert torch.equal(again["view"], tensors["a.b"].T)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt"])
def test_checkpoints_are_read_as_plain_weights(tmp_path, suffix):
    weights = {"a": torch.ones(2)}
    for wrapped in (
        weights,
        {"module.a": torch.ones(2)},
        {"state_dict": weights, "epoch": 5},
        {"model": {"module.a": torch.ones(2)}},
    ):
        torch.save(wrapped, tmp_path / f"w{suffix}")
        (name,) = read_tensors(tmp_path / f"w{suffix}")
        assert name == "a"
    for wrong in ([1], {"a": 5}, {"state_dict": {"a": "text"}}, torch.ones(2)):
        torch.save(wrong, tmp_path / f"w{suffix}")
        with pytest.raises(BadFile, match="state dict"):
            read_tensors(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors", "w.ckpt"])
def test_a_pickle_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / name)
    with pytest.raises(BadFile):
        read_tensors(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadFile):
        read_tensors(tmp_path / name)
    assert not Path("ran-code").exists()


def test_a_safetensors_file_of_another_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(BadFile):
        read_tensors(tmp_path / "w.pt")


def test_digest_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_tensors_on_a_full_disk(tmp_path):
    code = """
import resource, signal, sys, torch
from offramp.errors import BadFile
from offramp._support.files import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_tensors(sys.argv[1], {"a": torch.zeros(1000)})
except BadFile as problem:
    print(problem)
"""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
    )
    assert "Make room" in done.stdout, done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_home_folder_that_does_not_exist_is_a_path_like_any_other():
    """Python raises a RuntimeError for a user without an account."""
    assert files.from_home("~no-such-user/x.npz") == Path("~no-such-user/x.npz")
    assert files.from_home("~/x.npz") == Path.home() / "x.npz"
