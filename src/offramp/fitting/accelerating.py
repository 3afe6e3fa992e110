"""Device, precision and trackers, from Hugging Face Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from offramp._support.processes import ALONE, Processes
from offramp.errors import InvalidArgument, MissingExtra
from offramp.fitting.history import Epoch
from offramp.networks.network import Network
from offramp.networks.recipe import Phase

PRECISIONS = ("no", "bf16", "fp16")
Log = Callable[[Epoch, int], None]


@contextlib.contextmanager
def accelerating(
    network: Network,
    precision: str,
    phases: tuple[Phase, ...],
    tracker: str | None,
    folder: Path | None,
    processes: Processes = ALONE,
) -> Iterator[Any]:
    """Yield an Accelerator on the network's device, in as many processes as were launched.

    Raises MissingExtra, InvalidArgument for what it or a phase cannot do.
    """
    _require_precision(precision, phases, network)
    _require_tracker(tracker, folder)
    device = network.device()
    with _own_state(processes) as users:
        made = _made(
            users,
            mixed_precision=precision,
            cpu=device.type == "cpu",
            log_with=tracker,
            project_dir=folder,
        )
        apart = processes.count > 1 and device.type == "cuda" and made.device != device
        if made.device.type != device.type or made.num_processes != processes.count or apart:
            raise InvalidArgument(
                f"Accelerate works on {made.device} in {made.num_processes} process(es) and the "
                f"network lies on "
                f"{device} in one of {processes.count}, expected the same; move the network "
                f"there, or begin in a fresh "
                "process, by torchrun or accelerate launch where it is one of several"
            )
        yield made


@contextlib.contextmanager
def _own_state(processes: Processes) -> Iterator[bool]:
    """Yield whether the user has an Accelerator. Accelerate keeps one state per process: ours goes
    when we are done.
    """
    try:
        import accelerate  # noqa: F401
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as problem:
        raise MissingExtra("accelerate", "fit", "fit") from problem
    users = bool(AcceleratorState._shared_state)
    placed = bool(PartialState._shared_state)
    try:
        yield users
    finally:
        if not users:
            AcceleratorState._reset_state(reset_partial_state=not placed and processes.count == 1)


def _made(users: bool, **options: Any) -> Any:
    from accelerate import Accelerator

    try:
        return Accelerator(**options)
    except ValueError as problem:
        if users:
            remedy = (
                "an Accelerator of yours sets one precision and one device for the whole process: "
                "give fit the same, or "
                "call it in a fresh process"
            )
        else:
            remedy = "give another precision or tracker"
        raise InvalidArgument(
            f"Accelerate refuses precision {options['mixed_precision']!r} with tracker "
            f"{options['log_with']!r} "
            f"({problem}); {remedy}"
        ) from problem


@contextlib.contextmanager
def tracking(accelerator: Any, tracker: str | None) -> Iterator[Log]:
    """Yield what logs an epoch under its number in the run; in the end everything is written
    out.
    """
    if tracker is None:
        yield lambda epoch, number: None
        return
    accelerator.init_trackers("offramp")
    try:
        yield lambda epoch, number: accelerator.log(
            {f"{epoch.phase}/{name}": value for name, value in epoch.figures.items()}, step=number
        )
    finally:
        for each in accelerator.trackers:  # its own end_training would also part the processes
            each.finish()


def _require_tracker(tracker: str | None, folder: Path | None) -> None:
    if tracker is not None and folder is None:
        raise InvalidArgument(
            f"got track={tracker!r} without a folder, expected one for what it writes; give folder="
        )
    if tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as problem:
            raise MissingExtra("tensorboard", "tensorboard", "track='tensorboard'") from problem


def _require_precision(precision: str, phases: tuple[Phase, ...], network: Network) -> None:
    """Raise InvalidArgument for a precision in which these phases cannot be trained on this
    device.
    """
    if precision not in PRECISIONS:
        raise InvalidArgument(
            f"got precision={precision!r}, expected one of {', '.join(PRECISIONS)}"
        )
    if precision == "no":
        return
    if own := [phase.name for phase in phases if phase.by == "update"]:
        raise InvalidArgument(
            f"the recipe steps by itself in phase {own[0]!r}, where nothing brings {precision} "
            f"about; take 'no'"
        )
    if precision == "fp16" and network.device().type != "cuda":
        raise InvalidArgument(
            f"precision 'fp16' needs a CUDA device and the network lies on {network.device()}; "
            f"take 'bf16' or 'no'"
        )
