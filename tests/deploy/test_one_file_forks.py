"""A network with forks in one ONNX file: the answers of `run`, on random topologies too."""

from __future__ import annotations

import importlib.util
import math
import random

import numpy as np
import pytest
import torch

import offramp as off
from forked import WIDTH, three
from offramp.plans.plan import Plan
from routes import drawn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (count, WIDTH), generator=draw).float()


def program_of(net, plan, folder, x):
    """run.py of an export as one file."""
    off.export(net, plan, folder, example=x[:4], one_file=True)
    assert len([*folder.glob("*.onnx")]) == 1
    spec = importlib.util.spec_from_file_location("run_one_file", folder / "run.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def require_same(program, net, plan, x):
    found = program.run(x.numpy(), threads=1)
    wanted = off.open(net, plan)(x)
    for name in ("exit", "why", "flagged"):
        assert found[name].tolist() == getattr(wanted, name).tolist()
    np.testing.assert_allclose(found["logits"], wanted.logits.numpy(), atol=1e-4)


def thresholds_for(net, draw):
    choices = [-math.inf, -1.5, -0.5, 0.5, 1.0, 1.5, math.inf]
    thresholds = {}
    for gate in net.topology.gates:
        thresholds[gate] = tuple(draw.choice(choices) for _ in range(net.topology.routes(gate)))
    return thresholds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_topologies_answer_as_run_does(seed, tmp_path):
    net = drawn(seed)
    x = rows_of(200, seed)
    draw = random.Random(seed)
    exit_ = draw.choice([None, *net.topology.exits])
    plan = Plan.by_hand(thresholds_for(net, draw), max_exit=exit_)
    program = program_of(net, plan, tmp_path / "f", x)
    for rows in (x, x[:1], x[7:9]):
        require_same(program, net, plan, rows)
    assert len(program.run(x[:0].numpy(), threads=1)["exit"]) == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network with its plan, the folder of its export, and the program there."""
    net = three()
    plan = Plan.by_hand({"size": (1.0, 0.0), "middle": 1.0})
    folder = tmp_path_factory.mktemp("exported") / "f"
    return net, plan, folder, program_of(net, plan, folder, rows_of(60))


def test_rows_that_are_not_finite_take_the_last_way_and_are_flagged(exported):
    net, plan, _, program = exported
    x = rows_of(40)
    x[3] = math.nan
    x[11, 2] = math.inf
    found = program.run(x.numpy(), threads=1)
    wanted = off.open(net, plan)(x)
    for name in ("exit", "why", "flagged"):
        assert found[name].tolist() == getattr(wanted, name).tolist()
    assert found["flagged"][[3, 11]].all()
    np.testing.assert_array_equal(found["logits"], wanted.logits.numpy())


def test_thresholds_are_inputs_of_the_file(exported):
    import onnxruntime

    net, plan, folder, _ = exported
    x = rows_of(60)
    session = onnxruntime.InferenceSession(folder / "network.onnx")
    names = {entry.name for entry in session.get_overridable_initializers()}
    assert names == {"threshold/size", "threshold/middle"}
    # no threshold is given, so those of the plan count; then others
    (exits,) = session.run(["exit"], {"x": x.numpy()})
    assert exits.tolist() == off.run(net, plan, x).exit.tolist()
    other = Plan.by_hand({"size": (-0.5, math.inf), "middle": 1.0})
    limits = {"threshold/size": np.array([-0.5, math.inf], np.float32)}
    (logits,) = session.run(["logits"], {"x": x.numpy(), **limits})
    np.testing.assert_array_equal(logits, off.run(net, other, x).logits.numpy())
