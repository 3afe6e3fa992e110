"""A run that is stopped anywhere goes on as if it had not been, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial

import pytest
import torch

import offramp as off
from offramp._support.files import read_json, write_json
from offramp.errors import BadFile, InvalidArgument, Mismatch
from offramp.networks.recipe import Phase, Recipe, plain
from offramp.recipes.joint import Joint
from offramp.testing import stopping
from small import cut_of, images_of

X = images_of(70)
Y = (X.mean((1, 2, 3)) > 0).long()


def trained(recipe, **options):
    net = cut_of(trained=False)
    off.fit(net, (X, Y), recipe=recipe, batch_size=16, progress=False, **options)
    return net


def scheduled(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)


class Scheduled(Recipe):
    """Exits from pooled features, by SGD with momentum under a schedule."""

    def phases(self, network):
        def sgd(parameters):
            return torch.optim.SGD(parameters, 1e-2, momentum=0.9, nesterov=True)

        names = ("stem", "blocks.0")
        return [
            Phase(name, tuple(network.exits[name].parameters()), 2, sgd, scheduled, reads="pooled")
            for name in names
        ]

    def loss(self, outputs, batch):
        return {
            name: torch.nn.functional.cross_entropy(outputs.logits[name], batch.labels())
            for name in outputs.logits
        }


STOPPED = {
    "joint": Joint(epochs=2, alone=1, decay=True),
    "kept": Joint(epochs=3, keep=0.5),
    "scheduled": Scheduled(),
}


@pytest.mark.parametrize("recipe", STOPPED.values(), ids=STOPPED)
@pytest.mark.parametrize("after", [1, 5, 7, 13])
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_weights(tmp_path, recipe, after):
    table = trained(recipe)
    with pytest.raises(KeyboardInterrupt):
        trained(stopping(recipe, after), folder=tmp_path)
    off.load(tmp_path / "checkpoint", cut_of().backbone)  # usable as it is
    net = cut_of(trained=False)
    history = off.fit(
        net, (X, Y), recipe=recipe, batch_size=16, progress=False, folder=tmp_path, resume=True
    )
    assert not [
        key
        for key, value in table.state_dict().items()
        if not torch.equal(value, net.state_dict()[key])
    ]
    straight = off.fit(cut_of(trained=False), (X, Y), recipe=recipe, batch_size=16, progress=False)
    assert [epoch.figures for epoch in history.epochs] == [
        epoch.figures for epoch in straight.epochs
    ]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + len(straight.epochs)


def resumed(net, folder):
    return off.fit(
        net,
        (X, Y),
        recipe=Joint(epochs=1),
        batch_size=16,
        progress=False,
        folder=folder,
        resume=True,
    )


def test_a_finished_run_is_resumed_at_its_end(tmp_path):
    first = trained(Joint(epochs=1), folder=tmp_path)
    net = cut_of(trained=False)
    history = resumed(net, tmp_path)
    assert net.fingerprint() == first.fingerprint()
    assert len(history.epochs) == 1


def test_resuming_where_nothing_is_begins(tmp_path):
    assert trained(Joint(epochs=1), folder=tmp_path, resume=True).untrained() == ()


def test_an_earlier_run_is_not_overwritten(tmp_path):
    trained(Joint(epochs=1), folder=tmp_path)
    with pytest.raises(InvalidArgument, match="resume=True"):
        trained(Joint(epochs=1), folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, "seed 0, this one has 1"),
        ({"views": 2}, "views"),
        ({"recipe": Joint(epochs=2)}, "recipe"),
    ],
)
def test_another_run_is_not_continued(tmp_path, options, says):
    trained(Joint(epochs=1), folder=tmp_path)
    with pytest.raises(Mismatch, match=says):
        trained(**{"recipe": Joint(epochs=1), "folder": tmp_path, "resume": True, **options})


def test_other_rows_do_not_continue_a_run(tmp_path):
    trained(Joint(epochs=1), folder=tmp_path)
    with pytest.raises(Mismatch, match="data"):
        off.fit(
            cut_of(trained=False),
            (X + 1, Y),
            recipe=Joint(epochs=1),
            batch_size=16,
            folder=tmp_path,
            resume=True,
        )


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trained(Joint(epochs=1), folder=tmp_path)
    file = tmp_path / "checkpoint" / "training.json"
    body = json.loads(file.read_text())
    body["progress"]["step"] = 5
    file.write_text(json.dumps(body))
    with pytest.raises(BadFile, match="edited or damaged"):
        trained(Joint(epochs=1), folder=tmp_path, resume=True)


def flipped(file, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("at", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "network.json", "training.json"]
)
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused(tmp_path, name, at):
    with pytest.raises(KeyboardInterrupt):
        trained(stopping(Joint(epochs=1), 3), folder=tmp_path)
    flipped(tmp_path / "checkpoint" / name, at)
    net = cut_of(trained=False)
    before = net.fingerprint()
    with pytest.raises(BadFile, match=r"damaged|must be an offramp"):
        off.fit(
            net,
            (X, Y),
            recipe=Joint(epochs=1),
            batch_size=16,
            progress=False,
            folder=tmp_path,
            resume=True,
        )
    assert net.fingerprint() == before


def test_weights_of_another_run_are_no_weights_to_go_on_from(tmp_path):
    """Sound files, each for itself."""
    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            trained(stopping(Joint(epochs=2), 3 if name == "one" else 5), folder=tmp_path / name)
    for file in ("weights.safetensors", "optimizer.safetensors"):
        shutil.copytree(tmp_path / "one", tmp_path / file)
        shutil.copy(tmp_path / "two" / "checkpoint" / file, tmp_path / file / "checkpoint" / file)
        with pytest.raises(BadFile, match="damaged or exchanged"):
            trained(Joint(epochs=2), folder=tmp_path / file, resume=True)


def test_a_checkpoint_of_the_first_version_goes_on_while_its_weights_are_sound(tmp_path):
    table = trained(Joint(epochs=2))
    with pytest.raises(KeyboardInterrupt):
        trained(stopping(Joint(epochs=2), 3), folder=tmp_path)
    file = tmp_path / "checkpoint" / "training.json"
    _, body = read_json(file, "training", 2)
    del body["files"]
    write_json(file, "training", 1, body)
    shutil.copytree(tmp_path, tmp_path / "damaged")
    assert (
        trained(Joint(epochs=2), folder=tmp_path, resume=True).fingerprint() == table.fingerprint()
    )
    flipped(tmp_path / "damaged" / "checkpoint" / "weights.safetensors", 0.9)
    with pytest.raises(BadFile, match="damaged or exchanged"):
        trained(Joint(epochs=2), folder=tmp_path / "damaged", resume=True)


def test_an_optimizer_whose_state_no_checkpoint_holds_is_told(tmp_path):
    class Keeping(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for value in group["params"]:
                    self.state[value]["past"] = [1.0]

    class Odd(Scheduled):
        def phases(self, network):
            return [Phase("exits", tuple(network.exits.parameters()), 2, Keeping, reads="pooled")]

    trained(Odd())
    with pytest.raises(InvalidArgument, match="got a list as 'past' of Keeping"):
        trained(Odd(), folder=tmp_path)


class Wrong(Recipe):
    """Trains on the rows that the exit gets wrong when the phase begins."""

    def phases(self, network):
        def wrong(outputs, batch):
            return outputs.logits["stem"].argmax(1) != batch.labels()

        values = tuple(network.exits["stem"].parameters())
        return [Phase("stem", values, 3, lambda some: torch.optim.SGD(some, 0.5), rows=wrong)]

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs.logits["stem"], batch.labels())


@pytest.mark.parametrize("after", [2, 5])
def test_a_resumed_phase_goes_on_with_the_rows_that_it_chose_when_it_began(tmp_path, after):
    table = trained(Wrong())
    with pytest.raises(KeyboardInterrupt):
        trained(stopping(Wrong(), after), folder=tmp_path)
    assert trained(Wrong(), folder=tmp_path, resume=True).fingerprint() == table.fingerprint()


def test_ctrl_c_after_the_last_step_of_a_phase_stops_too(tmp_path, monkeypatch):
    def measured(self, *arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return {}

    table = trained(Joint(epochs=1, alone=1))
    monkeypatch.setattr("offramp.fitting.loop.Loop._accuracies", measured)
    with pytest.raises(KeyboardInterrupt):
        trained(Joint(epochs=1, alone=1), folder=tmp_path)
    monkeypatch.undo()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 2  # the first phase alone
    again = trained(Joint(epochs=1, alone=1), folder=tmp_path, resume=True)
    assert again.fingerprint() == table.fingerprint()


def test_what_a_recipe_and_augment_say_of_themselves_is_the_same_in_the_next_process():
    class Noise:
        def __call__(self, x):
            return x

    assert plain(Noise()) == plain(Noise())
    assert plain(partial(torch.roll, dims=1)) == plain(partial(torch.roll, dims=1))
    assert plain(partial(torch.roll, dims=1)) != plain(partial(torch.roll, dims=2))


def test_other_labels_do_not_continue_a_run(tmp_path):
    trained(Joint(epochs=1), folder=tmp_path)
    with pytest.raises(Mismatch, match="labels"):
        off.fit(
            cut_of(trained=False),
            (X, 1 - Y),
            recipe=Joint(epochs=1),
            batch_size=16,
            folder=tmp_path,
            resume=True,
        )


def test_a_run_that_was_killed_while_a_checkpoint_was_replaced_goes_on_from_the_one_before(
    tmp_path,
):
    trained(Joint(epochs=1), folder=tmp_path)
    (tmp_path / ".checkpoint.offramp-abc.part").mkdir()
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.offramp-abc.part" / "old")
    net = cut_of(trained=False)
    history = resumed(net, tmp_path)
    assert len(history.epochs) == 1
    assert (tmp_path / "checkpoint" / "training.json").is_file()
    assert not (tmp_path / ".checkpoint.offramp-abc.part").exists()
