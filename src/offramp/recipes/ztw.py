"""Zero Time Waste: exits in a cascade on a frozen backbone, then the weights of their ensembles.

Wolczyk et al., 2021, arXiv 2106.05409; the formulas stand in exits/_cascading.py, hyper-parameters are those of the
authors' code. Where we differ: what is frozen stays in eval mode (as in their later code); features are pooled once
where exits have no convolution; ensembles see the training rows through the exits as they are, not through cached
answers; and all ensembles are taught in one phase, sharing nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp.errors import BadNetwork
from offramp.exits.cascade import Cascade, CascadeConv
from offramp.networks.network import Network
from offramp.networks.nodes import Seen
from offramp.networks.recipe import Lesson, Losses, Phase, Recipe, View, reading, taught_exits
from offramp.recipes._schedules import dropped

__all__ = ["Ztw"]

ENSEMBLES = "ensembles"


class Ztw(Recipe):
    """First the sum of the exits' own cross-entropies, then that of the ensembles' with everything else frozen.

    epochs, rate: of the exits (Adam; the rate falls tenfold after 15 of 50 epochs). ensembles: epochs of the ensembles
    (Adam, rate 5e-4, no regulariser); by default 501 where features are pooled, as there on cached answers, and 10 (as
    there on ImageNet) where every epoch runs the model. Ensembles taught on rows that the exits know lean on the late
    ones; the paper has it so.
    """

    def __init__(self, *, epochs: int = 50, rate: float = 1e-3, ensembles: int | None = None) -> None:
        self.epochs, self.rate, self.ensembles = epochs, rate, ensembles

    def prepare(self, network: Network) -> None:
        """Raise BadNetwork unless all exits but the last are in one cascade of at least two."""
        taught_exits(network)
        names, found = network.chain.exits[:-1], dict(_cascaded(network))
        chained = [exit_.tail.before for exit_ in found.values()] == [None, *names[:-1]]
        if len(found) < 2 or len(found) != len(names) or not chained:
            raise BadNetwork(
                f"exits {', '.join(found) or 'none'} of {', '.join(names)} are in a cascade, expected all, and at "
                "least two; cut(model, example, at=..., exits='cascade') or 'cascade_conv'"
            )

    def phases(self, network: Network) -> list[Phase]:
        """The exits, then the ensembles, unless those are plain means and have nothing to learn."""
        exits = dict(_cascaded(network))
        each = (value for exit_ in exits.values() for value in (exit_.tail.a, exit_.tail.b))
        votes = tuple(value for value in each if value is not None)
        apart = {id(value) for value in votes}
        heads = tuple(v for exit_ in exits.values() for v in exit_.parameters() if id(v) not in apart)
        reads = reading(network, exits)
        epochs = self.ensembles or (501 if reads == "pooled" else 10)
        adam = partial(torch.optim.Adam, lr=self.rate)
        first = Phase("exits", heads, self.epochs, adam, dropped(15 / 50), reads)
        if not votes:
            return [first]
        return [
            first,
            Phase(ENSEMBLES, votes, epochs, partial(torch.optim.Adam, lr=5e-4), reads=reads),
        ]

    def loss(self, view: View, lesson: Lesson) -> Losses:
        """Cross-entropy by exit: of its own logits, or of its ensemble."""
        y, found, handed = lesson.labels(), dict[str, Tensor](), dict[str, Tensor]()
        for name, exit_ in _cascaded(view.network):
            if lesson.phase == ENSEMBLES:
                if exit_.tail.a is None:
                    continue
                found[name] = cross_entropy(view.logits[name], y)
                continue
            _, handed[name] = exit_.both(Seen(view.features[name], handed))
            found[name] = cross_entropy(handed[name][:, -1], y)
        return found


def _cascaded(network: Network) -> Iterator[tuple[str, Cascade | CascadeConv]]:
    """The exits in a cascade, shallow to deep."""
    for name in network.chain.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, (Cascade, CascadeConv)):
            yield name, exit_
