"""Random networks with forks, of whole-number models: nested, re-joining, with exits and
defaults.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

import offramp as off
from forked import CLASSES, WIDTH, Columns, FirstClasses, WholeNumbers


class Sum(nn.Module):
    """Adds what it reads besides, and goes on like `WholeNumbers`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.whole = WholeNumbers(WIDTH, seed)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = x + other
        return self.whole(x)


class Answer(nn.Module):
    """The first numbers of what it reads, as logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.whole = WholeNumbers(WIDTH, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)[:, :CLASSES]


class Steps:
    """Random steps for `route`; about so many nodes."""

    def __init__(self, seed: int, nodes: int = 12) -> None:
        self.draw = random.Random(seed)
        self.left = nodes
        self.count = 0
        self.segments: list[str] = []

    def name(self, kind: str) -> str:
        self.count += 1
        self.left -= 1
        return f"{kind}{self.count}"

    def column(self) -> int:
        return self.draw.randrange(WIDTH)

    def segment(self):
        name = self.name("s")
        reads = {}
        if self.segments and self.draw.random() < 0.3:
            reads = {self.draw.choice(self.segments): float(self.draw.randrange(-2, 3))}
        reads = {other: self.known.setdefault(other, value) for other, value in reads.items()}
        self.segments.append(name)
        return (name, Sum(self.count).eval(), reads)

    known: dict[str, float]

    def leave(self):
        return off.Leave(self.name("e"), FirstClasses(CLASSES), Columns(self.column()))

    def fork(self, depth: int):
        ways = self.draw.choice([2, 2, 3])
        name = self.name("f")
        arms = {}
        for number in range(ways):
            if number == 0 and self.draw.random() < 0.4:
                arms[f"{name}-skip"] = []
            elif number and depth and self.draw.random() < 0.15:
                arms[f"{name}-stop{number}"] = [
                    off.Leave(self.name("e"), FirstClasses(CLASSES), None)
                ]
            else:
                arms[f"{name}-arm{number}"] = self.steps(depth + 1)
        columns = [self.column() for _ in range(ways - 1)]
        return off.Fork(name, arms, gate=Columns(*columns))

    def steps(self, depth: int = 0):
        found = [self.segment()]
        for _ in range(self.draw.randrange(1, 4)):
            kind = self.draw.random()
            if self.left > 0 and kind < 0.45 and depth < 3:
                found.append(self.fork(depth))
                found.append(self.segment())
            elif self.left > 0 and kind < 0.65:
                found.append(self.leave())
                found.append(self.segment())
            else:
                found.append(self.segment())
        return found


def drawn(seed: int, nodes: int = 12) -> off.Network:
    """A random network with forks, of at most sixteen paths."""
    while True:
        steps = Steps(seed, nodes)
        steps.known = {}
        every = [*steps.steps(), ("answer", Answer(seed).eval())]
        net = off.route(every, example=torch.zeros(2, WIDTH))
        try:
            paths = len(net.topology.exit_labels)
        except off.errors.BadNetwork:  # more than sixteen
            paths = 99
        if paths <= 24 and len(net.topology.gates) > 1:
            return net.eval()
        seed += 1000
