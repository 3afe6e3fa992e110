"""What `cut` is handed, and rows and networks that go wrong only later: one sentence each, and
nobody else harmed.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import cut
from offramp.errors import BadData, BadNetwork, InvalidArgument, StaleRunner, UnknownName
from offramp.networks.nodes import Exit
from offramp.plans.plan import Plan
from small import (
    INF_MARK,
    NAN_MARK,
    Spoiled,
    cut_of,
    dense,
    images_of,
    moved,
    rows_of,
    seeded,
    stages,
)

EXAMPLES = {
    "another shape": torch.zeros(2, 9, 8, 8),
    "another size, noticed late": torch.zeros(2, 1, 9, 9),
    "another type": torch.zeros(2, 1, 8, 8, dtype=torch.int64),
    "another name": {"images": images_of(2)},
}


@pytest.mark.parametrize("how", [{"at": "stem"}, {"parts": 2}])
@pytest.mark.parametrize("case", EXAMPLES)
def test_an_example_on_which_the_model_fails(case, how):
    with pytest.raises(
        BadData, match=r"the model fails on the example: .*; give a batch"
    ) as caught:
        cut(stages(), EXAMPLES[case], **how)
    assert "\n" not in str(caught.value)


def test_a_wrong_model_preprocess_or_name_is_refused():
    with pytest.raises(BadNetwork, match=r"the model must be a torch\.nn\.Module, got a function"):
        cut(lambda x: x, images_of(2), at="stem")
    with pytest.raises(
        BadNetwork, match=r"the preprocess must be a torch\.nn\.Module, got a function"
    ):
        cut(stages(), images_of(2), at="stem", preprocess=lambda x: x)
    with pytest.raises(InvalidArgument, match=r"at must be names of modules .* got 3"):
        cut(stages(), images_of(2), at=3)


def normed(**options) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 3))


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_norm_in_training_mode(count):
    """With one row torch itself fails, with more it mixes them: every verb asks for eval mode
    first.
    """
    model = normed()
    x = rows_of(count)
    with pytest.raises(BadNetwork, match=r"model\.eval"):
        cut(model, x, at=["0"])
    model.eval()[1].train()
    with pytest.raises(BadNetwork, match=r"model\.eval"):
        cut(model, x, at=["0"])
    net = moved(cut(model.eval(), x, at=["0"], exits="linear"))
    # all rows come to the batch norm: what does not run is not watched
    runner = off.open(net, Plan.by_hand({"0": 1e9}))
    model[1].train()
    for verb in (
        lambda: off.record(net, x.numpy(), progress=False),
        lambda: off.run(net, Plan.by_hand({"0": 0.1}), x),
    ):
        with pytest.raises(BadNetwork, match=r"net\.eval"):
            verb()
    with pytest.raises(StaleRunner, match=r"net\.eval"):
        runner(x)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_norm_without_statistics_mixes_rows_in_eval_mode_too(count):
    with pytest.raises(BadNetwork, match=r"aten.batch_norm.default in '1' mixes rows"):
        cut(normed(track_running_stats=False).eval(), rows_of(count), at=["0"])


class Marking(Exit):
    """An exit that spoils the logits of marked rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Spoiled(nn.Linear(4, 3))

    def forward(self, seen):
        return self.head(seen.features)

    def config(self):
        return {"name": "tests:Marking"}


def test_a_logit_that_is_not_finite_at_the_first_exit_only():
    """The row goes on and is answered; its batch-mates notice nothing; `record` takes it."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    model[1].weight.data = torch.eye(4)
    model[1].bias.data = torch.zeros(4)
    net = moved(seeded(lambda: cut(model, rows_of(4), at=["1"], exits=Marking()), 0))
    clean = rows_of(9)
    x = rows_of(9)
    x[2, 0], x[5, 0] = NAN_MARK, INF_MARK
    everyone = Plan.by_hand({"1": -1e9})
    answers = off.run(net, everyone, x)
    usual = off.run(net, everyone, clean)
    assert usual.exit.tolist() == [0] * 9
    assert answers.exit.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert answers.flagged.nonzero().flatten().tolist() == [2, 5]
    others = [row for row in range(9) if row not in (2, 5)]
    torch.testing.assert_close(answers.logits[others], usual.logits[others])
    torch.testing.assert_close(answers.logits[[2, 5]], model(x)[[2, 5]].detach())
    trace = off.record(net, x.numpy(), timed=False, progress=False)
    assert torch.tensor(trace.columns["score/1"]).isnan().nonzero().flatten().tolist() == [2, 5]
    assert trace.replay(everyone).exit.tolist() == answers.exit.tolist()


def test_two_threads_on_a_runner_while_the_network_trains():
    """What they get is what the network gave before; after the first step there is only
    `open again`.
    """
    net = cut_of()
    x = images_of(16)
    runner = off.open(net, Plan.by_hand({"stem": 0.3}))
    before = None
    before = runner(x)
    running = threading.Barrier(3)
    ended = []
    wrong = []

    def work():
        running.wait()
        try:
            while True:
                if not torch.equal(runner(x).logits, before.logits):
                    wrong.append("an answer of a network half trained")
        except StaleRunner as refusal:
            ended.append(str(refusal))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    running.wait()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sum(logits.square().sum() for logits in net(x)).backward()  # reading alone disturbs nobody
    optimizer.step()
    for thread in threads:
        thread.join(timeout=900)
    assert (len(ended), wrong) == (2, [])
    assert all("open again" in said for said in ended)
    with pytest.raises(StaleRunner):
        runner(x)
    off.run(net, Plan.by_hand({"stem": 0.3}), x)


def test_a_name_that_is_nearly_right():
    with pytest.raises(UnknownName, match=r"did you mean 'blocks\.0'"):
        cut(stages(), images_of(2), at=["block.0"])
    with pytest.raises(UnknownName, match="known: 0, 1, 2"):
        cut(dense(1), rows_of(2), at=["encoder"])
