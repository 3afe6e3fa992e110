"""Graphs are kept on disk by all that they were made of: the next process neither exports nor takes
a model apart.
"""

from __future__ import annotations

import pytest
import torch

import offramp as off
from compiled import carrying, middling
from offramp.errors import MissingExtra
from offramp.networks.compiled import compiled_of
from offramp.plans.plan import BAND
from offramp.runtime import graphs
from offramp.runtime.engine import engine_of
from serving import Exporting
from small import dense, rows_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    try:
        engine_of("onnxruntime")
    except MissingExtra as problem:
        pytest.skip(str(problem))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "offramp"


@pytest.fixture
def counted(monkeypatch):
    """The names of the nodes whose graphs were written, and of networks that were taken apart."""
    found = []
    written = graphs.written
    passing = graphs._passing
    monkeypatch.setattr(
        graphs, "written", lambda part, *rest: (found.append(part.name), written(part, *rest))[1]
    )
    monkeypatch.setattr(
        graphs, "_passing", lambda *rest, **more: (found.append("apart"), passing(*rest, **more))[1]
    )
    return found


def anew(net):
    """As a new process has it: nothing was made of it yet."""
    compiled_of(net).forget()
    return net


def test_the_next_process_writes_nothing(counted):
    x = rows_of(20)
    net = carrying()
    plan = middling(net, x)
    before = off.open(net, plan, engine="onnxruntime", example=x)
    assert counted
    counted.clear()
    after = off.open(anew(net), plan, engine="onnxruntime", example=x)
    assert counted == []
    assert "in one graph" in repr(after)
    assert torch.equal(after(x).logits, before(x).logits)
    assert after(x).exit.tolist() == before(x).exit.tolist()
    later = [one.logits for one in after.anytime(x)]
    assert all(map(torch.equal, later, [one.logits for one in before.anytime(x)]))


def test_other_weights_are_another_network(counted):
    x = rows_of(20)
    net = carrying()
    plan = middling(net, x)
    off.open(net, plan, engine="onnxruntime", example=x)
    counted.clear()
    with torch.no_grad():
        net.backbone.last.bias.add_(1)
    y = off.open(anew(net), plan, engine="onnxruntime", example=x)(x)
    assert counted
    torch.testing.assert_close(y.logits, off.open(net, plan)(x).logits, atol=BAND, rtol=0)


@pytest.mark.parametrize("damage", ["cut", "of another version", "no graph at all"])
def test_a_damaged_cache_is_made_again(folder, counted, damage, monkeypatch):
    x = rows_of(20)
    net = carrying()
    plan = middling(net, x)
    want = off.open(net, plan, engine="onnxruntime", example=x)(x)
    counted.clear()
    if damage == "of another version":
        monkeypatch.setattr(graphs, "edition", lambda: "another edition")
    elif damage == "cut":
        for file in folder.glob("*.bin"):
            file.write_bytes(file.read_bytes()[:-10])
    else:
        monkeypatch.setattr(graphs.disk, "read", lambda key: b"[1, 2]\nnot a model")
    got = off.open(anew(net), plan, engine="onnxruntime", example=x)(x)
    assert counted
    assert torch.equal(got.logits, want.logits)


def test_a_network_serves_while_it_is_exported(tmp_path):
    model = Exporting().eval()
    net = off.ladder({"a": model, "b": dense(1)})
    plan = off.Plan.by_hand({"a": 0.3})
    x = rows_of(20)
    runner = off.open(net, plan)
    wanted = runner(x).logits
    model.service.during_export(lambda: runner(x).logits)
    off.export(net, plan, tmp_path / "exported", example=x)
    results = model.service.all_results()
    assert results
    for logits in results:
        assert torch.equal(logits, wanted)
