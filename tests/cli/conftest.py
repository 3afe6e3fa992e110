"""A folder with everything that commands read, made once by the commands themselves from barely
trained nets.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from typed import CALIBRATION, TEST, offramp
from words import library, write_tokenizer

USERS_OWN = """
import numpy as np
import torch
from offramp.contracts import Recipe
from offramp.guarantees.risks import Risk, disagreement
from torch import nn

def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

def three_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()

def scaled():
    return Scaled()

class Scaled(nn.Module):
    def forward(self, x):
        return x.float() / 16

class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fold, self.last = nn.Linear(64, 8), nn.Identity(), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.between(self.first(x.float().flatten(1))))

    def between(self, h):
        return h

class Mixing(Halves):
    def between(self, h):
        return h - h.mean(0)

class Folded(Halves):
    def between(self, h):
        return self.fold(h.unflatten(1, (2, 4)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1)

class Repeated(Halves):
    def between(self, h):
        return self.fold(self.fold(h).relu())

class Branching(Halves):
    def between(self, h):
        return h if h.sum() > 0 else -h

def spread(logits):
    return logits.std(1)

def noise():
    return np.random.default_rng(0).integers(0, 16, (40, 1, 8, 8), dtype=np.uint8)

def odd_digits():
    import offramp
    batch = offramp.rows("digits[800:900]").take(range(100))
    return batch.x, batch.y % 2

def failing(*_, **__):
    raise ZeroDivisionError("no weights here")

def ending(*_, **__):
    raise SystemExit(0)

def failing_gate(reads):
    raise ZeroDivisionError("no weights here")

class Failing(Recipe):
    def __init__(self):
        raise ZeroDivisionError("no weights here")

    def phases(self, network):
        return ()

class Ending(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        raise SystemExit(0)

mine = Risk("mine", 0.0, 1.0, False, True, disagreement, values=(0.0, 1.0))
not_a_risk = 3
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """network/, two weights, calibration.npz, test.npz, plan.json and users_own.py: copied by
    `workdir`.
    """
    pytest.importorskip("sklearn")
    from offramp.cli import demonstration as demo

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, demo.one_thread():
        patch.setattr(demo, "MEMBERS", {"digits_small": 4, "digits_large": 2})
        demo.train(folder)
    for name, spec in (("calibration", CALIBRATION), ("test", TEST)):
        done = offramp("record", folder / "network", spec, "-o", folder / f"{name}.npz")
        assert done.exit_code == 0, done.output
    done = offramp(
        "calibrate", folder / "calibration.npz", "--at-most", "0.1", "-o", folder / "plan.json"
    )
    assert done.exit_code == 0, done.output
    (folder / "users_own.py").write_text(USERS_OWN)
    return folder


@pytest.fixture
def workdir(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was made, as the current folder; its users_own.py can be imported."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def as_json() -> Callable[..., Any]:
    """What a command prints with --json."""

    def call(*words: object, code: int = 0) -> Any:
        done = offramp(*words, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    return call


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Specs of sixty texts of nine tokens, and of twelve."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", library())
    write_tokenizer(tmp_path / "tok")
    lines = (f"{n % 3}\t{['good', 'bad', 'film'][n % 3]}{' a' * (n % 7)}" for n in range(60))
    (tmp_path / "t.tsv").write_text("\n".join(["label\tsentence", *lines]))
    return "tsv:t.tsv?tokenizer=tok&length=9", "tsv:t.tsv?tokenizer=tok&length=12[0:40]"
