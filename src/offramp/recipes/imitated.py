"""Exits learn the outputs of the last one from a stream without labels: the learning side of layer
caching.

Abedi, Iouannou, Jamshidi and Hemmati, 2022, arXiv 2209.08625; as SelfXit in TMLR, 2024. The service
stays as it is: its models are frozen, requests come without labels, and each exit (their cache
model) learns the last exit's probabilities.

Serving and training take turns, as with the authors' server, which trains again after every
thousand requests on all of them so far. Keep a tail of the stream that no step has used, and
calibrate on it: disagreement needs no labels either. The promise is for requests like those of that
tail. If the stream drifts, record and calibrate again.

    # again with a larger n when more rows have come
    off.fit(net, stream.select(slice(0, n)), recipe="imitated")
    trace = off.record(net, stream.select(slice(n, None)))
    plan = off.calibrate(trace, risk="disagreement", at_most=0.02)

Where we differ:
- Within one `fit` the rows are shuffled and seen in several epochs; only from one `fit` to the next
  do they come in the order of the stream. A stream that can be walked only once has to be gathered
  into an array first.
- All exits are trained in one run. They share nothing that learns, so each gets the gradients that
  it would get alone.
- Their released experiments train and measure on the same held-out rows; here `calibrate` refuses
  rows that trained.
- They search the shape of each cache model; here it is the exit of the network, for example `mlp`
  (their dense one).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from offramp._support.arguments import require
from offramp.networks.network import Network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs, reading
from offramp.recipes._schedules import dropped
from offramp.recipes._together import exit_parameters, students_of

__all__ = ["Imitated"]

EPOCHS = 9  # in the authors' code, where the rate falls after 2, 5 and 7 of them
FALLS = (2 / EPOCHS, 5 / EPOCHS, 7 / EPOCHS)


class Imitated(Recipe):
    """KL(last exit || exit) of the probabilities, the mean over rows and classes as in the authors'
    code; no labels.

    The optimizer is SGD with momentum 0.9. Pooled features are computed once if all exits pool. An
    exit cannot become better than the one it imitates. Check its disagreement and, if some rows
    have labels, its accuracy too.

    Args:
        epochs: over the rows of the stream.
        rate: at the start. It falls tenfold after 2, 5 and 7 of 9 epochs, and at the same shares of
            other numbers of epochs.
        decay: weight decay.
    """

    def __init__(self, *, epochs: int = EPOCHS, rate: float = 0.1, decay: float = 1e-4) -> None:
        self.epochs = epochs
        self.rate = rate
        self.decay = decay

    def prepare(self, network: Network) -> None:
        """Check the arguments and the network.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: the rate is not above 0, or the decay is below 0.
            BadNetwork: no exit before the last has parameters.
        """
        require("rate", self.rate, above=0)
        require("decay", self.decay, low=0)
        students_of(network)

    def phases(self, network: Network) -> list[Phase]:
        """One phase, which needs no labels."""
        names = students_of(network)
        exits = exit_parameters(network, names)
        sgd = partial(torch.optim.SGD, lr=self.rate, momentum=0.9, weight_decay=self.decay)
        reads = reading(network, (*names, network.topology.exits[-1]))
        schedule = dropped(*FALLS)
        return [Phase("stream", exits, self.epochs, sgd, schedule, reads=reads, labels=False)]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The divergence of each exit from the last one."""
        last = outputs.network.topology.exits[-1]
        teacher = outputs.logits[last].detach().log_softmax(-1)  # [b, C]
        losses = dict[str, Tensor]()
        for name in students_of(outputs.network):
            student = outputs.logits[name].log_softmax(-1)  # [b, C]
            # The mean over rows and classes, as the authors have it; not "batchmean".
            divergence = kl_div(student, teacher, reduction="none", log_target=True)
            losses[name] = divergence.mean()
        return losses
