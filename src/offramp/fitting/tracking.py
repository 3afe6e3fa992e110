"""Figures to a tracker of Accelerate, such as TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from offramp.errors import BadInput, MissingExtra
from offramp.fitting.history import Epoch

Log = Callable[[Epoch, int], None]


@contextlib.contextmanager
def tracking(tracker: str | None, folder: Path | None) -> Iterator[Log]:
    """Yield what logs an epoch under its number in the run; in the end everything is written out.

    Raises MissingExtra, BadInput for an unknown tracker or without a folder.
    """
    if tracker is None:
        yield lambda epoch, number: None
        return
    if folder is None:
        raise BadInput(f"got track={tracker!r} without a folder, expected one for what it writes; give folder=")
    made = _made(tracker, folder)
    made.init_trackers("offramp")
    try:
        yield lambda epoch, number: made.log(
            {f"{epoch.phase}/{name}": value for name, value in epoch.figures.items()}, step=number
        )
    finally:
        made.end_training()


def _made(tracker: str, folder: Path) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as problem:
        raise MissingExtra("accelerate", "fit", f"track={tracker!r}") from problem
    if tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as problem:
            raise MissingExtra("tensorboard", "tensorboard", "track='tensorboard'") from problem
    try:
        return Accelerator(log_with=tracker, project_dir=folder)
    except ValueError as problem:
        raise BadInput(f"Accelerate refuses the tracker {tracker!r} ({problem}); name another") from problem
