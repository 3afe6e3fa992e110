"""torch:compile, ahead of time: it answers as torch does at any batch size, and never compiles
while it serves.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import offramp as off
from offramp.engines import _compiling
from offramp.errors import BadNetwork, InvalidArgument, Mismatch
from offramp.plans.plan import Plan
from offramp.runtime import graphs
from offramp.runtime.engine import engine_of
from offramp.testing import check_engine
from small import ladder_of, rows_of

X = rows_of(70)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_it_answers_as_torch_does_and_compiles_nothing_after_open(monkeypatch):
    net = ladder_of(2)
    trace = off.record(net, X, timed=False, engine="torch:compile")
    assert trace.header.origin.engine == "torch:compile"
    middle = float(np.median(trace.columns["score/small"]))
    plan = Plan(thresholds={"small": (middle,)}, origin=trace.header.origin)
    with pytest.raises(Mismatch, match="torch:compile"):
        off.open(net, plan)
    runner = off.open(net, plan, engine="torch:compile")

    def late(*_args, **_options):
        raise AssertionError("compiled while it served")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", late)
    frames = dict(torch._dynamo.utils.counters["frames"])
    eager = off.open(net, Plan.by_hand({"small": middle}))
    for size in (1, 2, 3, 17, 64, 1, 70):
        mine = runner(X[:size])
        wanted = eager(X[:size])
        assert mine.exit.tolist() == wanted.exit.tolist()
        torch.testing.assert_close(mine.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert dict(torch._dynamo.utils.counters["frames"]) == frames
    check_engine(engine_of("torch:compile")[0], net, X[:9])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_package_is_kept_on_disk_and_made_again_where_it_cannot_be_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    real = torch._inductor.aoti_compile_and_package

    def counting(*args, **options):
        compiled.append(args)
        return real(*args, **options)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", counting)
    plan = Plan.by_hand({})

    def answers(seed=0):
        compiled.clear()
        net = ladder_of(2, seed=seed)
        return off.open(net, plan, engine="torch:compile", example=X[:4])(X).logits

    wanted = answers()
    assert len(compiled) == 2
    # another network object with the same weights, as in the next process
    torch.testing.assert_close(answers(), wanted, atol=0, rtol=0)
    assert not compiled
    file, _ = (tmp_path / "offramp").glob("*.bin")
    content = file.read_bytes()

    # damaged, then readable but no package
    file.write_bytes(content[:-5])
    torch.testing.assert_close(answers(), wanted)
    assert len(compiled) == 1
    monkeypatch.setattr(_compiling.disk, "read", lambda key, **_: b"no package")
    torch.testing.assert_close(answers(), wanted)
    assert len(compiled) == 2


def test_a_package_belongs_to_its_processor_its_threads_and_its_network(monkeypatch):
    """Without a compiler: what is asked of the cache is the key."""
    keys = []

    def read(key, *, private):
        assert private
        keys.append(key)

    def package(*_):
        raise BadNetwork("nothing is compiled here")

    monkeypatch.setattr(_compiling.disk, "read", read)
    monkeypatch.setattr(_compiling, "_package", package)

    def ask(seed=0):
        with pytest.raises(BadNetwork, match="nothing is compiled here"):
            off.open(
                ladder_of(2, seed=seed), Plan.by_hand({}), engine="torch:compile", example=X[:4]
            )
        return keys[-1]

    first = ask()
    assert ask() == first
    others = [ask(seed=1)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        others.append(ask())
    with monkeypatch.context() as patch:
        patch.setattr(_compiling, "processor", lambda: "another chip")
        others.append(ask())
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "edition", lambda: "another edition")
        others.append(ask())
    assert len({first, *others}) == 5


def test_what_it_does_not_keep_is_refused():
    with pytest.raises(
        InvalidArgument, match="compile must be the only option, got it together with bf16"
    ):
        engine_of("torch:compile,bf16")[0].open(ladder_of(2), (), torch.device("cpu"))


def test_without_a_compiler_it_is_said(monkeypatch):
    def fails(*_args, **_options):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(BadNetwork, match="segment 'small' cannot be compiled: No working C"):
        off.record(ladder_of(2, seed=3), X, timed=False, engine="torch:compile")
