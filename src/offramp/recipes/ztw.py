"""Zero Time Waste: exits in a cascade on a frozen backbone, then the weights of their ensembles.

Wolczyk et al., 2021, arXiv 2106.05409; the formulas stand in exits/_cascading.py, hyper-parameters
are those of the authors' code. Where we differ: what is frozen stays in eval mode (as in their
later code); features are pooled once where exits have no convolution; ensembles see the training
rows through the exits as they are, not through cached answers; and all ensembles are trained in one
phase, sharing nothing. In the authors' first code the model's last layer gets an ensemble too, and
that is the network's answer; in their later code it does not. Here the model's own answer is the
reference of every promise, so it stays the plain one. final=True makes the ensemble an exit of its
own before the last layer, with a copy of that layer. A plan that lets all rows leave there answers
as their first code does; its promise then compares the ensemble with the plain model, as it should.
The price is the layer run twice for rows that go on. Their exit ends the network, so none of their
rows go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offramp.errors import BadNetwork
from offramp.exits._pooling import pooled
from offramp.exits.cascade import Cascade, CascadeConv
from offramp.networks.network import Network
from offramp.networks.nodes import Seen
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.recipes._schedules import dropped
from offramp.recipes._together import last_layer, seen_of

__all__ = ["Ztw"]

ENSEMBLES = "ensembles"
NEAR = 1e-4  # by how much a copy of the last layer may differ from the model


class Ztw(Recipe):
    """First the sum of the exits' own cross-entropies, then that of the ensembles' with everything
    else frozen.

    epochs, rate: of the exits (Adam; the rate falls tenfold after 15 of 50 epochs). ensembles:
    epochs of the ensembles (Adam, rate 5e-4, no regularizer); by default 501 where features are
    pooled, as there on cached answers, and 10 (as there on ImageNet) where every epoch runs the
    model. Ensembles trained on rows that the exits know lean on the late ones; the paper has it so.
    final: whether the deepest exit becomes the ensemble of the model's last layer. Cut right before
    that layer too, with a `cascade`; only its ensemble is trained.
    """

    def __init__(
        self,
        *,
        epochs: int = 50,
        rate: float = 1e-3,
        ensembles: int | None = None,
        final: bool = False,
    ) -> None:
        self.epochs = epochs
        self.rate = rate
        self.ensembles = ensembles
        self.final = final

    def prepare(self, network: Network) -> None:
        """Hang the ensemble of the model's last layer, if asked for.

        Raises BadNetwork unless all exits but the last are in one cascade of at least two, and
        where the deepest of them does not read what the model's last layer reads.
        """
        trainable_exits(network)
        names = network.topology.exits[:-1]
        found = dict(_cascaded(network))
        chained = [exit_.tail.before for exit_ in found.values()] == [None, *names[:-1]]
        if len(found) < 2 or len(found) != len(names) or not chained:
            raise BadNetwork(
                f"exits {', '.join(found) or 'none'} of {', '.join(names)} are in a cascade, "
                f"expected all, and at "
                "least two; cut(model, example, at=..., exits='cascade') or 'cascade_conv'"
            )
        if self.final:
            network.hang_exit(names[-1], self._final(network, names[-1]).eval())

    def _final(self, network: Network, name: str) -> Cascade:
        """The exit of a node with a copy of the model's last layer, and its ensemble as it is."""
        exit_ = network.exit_of(name)
        head = last_layer(network)
        seen = seen_of(network)
        own = seen[network.topology.exits[-1]].own
        if isinstance(exit_, Cascade) and isinstance(head, nn.Linear) and own is not None:
            for pooling in ("flat", "mean"):
                features = pooled(seen[name].features, pooling, exit_.layout)
                if features.shape[1] == head.in_features and torch.allclose(
                    head(features), own, atol=NEAR, rtol=NEAR
                ):
                    return _copied(exit_, pooling, head)
        raise BadNetwork(
            "final=True needs a 'cascade' exit on the input of a linear last layer, and exit "
            f"{name!r} is none. Cut right before the last layer, or leave out final=True"
        )

    def phases(self, network: Network) -> list[Phase]:
        """The exits, then the ensembles, unless those are plain means and have nothing to learn."""
        exits = dict(_cascaded(network))
        each = (value for exit_ in exits.values() for value in (exit_.tail.a, exit_.tail.b))
        votes = tuple(value for value in each if value is not None)
        apart = {id(value) for value in votes}
        learning = [exit_ for exit_ in exits.values() if not exit_.tail.final]
        heads = tuple(v for exit_ in learning for v in exit_.parameters() if id(v) not in apart)
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

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy by exit: of its own logits, or of its ensemble."""
        y = batch.labels()
        found = dict[str, Tensor]()
        handed = dict[str, Tensor]()
        for name, exit_ in _cascaded(outputs.network):
            if batch.phase == ENSEMBLES:
                if exit_.tail.a is None:
                    continue
                found[name] = cross_entropy(outputs.logits[name], y)
                continue
            if exit_.tail.final:
                continue
            _, handed[name] = exit_.both(Seen(outputs.features[name], handed))
            found[name] = cross_entropy(handed[name][:, -1], y)
        return found


@torch.no_grad()
def _copied(exit_: Cascade, pooling: str, head: nn.Linear) -> Cascade:
    """An exit at the same place in the cascade, with the same ensemble and a copy of a model's last
    layer.
    """
    found = Cascade(
        pooling,
        head.in_features,
        head.out_features,
        before=exit_.tail.before,
        place=exit_.tail.place,
        layout=exit_.layout,
        ensemble=exit_.tail.kind,
        final=True,
    ).to(head.weight)
    found.tail.linear.load_state_dict(head.state_dict())
    if (
        exit_.tail.a is not None
        and exit_.tail.b is not None
        and found.tail.a is not None
        and found.tail.b is not None
    ):
        found.tail.a.copy_(exit_.tail.a)
        found.tail.b.copy_(exit_.tail.b)
    return found


def _cascaded(network: Network) -> Iterator[tuple[str, Cascade | CascadeConv]]:
    """The exits in a cascade, shallow to deep."""
    for name in network.topology.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, (Cascade, CascadeConv)):
            yield name, exit_
