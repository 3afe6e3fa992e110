"""What a Runner gives, and how it is filled in: rows in the order of x, whatever order they leave
in.

Shapes: B rows handed in, n rows at one exit, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.plans.trace import WHY

GATE, END, DEEPEST, DEADLINE, UNAVAILABLE = range(len(WHY))

Array = np.ndarray[Any, np.dtype[Any]]
RowNumbers = np.ndarray[Any, np.dtype[np.int64]] | None  # numbers of rows in x; None: all of them
Passed = Sequence[tuple[RowNumbers, int]]  # rows, and the exit that answered them
# rows, and whether their score was NaN
Bad = Sequence[tuple[RowNumbers, np.ndarray[Any, np.dtype[np.bool_]]]]


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, exit, why, flagged


class Outputs:
    """What a runner gives, in the order of x. It cannot be changed.

    Attributes:
        logits: [B, C].
        exit: [B] int64, an index into `exits`.
        why: [B] int64, an index into trace.WHY: gate, end, deepest, deadline, unavailable.
        flagged: [B] bool: a score of this row was NaN, or its answer is not finite.
        exits: The names of the exits.
    """

    def __init__(
        self,
        logits: Tensor,
        exit: Tensor,
        why: Tensor,
        flagged: Tensor,
        exits: tuple[str, ...],
    ) -> None:
        self._exits = exits
        self._tensors: Tensors = (logits, exit, why, flagged)

    @property
    def logits(self) -> Tensor:
        """Logits [B, C]."""
        return self._tensors[0]

    @property
    def exit(self) -> Tensor:
        """Which exit answered, [B] int64: an index into `exits`."""
        return self._tensors[1]

    @property
    def why(self) -> Tensor:
        """Why it did, [B] int64: an index into trace.WHY."""
        return self._tensors[2]

    @property
    def flagged(self) -> Tensor:
        """Rows with a NaN score or an answer that is not finite, [B] bool."""
        return self._tensors[3]

    @property
    def exits(self) -> tuple[str, ...]:
        """The names of the exits."""
        return self._exits

    def __len__(self) -> int:
        return len(self.exit)

    def __repr__(self) -> str:
        counts = np.bincount(self.exit.cpu().numpy(), minlength=len(self.exits)).tolist()
        left = ", ".join(
            f"{count} at {name}" for name, count in zip(self.exits, counts, strict=True)
        )
        return f"Answers({len(self)} rows: {left})"

    def reasons(self) -> list[str]:
        """`why` in words, one per row."""
        return [WHY[code] for code in self.why.tolist()]

    def to(self, device: torch.device) -> Outputs:
        """The same on another device."""
        logits, exit, why, flagged = (tensor.to(device) for tensor in self._tensors)
        return Outputs(logits, exit, why, flagged, self._exits)


class Unpacked(Outputs):
    """Answers as the lean walk leaves them: tensors are made when somebody asks for one of them.

    At batch 1 four tensors take as long as a small network.
    """

    def __init__(
        self, logits: Array, passed: Passed, why: int, bad: Bad, exits: tuple[str, ...]
    ) -> None:
        """Keep what was decided.

        Args:
            logits: [B, C], of all rows.
            passed: pairs of rows and the exit that answered them, unless a later pair holds them
                too. Rows None stands for all of them.
            why: of the rows of the last pair; all others left at a gate.
            bad: pairs of rows and whether their score was NaN.
            exits: the names of the exits.
        """
        self._exits = exits
        self._left = (logits, passed, why, bad)

    @cached_property
    def _tensors(self) -> Tensors:  # type: ignore[override]
        logits, passed, why, bad = self._left
        count = len(logits)
        places = np.empty(count, np.int64)
        reasons = np.full(count, GATE, np.int64)
        flags = np.zeros(count, bool)
        for rows, index in passed:
            places[_where(rows)] = index
        for rows, nan in bad:
            flags[_where(rows)] |= nan
        if why != GATE:  # what leaves at a gate had a score, so its logits were finite
            last = _where(passed[-1][0])
            reasons[last] = why
            flags[last] |= ~np.isfinite(logits[last].astype(np.float32, copy=False)).all(-1)
        arrays = (logits, places, reasons, flags)
        made = tuple(torch.from_numpy(array) for array in arrays)
        return made[0], made[1], made[2], made[3]


def _where(rows: RowNumbers) -> Any:
    return slice(None) if rows is None else rows


class Answers(Protocol):
    """What takes the answers of rows while stages run: an OutputBuffer, or a server's requests."""

    def put(self, rows: RowNumbers, logits: Tensor, index: int, why: int) -> None:
        """Take the answers [n, C] of rows; None stands for all of them.

        Args:
            rows: their numbers [n], in rising order.
            logits: [n, C].
            index: the exit that gave them, an index into `exits`.
            why: an index into trace.WHY.
        """

    def flag(self, rows: RowNumbers, bad: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Take note of whether the scores of rows [n] were NaN."""


class OutputBuffer:
    """Answers being filled. What is decided per row is kept on the host; only logits live on the
    device.

    When all rows are put at once, nothing is copied.
    """

    def __init__(
        self, count: int, device: torch.device, exits: tuple[str, ...], classes: int
    ) -> None:
        self.count = count
        self.device = device
        self.exits = exits
        self.classes = classes
        self.logits: Tensor | None = None
        self.codes = np.zeros((2, count), np.int64)  # exit and why
        self.flags = np.zeros(count, bool)

    def put(self, rows: RowNumbers, logits: Tensor, index: int, why: int) -> None:
        """Write the answers [n, C] of rows; None stands for all of them."""
        where = slice(None) if rows is None else rows
        self.codes[0, where] = index
        self.codes[1, where] = why
        # what leaves at a gate had a score: its logits were finite
        if why != GATE and not math.isfinite(_sum(logits)):
            self.flags[where] |= ~np.isfinite(logits.float().cpu().numpy()).all(-1)
        if rows is None:
            self.logits = logits
            return
        if self.logits is None:
            self.logits = logits.new_empty(self.count, logits.shape[1])
        if self.logits.shape[1] != logits.shape[1]:
            raise BadNetwork(
                f"exit {self.exits[index]!r} answers with {logits.shape[1]} classes, an earlier "
                f"one with "
                f"{self.logits.shape[1]}, expected one number; check the members"
            )
        if self.logits.dtype != logits.dtype:  # members of different precision
            wide = torch.promote_types(self.logits.dtype, logits.dtype)
            self.logits = self.logits.to(wide)
            logits = logits.to(wide)
        self.logits.index_copy_(
            0, torch.from_numpy(rows).to(self.device, non_blocking=True), logits
        )

    def flag(self, rows: RowNumbers, bad: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Mark rows [n] whose score was NaN."""
        self.flags[slice(None) if rows is None else rows] |= bad

    def answers(self) -> Outputs:
        """All of them; of an empty batch, none."""
        if self.logits is None:
            logits = torch.zeros(0, self.classes, device=self.device)
        else:
            logits = self.logits
        codes = torch.from_numpy(self.codes)
        flagged = torch.from_numpy(self.flags)
        if self.device.type != "cpu":
            codes = codes.to(self.device)
            flagged = flagged.to(self.device)
        return Outputs(logits, codes[0], codes[1], flagged, self.exits)


def _sum(logits: Tensor) -> float:
    """Of all logits [n, C]: not finite when one of them is not. One number, because a batch of one
    waits for it.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        with np.errstate(all="ignore"):  # NaN and infinities are what is looked for
            return float(np.add.reduce(logits.numpy(), axis=None))  # half of what torch takes
    return float(logits.sum())
