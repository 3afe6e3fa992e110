"""What can go wrong, as a tree.

    OfframpError
    ├── InvalidArgument      what was handed over cannot be used (also a ValueError)
    │   ├── BadData          rows, labels or shapes; names the rows
    │   ├── BadNetwork       models that cannot form one network
    │   ├── UnknownName      not a name that offramp knows; offers the nearest
    │   ├── OverlappingRows  rows that are not independent draws: on one or both sides of a promise
    │   └── OutOfBudget      not even the cheapest plan costs as little as that
    ├── BadFile              truncated, edited, of another kind, or unwritable
    │   └── NewerSchema      written by a newer offramp
    ├── Mismatch             a plan or trace of another network, engine or precision
    ├── StaleRunner          the network changed under a Runner
    ├── Diverged             a loss that is not finite while a network is trained
    ├── NoSafePlan           no plan keeps the promise on these rows
    ├── MemberUnavailable    a member of a ladder that runs elsewhere did not answer
    └── MissingExtra         an optional dependency is not installed (also an ImportError)

and what deserves a second look, but stops nothing:

    OfframpWarning           (also a UserWarning)
    ├── UntrainedExitWarning an exit that nothing has trained is recorded
    ├── UnevenParts          the only legal cuts divide the work badly
    ├── BetterExit           an exit answers better than the last one
    ├── DearFirst            a member of a cascade costs more than a later one
    ├── NoisyTimings         milliseconds were measured on a busy machine
    ├── GapNotReached        a solver stopped before the duality gap that was asked for
    └── Notice               what a reader of data or weights left out, or how it chose

Every message is one sentence in three parts: what was got, what was expected, what to do.
At the command line each of them prints that sentence and ends with exit code 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offramp.plans.plan import Plan


class OfframpError(Exception):
    """The root of everything that offramp raises on purpose."""


class OfframpWarning(UserWarning):
    """The root of all warnings; the command line prints each as a sentence."""


class UntrainedExitWarning(OfframpWarning):
    """An exit that `cut` made is recorded before anything has trained it."""


class UnevenParts(OfframpWarning):
    """The only legal cuts of a model divide its work badly."""


class BetterExit(OfframpWarning):
    """An exit is right more often than the last one, which then costs without a gain."""


class GapNotReached(OfframpWarning):
    """A solver stopped at its limit of steps, before the duality gap that was asked for."""


class DearFirst(OfframpWarning):
    """A member of a cascade costs more than a later one."""


class NoisyTimings(OfframpWarning):
    """The same call's milliseconds lay far apart while they were measured: prices in them may be
    far off.
    """


class Notice(OfframpWarning):
    """Something in data or weights that a user should know."""


class InvalidArgument(OfframpError, ValueError):
    """What was handed over cannot be used."""


class BadData(InvalidArgument):
    """Rows, labels or shapes that cannot be used."""


class BadNetwork(InvalidArgument):
    """Models, exits or gates that cannot stand together in one network."""


class UnknownName(InvalidArgument):
    """A name that nothing answers to."""


class OverlappingRows(InvalidArgument):
    """Rows that are no independent draws: the same one twice, or on both sides of a promise.

    `rows` holds the numbers of all of them, of which the sentence names the first few.
    """

    def __init__(self, message: str, *, rows: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(int(row) for row in rows)


class OutOfBudget(InvalidArgument):
    """A budget that no plan keeps on these rows."""


class BadFile(OfframpError):
    """A file that is missing, truncated, edited, of another kind, or cannot be written."""


class NewerSchema(BadFile):
    """A file written by a newer offramp than this one."""


class Mismatch(OfframpError):
    """A plan or a trace that belongs to another network, engine or precision."""


class StaleRunner(OfframpError):
    """The network was moved, cast, trained or re-assigned after the Runner was opened."""


class Diverged(OfframpError):
    """A loss became NaN or infinite; `step` is the optimizer step of the phase."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class NoSafePlan(OfframpError):
    """No plan keeps the promise on these rows.

    `smallest_level` is the smallest level in sight, found by looking at these very rows: certify it
    on fresh ones (None when not even that was in sight). `never` is the plan in which no sample
    leaves early.
    """

    def __init__(self, message: str, *, smallest_level: float | None, never: Plan) -> None:
        super().__init__(message)
        self.smallest_level = smallest_level
        self.never = never


class MemberUnavailable(OfframpError):
    """A member of a ladder that runs elsewhere did not answer, not in time, or not with logits."""


class MissingExtra(OfframpError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, what_for: str) -> None:
        super().__init__(
            f"{what_for} needs {package}, which is not installed; run: pip install "
            f"'offramp[{extra}]'"
        )
        self.extra = extra
