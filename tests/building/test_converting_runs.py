"""Every method gives a model that is cut, exported, and run on every engine like any other. That it
is trained is in contracts/test_contracts_conversions.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import convert, methods
from offramp.layers.residual import Block
from small import made_once, seeded

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "binary": {"stage.*": "binary"},
    "g_ghost": {"stage": "g_ghost"},
    "ghost": {"stage.*": "ghost"},
    "low_rank": {"stage.*": "low_rank?rank=4"},
    "packed": {"stage.*": "packed?of=binary"},
    "packed-ternary": {"stage.*": "packed?of=ternary"},
    "pad": {"stage.*": "pad?ratio=0.3", "head": "pad?ratio=0.5"},
    "pruned": {"stage.*.conv1": "pruned?importance=magnitude"},
    "skip": {"stage.1": "skip"},
    "ternary": {"stage.*": "ternary"},
    "tucker": {"stage.*": "tucker?rank_in=4&rank_out=4"},
}


SAY = "print(json.dumps(run(x)['logits'].tolist()))"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(*(Block(8, 8) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


@made_once
def net_of(method):
    """A converted network that is cut, and its model."""
    if method == "pruned":
        pytest.importorskip("torch_pruning")
    made = seeded(lambda: convert(seeded(Net, 0).eval(), LAYERS[method], example=X), 0)
    return seeded(lambda: off.cut(made, X, at=["stem"]), 0), made


def test_no_method_is_forgotten():
    plain = {
        "keep",
        "adaptive_depth",
        "switchable_norm",
    }  # tests of their own: halting, resolutions
    assert set(methods()) - plain == {name.partition("-")[0] for name in LAYERS}


# contracts/test_contracts_conversions.py exports a folder with "ghost".
FAST = [("torch", method) for method in LAYERS] + [("onnxruntime", "packed")]
SLOW = [("onnxruntime", method) for method in LAYERS if ("onnxruntime", method) not in FAST]


@pytest.mark.parametrize(
    ("engine", "method"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_it_runs_on_engines(method, engine):
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    net, made = net_of(method)
    runner = off.open(net.eval(), off.Plan.by_hand({"stem": float("inf")}), engine=engine)
    for rows in (X, X[:1]):
        with torch.no_grad():
            assert torch.allclose(runner(rows).logits, made(rows), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pad", "tucker", "packed"])
def test_an_exported_folder_runs_without_us(method, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, made = net_of(method)
    off.export(net.eval(), off.Plan.by_hand({"stem": float("inf")}), tmp_path / "out", example=X)
    np.save(tmp_path / "x.npy", X.numpy())
    code = (
        "import runpy, numpy, json; run = runpy.run_path('out/run.py')['run']; x = "
        f"numpy.load('x.npy'); {SAY}"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    assert said.returncode == 0, said.stderr
    with torch.no_grad():
        assert torch.allclose(torch.tensor(json.loads(said.stdout)), made(X), atol=1e-4)
