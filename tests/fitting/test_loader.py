"""Batches: every row once an epoch, in an order that the seed decides, about equal in size."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

import offramp as off
from offramp.fitting.loader import BatchLoader, drawn, index_of

X = torch.arange(23.0)[:, None]
Y = torch.arange(23) % 3


def loader(batch_size=5, draws=(0, 0), **options):
    rows = off.rows((X, Y))
    cpu = torch.device("cpu")
    return BatchLoader(
        rows,
        index_of(rows, progress=False),
        batch_size=batch_size,
        draws=draws,
        device=cpu,
        **options,
    )


def order(some, epoch=0, start=0):
    return [positions.tolist() for _, positions in some.epoch(epoch, start)]


@pytest.mark.parametrize("size", [1, 2, 5, 22, 23, 99])
def test_every_row_once_in_batches_of_about_one_size(size):
    batches = order(loader(size))
    assert sorted(chain.from_iterable(batches)) == list(range(23))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == loader(size).smallest


def test_the_order_depends_on_seed_phase_and_epoch_alone():
    one = order(loader())
    assert order(loader()) == one
    others = [order(loader(draws=(1, 0))), order(loader(draws=(0, 1))), order(loader(), epoch=1)]
    assert all(other != one for other in others)


def test_an_epoch_goes_on_from_any_step_with_the_same_draws():
    table = [(positions.tolist(), torch.rand(2).tolist()) for _, positions in loader().epoch(2)]
    rest = [(positions.tolist(), torch.rand(2).tolist()) for _, positions in loader().epoch(2, 3)]
    assert rest == table[3:]


def test_rows_labels_and_numbers_belong_together():
    some = loader()
    for state, positions in some.epoch(0):
        batch = some.batch(positions, "phase", 0.5)
        assert state["x"][:, 0].tolist() == positions.tolist() == batch.row.tolist()
        assert batch.labels().tolist() == (positions % 3).tolist()


def test_copies_take_turns_by_epoch():
    cache = {"node": np.arange(46, dtype=np.float32)[:, None]}
    some = loader(cache=cache)
    for epoch in range(3):
        for state, positions in some.epoch(epoch):
            assert state["node"][:, 0].tolist() == (positions + 23 * (epoch % 2)).tolist()


def test_a_selection_is_trained_alone():
    some = loader()
    some.keep = np.array([1, 4, 9])
    assert sorted(chain.from_iterable(order(some))) == [1, 4, 9]
    assert some.steps == 1


def test_seeds_of_different_places_differ():
    assert (
        len(
            {
                drawn(0, phase, epoch, step)
                for phase in range(3)
                for epoch in range(3)
                for step in range(50)
            }
        )
        == 450
    )
