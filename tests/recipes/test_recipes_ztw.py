"""Zero Time Waste: two phases, what each of them moves, and what is refused."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork
from offramp.recipes.ztw import Ztw
from small import cut_of, images_of, ladder_of

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()


def changed(net, before):
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def test_each_phase_moves_its_own():
    net = cut_of(taught=False, exits="cascade")
    votes = {f"exits.{name}.tail.{value}" for name in ("stem", "blocks.0") for value in "ab"}
    start = {key: value.clone() for key, value in net.state_dict().items()}
    heads, ensembles = Ztw().phases(net)
    assert {id(value) for value in ensembles.parameters} == {
        id(value) for name, value in net.named_parameters() if name in votes
    }
    assert len(heads.parameters) == 4
    assert {heads.reads, ensembles.reads} == {"pooled"}
    assert ensembles.epochs == 501
    history = off.fit(net, (X, Y), recipe=Ztw(epochs=2, ensembles=2), batch_size=16, progress=False)
    assert {epoch.phase for epoch in history.epochs} == {"exits", "ensembles"}
    assert changed(net, start) == {key for key in start if key.startswith("exits.")}


def test_the_first_phase_teaches_own_logits_and_the_second_the_ensembles():
    net = cut_of(exits="cascade")
    own, ensemble = [], []
    for name, seen in net.look(X):
        if name != "backbone":
            ensemble.append(torch.nn.functional.cross_entropy(seen.own, Y).item())
    handed = {}
    for name, seen in net.look(X):
        if name != "backbone":
            _, handed[name] = net.exit_of(name).both(type(seen)(seen.features, handed))
            own.append(torch.nn.functional.cross_entropy(handed[name][:, -1], Y).item())
    history = off.fit(net, (X, Y), recipe=Ztw(epochs=1, ensembles=1, rate=1e-12), batch_size=48, progress=False)
    for epoch, expected in zip(history.epochs, (own, ensemble), strict=True):
        found = [epoch.figures["loss/stem"], epoch.figures["loss/blocks.0"]]
        assert found == pytest.approx(expected, abs=1e-5)
    assert own != pytest.approx(ensemble, abs=1e-3)


def test_heads_with_a_convolution_read_inputs_and_take_fewer_epochs_of_ensembles():
    phases = Ztw().phases(cut_of(exits="cascade_conv"))
    assert [(phase.reads, phase.epochs) for phase in phases] == [("input", 50), ("input", 10)]


@pytest.mark.parametrize(
    "net",
    [
        lambda: cut_of("stem", exits="cascade"),
        lambda: cut_of(),
        lambda: cut_of(
            "stem", "blocks.0", "blocks.1", exits={"stem": "cascade", "blocks.0": "cascade", "blocks.1": "linear"}
        ),
        lambda: ladder_of(3),
    ],
)
def test_a_network_without_a_cascade_of_two_is_refused(net):
    made = net()
    before = made.fingerprint()
    with pytest.raises(BadNetwork, match=r"cascade|parameters"):
        off.fit(made, (X, Y), recipe=Ztw(), progress=False)
    assert made.fingerprint() == before
