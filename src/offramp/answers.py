"""What a Runner gives, and how it is filled in: rows in the order of x, whatever order they leave in.

Shapes: B rows handed in, n rows at one exit, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.trace import WHY

GATE, END, DEEPEST, DEADLINE = range(len(WHY))


@dataclass(frozen=True)
class Answers:
    """What a Runner gives, in the order of x.

    logits [B, C]; exit [B] int64, an index into `exits`; why [B] int64, an index into trace.WHY (gate, end, deepest,
    deadline); flagged [B] bool: a score of this row was NaN, or an answer not finite.
    """

    logits: Tensor
    exit: Tensor
    why: Tensor
    flagged: Tensor
    exits: tuple[str, ...]

    def reasons(self) -> list[str]:
        """`why` in words, one per row."""
        return [WHY[code] for code in self.why.tolist()]

    def to(self, device: torch.device) -> Answers:
        """The same on another device."""
        return Answers(
            self.logits.to(device), self.exit.to(device), self.why.to(device), self.flagged.to(device), self.exits
        )


class Filling:
    """Answers being filled; when all rows are put at once, nothing is copied."""

    def __init__(self, count: int, device: torch.device, exits: tuple[str, ...], classes: int) -> None:
        self.count, self.device, self.exits, self.classes = count, device, exits, classes
        self.full: tuple[Tensor, int, int] | None = None
        self.logits: Tensor | None = None
        self.flags: Tensor | None = None

    def put(self, rows: Tensor | None, logits: Tensor, place: int, why: int) -> None:
        if why != GATE:  # what leaves at a gate had a score, so its logits were finite
            self.flag(rows, logits.sum(-1).isfinite().logical_not())
        if rows is None:
            self.full = logits, place, why
            return
        if self.logits is None:
            self.logits = logits.new_empty(self.count, logits.shape[1])
            self.exit = torch.empty(self.count, dtype=torch.int64, device=self.device)
            self.why = torch.empty(self.count, dtype=torch.int64, device=self.device)
        if self.logits.shape[1] != logits.shape[1]:
            raise BadNetwork(
                f"exit {self.exits[place]!r} answers with {logits.shape[1]} classes, an earlier one with "
                f"{self.logits.shape[1]}, expected one number; check the rungs"
            )
        self.logits.index_copy_(0, rows, logits)
        self.exit.index_fill_(0, rows, place)
        self.why.index_fill_(0, rows, why)

    def flag(self, rows: Tensor | None, bad: Tensor) -> None:
        if rows is None:
            self.flags = bad if self.flags is None else bad | self.flags
            return
        if self.flags is None:
            self.flags = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self.flags.index_copy_(0, rows, bad | self.flags.index_select(0, rows))

    def answers(self) -> Answers:
        flags = torch.zeros(self.count, dtype=torch.bool, device=self.device) if self.flags is None else self.flags
        if self.full is not None:
            logits, place, why = self.full
            exit_, reason = (torch.full((self.count,), value, device=self.device) for value in (place, why))
            return Answers(logits, exit_, reason, flags, self.exits)
        if self.logits is None:  # an empty batch: no segment was called
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            return Answers(torch.zeros(0, self.classes, device=self.device), none, none, flags, self.exits)
        return Answers(self.logits, self.exit, self.why, flags, self.exits)
