"""Models taken apart at module boundaries and put together again."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import offramp as off
from apart import Around, Folded, Pair, Residual, Sum, Twice, model_of, rows
from offramp.errors import BadNetwork, InvalidArgument
from offramp.models.cifar_resnet import resnet20
from offramp.partition import (
    CutPoint,
    Partition,
    cut_points,
    evenly,
    inputs_of,
    partition,
    self_check,
    staged,
    tapped,
)
from serving import Exporting
from small import dense, rows_of


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def agree(model: nn.Module, parts: Partition, x: Tensor) -> None:
    """The pieces give exactly what the model gives on one tensor."""
    with torch.no_grad():
        expected = model(x.clone())
    given = x.clone()
    assert torch.equal(parts.run({"x": given})["y"], expected)
    assert torch.equal(given, x)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return model_of(resnet20)


@pytest.fixture(scope="module")
def cut(resnet: nn.Module) -> Partition:
    return partition(resnet, (rows(1, 3, 32, 32),), at=["layer2", "layer1"])


def test_resnet_in_three(resnet: nn.Module, cut: Partition) -> None:
    assert [(piece.name, piece.reads, piece.writes) for piece in cut.pieces] == [
        ("layer1", ("x",), ("layer1",)),
        ("layer2", ("layer1",), ("layer2",)),
        ("", ("layer2",), ("y",)),
    ]
    assert (cut.inputs, cut.outputs, dict(cut.taps)) == (
        ("x",),
        ("y",),
        {"layer1": ("layer1",), "layer2": ("layer2",)},
    )
    for count in (1, 2, 7):
        agree(resnet, cut, rows(count, 3, 32, 32))
    assert self_check(resnet, cut, (rows(2, 3, 32, 32),)) < 1e-5


def test_rows_may_leave_between_pieces(resnet: nn.Module, cut: Partition) -> None:
    x = rows(5, 3, 32, 32)
    first, second, third = cut.pieces
    with torch.no_grad():
        some = {name: value[[3, 0, 4]] for name, value in first.call({"x": x}).items()}
        one = {name: value[[2]] for name, value in second.call(some).items()}
        torch.testing.assert_close(third.call(one)["y"], resnet(x)[[4]])


def test_parameters_and_buffers_are_the_models_own(resnet: nn.Module, cut: Partition) -> None:
    own = dict([*resnet.named_parameters(), *resnet.named_buffers()])
    found = [
        pair
        for piece in cut.pieces
        for pair in [*piece.module.named_parameters(), *piece.module.named_buffers()]
    ]
    assert all(own[name] is tensor for name, tensor in found)
    assert {name for name, _ in resnet.named_parameters()} <= dict(found).keys()
    assert not any(module.training for piece in cut.pieces for module in piece.module.modules())


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(lambda: Around(lambda h, _: h))
    before = list(model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    partition(model, (rows(2, 4),), at="body")
    cut_points(model, (rows(2, 4),))
    broken = model_of(lambda: Around(lambda h, _: h if h.sum() > 0 else -h))
    with pytest.raises(BadNetwork):
        partition(broken, (rows(2, 4),), at="body")
    assert hooks(model) == hooks(broken) == 0
    assert list(model.modules()) == before
    assert all(
        one is other
        for one, other in zip([*model.parameters(), *model.buffers()], tensors, strict=True)
    )
    assert all(
        type(tensor) in (Tensor, nn.Parameter)
        for tensor in broken.state_dict(keep_vars=True).values()
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_read_later_is_carried_on() -> None:
    model = model_of(lambda: Around(lambda h, x: h + x.sum(1, keepdim=True)))
    skip = model_of(lambda: Residual())
    parts = partition(model, (rows(3, 4),), at=["first", "body"])
    assert parts.pieces[-1].reads == ("x", "body")
    agree(model, parts, rows(5, 4))
    parts = partition(skip, (rows(3, 4),), at=["deep.0", "deep"])
    assert [piece.reads for piece in parts.pieces] == [
        ("x",),
        ("deep.0",),
        ("deep.0/+tanh", "deep"),
    ]
    assert parts.pieces[0].writes == ("deep.0", "deep.0/+tanh")
    assert parts.pieces[1].writes == ("deep",)
    agree(skip, parts, rows(5, 4))
    assert self_check(skip, parts, (torch.zeros(1, 4),)) < 1e-5


def test_a_constant_made_like_an_input_is_not_carried() -> None:
    def masked(h: Tensor, x: Tensor) -> Tensor:
        return h * torch.nn.functional.pad(x.new_ones([h.shape[1] - 1]), (1, 0)) + x.new_full(
            (6,), 0.5
        )

    class Early(Around):
        def forward(self, x: Tensor) -> Tensor:
            ones = x.new_ones([6]).cumsum(0)  # made before the cut, used behind it, and of no row
            return self.last(self.between(self.body(self.first(x)) * ones, x))

    model = model_of(lambda: Early(masked))
    parts = partition(model, (rows(3, 4),), at=["first", "body"])
    assert [piece.reads for piece in parts.pieces] == [("x",), ("first",), ("body",)]
    agree(model, parts, rows(5, 4))


def test_even_cuts_are_outer_modules_near_equal_shares() -> None:
    points = [
        CutPoint("stem", None, ((8,),), 32, 0.0),
        CutPoint("a.one", None, ((9,),), 36, 0.25),
        CutPoint("a", None, ((8,),), 32, 0.31),
        CutPoint("b.one", None, ((9,),), 36, 0.5),
        CutPoint("b.two", None, ((8,), (8,)), 64, 0.51),
        CutPoint("c", None, ((8,),), 32, 0.7),
        CutPoint("d", "carries 'h' of shape [9], which has no rows", share=0.76),
        CutPoint("head", None, ((8,),), 32, 1.0),
    ]
    assert evenly(points, 4) == ("a", "b.one", "c")
    assert evenly(points, 2) == ("b.one",)
    assert evenly(points, 6) == ("a.one", "a", "b.one", "b.two", "c")
    with pytest.raises(
        InvalidArgument, match=r"parts must be between 2 and 6 .*'d' carries 'h' of shape \[9\]"
    ):
        evenly(points, 7)


def test_several_inputs_and_outputs() -> None:
    @dataclass
    class Answer:
        logits: Tensor
        scale: float
        states: tuple[Tensor, Tensor]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 5)
            self.other = nn.Linear(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, a: Tensor, b: Tensor, *, mask: Tensor, flip: bool = False) -> Answer:
            h = self.one(a)
            g = (h + self.other(b)) * mask[:, None]
            logits = self.head(g)
            return Answer(-logits if flip else logits, 2.0, (h, logits.mean()))

    model = model_of(Two)
    args = (rows(3, 4), rows(3, 3))
    kwargs = {"flip": True, "mask": torch.tensor([1, 0, 1])}
    parts = partition(model, args, kwargs, at=["one"])
    assert parts.inputs == ("x/0", "x/1", "x/mask")
    assert parts.outputs == (
        "y/logits",
        "y/states/0",
    )  # a mean over all rows has none and cannot be given
    assert parts.pieces[1].reads == ("x/1", "x/mask", "one")
    found = parts.run(inputs_of(args, kwargs))
    assert torch.equal(found["y/logits"], model(*args, **kwargs).logits)
    assert self_check(model, parts, args, kwargs) < 1e-5


def test_a_tapped_tuple() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.last = nn.Linear(5, 3)
            self.fork = Fork()

        def forward(self, x: Tensor) -> Tensor:
            h, doubled = self.fork(self.lstm(x)[0])
            return self.last(h[:, -1] + doubled[:, 0])

    class Fork(nn.Module):
        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return h.relu(), h * 2

    model = model_of(Recurrent)
    parts = partition(model, (rows(2, 6, 4),), at=["lstm", "fork"])
    assert dict(parts.taps) == {
        "lstm": ("lstm",),
        "fork": ("fork", "fork/1"),
    }  # the LSTM's states are [1, B, 5]
    found = parts.run({"x": rows(3, 6, 4)})
    heard = tapped(model.fork(model.lstm(rows(3, 6, 4))[0]), "fork")
    assert all(torch.allclose(found[name], heard[name]) for name in ("fork", "fork/1"))
    assert self_check(model, parts, (rows(2, 6, 4),)) < 1e-5


def test_pieces_never_change_what_they_are_given() -> None:
    def make() -> nn.Module:
        blocks = [
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
            for _ in "ab"
        ]
        return nn.Sequential(nn.Hardtanh(inplace=True), *blocks, nn.Flatten(), nn.Linear(48, 2))

    model = model_of(make)
    parts = partition(model, (rows(2, 3, 4, 4),), at=["1.1", "2.1", "2"])
    state = {"x": rows(4, 3, 4, 4)}
    for piece in parts.pieces:
        before = {name: value.clone() for name, value in state.items()}
        written = piece.call(state)
        assert all(torch.equal(before[name], state[name]) for name in before)
        state |= written
    assert torch.equal(state["y"], model(rows(4, 3, 4, 4)))
    # the tap is what a hook sees, not what the next operation made of it
    assert state["1.1"].min() < 0
    copies = [
        sum(node.name.startswith("clone") for node in piece.module.graph.nodes)
        for piece in parts.pieces
    ]
    assert copies == [1, 1, 1, 0]
    assert self_check(model, parts, (rows(2, 3, 4, 4),)) < 1e-5


def test_constants_and_sizes_are_made_again() -> None:
    def between(h: Tensor, x: Tensor) -> Tensor:
        table = torch.zeros(6)
        table[2] = 5.0
        cls = torch.ones(1, 6).expand(x.shape[0], -1)
        h = h + table + torch.tensor([1.0, 2, 3, 4, 5, 6]) + cls + torch.arange(6)
        return h.view(x.shape[0], 2, 3).reshape(2 * x.shape[0], 3).view(x.size(0), 6)

    class Late(Around):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(6)
            table[2] = 5.0
            h = self.first(x) + table + self.table
            h = self.body(h) + table
            return self.last(self.between(h, x))

    model = model_of(lambda: Late(between))
    parts = partition(model, (rows(2, 4),), at=["first", "body"])
    assert [piece.reads for piece in parts.pieces] == [("x",), ("first",), ("body",)]
    for count in (1, 3):
        agree(model, parts, rows(count, 4))
    assert self_check(model, parts, (rows(2, 4),)) < 1e-5


def test_tied_weights_and_dropout() -> None:
    def make() -> nn.Module:
        first = nn.Linear(4, 4)
        last = nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(first, nn.Dropout(), nn.LayerNorm(4), last)

    model = model_of(make)
    parts = partition(model, (rows(2, 4),), at=["1"])
    agree(model, parts, rows(3, 4))
    assert all(
        any(p is model[0].weight for p in piece.module.parameters()) for piece in parts.pieces
    )


def test_attention_with_a_mask() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.words = nn.Embedding(9, 8)
            self.layers = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, 3)
            self.register_buffer("places", torch.linspace(-1, 1, 40).view(1, 5, 8))

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = self.words(ids) + self.places[:, : ids.shape[1]]
            return self.head(self.layers(h, src_key_padding_mask=mask == 0)[:, 0])

    model = model_of(Reader).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    parts = partition(model, (ids,), {"mask": (ids > 0).long()}, at=["layers.layers.0"])
    assert len(parts.pieces[1].reads) == 2  # hidden states and the mask as attention wants it
    assert self_check(model, parts, (ids,), {"mask": (ids > 0).long()}) < 1e-5


def test_pieces_may_be_made_and_run_in_inference_mode() -> None:
    model = model_of(Residual)
    with torch.inference_mode():
        parts = partition(model, (rows(2, 4),), at="deep")
        assert self_check(model, parts, (rows(2, 4),)) < 1e-5
        agree(model, parts, rows(3, 4))


def test_the_list_of_cuts() -> None:
    points = {point.name: point for point in cut_points(model_of(Folded), (rows(2, 4),))}
    assert list(points) == ["first", "fold", "unfold", "body", "last"]
    assert [point.legal for point in points.values()] == [True, False, True, True, False]
    assert (
        points["fold"].why_not
        == "gives 'flatten' of shape [2*B, 3], whose first dimension is 2*B, not B"
    )
    assert points["last"].why_not == "ends where the model does"
    assert points["first"].carried == ((6,),)
    assert points["first"].row_bytes == 24
    assert [points[name].share for name in ("first", "body", "last")] == pytest.approx(
        [24 / 78, 60 / 78, 1.0]
    )
    points = {point.name: point for point in cut_points(model_of(Twice), (rows(2, 4),))}
    assert points["spare"].share is None
    assert {name: points[name].why_not for name in ("body", "spare", "side")} == {
        "body": "runs twice",
        "spare": "never runs",
        "side": "is not on the path to the output",
    }


def test_explicit_stages() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair({"h": x if x.sum() > 0 else x + 1, "x": x * 2}, len(x.shape))

    class Join(nn.Module):
        def forward(self, pair: Pair) -> Tensor:
            return pair.hidden["h"].relu_() + pair.hidden["x"] * pair.size

    model = nn.Sequential(Wide(), Join(), nn.Linear(4, 3)).eval()
    with pytest.raises(BadNetwork, match="explicit stages"):
        partition(model, (rows(2, 4),), at=["0"])
    parts = staged(model, (rows(2, 4),), names=["0", "1"])
    assert [(piece.reads, piece.writes) for piece in parts.pieces] == [
        (("x",), ("0", "0/1")),
        (("0", "0/1"), ("1",)),
        (("1",), ("y",)),
    ]
    x = rows(5, 4).abs()
    state = parts.run({"x": x})
    assert torch.equal(state["y"], model(x))
    assert torch.equal(state["0"], x)
    biased = torch.full((8, 4), -1.0)
    biased[4] = 2.0  # alone its sum is positive, among the others it is not
    with pytest.raises(BadNetwork, match="the stage that ends at '0' mixes rows"):
        self_check(model, parts, (biased,))
    with pytest.raises(BadNetwork, match="a different name for each of the"):
        staged(model, (x,), names=["0"])


def test_explicit_stages_pass_the_check() -> None:
    model = model_of(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)))
    parts = staged(model, (rows(2, 4),), names=["0", "1"])
    assert self_check(model, parts, (rows(2, 4),)) < 1e-5
    with pytest.raises(BadNetwork, match=r"gives \[4\] for 2 rows"):
        staged([model[0], Sum().eval()], (rows(2, 4),), names=["0"])
    with pytest.raises(BadNetwork, match="training mode"):
        staged([model[0], Sum()], (rows(2, 4),), names=["0"])


@pytest.mark.parametrize("kind", ["plain", "the same stem twice", "with a lock", "a method of it"])
def test_a_model_serves_while_it_is_taken_apart(kind):
    model = Exporting().eval()
    if kind == "the same stem twice":
        model.again = model.stem
    elif kind == "with a lock":
        model.lock = threading.Lock()
    elif kind == "a method of it":
        model.forward = model.forward
    x = rows_of(6)
    runner = off.open(off.ladder({"a": model, "b": dense(1)}), off.Plan.by_hand({"a": -1.0}))
    wanted = runner(x).logits
    model.service.during_export(lambda: runner(x).logits)
    agree(model, partition(model, (x,), at=["stem"]), x)
    results = model.service.all_results()
    assert results
    for logits in results:
        assert torch.equal(logits, wanted)
