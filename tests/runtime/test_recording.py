"""All exits on all rows: the columns, the costs, the header, and rows that cannot be recorded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import ladder
from offramp.errors import BadData, BadNetwork, InvalidArgument, UnknownName
from offramp.plans.plan import Plan
from offramp.runtime.recording import record
from small import NAN_MARK, conv, dense, ladder_of, rows_of, spoiled

X = rows_of(70).numpy()
Y = np.arange(70) % 3


def test_the_columns_are_what_the_network_gives(three):
    trace = record(three, (X, Y), timed=False, batch_size=32)
    for name, logits, score in three.walk(torch.from_numpy(X)):
        np.testing.assert_allclose(trace.columns[f"logits/{name}"], logits.detach(), atol=1e-5)
        assert (trace.columns[f"answer/{name}"] == trace.columns[f"logits/{name}"].argmax(1)).all()
        if score is not None:
            np.testing.assert_allclose(trace.columns[f"score/{name}"], score.detach(), atol=1e-5)
            assert trace.columns[f"score/{name}"].dtype == np.float32
    assert trace.labels.tolist() == Y.tolist()
    assert trace.columns["row"].tolist() == list(range(70))
    assert len(np.unique(trace.columns["digest"])) == 70
    assert "score/large" not in trace.columns
    assert not any("backbone" in name for name in trace.columns)


def test_the_header(three):
    header = record(three, (X, Y), timed=False).header
    assert header.topology == three.topology
    assert (header.reference, header.classes, header.trained) == ("large", 3, True)
    assert header.origin.key == (three.fingerprint(), "torch", "float32")
    assert [one.shape for one in header.origin.probe.inputs] == [(4,)]
    assert record(three, (X, Y), timed=False).header == header
    assert (
        record(three, (X[1:], Y[1:]), timed=False).header.data_fingerprint
        != header.data_fingerprint
    )
    assert (
        record(three.double(), (X.astype(np.float64), Y), timed=False).header.origin.precision
        == "float64"
    )


def test_the_probe_is_what_open_runs_again(three):
    trace = record(three, X, timed=False)
    logits = three(torch.from_numpy(trace.header.origin.probe.batch()))
    for mine, its in zip(trace.header.origin.probe.logits, logits, strict=True):
        np.testing.assert_allclose(mine, its.detach(), atol=1e-6)
    off.open(three, Plan(thresholds={}, origin=trace.header.origin))


def test_macs_of_each_part(three):
    trace = record(three, X, timed=False)
    macs = {name: column[0] for name, column in trace.columns.items() if name.startswith("cost/")}
    assert macs["cost/segment/small"] == 4 * 3
    assert macs["cost/segment/middle"] == 4 * 8 + 8 * 3
    assert macs["cost/segment/large"] == 4 * 16 + 16 * 3
    assert macs.keys() == {f"cost/segment/{n}" for n in three.topology.exits} | {
        f"cost/{kind}/{n}" for kind in ("exit", "gate") for n in ("small", "middle")
    } | {"cost/exit/large"}
    assert all(macs[name] == 0 for name in macs if "segment" not in name)
    assert all(
        np.isnan(column[1:]).all()
        for name, column in trace.columns.items()
        if name.startswith("cost/")
    )


def test_milliseconds_are_measured_when_asked_for(two):
    trace = record(two, X)
    for name, column in trace.columns.items():
        if name.startswith("cost/"):
            assert column.shape == (3,)
            assert (column >= 0).all()
    price = trace.price(Plan.by_hand({"small": 1.0}), "ms", 8)
    assert 0 < price.mean <= price.worst
    assert [each.unit for each in trace.evaluate(Plan.by_hand({"small": 1.0})).prices] == [
        "macs",
        "ms",
        "ms",
    ]


def test_answers_alone(three):
    trace = record(three, (X, Y), keep="answers", timed=False)
    assert not any(name.startswith("logits/") for name in trace.columns)
    assert trace.answers.tolist() == record(three, (X, Y), timed=False).answers.tolist()
    with pytest.raises(BadData, match="keep"):
        record(three, X, keep="all")


@pytest.mark.parametrize("keep", ["logits", "answers"])
def test_a_mean_records_the_plain_model_too(keep):
    net = ladder_of(2, answer="mean")
    trace = record(net, X, timed=False, keep=keep)
    plain = net.backbone["middle"](torch.from_numpy(X)).detach().numpy()
    assert trace.columns["answer/backbone"].tolist() == plain.argmax(1).tolist()
    assert ("logits/backbone" in trace.columns) == (keep == "logits")


def test_data_of_every_form(three):
    want = record(three, (X, Y), timed=False)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(dataset, batch_size=9)
    for data in (dataset, loader, [(X[:30], Y[:30]), (X[30:], Y[30:])], off.rows(X, Y)):
        trace = record(three, data, timed=False)
        assert trace.answers.tolist() == want.answers.tolist()
        assert trace.header.data_fingerprint == want.header.data_fingerprint
    part = record(three, off.rows(X, Y).select(slice(10, 20)), timed=False)
    assert part.columns["row"].tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.full(70, 3), r"labels must be from 0 to 2, got 64 others \(row 0 has 3\)"),
        (np.full(70, -1), "expected integers of at least 0"),
    ],
)
def test_labels_out_of_range(three, labels, says):
    with pytest.raises(BadData, match=says):
        record(three, (X, labels), timed=False)


def test_rows_that_are_not_finite_are_named(three):
    x = X.copy()
    x[[3, 41]] = np.nan
    with pytest.raises(BadData, match="rows 3"):
        record(three, x, timed=False, batch_size=32)
    with pytest.raises(BadData, match=r"rows 3, 41\."):
        record(three, x, timed=False, batch_size=70)
    x[:] = np.inf
    with pytest.raises(BadData, match=r"rows 0, 1, .*8, 9 and 54 more\."):
        record(three, x, timed=False)


def test_a_row_that_an_early_exit_alone_cannot_answer_is_recorded():
    x = rows_of(20, whole=True).numpy()
    x[4, 0] = NAN_MARK
    trace = record(ladder_of(3, make=spoiled), x, timed=False)
    assert np.isnan(trace.columns["score/small"]).nonzero()[0].tolist() == [4]
    assert np.isfinite(trace.columns["score/middle"]).all()


def test_different_classes(two):
    with pytest.raises(BadNetwork, match="same number of classes"):
        record(ladder([dense(0), dense(1, classes=4)]), X, timed=False)


def test_models_that_are_not_classifiers():
    with pytest.raises(BadNetwork, match="at least two classes"):
        record(ladder([dense(0, classes=1), dense(1, classes=1)]), X, timed=False)
    with pytest.raises(BadNetwork, match="logits"):
        record(
            ladder({"small": nn.Unflatten(1, (2, 2)), "large": nn.Unflatten(1, (2, 2))}).eval(),
            X,
            timed=False,
        )


@pytest.mark.parametrize(
    "x", [np.zeros((5, 7), np.float32), np.zeros((5, 4)), np.zeros((5, 4), np.uint8)]
)
def test_rows_of_another_shape_or_type(three, x):
    with pytest.raises(BadData, match="segment 'small' cannot run on x"):
        record(three, x, timed=False)


def test_images_of_another_size():
    with pytest.raises(BadData, match="segment 'small'"):
        record(ladder_of(2, make=conv), np.zeros((3, 1, 9, 9), np.float32), timed=False)


def test_what_else_is_refused(three):
    with pytest.raises(BadNetwork, match="eval"):
        record(ladder_of(2).train(), X)
    with pytest.raises(UnknownName, match="torch"):
        record(three, X, engine="troch")
    with pytest.raises(BadData):
        record(three, np.zeros((0, 4), np.float32))
    for wrong in (0, True, 1.5, "64", None):
        with pytest.raises(
            InvalidArgument, match="batch_size must be a whole number of at least 1"
        ):
            record(three, X, batch_size=wrong)
    for name in ("timed", "keep_probe_rows", "progress"):
        with pytest.raises(InvalidArgument, match=f"{name} must be True or False, got 'no'"):
            record(three, X, **{name: "no"})


def peak_of(call):
    """What a call gives, and the most bytes that NumPy and Python held for it at once."""
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_logits_are_held_once(tmp_path, stream):
    net = ladder({name: nn.Linear(4, 1000) for name in ("a", "b", "c")}).eval()
    x = rows_of(4500).numpy()
    logits = 4 * 3 * 4500 * 1000
    record(net, x[:64], timed=False)
    data = (x[start : start + 50] for start in range(0, 4500, 50)) if stream else x
    trace, peak = peak_of(lambda: record(net, data, timed=False, progress=False))
    assert logits < peak < 1.2 * logits
    _, more = peak_of(lambda: trace.save(tmp_path / "trace.npz"))
    # NumPy writes 16 MB at a time, here one of three columns; and the probe
    assert more < 0.5 * logits
    again, peak = peak_of(lambda: off.Trace.load(tmp_path / "trace.npz"))
    assert peak < 1.2 * logits
    for name, column in trace.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
    _, peak = peak_of(lambda: record(net, x, timed=False, keep="answers", progress=False))
    assert peak < 0.2 * logits


def test_a_stream_is_recorded_like_an_array(three):
    want = record(three, (X, Y), timed=False)
    for size in (1, 3, 64, 70):
        batches = (
            (X[start : start + size], Y[start : start + size]) for start in range(0, 70, size)
        )
        got = record(three, batches, timed=False, batch_size=32)
        for name, column in want.columns.items():
            np.testing.assert_array_equal(got.columns[name], column)


def test_nothing_is_left_behind(three):
    record(three, X, timed=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in three.modules())
    assert all(p.grad is None and p.requires_grad for p in three.parameters())


def scaled(by):
    net = ladder_of(2)
    with torch.no_grad():
        for value in net.backbone["small"].parameters():
            value.mul_(by)
    return net


def test_large_logits_widen_the_band_and_are_told():
    x = torch.randn(300, 4)
    ordinary = off.record(scaled(1), x, timed=False, progress=False).header.origin
    assert ordinary.band == ordinary.rounding == 1e-4
    with pytest.warns(
        off.errors.Notice, match=r"logits reach .*, so thresholds count as uncertain within"
    ):
        trace = off.record(scaled(200), x, timed=False, progress=False)
    largest = np.abs(trace.columns["logits/small"]).max()
    assert trace.header.origin.band == pytest.approx(1e-4 * largest / 30)


def test_large_scores_of_ordinary_logits_are_told():
    net = off.ladder([dense(0), dense(1)], gate=lambda z: 1e4 * z.max(1).values)
    with pytest.warns(off.errors.Notice, match=r"scores of gate 'member1' reach"):
        off.record(net, torch.randn(300, 4), timed=False, progress=False)
    # a gate that says yes or no
    yes = off.ladder([dense(0), dense(1)], gate=lambda z: 1e9 * (z[:, 0] > 0))
    off.record(yes, torch.randn(300, 4), timed=False, progress=False)
