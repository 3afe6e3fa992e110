"""torch:cuda_graphs: padding to the recorded sizes changes no answer. Without a GPU a recording is
a plain call.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import offramp as off
from offramp.engines import _cuda_graphs
from offramp.engines import torch as eager
from offramp.engines._cuda_graphs import SIZES, Replayed
from offramp.errors import BadNetwork, InvalidArgument
from offramp.plans.plan import Plan
from offramp.plans.schedule import Schedule
from offramp.runtime.engine import engine_of
from offramp.testing import check_engine
from small import cut_of, images_of, ladder_of, rows_of

BATCHES = (1, 2, 3, 5, 8, 33, 64, 65, 100)


class Recorder:
    """Stands in for CUDA graphs: calls once, and again into the same memory."""

    def __init__(self):
        self.sizes = []

    def __call__(self, call, device):
        found = call()
        self.sizes.append(len(next(iter(found.values()))))

        def replay():
            for name, value in call().items():
                found[name].copy_(value)

        return replay, found


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(_cuda_graphs, "recorded", recorder)
    monkeypatch.setattr(eager, "_require_fixed", lambda network, device: None)
    return recorder


def halves(net, x):
    scores = {
        name: score.detach().median().item() for name, _, score in net.walk(x) if score is not None
    }
    return Plan.by_hand(scores)


def same(got, want):
    torch.testing.assert_close(got.logits, want.logits, atol=1e-6, rtol=1e-5)
    assert got.exit.tolist() == want.exit.tolist()
    assert got.why.tolist() == want.why.tolist()


@pytest.mark.parametrize("options", ["cuda_graphs", "cuda_graphs,channels_last"])
@pytest.mark.parametrize(("make", "rows"), [(cut_of, images_of), (lambda: ladder_of(3), rows_of)])
def test_any_batch_is_answered_as_without(recorder, make, rows, options):
    net = make()
    plan = halves(net, rows(101))
    mine = off.open(net, plan, engine=f"torch:{options}", example=rows(2))
    plain = off.open(net, plan)
    kept = [(mine(rows(size)), plain(rows(size))) for size in BATCHES]
    for got, want in kept:  # looked at after all of them ran: no answer lies in a buffer
        same(got, want)
    # once, whatever arrived
    assert sorted(recorder.sizes) == sorted(SIZES * len(net.topology.exits))


def test_rows_of_an_earlier_batch_behind_a_smaller_one_are_not_seen(recorder):
    net = ladder_of(2)
    plan = Plan.by_hand({"small": 0.2})
    mine = off.open(net, plan, engine="torch:cuda_graphs", example=rows_of(2))
    plain = off.open(net, plan)
    mine(torch.full((4, 4), float("nan")))
    for size in (3, 1, 2):
        same(mine(rows_of(size)), plain(rows_of(size)))


def test_threads_take_turns(recorder):
    net = ladder_of(3)
    draw = random.Random(0)
    plan = halves(net, rows_of(64))
    mine = off.open(net, plan, engine="torch:cuda_graphs", example=rows_of(2))
    plain = off.open(net, plan)
    batches = [rows_of(draw.choice(BATCHES), seed=seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as threads:
        for got, x in zip(threads.map(mine, batches), batches, strict=True):
            same(got, plain(x))


def test_what_cannot_be_recorded_is_named(monkeypatch):
    def fails(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(_cuda_graphs, "recorded", fails)
    net = ladder_of(2)
    (engine_stage,) = eager.Eager().open(net, Plan.by_hand({}).schedule(net.topology), net.device())
    with pytest.raises(
        BadNetwork,
        match="segment 'middle' cannot be recorded as a CUDA graph: operation not permitted",
    ):
        Replayed(engine_stage)({"x": rows_of(2)})


def test_it_needs_a_gpu_fixed_shapes_and_no_compiler():
    for options, says in (
        ("cuda_graphs", "needs a network on a GPU, got one on cpu"),
        (
            "compile,cuda_graphs",
            "compile must be the only option, got it together with cuda_graphs",
        ),
    ):
        with pytest.raises(InvalidArgument, match=says):
            engine_of(f"torch:{options}")[0].open(ladder_of(2), Schedule(()), torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", ["cuda_graphs", "cuda_graphs,bf16"])
def test_on_a_gpu(options):
    net = cut_of().to("cuda")
    plan = halves(net, images_of(101).to("cuda"))
    check_engine(engine_of(f"torch:{options}")[0], net, images_of(9).to("cuda"))
    mine = off.open(net, plan, engine=f"torch:{options}")
    plain = off.open(net, plan)
    for size in BATCHES:
        x = images_of(size).to("cuda")
        agree = (mine(x).exit == plain(x).exit).float().mean()
        assert agree > 0.9
