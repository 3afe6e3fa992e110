"""Zero Time Waste: two phases, what each of them moves, and what is refused."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork
from offramp.networks.nodes import Seen
from offramp.recipes.ztw import Ztw
from small import cut_of, images_of, ladder_of

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()


def changed(net, before):
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def test_each_phase_moves_its_own():
    net = cut_of(trained=False, exits="cascade")
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


def test_the_first_phase_trains_own_logits_and_the_second_the_ensembles():
    net = cut_of(exits="cascade")
    own = []
    ensemble = []
    for name, seen in net.look(X):
        if name != "backbone":
            ensemble.append(torch.nn.functional.cross_entropy(seen.own, Y).item())
    handed = {}
    for name, seen in net.look(X):
        if name != "backbone":
            _, handed[name] = net.exit_of(name).both(type(seen)(seen.features, handed))
            own.append(torch.nn.functional.cross_entropy(handed[name][:, -1], Y).item())
    history = off.fit(
        net, (X, Y), recipe=Ztw(epochs=1, ensembles=1, rate=1e-12), batch_size=48, progress=False
    )
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
            "stem",
            "blocks.0",
            "blocks.1",
            exits={"stem": "cascade", "blocks.0": "cascade", "blocks.1": "linear"},
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


def before_the_last_layer(trained=True):
    """Cut before the last layer too; exits there read the map [B, 4, 4, 4] that it flattens."""
    return cut_of("stem", "blocks.0", "blocks.1", exits="cascade", trained=trained)


def test_the_last_layer_gets_an_ensemble_of_its_own():
    """log p = (1/M) sum_m exp(a_m) log softmax(z_m) + b, the last z being the model's own
    answer.
    """
    net = before_the_last_layer()
    Ztw(final=True).prepare(net)
    exit_ = net.exit_of("blocks.1")
    handed = {}
    seen = dict(net.look(X))
    for name in ("stem", "blocks.0", "blocks.1"):
        _, handed[name] = net.exit_of(name).both(Seen(seen[name].features, handed))
    members = handed["blocks.1"]
    torch.testing.assert_close(members[:, -1], seen["backbone"].own)
    logs = (members.log_softmax(-1) * exit_.tail.a.exp()[:, None] / 3).sum(1) + exit_.tail.b
    torch.testing.assert_close(seen["blocks.1"].own, logs.log_softmax(-1))
    # the reference is the plain model
    torch.testing.assert_close(seen["backbone"].own, net.backbone(X))


def test_the_copy_of_the_last_layer_stays_and_only_its_ensemble_is_trained(tmp_path):
    net = before_the_last_layer(trained=False)
    recipe = Ztw(epochs=1, ensembles=1, final=True)
    recipe.prepare(net)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    heads, _ = recipe.phases(net)
    final = {id(value) for value in net.exit_of("blocks.1").parameters()}
    assert not final & {id(value) for value in heads.parameters}
    off.fit(net, (X, Y), recipe=recipe, batch_size=16, progress=False)
    moved = {key for key in changed(net, start) if key.startswith("exits.blocks.1")}
    assert moved == {"exits.blocks.1.tail.a", "exits.blocks.1.tail.b"}
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    assert again.fingerprint() == net.fingerprint()
    for one, other in zip(net(X), again(X), strict=True):
        assert torch.equal(one, other)


def test_a_plan_that_lets_all_leave_at_the_last_ensemble_answers_by_it():
    net = before_the_last_layer()
    Ztw(final=True).prepare(net)
    closed = float("inf")
    plan = off.Plan.by_hand({"stem": closed, "blocks.0": closed, "blocks.1": -closed})
    torch.testing.assert_close(
        off.run(net, plan, X).logits, net(X)[2].detach(), atol=1e-5, rtol=1e-5
    )


def test_an_exit_that_does_not_read_what_the_last_layer_reads_is_refused():
    for made in (cut_of(exits="cascade"), cut_of("stem", "blocks.1", exits="cascade_conv")):
        before = made.fingerprint()
        with pytest.raises(BadNetwork, match="Cut right before the last layer"):
            Ztw(final=True).prepare(made)
        assert made.fingerprint() == before
