"""Checkpoints as people save them: read where they fit exactly, and said; else refused with what is
there.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from offramp.building.weights import load_weights
from offramp.errors import BadFile, Notice


class Small(nn.Module):
    """Two parts, so that a part of it can be wrapped; with a batch norm, which has a counter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)


def state(seed: int = 1) -> dict[str, torch.Tensor]:
    return Small(seed).state_dict()


def prefixed(prefix: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state(seed).items()}


def loaded(path, **more) -> bool:
    """Whether a new model has exactly the weights of seed 1 afterwards."""
    model = Small(0)
    load_weights(model, path, **more)
    return all(torch.equal(value, state(1)[name]) for name, value in model.state_dict().items())


def averaged() -> dict[str, torch.Tensor]:
    return torch.optim.swa_utils.AveragedModel(Small(1)).state_dict()


CHECKPOINTS = {
    "model_state_dict": lambda: {
        "epoch": 3,
        "model_state_dict": state(),
        "optimizer_state_dict": {"state": {0: {}}},
    },
    "state_dict": lambda: {"state_dict": state(), "best_acc1": 91.5},
    "net": lambda: {"net": prefixed("module."), "acc": np.float64(91.5), "epoch": np.int64(4)},
    "model": lambda: {"model": state(), "args": argparse.Namespace(lr=0.1, output="out")},
    "model_ema": lambda: {"model_ema": state(), "epoch": 1},
    "Lightning": lambda: {
        "state_dict": prefixed("model."),
        "pytorch-lightning_version": "2",
        "loops": {},
    },
    "Lightning, with a loss": lambda: {
        "state_dict": prefixed("model.") | {"loss.weight": torch.ones(2)}
    },
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled in Lightning": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "DataParallel": lambda: prefixed("module."),
    "compiled DataParallel": lambda: prefixed("_orig_mod.module."),
    "a part in DataParallel": lambda: {
        name.replace("features.", "features.module."): value for name, value in state().items()
    },
    "a part in FSDP": lambda: {
        name.replace("head.", "head._fsdp_wrapped_module."): value
        for name, value in prefixed("module.").items()
    },
    "AveragedModel": averaged,
    "torchvision's reference": lambda: {"model_ema": averaged(), "epoch": 1},
    "deeper": lambda: {"checkpoint": {"ema": {"shadow": state()}}},
    "the same twice": lambda: {"state_dict": state(), "state_dict_ema": state()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_checkpoints_are_read_where_they_fit(tmp_path, kind, suffix):
    torch.save(CHECKPOINTS[kind](), tmp_path / f"w{suffix}")
    with pytest.warns(Notice, match=f"w{suffix}: "):
        assert loaded(tmp_path / f"w{suffix}")


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "backbone.net."]
)
def test_prefixes_in_safetensors(tmp_path, prefix):
    save_file(prefixed(prefix), tmp_path / "w.safetensors")
    with pytest.warns(Notice, match=prefix):
        assert loaded(tmp_path / "w.safetensors")


def test_a_plain_state_dict_needs_no_word(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    save_file(state(), tmp_path / "w.safetensors")
    without = {
        name: value for name, value in state().items() if not name.endswith("num_batches_tracked")
    }
    torch.save(without, tmp_path / "old.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(tmp_path / "w.pt")
        assert loaded(tmp_path / "w.safetensors")
        assert loaded(tmp_path / "old.pt")


def test_what_is_not_used_is_said(tmp_path):
    torch.save(CHECKPOINTS["Lightning, with a loss"](), tmp_path / "w.pt")
    with pytest.warns(
        Notice, match="under 'state_dict', the prefix 'model.' .* not used: loss.weight"
    ):
        loaded(tmp_path / "w.pt")


AMBIGUOUS = {
    "state_dict_ema": (
        lambda: {"state_dict": state(2), "state_dict_ema": state(1)},
        "state_dict_ema",
    ),
    "model_ema": (lambda: {"model": state(2), "model_ema": averaged()}, "model_ema"),
    "teacher": (lambda: prefixed("student.", 2) | prefixed("teacher.", 1), "teacher."),
    "both": (lambda: {"model": prefixed("a.", 1) | prefixed("b.", 2), "ema": state(3)}, "model/a."),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_of_several_the_user_says_which(tmp_path, kind):
    made, key = AMBIGUOUS[kind]
    torch.save(made(), tmp_path / "w.pt")
    with pytest.raises(
        BadFile, match=rf"different sets of weights that fit Small: .*{key}.*\?key="
    ):
        loaded(tmp_path / "w.pt")
    with pytest.warns(Notice):
        assert loaded(tmp_path / "w.pt", key=key)
    with pytest.warns(Notice):
        assert loaded(f"{tmp_path}/w.pt?key={key}")
    with pytest.raises(BadFile, match="no 'nothing' that fits Small; these fit:"):
        loaded(tmp_path / "w.pt", key="nothing")


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save({"weight": torch.zeros(3, 5), "extra": torch.zeros(1)}, tmp_path / "w.pt")
    says = (
        r"1 missing .*bias.*1 not expected .*extra.*1 of another shape .*weight.*holds "
        r"itself: weight, extra"
    )
    with pytest.raises(BadFile, match=says):
        load_weights(nn.Linear(4, 3), tmp_path / "w.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        state() | {"extra.weight": torch.ones(1)},
        {name: value for name, value in state().items() if name != "head.bias"},
        {"state_dict": prefixed("model.") | {"model.extra": torch.ones(1)}},
        {"weights": state() | {"head.bias": torch.ones(3)}},
        prefixed("model") | {"x": torch.ones(1)},
        {"generator": {"a.weight": torch.ones(1)}, "critic": {"b.weight": torch.ones(1)}},
    ],
)
def test_nothing_is_taken_that_does_not_fit_exactly(tmp_path, wrong):
    torch.save(wrong, tmp_path / "w.pt")
    with pytest.raises(BadFile, match=r"does not fit Small: .*; the file holds .*: "):
        loaded(tmp_path / "w.pt")


def test_a_file_without_weights_names_its_keys(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    with pytest.raises(
        BadFile, match="must have a state dict of tensors, got the keys epoch, optimizer"
    ):
        loaded(tmp_path / "w.pt")


def test_a_whole_model_is_named_and_not_run(tmp_path):
    torch.save(Small(), tmp_path / "w.pt")
    with pytest.raises(
        BadFile, match=r"has a \S*Small, which would run code\. Save model.state_dict"
    ):
        loaded(tmp_path / "w.pt")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


@pytest.mark.parametrize("beside", [Evil(), argparse.Namespace(evil=Evil()), [Path("x"), Evil()]])
def test_what_stands_beside_weights_runs_nothing(tmp_path, beside, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state(), "args": beside}, "w.pt")
    with pytest.raises(BadFile, match="would run code"):
        loaded("w.pt")
    Path("raw.pt").write_bytes(pickle.dumps({"model": beside}))
    with pytest.raises(BadFile):
        loaded("raw.pt")
    assert not Path("ran-code").exists()


def test_a_compressed_archive_is_refused(tmp_path):
    """torch.save stores; what is deflated could fill the memory from a small file."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as source,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(BadFile, match="must be an uncompressed archive"):
        loaded(tmp_path / "z.pt")
