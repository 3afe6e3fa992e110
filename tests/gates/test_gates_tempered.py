"""Temperatures: what they change, what they leave, and the best of them."""

from __future__ import annotations

import math

import pytest
import torch

from offramp.building.factories import make_gate
from offramp.errors import InvalidArgument
from offramp.gates.tempered import Tempered
from offramp.networks.nodes import Gate, Seen
from offramp.testing import example_seen


def of(name: str, temperature: float) -> Tempered:
    return Tempered(make_gate(name), temperature)


def test_it_divides_the_logits():
    seen = example_seen()
    for name in ("margin", "max_prob", "neg_entropy"):
        plain = make_gate(name)
        torch.testing.assert_close(of(name, 1.0).score(seen), plain.score(seen))
        torch.testing.assert_close(
            of(name, 4.0).score(seen), plain.score(Seen(seen.features, {}, seen.own / 4))
        )
    torch.testing.assert_close(of("margin", 4.0).score(seen), make_gate("margin").score(seen) / 4)


def test_temperatures_multiply():
    seen = example_seen()
    torch.testing.assert_close(
        Tempered(of("max_prob", 2.0), 3.0).score(seen), of("max_prob", 6.0).score(seen)
    )


def test_earlier_logits_are_divided_too():
    class Earlier(Gate):
        reads = ("before",)

        def score(self, seen):
            return seen.logits["before"][:, 0]

        def config(self):
            return {"name": "Earlier"}

    seen = example_seen(reads=("before",))
    gate = Tempered(Earlier(), 5.0)
    assert gate.reads == ("before",)
    torch.testing.assert_close(gate.score(seen), seen.logits["before"][:, 0] / 5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_temperature(wrong):
    with pytest.raises(InvalidArgument, match="temperature"):
        of("margin", wrong)


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_the_best_temperature_is_the_one_that_made_the_labels(true):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=draw) * 2
    labels = torch.multinomial((logits / true).softmax(-1), 1, generator=draw)[:, 0]
    fitted = Tempered.fitted(make_gate("max_prob"), logits, labels)
    assert fitted.temperature == pytest.approx(true, rel=0.05)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(logits / temperature, labels).item()

    assert loss(fitted.temperature) <= min(
        loss(fitted.temperature * factor) for factor in (0.9, 0.99, 1.01, 1.1)
    )
