"""Which of a model's outputs are its logits, and what is said where that is not clear."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork
from offramp.networks.taps import listening, logits_in

FLAT = torch.randn(4, 3)
OTHER = torch.randn(4, 5)
MAP = torch.randn(4, 3, 8, 8)

CLEAR = {
    "a tensor": FLAT,
    "one entry": {"scores": FLAT},
    "called logits": {"aux": OTHER, "logits": FLAT},
    "called logits, beside a loss": {"loss": None, "logits": FLAT, "hidden": MAP},
    "first of a tuple": (FLAT, MAP),
    "first of a list": [FLAT, MAP, MAP],
}
UNCLEAR = {
    "segmentation with an auxiliary head": {"out": MAP, "aux": FLAT},
    "the same as a tuple": (MAP, FLAT),
    "two heads": {"digit": FLAT, "colour": OTHER},
    "two heads in a tuple": (FLAT, OTHER),
    "detection": {"scores": FLAT, "boxes": torch.randn(4, 9, 4)},
    "features with a pooled output": {"last_hidden_state": torch.randn(4, 7, 6), "pooler": FLAT},
    "nested": ((FLAT, MAP), MAP),
}


@pytest.mark.parametrize("name", CLEAR)
def test_logits_that_are_clear(name):
    assert logits_in(CLEAR[name]) is FLAT


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_not_clear_is_left_as_it_is(name):
    assert logits_in(UNCLEAR[name]) is UNCLEAR[name]


class Segmentation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 5, 1)
        self.aux = nn.Linear(4, 7)

    def forward(self, x):
        h = self.a(x)
        return {"out": self.out(h), "aux": self.aux(h.mean((2, 3)))}


def test_a_segmentation_model_is_refused_with_its_outputs():
    x = torch.randn(4, 3, 8, 8)
    said = r"got a dict of out \[4, 5, 8, 8\], aux \[4, 7\]. Wrap the model"
    with pytest.raises(BadNetwork, match=said):
        off.cut(Segmentation().eval(), x, at=["a"])
    net = off.ladder({"p": Segmentation().eval(), "q": Segmentation().eval()})
    with pytest.raises(BadNetwork, match=said):
        off.record(net, x, timed=False, progress=False)


def test_listening_hears_its_own_thread_alone():
    model = nn.Linear(4, 3)
    heard = []
    with listening({"model": model}, lambda name, output: heard.append((name, output))):
        mine = model(torch.zeros(1, 4))
        thread = Thread(target=model, args=(torch.ones(2, 4),))
        thread.start()
        thread.join()
    model(torch.zeros(1, 4))
    assert len(heard) == 1
    assert heard[0][0] == "model"
    assert heard[0][1] is mine
