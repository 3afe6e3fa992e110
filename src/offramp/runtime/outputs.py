"""The Outputs of a Runner, and how they are filled: in the order of x, although rows leave in
another order.

Shapes: B rows in x, n rows at one exit, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.plans.replay import WHY

GATE, END, DEEPEST, DEADLINE, UNAVAILABLE = range(len(WHY))

Array = np.ndarray[Any, np.dtype[Any]]
RowNumbers = np.ndarray[Any, np.dtype[np.int64]] | None  # numbers of rows in x; None: all rows
Passed = Sequence[tuple[RowNumbers, int]]  # rows, and the exit that answered them
# rows, and for each whether its score was NaN
Bad = Sequence[tuple[RowNumbers, np.ndarray[Any, np.dtype[np.bool_]]]]


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, exit, why, flagged


class Outputs:
    """The answers for a batch x, in the order of its rows. They cannot be changed.

    Attributes:
        logits: [B, C].
        exit: [B] int64, the exit that answered: an index into `exits`.
        why: [B] int64, the reason: an index into trace.WHY (gate, end, deepest, deadline,
            unavailable).
        flagged: [B] bool, whether a score of the row was NaN, or its answer is not finite.
        exits: names of the exits.
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
        left = list[str]()
        for name, count in zip(self.exits, counts, strict=True):
            left.append(f"{count} at {name}")
        return f"Answers({len(self)} rows: {', '.join(left)})"

    def reasons(self) -> list[str]:
        """`why` in words, one per row."""
        return [WHY[code] for code in self.why.tolist()]

    def to(self, device: torch.device) -> Outputs:
        """The same Outputs on another device."""
        logits, exit, why, flagged = self._tensors
        return Outputs(
            logits.to(device), exit.to(device), why.to(device), flagged.to(device), self._exits
        )


class FromArrays(Outputs):
    """Outputs that an engine gave as arrays. Tensors are made when somebody asks for one of them.

    At batch 1, making four tensors takes as long as a small network. So the logits, which everybody
    asks for, do not wait for the others.

    Args:
        logits: [B, C].
        exits: the names of the exits.
    """

    def __init__(self, logits: Array, exits: tuple[str, ...]) -> None:
        self._exits = exits
        self._array = logits

    @cached_property
    def _logits(self) -> Tensor:
        return torch.from_numpy(self._array)

    @property
    def logits(self) -> Tensor:
        """Logits [B, C]."""
        return self._logits


class Unpacked(FromArrays):
    """The Outputs of the lean loop.

    Args:
        logits: [B, C], of all rows.
        passed: pairs of rows and the exit that answered them. A row counts to the last pair that
            has it. Rows None means all rows.
        why: the reason for the rows of the last pair. All others left at a gate.
        bad: pairs of rows, and for each row whether its score was NaN.
        exits: the names of the exits.
    """

    def __init__(
        self, logits: Array, passed: Passed, why: int, bad: Bad, exits: tuple[str, ...]
    ) -> None:
        super().__init__(logits, exits)
        self._left = (passed, why, bad)

    @cached_property
    def _tensors(self) -> Tensors:  # type: ignore[override]
        logits = self._array
        passed, why, bad = self._left
        count = len(logits)
        exit_indices = np.empty(count, np.int64)
        reasons = np.full(count, GATE, np.int64)
        flags = np.zeros(count, bool)
        for rows, index in passed:  # later exits overwrite earlier ones
            exit_indices[_where(rows)] = index
        for rows, nan in bad:
            flags[_where(rows)] |= nan
        if why != GATE:  # a row that left at a gate had a score, so its logits were finite
            last = _where(passed[-1][0])
            reasons[last] = why
            flags[last] |= ~np.isfinite(logits[last].astype(np.float32, copy=False)).all(-1)
        return (
            self._logits,
            torch.from_numpy(exit_indices),
            torch.from_numpy(reasons),
            torch.from_numpy(flags),
        )


def _where(rows: RowNumbers) -> Any:
    """An index for rows; None means all rows."""
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
    """Outputs that are being filled.

    Exits, reasons and flags stay on the host, because they are decided there. Logits stay on the
    device. If all rows are put at once, nothing is copied.
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
        self.flags = np.zeros(count, bool)  # whether a score was NaN
        self.ended = list[RowNumbers]()  # rows whose logits no gate has looked at
        self.late: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # [B], where time was short

    def put(self, rows: RowNumbers, logits: Tensor, index: int, why: int) -> None:
        """Write the answers of some rows.

        Args:
            rows: their numbers [n]; None for all rows.
            logits: [n, C].
            index: the exit that answered.
            why: the reason, as an index into trace.WHY.
        """
        where = _where(rows)
        self.codes[0, where] = index
        self.codes[1, where] = why
        # A row that leaves at a gate had a score, so its logits were finite.
        if why != GATE:
            self.ended.append(rows)
        if rows is None:
            self.logits = logits
            return
        if self.logits is None:
            self.logits = logits.new_empty(self.count, logits.shape[1])
        if self.logits.shape[1] != logits.shape[1]:
            raise BadNetwork(
                f"all exits must have the same number of classes, got {logits.shape[1]} at exit "
                f"{self.exits[index]!r} and {self.logits.shape[1]} at an earlier one. Check the "
                "members"
            )
        if self.logits.dtype != logits.dtype:  # members of different precision
            wide = torch.promote_types(self.logits.dtype, logits.dtype)
            self.logits = self.logits.to(wide)
            logits = logits.to(wide)
        positions = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.logits.index_copy_(0, positions, logits)

    def flag(self, rows: RowNumbers, bad: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Mark rows whose score was NaN: `bad` [n] says which of `rows` [n]."""
        self.flags[_where(rows)] |= bad

    def mark_late(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Mark rows that took another way than the plan's, because time was short."""
        if self.late is None:
            self.late = np.zeros(self.count, bool)
        self.late[rows] = True

    def answers(self) -> Outputs:
        """The Outputs of all rows. They are empty for an empty batch."""
        if self.late is not None:
            self.codes[1, self.late] = DEADLINE
        if self.logits is None:
            logits = torch.zeros(0, self.classes, device=self.device)
        else:
            logits = self.logits
        return FromBuffer(logits, self)


class FromBuffer(Outputs):
    """The Outputs of a buffer that is full. Everything but the logits is made when somebody asks.

    Args:
        logits: [B, C], of all rows.
        buffer: where nothing is written any more.
    """

    def __init__(self, logits: Tensor, buffer: OutputBuffer) -> None:
        self._exits = buffer.exits
        self._logits = logits
        self._buffer = buffer

    @property
    def logits(self) -> Tensor:
        """Logits [B, C]."""
        return self._logits

    @cached_property
    def _tensors(self) -> Tensors:  # type: ignore[override]
        logits = self._logits
        buffer = self._buffer
        flags = buffer.flags.copy()
        for rows in buffer.ended:
            if rows is None:
                some = logits
            else:
                some = logits.index_select(0, torch.from_numpy(rows).to(logits.device))
            flags[_where(rows)] |= _not_finite(some)
        codes = torch.from_numpy(buffer.codes)
        flagged = torch.from_numpy(flags)
        if logits.device.type != "cpu":
            codes = codes.to(logits.device)
            flagged = flagged.to(logits.device)
        return logits, codes[0], codes[1], flagged


def _not_finite(logits: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows of logits [n, C] have a value that is not finite in float32: bool [n]."""
    if logits.device.type == "cpu":
        # NumPy, because torch would wake its threads.
        return np.asarray(~np.isfinite(logits.float().numpy()).all(-1))
    return np.asarray((~logits.float().isfinite().all(-1)).cpu().numpy())
