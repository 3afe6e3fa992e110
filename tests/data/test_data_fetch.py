"""benchmarks/fetch.py, with files in place of the network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offramp.errors import BadFile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fetch.py"


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("benchmarks_fetch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convert_takes_the_state_dict_without_prefix_and_counters(fetch, tmp_path):
    weight = torch.randn(3, 2)
    counter = torch.tensor(7)
    state = {"module.linear.weight": weight, "module.bn1.num_batches_tracked": counter}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th")
    fetch.convert(tmp_path / "net.th", tmp_path / "weights" / "net.safetensors")
    loaded = load_file(tmp_path / "weights" / "net.safetensors")
    assert list(loaded) == ["linear.weight"]
    assert torch.equal(loaded["linear.weight"], weight)
    (notice,) = (tmp_path / "weights").glob("*.txt")
    assert "Copyright (c) 2018, Yerlan Idelbayev" in notice.read_text()


def test_convert_refuses_pickles(fetch, tmp_path):
    torch.save({"state_dict": {"a": print}}, tmp_path / "net.th")
    with pytest.raises(BadFile, match="weights_only"):
        fetch.convert(tmp_path / "net.th", tmp_path / "net.safetensors")


def test_download_checks_before_it_replaces(fetch, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"rows" * 100_000)
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    fetch.download(source.as_uri(), tmp_path / "target", "sha256", sha[:8])
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    with pytest.raises(BadFile, match="cut short"):
        fetch.download(source.as_uri(), tmp_path / "other", "sha256", "00000000")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def archive(path, name):
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3073
        tar.addfile(member, io.BytesIO(bytes(3073)))
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_unpacked_and_kept(fetch, tmp_path):
    (tmp_path / "out").mkdir()
    fetch.cifar10(
        tmp_path / "out", *archive(tmp_path / "a.tar.gz", "cifar-10-batches-bin/test_batch.bin")
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cifar-10-batches-bin"]
    fetch.cifar10(tmp_path / "out", "file:///nowhere", "")


def test_an_archive_cannot_write_elsewhere(fetch, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(tarfile.TarError):
        fetch.cifar10(tmp_path / "out", *archive(tmp_path / "b.tar.gz", "../../escaped"))
    assert not (tmp_path / "escaped").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_ends_with_a_sentence(fetch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "CHECKPOINTS", {})
    assert fetch.main([str(tmp_path), "weights"]) == 0
    monkeypatch.setattr(fetch.mnist, "__defaults__", ((tmp_path / "nowhere").as_uri() + "/",))
    assert fetch.main([str(tmp_path), "mnist"]) == 2
    assert capsys.readouterr().err.startswith("fetch: ")
