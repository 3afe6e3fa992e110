"""The convex solver: against other solvers, and what it says of itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from offramp.errors import BadData, InvalidArgument
from offramp.recipes import _convex, _standard
from offramp.recipes._convex import DualBound, choose, solve
from offramp.recipes._losses import LOSSES
from written_losses import loss_of

ALL = tuple(LOSSES)


def blobs(rows=60, features=5, classes=3, apart=1.0, seed=0):
    """Features [rows, features] around one random center for each class, and labels."""
    made = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    centers = apart * torch.randn(classes, features, generator=made)
    return torch.randn(rows, features, generator=made) * 2 + centers[y] + 3, y


def standardized(x):
    """By numpy, with the constant beside it."""
    x = x.double().numpy()
    return np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))], 1)


def on_standardized(solved, x):
    """Its weights [C, F + 1] on standardised features, by the definition of the fold."""
    x = x.double()
    weight = solved.weight
    return torch.cat(
        [weight * x.std(0, unbiased=False), (solved.bias + weight @ x.mean(0))[:, None]], 1
    ).numpy()


def best_objective(name, x, y, classes, regularizer):
    """The least objective by SLSQP on the quadratic program of a hinge, by BFGS on
    cross-entropy.
    """
    a = standardized(x)
    n = len(y)
    wide = classes * a.shape[1]
    own = np.eye(classes)[y.numpy()]

    def scores(v):
        return a @ v[:wide].reshape(classes, -1).T

    def norm(v):
        return regularizer / 2 * (v[:wide] ** 2).sum()

    if name == "cross_entropy":
        return minimize(
            lambda v: loss_of(name, scores(v), y.tolist()) + norm(v), np.zeros(wide), tol=1e-9
        ).fun
    columns = classes if name == "one_vs_rest" else 1
    sign = 2 * own - 1

    def slack_left(v):
        s = scores(v)
        slack = v[wide:].reshape(n, columns)
        if name == "one_vs_rest":
            return (slack - 1 + sign * s).ravel()
        return (slack - 1 + own - s + (s * own).sum(1, keepdims=True)).ravel()

    size = wide + n * columns
    jacobian = np.stack([slack_left(e) - slack_left(np.zeros(size)) for e in np.eye(size)], 1)
    weights = np.concatenate([np.zeros(wide), np.full(n * columns, 1 / n)])
    first = np.concatenate([np.zeros(wide), np.full(n * columns, 2.0)])
    done = minimize(
        lambda v: norm(v) + weights @ v,
        first,
        jac=lambda v: np.concatenate([regularizer * v[:wide], np.zeros(n * columns)]) + weights,
        constraints=[
            {"type": "ineq", "fun": slack_left, "jac": lambda v: jacobian},
            {"type": "ineq", "fun": lambda v: v[wide:], "jac": lambda v: np.eye(size)[wide:]},
        ],
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-10},
    )
    assert done.success
    return done.fun


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("regularizer", [0.3, 0.01])
def test_the_optimum_lies_between_its_dual_and_its_primal(loss, regularizer):
    x, y = blobs(rows=24, features=3)
    solved = solve(x, y, 3, loss=loss, regularizer=regularizer, gap=1e-3)
    best = best_objective(loss, x, y, 3, regularizer)
    assert solved.gap <= 1e-3
    assert solved.dual - 1e-7 <= best <= solved.primal + 1e-7
    assert solved.primal <= best * 1.001 + 1e-7


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(("block", "dtype"), [(1000, torch.float64), (100, torch.float32)])
def test_primal_is_the_objective_of_the_weights_returned(loss, block, dtype, monkeypatch):
    monkeypatch.setattr(_standard, "BLOCK", block)
    x, y = blobs()
    assert _standard.Standardized(x).dtype == dtype
    solved = solve(x, y, 3, loss=loss, regularizer=0.02)
    weight = on_standardized(solved, x)
    s = standardized(x) @ weight.T
    assert_close(torch.from_numpy(s), x.double() @ solved.weight.T + solved.bias)
    objective = loss_of(loss, s, y.tolist()) + 0.01 * (weight**2).sum()
    assert solved.primal == pytest.approx(objective, rel=1e-9)
    assert solved.gap == pytest.approx((solved.primal - solved.dual) / solved.primal)
    assert solved.gap <= 1e-3
    assert solved.dual <= solve(x, y, 3, loss=loss, regularizer=0.02, gap=1e-4).primal + 1e-12


@pytest.mark.parametrize("loss", ALL)
def test_the_mixed_bound_is_that_of_its_u_and_never_falls(loss):
    made = torch.Generator().manual_seed(3)
    x = torch.randn(30, 4, generator=made)
    y = torch.arange(30) % 3
    one = LOSSES[loss]
    bound = DualBound(0.1)
    values = []
    for _ in range(8):
        u = one.dual(torch.randn(30, 3, generator=made), y, 0.1)
        bound.add(u, -float(one.conjugate(u, y).mean()), u.T @ x / 30)
        values.append(bound.value)
        mixed = bound.u.double()
        pull = mixed.T @ x.double() / 30
        true = -float(one.conjugate(mixed, y).mean()) - float(pull.square().sum()) / 0.2
        assert bound.value <= true + 1e-5
    assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    ("shape", "regularizer"),
    [
        ({"rows": 300, "features": 8, "classes": 4}, 1e-3),
        ({"rows": 90, "features": 4, "apart": 30.0}, 1e-3),  # separable
        ({"rows": 20, "features": 50}, 1e-1),  # fewer rows than features
        ({"rows": 200, "features": 3, "apart": 0.0}, 1e-1),  # nothing to learn
        ({"rows": 1, "features": 3}, 1e-1),
    ],
)
def test_the_gap_asked_for_is_reached(loss, shape, regularizer):
    x, y = blobs(**shape)
    solved = solve(x, y, shape.get("classes", 3), loss=loss, regularizer=regularizer, gap=1e-3)
    assert -1e-12 <= solved.gap <= 1e-3
    assert solved.iterations < 1000


@pytest.mark.parametrize("loss", ALL)
def test_a_warm_start_gives_the_same_answer_sooner(loss):
    x, y = blobs(rows=200)
    cold = solve(x, y, 3, loss=loss, regularizer=0.01, gap=1e-4)
    near = solve(x, y, 3, loss=loss, regularizer=0.012, gap=1e-4)
    warm = solve(x, y, 3, loss=loss, regularizer=0.01, gap=1e-4, start=near)
    assert warm.iterations < cold.iterations
    assert warm.gap <= 1e-4
    assert warm.primal == pytest.approx(cold.primal, rel=2e-4)


@pytest.mark.parametrize("loss", ALL)
def test_twice_the_same_is_the_same_to_the_bit(loss):
    x, y = blobs()
    first, second = (solve(x, y, 3, loss=loss, regularizer=0.01) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.primal == second.primal


@pytest.mark.parametrize("loss", ALL)
def test_weights_shrink_as_the_regularizer_grows(loss):
    x, y = blobs()
    norms = []
    for each in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        norms.append(
            np.linalg.norm(
                on_standardized(solve(x, y, 3, loss=loss, regularizer=each, gap=1e-5), x)
            )
        )
    assert all(stronger < weaker for weaker, stronger in pairwise(norms))


@pytest.mark.parametrize("loss", ALL)
def test_a_constant_feature_gets_no_weight_and_moves_nothing(loss):
    x, y = blobs()
    wider = torch.cat([x, torch.full((60, 1), 0.1)], 1)
    plain, other = (solve(each, y, 3, loss=loss, regularizer=0.01, gap=1e-4) for each in (x, wider))
    assert torch.equal(other.weight[:, 5], torch.zeros(3).double())
    assert other.primal == pytest.approx(plain.primal, rel=1e-4)


@pytest.mark.parametrize("loss", ALL)
def test_scale_and_offset_of_features_do_not_count(loss):
    x, y = blobs()
    moved = x.double() * torch.tensor([1e-8, 1.0, 1e8, 1e20, 1.0]) + torch.tensor(
        [0, 1e6, -1e9, 0, 0.0]
    )
    plain, other = (
        solve(each.double(), y, 3, loss=loss, regularizer=0.01, gap=1e-4) for each in (x, moved)
    )
    assert other.gap <= 1e-4
    assert other.primal == pytest.approx(plain.primal, rel=2e-4)


def test_a_class_without_rows_is_never_answered():
    x, y = blobs(classes=3)
    for loss in ALL:
        solved = solve(x, y, 4, loss=loss, regularizer=0.01)
        assert solved.gap <= 1e-3
        assert (x.double() @ solved.weight.T + solved.bias).argmax(1).max() < 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type(dtype):
    x, y = blobs()
    x = x.to(dtype)
    solved = solve(x, y.int(), 3, loss="one_vs_rest", regularizer=0.01)
    plain = solve(x.float(), y, 3, loss="one_vs_rest", regularizer=0.01)
    assert solved.primal == pytest.approx(plain.primal, rel=1e-6)


def test_memory_mapped_and_in_blocks_is_the_same(tmp_path, monkeypatch):
    x, y = blobs(rows=200)
    plain = solve(x, y, 3, loss="crammer_singer", regularizer=0.01)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    monkeypatch.setattr(_standard, "HELD", 10)
    monkeypatch.setattr(_standard, "BLOCK", 5 * 7)
    rows = _standard.Standardized(mapped)
    assert rows.held is None
    assert [len(block) for _, block in rows.blocks()] == [7] * 28 + [4]
    solved = solve(mapped, y, 3, loss="crammer_singer", regularizer=0.01)
    assert solved.primal == pytest.approx(plain.primal, rel=1e-3)


def test_without_second_moments_it_still_arrives(monkeypatch):
    x, y = blobs()
    monkeypatch.setattr(_standard, "WIDE", 2)
    assert _standard.Standardized(x).second is None
    for loss in ALL:
        assert solve(x, y, 3, loss=loss, regularizer=0.01).gap <= 1e-3


@pytest.mark.parametrize("loss", ALL)
def test_at_the_limit_it_says_how_far_it_came(loss):
    x, y = blobs()
    solved = solve(x, y, 3, loss=loss, regularizer=1e-4, gap=1e-6, limit=2)
    assert solved.iterations == 2
    assert solved.gap > 1e-6
    assert solved.dual <= solve(x, y, 3, loss=loss, regularizer=1e-4).primal


def test_choose_takes_the_most_accurate_and_of_equals_the_strongest():
    x, y = blobs(rows=400, features=30, classes=3, apart=0.7)
    train = (x[:60], y[:60])
    dev = (x[60:], y[60:])
    path = (1e-1, 10.0, 1e-3, 1.0)
    solved, tried = choose(*train, 3, loss="one_vs_rest", dev=dev, regularizers=path)
    assert [each.regularizer for each in tried] == sorted(path, reverse=True)[: len(tried)]
    best = max(tried, key=lambda each: (each.accuracy, each.regularizer))
    alone = solve(*train, 3, loss="one_vs_rest", regularizer=best.regularizer)
    assert solved.gap <= 1e-3
    assert solved.primal == pytest.approx(alone.primal, rel=2e-3)
    assert len({each.accuracy for each in tried}) > 1


def test_choose_ends_when_two_in_a_row_bring_nothing():
    x, y = blobs(rows=90, features=4, apart=30.0)
    solved, tried = choose(
        x, y, 3, loss="crammer_singer", dev=(x, y), regularizers=(1e-1, 1e-2, 1e-3, 1e-4)
    )
    assert [(each.regularizer, each.accuracy) for each in tried] == [
        (1e-1, 1.0),
        (1e-2, 1.0),
        (1e-3, 1.0),
    ]
    assert solved.primal == pytest.approx(
        solve(x, y, 3, loss="crammer_singer", regularizer=1e-1).primal, rel=2e-3
    )


def test_rows_that_are_not_finite_are_counted():
    x, y = blobs()
    x[3, 1], x[3, 2], x[7, 0] = float("nan"), float("nan"), float("inf")
    with pytest.raises(BadData, match="2 of 60 rows"):
        solve(x, y, 3, loss="one_vs_rest", regularizer=0.1)


@pytest.mark.parametrize(
    ("x", "y", "classes"),
    [
        (torch.zeros(4), torch.zeros(4).long(), 2),
        (torch.zeros(0, 2), torch.zeros(0).long(), 2),
        (torch.zeros(4, 2), torch.zeros(3).long(), 2),
        (torch.zeros(4, 2), torch.zeros(4), 2),
        (torch.zeros(4, 2), torch.full((4,), 2), 2),
        (torch.zeros(4, 2), torch.full((4,), -1), 2),
        (torch.zeros(4, 2), torch.zeros(4).long(), 1),
    ],
)
def test_bad_rows_and_labels_are_refused(x, y, classes):
    with pytest.raises(BadData, match=r"features and labels must be \[N, F\]|must be integers"):
        solve(x, y, classes, loss="one_vs_rest", regularizer=0.1)


def test_bad_settings_are_refused():
    x, y = blobs()
    with pytest.raises(InvalidArgument, match="one_vs_rest, crammer_singer, cross_entropy"):
        solve(x, y, 3, loss="hinge", regularizer=0.1)
    for regularizer in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="above 0"):
            solve(x, y, 3, loss="one_vs_rest", regularizer=regularizer)
    with pytest.raises(InvalidArgument, match="at least one"):
        choose(x, y, 3, loss="one_vs_rest", dev=(x, y), regularizers=())


def test_constants_of_the_path_fall():
    assert list(_convex.REGULARIZERS) == sorted(_convex.REGULARIZERS, reverse=True)
