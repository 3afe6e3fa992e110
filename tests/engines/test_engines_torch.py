"""The option `threads` of the torch engine."""

import pytest
import torch

import offramp as off
from offramp.engines.torch import Eager
from offramp.errors import InvalidArgument
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import engine_of
from offramp.runtime.threads import can_set, on_threads
from offramp.testing import check_engine
from small import Counting, dense, ladder_of, rows_of

with_openmp = pytest.mark.skipif(not can_set(), reason="torch was built without OpenMP")


class Asked(Counting):
    """A model that notes on how many threads it ran."""

    def forward(self, x):
        self.calls.append(torch.get_num_threads())
        return self.model(x)


@with_openmp
def test_every_stage_and_the_bare_call_run_on_the_given_number():
    model = Asked(dense(1))
    net = off.ladder({"small": dense(0), "large": model}).eval()
    plan = off.Plan.never_leave(net.topology)
    off.open(net, plan, engine="torch:threads=3")(rows_of(4))
    assert model.calls == [3]
    schedule = full_schedule(net.topology)
    rows = {"x": rows_of(4)}
    Eager(threads="2").bare(net, schedule, rows)(rows)()
    assert model.calls == [3, 2]
    assert torch.get_num_threads() == 1


@with_openmp
def test_stages_run_on_it_without_a_runner_too_as_in_a_recording():
    model = Asked(dense(0))
    net = off.ladder({"small": model, "large": dense(1)}).eval()
    stage, _ = Eager(threads="2").open(net, full_schedule(net.topology), net.device())
    stage.call({"x": rows_of(4)})
    assert model.calls == [2]


@with_openmp
def test_a_promise_holds_on_any_number_of_threads():
    net = ladder_of(2)
    trace = off.record(net, rows_of(400), timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.2)
    x = rows_of(9)
    wanted = off.open(net, plan)(x)
    assert torch.equal(off.open(net, plan, engine="torch:threads=2")(x).exit, wanted.exit)


@with_openmp
def test_it_keeps_the_contract():
    check_engine(Eager(threads="2"), ladder_of(3), rows_of(9))
    assert Eager(threads="2").identity == Eager().identity
    assert Eager(threads="2", bf16=True).marks() == ["bf16"]


def test_it_measures_where_no_number_is_given():
    assert Eager().measures_threads
    assert not Eager(threads="2").measures_threads
    assert not Eager(compile=True).measures_threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_a_number_that_is_none_is_refused(text):
    with pytest.raises(InvalidArgument, match=rf"^threads must be a whole .* got '{text}'$"):
        engine_of(f"torch:threads={text}")


def test_compile_fixes_the_number_itself():
    refusal = r"^compile must be the only option, got it together with threads$"
    with pytest.raises(InvalidArgument, match=refusal):
        Eager(compile=True, threads="2")


def test_a_gpu_has_no_such_threads():
    net = ladder_of(2)
    refusal = r"^threads needs a network on the cpu, got one on cuda$"
    with pytest.raises(InvalidArgument, match=refusal):
        Eager(threads="2").open(net, full_schedule(net.topology), torch.device("cuda"))


def test_a_torch_without_openmp_is_refused(monkeypatch):
    monkeypatch.setattr("offramp.engines.torch.can_set", lambda: False)
    net = ladder_of(2)
    with pytest.raises(InvalidArgument, match="threads needs a build of torch with OpenMP"):
        off.open(net, off.Plan.never_leave(net.topology), engine="torch:threads=2")


@with_openmp
def test_the_number_of_the_calling_thread_comes_back():
    with on_threads(4):
        net = ladder_of(2)
        off.open(net, off.Plan.never_leave(net.topology), engine="torch:threads=2")(rows_of(3))
        assert torch.get_num_threads() == 4
