"""Several processes: what they exchange, and that they record and train what one process does."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp._support.processes import ALONE, here
from offramp.building.cutting import cut
from offramp.errors import BadData
from offramp.fitting.norms import shared_norms
from offramp.networks.recipe import Phase, Recipe
from offramp.recipes.hinge import Hinge
from offramp.recipes.joint import Joint
from offramp.recipes.objective import Objective
from offramp.recipes.weighted import Weighted
from offramp.runtime.recording import record
from small import images_of, ladder_of, rows_of, seeded, stages
from together import together

X = images_of(45)
Y = torch.arange(45) % 3
DEVELOPMENT = images_of(11, 1), Y[:11]
CPU = torch.device("cpu")


def network(gate="margin"):
    net = seeded(lambda: cut(stages(), images_of(4), at=["stem", "blocks.0"], gate=gate), 0)
    net.backbone.drop.p = 0.0  # what dropout draws is each process's own
    return net


def trained(recipe, *, batch_size=15, **options):
    """The state and figures that a network ends with; 45 rows in three batches, which two processes
    halve unequally.
    """
    net = network("uncertainty" if isinstance(recipe, Objective) else "margin")
    given = {
        "recipe": recipe,
        "batch_size": batch_size,
        "development": DEVELOPMENT,
        "progress": False,
    }
    history = off.fit(net, (X, Y), **given | options)
    figures = {name: torch.tensor(value) for name, value in history.last.figures.items()}
    return {name: value.numpy() for name, value in {**net.state_dict(), **figures}.items()}


def same(found, wanted, **tolerance):
    for one in found:
        assert isinstance(one, dict), one
        assert list(one) == list(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(one[name], value, err_msg=name, **tolerance)


def test_one_process_exchanges_nothing():
    assert here(CPU) == ALONE
    assert ALONE.main
    assert ALONE.woven([1, 2]) == [1, 2]
    assert ALONE.alone(lambda: 3) == 3
    assert ALONE.either(True, False) == (True, False)


def test_what_three_processes_exchange():
    def job(rank):
        many = here(CPU)
        weights = [
            nn.Parameter(torch.full((2,), float(rank))),
            nn.Parameter(torch.zeros(3)),
            nn.Parameter(torch.ones(1)),
        ]
        weights[0].grad = torch.ones(2)
        weights[1].grad = torch.ones(3) if rank == 1 else None
        many.add_gradients(weights)
        many.spread(weights[:1])
        return (
            many.woven(list(range(8))[many.turn]),
            many.share(np.arange(7)).tolist(),
            many.alone(lambda: rank),
            many.either(rank == 1, False),
            round(many.mean({"loss": float(rank)}, 0.5)["loss"], 6),
            weights[0].tolist(),
            [value.grad if value.grad is None else value.grad.tolist() for value in weights],
        )

    found = together(job, 3)
    shares = [[0, 1, 2], [3, 4], [5, 6]]
    gradients = [[3.0, 3.0], [1.0, 1.0, 1.0], None]
    for rank, one in enumerate(found):
        assert one == (list(range(8)), shares[rank], 0, (True, False), 1.5, [0.0, 0.0], gradients)


def test_what_one_raises_is_raised_by_all():
    def job(rank):
        def fail():
            if rank == 1:
                raise BadData("row 7 is damaged")

        here(CPU).agreed(fail)

    assert together(job) == ["BadData: row 7 is damaged"] * 2


def test_batch_norm_over_all_rows_as_torch_has_it():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(60.0).view(5, 3, 4)

    def job(rank):
        many = here(CPU)
        norm = nn.BatchNorm1d(3)
        if many.count == 1:
            own = torch.arange(5)
        else:
            own = torch.from_numpy(many.share(np.arange(5)))
        rows = x[own].requires_grad_()
        with shared_norms(norm, many):
            ((norm(rows) * target[own]).square().mean() * len(own) / 5).backward()
        many.add_gradients(norm.parameters())
        return [
            *(value.numpy() for value in norm.state_dict().values()),
            norm.weight.grad.numpy(),
            rows.grad.numpy(),
        ]

    whole = job(0)
    halves = together(job)
    for half in halves:
        for one, two in zip(whole[:-1], half[:-1], strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([half[-1] for half in halves]), whole[-1], rtol=1e-4, atol=1e-4
    )


def test_a_trace_is_the_same_to_the_last_bit():
    net = ladder_of(3)
    labels = np.arange(50) % 3

    def job(_):
        trace = record(net, (rows_of(50), labels), batch_size=8, timed=False, progress=False)
        return trace.header, trace.columns

    header, columns = job(0)
    for its, found in together(job, 3):
        assert its == header
        same([found], columns, rtol=0)


def test_records_where_a_process_has_no_row_and_where_a_row_is_damaged():
    net = ladder_of(2)
    x = rows_of(20)
    assert [len(record(net, x, timed=False))] * 2 == together(
        lambda _: len(record(net, x, timed=False))
    )
    x[17] = torch.nan
    assert all(
        "rows 17" in text for text in together(lambda _: record(net, x, batch_size=4, timed=False))
    )


def test_processes_with_different_networks_are_refused():
    found = together(lambda rank: record(ladder_of(2, seed=rank), rows_of(9), timed=False))
    assert all("2 processes must have the same network" in text for text in found), found


def test_training_together_gives_the_weights_of_one_process():
    """Models in training mode, batch norm and unequal shares included."""
    same(together(lambda _: trained(Joint(epochs=2))), trained(Joint(epochs=2)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [Hinge(), Objective(warm=1, epochs=1), Weighted(epochs=1)],
    ids=lambda r: type(r).__name__,
)
def test_other_recipes_too(recipe):
    """What is solved, what reads pooled features, and what steps by itself."""
    same(together(lambda _: trained(recipe)), trained(recipe), atol=1e-5)


def test_too_few_rows_for_a_share_in_each_are_refused():
    found = together(lambda _: trained(Joint(epochs=1), batch_size=1))
    assert all("a row for each of the 2 processes, got a batch of 1" in text for text in found), (
        found
    )


class Interrupted(Recipe):
    """`joint`, of which process 1 hears a Ctrl-C at a step."""

    def __init__(self, rank, at):
        self._rank = rank
        self._at = at

    def phases(self, network) -> list[Phase]:
        return list(Joint(epochs=2).phases(network))

    def loss(self, view, batch):
        if self._rank == 1 and batch.step == self._at:
            os.kill(os.getpid(), signal.SIGINT)
            # as a launcher passes on what the terminal said already
            os.kill(os.getpid(), signal.SIGINT)
        return Joint().loss(view, batch)

    def config(self):
        return {}


@pytest.mark.slow
def test_ctrl_c_on_one_stops_all_and_resume_goes_on(tmp_path):
    found = together(lambda rank: trained(Interrupted(rank, 4), folder=tmp_path))
    assert found == ["KeyboardInterrupt: "] * 2
    assert (tmp_path / "checkpoint" / "training.json").is_file()
    resumed = together(lambda rank: trained(Interrupted(rank, -1), folder=tmp_path, resume=True))
    same(resumed, trained(Interrupted(0, -1)), atol=1e-5)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
