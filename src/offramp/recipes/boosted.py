"""Exits as weak learners of an additive model: each fits what the exits before it still get wrong (BoostNet).

Yu, Wang, Hua and Shi, Boosted Dynamic Neural Networks, AAAI 2023, arXiv 2211.16726. `prepare` hangs an `Added` on every
exit but the first: F_n = f_n + weight F_{n-1} without gradient through F_{n-1}. All exits learn at once, by the plain
sum of the cross-entropies of F_n; gradients into shared pieces are averaged (`rescale`). Optimiser and schedule are
those of the CIFAR scripts. Where we differ: their optional loss equalisation, off by default, is left out; thresholds
and checkpoints are not chosen here, where they use test rows and augmented rows for it; their RANet has no rescaling,
here it is one switch for every model.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy

from offramp.errors import BadInput
from offramp.exits.added import Added
from offramp.networks.network import Network
from offramp.networks.recipe import Lesson, Losses, Phase, Recipe, View, taught_exits
from offramp.recipes._equilibrium import equilibrium, require_one_model
from offramp.recipes._schedules import dropped
from offramp.recipes._together import parameters_of, require_one_width

__all__ = ["Boosted"]


class Boosted(Recipe):
    """Exits that add to one another, and the model, together.

    weight: of the running sum, the prediction reweighting of the paper; below 1 it leaves deep exits something to do.
    rescale: average the gradients of all exits behind a tap. epochs, rate, momentum, decay: of SGD, whose rate falls to
    a tenth at one half and at three quarters.
    """

    def __init__(
        self,
        weight: float = 0.5,
        *,
        epochs: int = 300,
        rate: float = 0.1,
        momentum: float = 0.9,
        decay: float = 1e-4,
        rescale: bool = True,
    ) -> None:
        self.weight, self.epochs, self.rescale = weight, epochs, rescale
        self.rate, self.momentum, self.decay = rate, momentum, decay

    def prepare(self, network: Network) -> None:
        """Hang an `Added` on every exit but the first.

        Raises BadInput for a weight that is no number above 0, BadNetwork where there is nothing to teach, for a
        ladder, and for exits with different numbers of classes.
        """
        if not 0 < self.weight < math.inf:
            raise BadInput(f"weight is {self.weight}, expected a finite number above 0")
        taught_exits(network)
        require_one_model(network, "boosted")
        require_one_width(network)
        add_up(network, self.weight)

    def phases(self, network: Network) -> list[Phase]:
        """Everything at once."""
        sgd = partial(torch.optim.SGD, lr=self.rate, momentum=self.momentum, weight_decay=self.decay)
        during = partial(equilibrium, network) if self.rescale else nullcontext
        return [Phase("boosted", parameters_of(network), self.epochs, sgd, dropped(1 / 2, 3 / 4), during=during)]

    def loss(self, view: View, lesson: Lesson) -> Losses:
        """Cross-entropy of every running sum."""
        return {name: cross_entropy(logits, lesson.labels()) for name, logits in view.logits.items()}


def add_up(network: Network, weight: float) -> None:
    """Let every exit but the first add to the one before it, in place; one that does already gets this weight."""
    for before, name in pairwise(network.chain.exits):
        inner = network.exit_of(name)
        added = Added(inner.exit if isinstance(inner, Added) else inner, before, weight)
        network.hang_exit(name, added.eval())
