"""Operations write in place only where nobody notices, and the values stay the same bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.partition import partition, self_check
from offramp.partition.inplace import in_place

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two linear layers, and a function of what the first gives and of the input between them."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.mark = nn.Identity()
        self.last = nn.Linear(4, 3)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.mark(self.first(x)), x))


def graph_of(between):
    model = Body(between).eval()
    return torch.export.export(model, (X,), strict=False).module().graph, model


def written(between) -> list[str]:
    return sorted(str(target) for target in in_place(graph_of(between)[0]).values())


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (lambda h, x: h.relu(), ["aten.relu_.default"]),
        (
            lambda h, x: (h.relu() + x).relu(),
            ["aten.add_.Tensor", "aten.relu_.default", "aten.relu_.default"],
        ),
        (
            lambda h, x: x.relu() + h,
            ["aten.add_.Tensor"],
        ),  # x is the caller's, what relu gives is not
        (lambda h, x: h.relu() + h, ["aten.add_.Tensor"]),  # h is read after the relu
        (lambda h, x: h + h, []),
        (lambda h, x: h[:, :2].sum(1, keepdim=True) + h.relu(), []),  # a view looks into h
        (lambda h, x: h[:1].relu() + h, []),
        (lambda h, x: x.relu().mean(0) + h, []),
        (
            lambda h, x: nn.functional.linear(h[:, :1], torch.ones(1, 1)).relu() * h,
            ["aten.relu_.default"],
        ),  # grows
        (lambda h, x: torch.cat([h, x], 1).sigmoid()[:, :4], ["aten.sigmoid_.default"]),
    ],
)
def test_where_nothing_needs_the_input_any_more(between, found):
    assert written(between) == found


def test_an_answer_that_is_handed_out_is_not_written_over():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            return h.relu(), h

    graph = torch.export.export(Two().eval(), (X,), strict=False).module().graph
    assert in_place(graph) == {}


@pytest.mark.parametrize(
    "between",
    [
        lambda h, x: (h.relu() + x).relu() * h.sigmoid(),
        lambda h, x: h.relu() + h,
        lambda h, x: nn.functional.gelu(h + x) * torch.cat([h, x], 1)[:, 2:6].relu(),
        lambda h, x: (h.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4) + h.relu()).relu(),
    ],
)
def test_pieces_give_the_same_bits_and_keep_what_they_read(between):
    model = Body(between).eval()
    parts = partition(model, (X,), {}, at=["mark"])
    self_check(model, parts, (X,), {})
    with torch.inference_mode():
        state = {parts.inputs[0]: X.clone()}
        for piece in parts.pieces:
            before = {name: state[name].clone() for name in piece.reads}
            out = piece.call({name: state[name] for name in piece.reads})
            assert all(torch.equal(state[name], value) for name, value in before.items())
            state |= out
        assert torch.equal(state[parts.outputs[0]], model(X))
