"""What a network reads of a batch: labels are never inputs, and an input that nothing reads is
refused by name.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import offramp as off
from offramp.errors import BadData, InvalidArgument
from offramp.exits.whole import Own
from offramp.networks.dependence import unread
from offramp.networks.inputs import as_inputs
from offramp.networks.nodes import Seen
from offramp.runtime.benching import bench
from small import rows_of, seeded

pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.BetterExit")  # made-up models

X = rows_of(48, inputs=6, seed=3)
Y = (X[:, 0] > 0).long()
IDX = torch.arange(len(X))
BATCH = {"feats": X, "labels": Y}


class Model(nn.Module):
    """Takes what transformers' models take: labels too, for a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 2)

    def forward(
        self, feats: Tensor, labels: Tensor | None = None, idx: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.last(torch.relu(self.first(feats)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Scaled(nn.Module):
    """Reads a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, feats: Tensor, scale: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(feats) * scale[:, None]))


class Items(torch.utils.data.Dataset):
    """Any columns as a data set of dicts."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {name: column[at] for name, column in self.columns.items()}


def cut(example: object = None) -> off.Network:
    return off.cut(
        seeded(Model, 0).eval(), {"feats": X[:8]} if example is None else example, at=["first"]
    )


def trained() -> off.Network:
    net = cut()
    off.fit(net, BATCH, recipe="cross_entropy", progress=False)
    return net


@pytest.mark.parametrize("name", ["label", "labels", "Label", "LABELS"])
@pytest.mark.parametrize("form", ["arrays", "dataset", "loader", "batches"])
def test_a_label_beside_inputs_is_the_label(name, form):
    columns = {"feats": X, name: Y}
    data = {
        "arrays": columns,
        "dataset": Items(columns),
        "loader": torch.utils.data.DataLoader(Items(columns), batch_size=7),
        "batches": [{"feats": X[:20], name: Y[:20]}, {"feats": X[20:], name: Y[20:]}],
    }[form]
    batches = list(off.rows(data).batches(16))
    assert all([*batch.x] == ["feats"] for batch in batches)
    assert np.concatenate([batch.y for batch in batches]).tolist() == Y.tolist()
    plain = next(off.rows(X).batches(len(X))).digest
    assert np.concatenate([batch.digest for batch in batches]).tolist() == plain.tolist()


def test_labels_that_come_twice():
    both = off.rows((BATCH, Y))
    assert both.labels.tolist() == Y.tolist()
    assert off.rows({**BATCH, "label": Y.numpy()}).labels.tolist() == Y.tolist()
    for data in ((BATCH, 1 - Y), {**BATCH, "label": 1 - Y}, [(BATCH, 1 - Y)]):
        with pytest.raises(BadData, match="labels twice"):
            next(off.rows(data).batches(4))


def test_labels_that_are_none_of_ours():
    with pytest.raises(BadData, match="labels"):
        off.rows({"feats": X, "labels": torch.rand(len(X), 2)})
    with pytest.raises(BadData, match="no input"):
        off.rows({"labels": Y})
    with pytest.raises(BadData, match="no input"):
        as_inputs({"labels": Y})


def test_labels_everywhere_that_rows_enter():
    net = trained()
    trace = off.record(net, Items(BATCH), timed=False, progress=False)
    assert trace.labels.tolist() == Y.tolist()
    assert [one.name for one in trace.header.origin.probe.inputs] == ["x/feats"]
    assert trace.columns["learned"].all()
    plan = off.Plan.by_hand({"first": 0.1})
    assert off.run(net, plan, BATCH).exit.tolist() == off.run(net, plan, {"feats": X}).exit.tolist()
    assert [logits.shape for logits in net(BATCH)] == [(48, 2), (48, 2)]
    assert bench(net, plan, BATCH, batches=(1,), repeats=5).lines
    example = cut({"feats": X[:8], "labels": Y[:8]})
    assert [one.name for one in example.members[0].inputs] == ["x/feats"]


def test_a_model_that_needs_an_input_called_label():
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)

        def forward(self, feats: Tensor, label: Tensor) -> Tensor:
            return self.first(feats) * label[:, None]

    with pytest.raises(InvalidArgument, match="needs an input called 'label'"):
        off.cut(Conditional().eval(), {"feats": X[:8], "label": Y[:8]}, at=["first"])
    with pytest.raises(InvalidArgument, match="needs an input called 'label'"):
        off.ladder([Conditional().eval()] * 2, example={"feats": X[:8], "label": Y[:8]})


EXTRA = {"feats": X, "idx": IDX}


def test_an_input_that_nothing_reads_is_refused_by_name():
    net = trained()
    plan = off.Plan.by_hand({"first": 0.1})
    stack = off.ladder({"small": seeded(Model, 1), "large": seeded(Model, 2)}).eval()
    calls = {
        "cut": lambda: cut({"feats": X[:8], "idx": IDX[:8]}),
        "fit": lambda: off.fit(
            cut(), {**EXTRA, "labels": Y}, recipe="cross_entropy", progress=False
        ),
        "record": lambda: off.record(net, Items(EXTRA), timed=False, progress=False),
        "a ladder": lambda: off.record(stack, EXTRA, timed=False, progress=False),
        "run": lambda: off.run(net, plan, EXTRA),
        "bench": lambda: bench(net, plan, EXTRA, batches=(1,), repeats=5),
        "a promise": lambda: off.open(net, recorded(net))(EXTRA),
        "probe": lambda: off.cut(
            seeded(Model, 0).eval(),
            {"feats": X[:8]},
            at="auto",
            labelled={**EXTRA, "labels": Y},
            exits="linear",
        ),
    }
    for call in calls.values():
        with pytest.raises(
            BadData, match=r"the input 'idx', which the network does not read \(it reads 'feats'\)"
        ):
            call()


def recorded(net: off.Network) -> off.Plan:
    trace = off.record(net, {"feats": X + 9}, timed=False, progress=False)
    return off.calibrate(trace, budget=1.0)


def test_an_argument_that_no_model_has():
    stack = off.ladder({"small": seeded(Model, 1), "large": seeded(Model, 2)}).eval()
    with pytest.raises(BadData, match="the input 'ids', which the network does not read"):
        off.record(stack, {"feats": X, "ids": IDX}, timed=False, progress=False)


def test_a_name_for_what_was_cut_without_one():
    net = off.cut(seeded(Model, 0).eval(), X[:8], at=["first"])
    off.fit(net, (X, Y), recipe="cross_entropy", progress=False)
    for call in (
        lambda: off.record(net, {"feats": X}, timed=False, progress=False),
        lambda: off.run(net, off.Plan.by_hand({"first": 0.1}), {"feats": X}),
    ):
        with pytest.raises(
            BadData, match=r"the input 'feats', .* \(it reads other names, or none\)"
        ):
            call()


def test_an_input_that_an_exit_alone_reads():
    class Masked(Own):
        reads = ("x/idx",)

        def forward(self, seen: Seen) -> Tensor:
            return seen.features[:, :2] * seen.inputs["x/idx"][:, None]

    model = seeded(Model, 0).eval()
    net = off.cut(model, {"feats": X[:8], "idx": IDX[:8]}, at=["first"], exits={"first": Masked()})
    assert len(off.record(net, EXTRA, timed=False, progress=False)) == len(X)


def test_inputs_that_are_read_are_kept():
    stack = off.ladder({"small": seeded(Scaled, 1), "large": seeded(Scaled, 2)}).eval()
    trace = off.record(
        stack, {"feats": X, "scale": X[:, 1], "label": Y}, timed=False, progress=False
    )
    other = off.record(
        stack, {"feats": X, "scale": X[:, 2], "label": Y}, timed=False, progress=False
    )
    assert (trace.columns["digest"] != other.columns["digest"]).all()


LINEAR = nn.Linear(6, 2)
with warnings.catch_warnings():
    # torch is about to give TorchScript up; users have such models all the same
    warnings.simplefilter("ignore")
    TRACED = torch.jit.trace(LINEAR, torch.zeros(2, 6))
ATTENTION = nn.MultiheadAttention(6, 2, batch_first=True).eval()


def written(x: Tensor, mask: Tensor) -> Tensor:
    room = torch.zeros(2, 12)
    room.view(2, 2, 6)[:, 1] += mask
    return LINEAR(room[:, 6:] + x)


READING = {
    "arithmetic": lambda x, mask: LINEAR(x * mask),
    "a branch": lambda x, mask: LINEAR(x) if bool((mask > 0).all()) else LINEAR(-x),
    "an index": lambda x, mask: LINEAR(x)[mask[:, 0].long()],
    "written into": written,
    "numpy": lambda x, mask: LINEAR(x) * torch.from_numpy(mask.numpy().copy()).mean(),
    "np.asarray": lambda x, mask: LINEAR(x) * float(np.asarray(mask).mean()),
    "a list": lambda x, mask: LINEAR(x) * mask.tolist()[0][0],
    "a number": lambda x, mask: LINEAR(x) * mask[0, 0].item(),
    "TorchScript": lambda x, mask: TRACED(x * mask),
    "attention": lambda x, mask: ATTENTION(
        x[:, None], x[:, None], x[:, None], key_padding_mask=mask[:, :1] == 0
    )[0],
}
NOT_READING = {
    "left alone": lambda x, mask: LINEAR(x),
    "computed in vain": lambda x, mask: (mask.float() * 2 + 1, LINEAR(x))[1],
    "its shape": lambda x, mask: LINEAR(x.reshape(mask.shape[0], 6)),
}


@pytest.mark.parametrize("how", [*READING, *NOT_READING])
def test_what_counts_as_reading(how):
    call = (READING | NOT_READING)[how]
    inputs = {"x/x": torch.randn(5, 6), "x/mask": torch.ones(5, 6)}
    got = unread(lambda state: [call(state["x/x"], state["x/mask"])], inputs)
    assert got == ([] if how in READING else ["x/mask"])


def test_a_model_that_fails_is_told_elsewhere():
    def fail(state):
        raise RuntimeError

    assert unread(fail, {"x/a": X, "x/b": X}) == []
