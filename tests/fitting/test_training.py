"""`fit` as a user calls it: what it trains, what it leaves alone, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import (
    BadData,
    BadFile,
    BadNetwork,
    Diverged,
    InvalidArgument,
    Mismatch,
    MissingExtra,
    OverlappingRows,
    UnknownName,
)
from offramp.fitting.training import recipe_of
from offramp.networks.recipe import Phase, Recipe
from offramp.recipes.hinge import Hinge
from offramp.recipes.joint import Joint
from small import cut_of, images_of, ladder_of, rows_of


def brightness(count: int, seed: int = 0):
    """Images, and three classes of their brightness: what exits at every depth can learn."""
    x = images_of(count, seed)
    return x, ((x.mean((1, 2, 3)) * 20).clamp(-1, 1).round().long() + 1)


def fitted(net=None, **options):
    net = net or cut_of(trained=False)
    off.fit(
        net,
        brightness(90),
        **{"recipe": Joint(epochs=2), "progress": False, "batch_size": 16, **options},
    )
    return net


def same(one, other):
    mine = one.state_dict()
    its = other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


class Frozen(Recipe):
    """Trains the exits of a frozen backbone by a loss of the user's."""

    def __init__(self, reads="input", epochs=2, loss=nn.functional.cross_entropy):
        self.reads = reads
        self.epochs = epochs
        self.lose = loss

    def phases(self, network):
        return [Phase("exits", tuple(network.exits.parameters()), self.epochs, reads=self.reads)]

    def loss(self, outputs, batch):
        return {name: self.lose(logits, batch.labels()) for name, logits in outputs.logits.items()}


def test_what_was_trained_answers_better_and_the_history_tells():
    net = cut_of(trained=False)
    history = off.fit(
        net,
        brightness(300),
        recipe=Joint(epochs=15, rate=1e-2),
        development=brightness(60, 1),
        progress=False,
    )
    first = history.epochs[0].figures
    last = history.last.figures
    assert last["loss"] < 0.8 * first["loss"]
    assert last["accuracy/stem"] > 0.75
    assert last["loss"] == pytest.approx(
        sum(last[f"loss/{name}"] for name in net.topology.exits), rel=1e-4
    )
    assert net.untrained() == ()
    assert not any(part.training for part in net.modules())
    assert "joint, epoch 15: loss " in str(history)


@pytest.mark.parametrize("reads", ["input", "pooled"])
def test_a_frozen_backbone_stays_as_it_is_to_the_last_bit(reads):
    net = cut_of(trained=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    wishes = [value.requires_grad for value in net.parameters()]
    fitted(net, recipe=Frozen(reads))
    changed = {
        key for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {key for key in before if key.startswith("exits.")}
    assert wishes == [value.requires_grad for value in net.parameters()]


def test_pooled_features_train_what_the_input_trains():
    one, other = (fitted(recipe=Frozen(reads)) for reads in ("input", "pooled"))
    for name, value in one.exits.state_dict().items():
        torch.testing.assert_close(other.exits.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    assert same(fitted(seed=3), fitted(seed=3))
    assert not same(fitted(seed=3), fitted(seed=4))


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted()
    assert torch.equal(torch.rand(3), expected)


def test_norms_move_or_stay():
    moving = cut_of(trained=False)
    frozen = cut_of(trained=False)
    before = moving.backbone.stem[1].running_mean.clone()
    fitted(moving)
    fitted(frozen, recipe=Joint(epochs=2, norm="frozen"))
    assert not torch.equal(moving.backbone.stem[1].running_mean, before)
    assert torch.equal(frozen.backbone.stem[1].running_mean, before)


def test_a_phase_may_train_some_rows_alone():
    seen = []

    class Some(Frozen):
        def phases(self, network):
            return [
                replace(*super().phases(network), rows=lambda outputs, batch: batch.labels() == 1)
            ]

        def loss(self, outputs, batch):
            seen.extend(batch.labels().tolist())
            return super().loss(outputs, batch)

    fitted(recipe=Some())
    assert set(seen) == {1}
    assert len(seen) == 2 * int((brightness(90)[1] == 1).sum())


def test_a_recipe_may_step_by_itself():
    class Steps(Frozen):
        def phases(self, network):
            return [replace(*super().phases(network), by="update")]

        def update(self, outputs, batch, optimizer):
            losses = self.loss(outputs, batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            return losses

    assert same(fitted(recipe=Steps()), fitted(recipe=Frozen()))


def test_augmentation_is_drawn_anew_where_the_input_is_read_and_kept_in_copies_where_it_is_pooled():
    def noisy(x):
        drawn.append(len(x))
        return x + torch.rand(len(x), 1, 1, 1)

    def trained(recipe, **options):
        drawn.clear()
        return off.fit(
            cut_of(trained=False),
            brightness(90),
            recipe=recipe,
            augment=noisy,
            progress=False,
            **options,
        ).notes

    drawn: list[int] = []
    assert trained(Frozen("input")) == ("rows were augmented anew in every epoch of exits",)
    assert sum(drawn) == 2 * 90
    said = trained(Frozen("pooled", epochs=5), views=3)
    assert said == (
        "pooled features were computed once for exits; 3 augmented copies of each row were kept",
    )
    assert sum(drawn) == 3 * 90


def test_the_rows_are_remembered_through_files_and_refused(tmp_path):
    x, y = brightness(90)
    net = fitted()
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(again, (x, y), timed=False, progress=False)
    with pytest.raises(OverlappingRows, match=r"90 of the 90 calibration rows .* also trained"):
        off.calibrate(trace, at_most=0.2)
    with pytest.raises(OverlappingRows, match="also trained"):
        off.calibrate(trace, budget=0.9)
    fresh = off.record(again, brightness(200, 9), timed=False, progress=False)
    # rows that are only searched promise nothing
    assert off.calibrate(fresh, at_most=0.9, search=trace).promise
    assert not fresh.columns["learned"].any()
    stacked = off.ladder({"one": again, "two": cut_of(seed=1)})
    assert off.record(stacked, (x, y), timed=False, progress=False).columns["learned"].all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"recipe": "hing"}, UnknownName, "hinge"),
        ({"recipe": 3}, InvalidArgument, "must be a name, a Recipe"),
        ({"recipe": Joint(weights=[1.0])}, InvalidArgument, "for each of stem, blocks.0, backbone"),
        ({"recipe": Joint(norm="odd")}, InvalidArgument, "moving, frozen"),
        ({"precision": "int4"}, InvalidArgument, "bf16"),
        ({"precision": "fp16"}, InvalidArgument, "CUDA"),
        ({"precision": "bf16", "recipe": "weighted"}, InvalidArgument, "makes its own steps"),
        (
            {"batch_size": 0},
            InvalidArgument,
            "batch_size must be a whole number of at least 1, got 0",
        ),
        ({"batch_size": 16.0}, InvalidArgument, "whole number"),
        ({"seed": -1}, InvalidArgument, "seed must be a whole number of at least 0, got -1"),
        ({"folder": __file__}, BadFile, "cannot write"),
        ({"cache": f"{__file__}/in"}, BadFile, "cannot write"),
        ({"recipe": Joint(epochs=0)}, InvalidArgument, "epochs of .* got 0"),
        ({"recipe": Joint(epochs=2.5)}, InvalidArgument, "epochs of .* got 2.5"),
        ({"recipe": Joint(rate=-1)}, InvalidArgument, "learning rate: -1"),
        ({"recipe": Joint(weights=float("nan"))}, InvalidArgument, "weights must be .*, got nan"),
        (
            {"recipe": Hinge(regularizer="strong")},
            InvalidArgument,
            "regularizer must be a number above 0, got 'strong'",
        ),
        ({"recipe": Hinge(gap=-1)}, InvalidArgument, "gap must be above 0, got -1"),
        (
            {"data": (images_of(20).double(), torch.zeros(20).long())},
            BadData,
            r"first row of array \(x torch.float64",
        ),
        ({"augment": lambda x: x[:3]}, BadData, "augment must return .* got 3"),
        ({"batch_size": 1}, BadData, "batch norm"),
        ({"resume": True}, InvalidArgument, "folder"),
        ({"track": "tensorboard"}, InvalidArgument, "folder"),
        ({"data": iter([brightness(4)])}, BadData, "stream"),
        ({"data": images_of(20)}, BadData, "has no labels"),
        ({"development": images_of(20, 3)}, BadData, "has no labels"),
        ({"data": (images_of(20), torch.full((20,), 3))}, BadData, "between 0 and 2"),
        ({"development": brightness(90)}, OverlappingRows, "development"),
        (
            {"recipe": Frozen("pooled"), "exits": "branch"},
            BadNetwork,
            "reads features that are pooled",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_changes(options, error, says):
    net = cut_of(trained=False, **({"exits": options.pop("exits")} if "exits" in options else {}))
    before = net.fingerprint()
    data = options.pop("data", brightness(90))
    with pytest.raises(error, match=says):
        off.fit(net, data, **{"recipe": Joint(epochs=1), "progress": False, **options})
    assert net.fingerprint() == before
    assert not net.training


def test_a_phase_without_parameters_of_this_network_is_refused():
    class Other(Frozen):
        def phases(self, network):
            return [Phase("other", tuple(nn.Linear(2, 2).parameters()))]

    with pytest.raises(BadNetwork, match="2 of them not of this network"):
        fitted(recipe=Other())
    with pytest.raises(BadNetwork, match=r"none of the exits has parameters to train"):
        off.fit(
            ladder_of(2),
            (rows_of(8), np.zeros(8, int)),
            recipe=Joint(backbone=False),
            progress=False,
        )


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(BadNetwork, match="training mode"):
        fitted(cut_of().train())


@pytest.mark.parametrize("folder", [False, True])
def test_a_loss_that_turns_nan_names_step_exit_and_checkpoint(tmp_path, folder):
    calls = []

    def spoiled(logits, y):
        calls.append(1)
        return nn.functional.cross_entropy(logits, y) * (
            torch.nan if len(calls) == 3 * 8 + 2 else 1
        )

    net = cut_of(trained=False)
    where = "last good checkpoint is" if folder else "no checkpoint"
    with pytest.raises(Diverged, match=rf"exit 'blocks.0' .* step 8\. .*{where}") as raised:
        fitted(
            net,
            recipe=Frozen(epochs=3, loss=spoiled),
            batch_size=12,
            folder=tmp_path if folder else None,
        )
    assert raised.value.step == 8
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert not net.training


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"offramp\[fit\]"):
        fitted()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="Unsupported logging capability: odd"):
        fitted(folder=tmp_path, track="odd")


def test_metrics_go_to_tensorboard_too(tmp_path):
    pytest.importorskip("tensorboard")
    fitted(folder=tmp_path, track="tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents.*"))


PRECISIONS = """
import torch, offramp as off
from accelerate import Accelerator
from offramp.errors import InvalidArgument
from offramp.recipes.joint import Joint
from small import cut_of, images_of
def kinds_in(precision):
    net, kinds = cut_of(trained=False), set()
    net.backbone.head.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    data = (images_of(32), torch.zeros(32).long())
    off.fit(net, data, recipe=Joint(epochs=1), precision=precision, progress=False)
    return torch.bfloat16 in kinds, net.precision()
"""


def in_a_fresh_process(code):
    """What it prints: Accelerate keeps one state per process, and these tests are about it."""
    tests = Path(__file__).parents[1] / "helpers"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.slow  # the two tests below train in these precisions too
def test_mixed_precision_trains_float32_weights_and_each_fit_has_its_own():
    code = PRECISIONS + "for asked in ('no', 'bf16', 'no'): print(*kinds_in(asked))"
    assert in_a_fresh_process(code) == ["False float32", "True float32", "False float32"]


def test_the_precision_of_the_users_own_accelerator_stays():
    code = """
own = Accelerator(mixed_precision="bf16", cpu=True)
print(*kinds_in("bf16"))
try:
    kinds_in("no")
except InvalidArgument as problem:
    print(problem)
print(own.mixed_precision)
"""
    same, refused, kept = in_a_fresh_process(PRECISIONS + code)
    assert (same, kept) == ("True float32", "bf16")
    assert "Your own Accelerator" in refused


def test_a_fit_leaves_nothing_of_accelerate_behind():
    code = """
kinds_in("bf16")
try:
    data = (images_of(32), torch.zeros(32).long())
    off.fit(cut_of(trained=False), data, track="nonsense", folder="somewhere")
except InvalidArgument as problem:
    print("another precision or tracker" in str(problem))
print(*kinds_in("no"))
own = Accelerator(mixed_precision="bf16", cpu=True)
print(own.mixed_precision, *kinds_in("bf16"), own.mixed_precision)
"""
    assert in_a_fresh_process(PRECISIONS + code) == [
        "True",
        "False float32",
        "bf16 True float32 bf16",
    ]


def test_gradients_do_not_stay_behind_and_the_users_own_do():
    net = cut_of(trained=False)
    net.backbone.head.weight.grad = mine = torch.ones_like(net.backbone.head.weight)
    fitted(net)
    assert net.backbone.head.weight.grad is mine
    assert all(
        value.grad is None for value in net.parameters() if value is not net.backbone.head.weight
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_pooled_features_are_read_in_the_precision_of_the_network(kind):
    (x, y), (held, its) = brightness(90), brightness(20, 1)
    for recipe in (
        "hinge",
        *([Frozen("pooled")] if kind == torch.float64 else []),
    ):  # Adam is nothing for float16
        net = cut_of(trained=False).to(kind)
        options = {"recipe": recipe, "development": (held.to(kind), its), "progress": False}
        assert "accuracy/blocks.0" in off.fit(net, (x.to(kind), y), **options).last.figures
        assert net.precision() == str(kind).removeprefix("torch.")


def test_rows_that_are_drawn_at_random_are_refused():
    x, y = brightness(90)

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, row):
            return x[row] + torch.rand(()), int(y[row])

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(BadData, match="augment="):
        off.fit(cut_of(trained=False), Drawn(), progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_only_a_network_is_trained():
    with pytest.raises(InvalidArgument, match=r"the network must be a Network, .* got a Linear"):
        off.fit(nn.Linear(2, 2), brightness(9))


def test_a_row_that_trains_twice_is_remembered_once():
    net = fitted(fitted())
    assert len(net.trained_on.digests) == 90


def test_a_run_that_is_refused_leaves_no_rows_behind(tmp_path):
    fitted(folder=tmp_path)
    net = cut_of(trained=False)
    with pytest.raises(Mismatch):
        fitted(net, folder=tmp_path, resume=True, seed=1)
    assert net.trained_on is None


def test_a_recipe_by_name_by_class_and_of_ones_own():
    assert isinstance(recipe_of("joint"), Joint)
    assert recipe_of(Joint(epochs=3)).epochs == 3
    assert isinstance(recipe_of("offramp.recipes.joint:Joint"), Joint)
    with pytest.raises(InvalidArgument, match="my"):
        recipe_of("my.nowhere:Recipe")
    with pytest.raises(UnknownName, match=r"argument of the recipe 'joint' called 'epoch'.*epochs"):
        recipe_of("joint", epoch=3)


@pytest.mark.parametrize("change", ["wider", "floats", "more channels", "by name"])
def test_rows_that_are_not_like_those_of_the_cut_are_refused_before_anything_is_trained(change):
    net = cut_of(trained=False)
    x = images_of(12)
    odd = {
        "wider": torch.cat([x, x], 3),
        "floats": x.float() if not x.is_floating_point() else (x * 255).to(torch.uint8),
        "more channels": torch.cat([x, x], 1),
        "by name": {"image": x},
    }[change]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(BadData, match=r"was cut|does not read"):
        off.fit(net, (odd, torch.zeros(12, dtype=torch.int64)), recipe="joint", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.trained_on is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rate": "fast"}, "rate of the recipe 'joint' must be a number, got 'fast'"),
        ({"epochs": 1.5}, "epochs of the recipe 'joint' must be a whole number, got 1.5"),
    ],
)
def test_arguments_of_another_kind_are_told(arguments, says):
    with pytest.raises(InvalidArgument, match=says):
        recipe_of("joint", **arguments)
