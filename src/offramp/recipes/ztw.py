"""Zero Time Waste: exits in a cascade on a frozen backbone, then the weights of their ensembles.

Wolczyk et al., 2021, arXiv 2106.05409; the formulas are in exits/_cascading.py, hyper-parameters
are those of the authors' code. Where we differ: frozen parts stay in eval mode (as in their later
code); features are pooled once if exits have no convolution; ensembles see the training rows
through the current exits, not through cached outputs; and all ensembles are trained in one phase,
sharing nothing. In the authors' first code the model's last layer gets an ensemble too, and that is
the network's output; in their later code it does not. Here the model's own output is the reference
of every promise, so it stays as it is. final=True makes the ensemble a separate exit before the
last layer, with a copy of that layer. A plan that lets all rows leave there has the outputs of
their first code, and its promise compares the ensemble with the plain model. The price is that the
layer runs twice for rows that go on. Their exit ends the network, so none of their rows go on.
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
NEAR = 1e-4  # the largest difference between a copy of the last layer and the model's output


class Ztw(Recipe):
    """First the sum of the exits' own cross-entropies, then that of the ensembles' with everything
    else frozen.

    Ensembles that are trained on the exits' own training rows prefer late exits; so do the paper's.

    Args:
        epochs: of the exits, by Adam.
        rate: of the exits. It falls tenfold after 15 of 50 epochs.
        ensembles: epochs of the ensembles, by Adam with rate 5e-4 and no regularizer. The default
            is 501 on pooled features (theirs on cached outputs), and 10 (theirs on ImageNet) if
            every epoch runs the model.
        final: whether the deepest exit becomes the ensemble of the model's last layer. Cut right
            before that layer too, with a `cascade`. Only its ensemble is trained.
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
        """Check the exits, and make the ensemble of the model's last layer if asked for.

        Args:
            network: with exits in a cascade.

        Raises:
            BadNetwork: the exits but the last are not one cascade of at least two; or, with
                final=True, the deepest of them does not have the input of the model's last layer.
        """
        trainable_exits(network)
        names = network.topology.exits[:-1]
        exits = dict(_cascaded(network))
        reads = [exit_.tail.before for exit_ in exits.values()]
        is_chained = reads == [None, *names[:-1]]
        if len(exits) < 2 or len(exits) != len(names) or not is_chained:
            raise BadNetwork(
                f"ztw needs all exits, and at least two, in one cascade, but of {', '.join(names)} "
                f"these are: {', '.join(exits) or 'none'}. Use cut(model, example, at=..., "
                "exits='cascade') or 'cascade_conv'"
            )
        if self.final:
            network.hang_exit(names[-1], self._final(network, names[-1]).eval())

    def _final(self, network: Network, name: str) -> Cascade:
        """The exit of a node with a copy of the model's last layer, and its ensemble as it is."""
        exit_ = network.exit_of(name)
        head = last_layer(network)
        seen = seen_of(network)
        logits = seen[network.topology.exits[-1]].own  # [b, C], the model's own
        if isinstance(exit_, Cascade) and isinstance(head, nn.Linear) and logits is not None:
            # The layer reads the features as they are or their mean: whatever gives its logits.
            for pooling in ("flat", "mean"):
                features = pooled(seen[name].features, pooling, exit_.layout)  # [b, F]
                if features.shape[1] != head.in_features:
                    continue
                if torch.allclose(head(features), logits, atol=NEAR, rtol=NEAR):
                    return _copied(exit_, pooling, head)
        raise BadNetwork(
            "final=True needs a 'cascade' exit on the input of a linear last layer, but exit "
            f"{name!r} is not one. Cut right before the last layer, or leave out final=True"
        )

    def phases(self, network: Network) -> list[Phase]:
        """The exits, then the ensembles.

        Ensembles that are plain means have no parameters, and then there is no second phase.
        """
        exits = dict(_cascaded(network))
        reads = reading(network, exits)

        # The weights of the ensembles, and the other parameters of the exits. An exit with a copy
        # of the model's last layer has nothing else to learn.
        ensembles = list[nn.Parameter]()
        heads = list[nn.Parameter]()
        for exit_ in exits.values():
            weights = [value for value in (exit_.tail.a, exit_.tail.b) if value is not None]
            ensembles.extend(weights)
            if exit_.tail.final:
                continue
            weight_ids = set(map(id, weights))
            heads.extend(value for value in exit_.parameters() if id(value) not in weight_ids)

        adam = partial(torch.optim.Adam, lr=self.rate)
        schedule = dropped(15 / 50)
        phases = [Phase("exits", tuple(heads), self.epochs, adam, schedule, reads)]
        if ensembles:
            epochs = 10
            if reads == "pooled":
                epochs = 501
            slow = partial(torch.optim.Adam, lr=5e-4)
            phases.append(
                Phase(ENSEMBLES, tuple(ensembles), self.ensembles or epochs, slow, reads=reads)
            )
        return phases

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy by exit: of its own logits, or of its ensemble."""
        y = batch.labels()
        losses = dict[str, Tensor]()
        if batch.phase == ENSEMBLES:
            for name, exit_ in _cascaded(outputs.network):
                if exit_.tail.a is not None:  # it has weights to learn
                    losses[name] = cross_entropy(outputs.logits[name], y)
            return losses
        # An exit hands on the logits of all exits so far, [b, exits, C]; its own are the last.
        handed = dict[str, Tensor]()
        for name, exit_ in _cascaded(outputs.network):
            if exit_.tail.final:
                continue
            _, handed[name] = exit_.both(Seen(outputs.features[name], handed))
            losses[name] = cross_entropy(handed[name][:, -1], y)
        return losses


@torch.no_grad()
def _copied(exit_: Cascade, pooling: str, head: nn.Linear) -> Cascade:
    """An exit with a copy of a model's last layer, and the ensemble and place of another exit."""
    copied = Cascade(
        pooling,
        head.in_features,
        head.out_features,
        before=exit_.tail.before,
        place=exit_.tail.place,
        layout=exit_.layout,
        ensemble=exit_.tail.kind,
        final=True,
    ).to(head.weight)
    copied.tail.linear.load_state_dict(head.state_dict())
    pairs = [(exit_.tail.a, copied.tail.a), (exit_.tail.b, copied.tail.b)]
    for source, target in pairs:
        if source is not None and target is not None:  # plain means have no weights
            target.copy_(source)
    return copied


def _cascaded(network: Network) -> Iterator[tuple[str, Cascade | CascadeConv]]:
    """The exits in a cascade, shallow to deep."""
    for name in network.topology.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, (Cascade, CascadeConv)):
            yield name, exit_
