"""Rows that trained a network, or made a plan, are noticed whatever way they come in again: 64 of
64 pairs of ways.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import offramp as off
from offramp.errors import OverlappingRows
from offramp.fitting.training import recipe_of
from small import seeded

pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.BetterExit")  # made-up models

ROWS = 40
X = np.random.default_rng(0).integers(-8, 8, (ROWS, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
ORDER = np.random.default_rng(1).permutation(ROWS)
OTHER = np.random.default_rng(2).normal(size=(ROWS, 6)).astype(np.float32)


class Model(nn.Module):
    """Reads numbers of any type, alone or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, feats: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(feats.float())))


class Dicts(Dataset):
    """Rows as transformers' Trainer takes them: the label stands beside the inputs."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = self.order[at]
        return {"feats": torch.from_numpy(X[row]), "labels": int(Y[row])}


def npz(folder: Path) -> str:
    np.savez(folder / "rows.npz", x=X, y=Y)
    return f"npz:{folder / 'rows.npz'}"


def npz_of_inputs(folder: Path) -> str:
    np.savez(folder / "named.npz", **{"x/feats": X.astype(np.float64), "labels": Y})
    return f"npz:{folder / 'named.npz'}"


def parquet(folder: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    files = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"x": X.tolist(), "label": Y})
    files.write_table(table, folder / "rows.parquet")
    return f"parquet:{folder / 'rows.parquet'}"


def spread(x: np.ndarray) -> Tensor:
    """The same values with gaps between them in memory."""
    wide = torch.zeros(ROWS, 12, dtype=torch.float64)
    wide[:, ::2] = torch.from_numpy(x)
    return wide[:, ::2]


Way = Callable[[Path], Any]
TRAINING: dict[str, Way] = {
    "arrays": lambda _: (X, Y),
    "dict of arrays": lambda _: {"feats": X, "labels": Y},
    "dataset of pairs": lambda _: TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
    "dataset of dicts": lambda _: Dicts(np.arange(ROWS)),
    "npz": npz,
    "parquet": parquet,
    "int16 in another order": lambda _: (X[ORDER].astype(np.int16), Y[ORDER]),
    "float64 with gaps": lambda _: (spread(X), torch.from_numpy(Y)),
}
CALIBRATION: dict[str, Way] = {
    "arrays": lambda _: (X, Y),
    "dict, another label": lambda _: {"LABEL": torch.from_numpy(Y), "feats": X.astype(np.int64)},
    "dataset of dicts": lambda _: Dicts(ORDER),
    "loader of pairs": lambda _: DataLoader(
        TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=7
    ),
    "loader of dicts": lambda _: DataLoader(Dicts(np.arange(ROWS)), batch_size=9),
    "npz of named inputs": npz_of_inputs,
    "parquet": parquet,
    "half, -0.0, another order": lambda _: (
        np.where(X == 0, -0.0, X)[ORDER].astype(np.float16),
        Y[ORDER],
    ),
}


def ladder() -> off.Network:
    """Two whole models: they take rows alone or by name."""
    return off.ladder({"small": seeded(Model, 0), "large": seeded(Model, 1)}).eval()


def test_no_pair_of_ways_hides_rows_that_trained(tmp_path):
    calibration = {name: make(tmp_path) for name, make in CALIBRATION.items()}
    noticed = []
    for train in TRAINING.values():
        net = ladder()
        off.fit(net, train(tmp_path), recipe=recipe_of("joint", epochs=1), progress=False)
        anew = off.ladder(dict(net.backbone.items())).eval()
        for name, again in calibration.items():
            trace = off.record(anew, again, timed=False, progress=False)
            assert trace.labels is not None, name
            with pytest.raises(
                OverlappingRows, match=f"{ROWS} of the {ROWS} calibration rows .* trained"
            ):
                off.calibrate(trace, risk="disagreement", at_most=0.9)
            noticed.append(name)
    assert len(noticed) == 64


def test_no_pair_of_ways_hides_rows_of_the_plan(tmp_path):
    net = ladder()
    traces = {}
    for name, make in {**TRAINING, **CALIBRATION}.items():
        traces[name] = off.record(net, make(tmp_path), timed=False, progress=False)
    noticed = []
    for first in TRAINING:
        plan = off.calibrate(traces[first], risk="disagreement", budget=1.5)
        for name in CALIBRATION:
            test = traces[name]
            form = test.header.digest_form
            with pytest.raises(OverlappingRows, match=f"{ROWS} of the {ROWS} test rows"):
                plan.rows.refuse_overlap(test.columns["digest"], "test", test.columns["row"], form)
            noticed.append(name)
    assert len(noticed) == 64


def test_rows_that_trained_nothing_are_free():
    net = ladder()
    off.fit(net, (X, Y), recipe=recipe_of("joint", epochs=1), progress=False)
    trace = off.record(net, (OTHER, Y), timed=False, progress=False)
    assert not trace.columns["learned"].any()
    mixed = off.record(net, np.concatenate([OTHER, X[3:5]]), timed=False, progress=False)
    assert np.flatnonzero(mixed.columns["learned"]).tolist() == [ROWS, ROWS + 1]
