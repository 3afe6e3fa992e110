"""Networks with forks, built by hand: there is no verb for them yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.exits.whole import Own
from offramp.networks.members import ModelSpec
from offramp.networks.network import Network
from offramp.networks.nodes import Gate, Seen
from offramp.plans.topology import LEAVE, Default, Node, Topology

WIDTH = 6
CLASSES = 3


class Columns(Gate):
    """Scores that are columns of the features: as many as a node's gate needs, whole numbers where
    the features are.
    """

    def __init__(self, *columns: int, reads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.columns = columns
        self.reads = reads

    def score(self, seen: Seen) -> Tensor:
        scores = seen.features[:, list(self.columns)]
        for logits in seen.logits.values():
            scores = scores + logits[:, :1]
        return scores[:, 0] if len(self.columns) == 1 else scores

    def config(self):
        return {"name": "tests:Columns", "columns": list(self.columns)}


class WholeNumbers(nn.Module):
    """Whole-number weights: sums are exact whatever the batch. NaN and infinities in a row pass
    through.
    """

    def __init__(self, out: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randint(-2, 3, (out, WIDTH), generator=draw).float())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).remainder(7.0) - 3.0


def forked(topology: Topology, gates: dict[str, Gate], classes: int = CLASSES) -> Network:
    """A network of small whole-number models, one a node: exits answer with their segment's output.

    A node with an exit gives `classes` numbers, any other one WIDTH.
    """
    models = {}
    for index, node in enumerate(topology.nodes):
        models[node.name] = WholeNumbers(WIDTH, seed=index)
    exits = {name: FirstClasses(classes) for name in topology.exits}
    return Network(
        backbone=nn.ModuleDict(models),
        members=tuple(ModelSpec(name) for name in topology.names),
        topology=topology,
        fronts={},
        exits=exits,
        gates=gates,
    ).eval()


class FirstClasses(Own):
    """An exit that answers with the first numbers of what its segment gave, and adds what it
    reads.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, seen: Seen) -> Tensor:
        logits = seen.features[:, : self.classes]
        for other in seen.logits.values():
            logits = logits + other
        return logits

    def config(self):
        return {"name": "tests:FirstClasses", "classes": self.classes}


THREE = Topology(
    (
        Node("stem", ("size",)),
        Node("size", ("small", "middle", "large"), ("stem",)),
        Node("small", ("head",), ("size",)),
        Node("middle", (LEAVE, "head"), ("size",)),
        Node("large", ("more",), ("size",)),
        Node("more", ("head",), ("large",)),
        Node("head", (LEAVE,), ("small", "middle", "more"), exit_reads=("middle",)),
    ),
    (Default("middle", 0.5, (CLASSES,)),),
)


def three() -> Network:
    """A gate of three ways, which re-join at the head; from the middle one rows may leave."""
    return forked(THREE, {"size": Columns(0, 1), "middle": Columns(2)})
