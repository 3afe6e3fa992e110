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

    Args:
        network: decides the device.
        precision: "no", "bf16" or "fp16".
        phases: that are to be trained in this precision.
        tracker: a tracker of Accelerate; None without one.
        folder: where the tracker writes.
        processes: that train together.

    Yields:
        The Accelerator.

    Raises:
        MissingExtra: Accelerate, or the tracker, is not installed.
        InvalidArgument: Accelerate, the device or a phase cannot do this.
    """
    _require_precision(precision, phases, network)
    _require_tracker(tracker, folder)
    device = network.device()
    with _own_state(processes) as users:
        accelerator = _accelerator(
            users,
            mixed_precision=precision,
            cpu=device.type == "cpu",
            log_with=tracker,
            project_dir=folder,
        )
        if accelerator.num_processes != processes.count:
            raise InvalidArgument(
                f"Accelerate must run in {processes.count} process(es), got "
                f"{accelerator.num_processes}. Start a fresh process; use torchrun or accelerate "
                f"launch for several"
            )
        # With several processes each has a GPU of its own, so the number of the GPU counts too.
        other_gpu = processes.count > 1 and device.type == "cuda" and accelerator.device != device
        if accelerator.device.type != device.type or other_gpu:
            raise InvalidArgument(
                f"the network must be on Accelerate's device {accelerator.device}, got {device}. "
                f"Move the network there, or start a fresh process"
            )
        yield accelerator


@contextlib.contextmanager
def _own_state(processes: Processes) -> Iterator[bool]:
    """Yield whether the user has an Accelerator. Accelerate keeps one state per process; ours is
    reset at the end.
    """
    try:
        import accelerate  # noqa: F401
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as problem:
        raise MissingExtra("accelerate", "fit", "fit") from problem
    users = bool(AcceleratorState._shared_state)
    had_partial_state = bool(PartialState._shared_state)
    try:
        yield users
    finally:
        if not users:
            # The partial state holds the process group, so it stays if there is one.
            reset_partial = not had_partial_state and processes.count == 1
            AcceleratorState._reset_state(reset_partial_state=reset_partial)


def _accelerator(users: bool, **options: Any) -> Any:
    """An Accelerator. users: whether the user already has one. Raises InvalidArgument."""
    from accelerate import Accelerator

    try:
        return Accelerator(**options)
    except ValueError as problem:
        remedy = "Use another precision or tracker"
        if users:
            remedy = (
                "Your own Accelerator sets one precision and one device for this process. Use the "
                "same ones in fit, or call fit in a fresh process"
            )
        raise InvalidArgument(
            f"Accelerate refuses precision {options['mixed_precision']!r} with tracker "
            f"{options['log_with']!r} ({problem}). {remedy}"
        ) from problem


@contextlib.contextmanager
def tracking(accelerator: Any, tracker: str | None) -> Iterator[Log]:
    """Yield a function that logs an epoch under its number in the run.

    Args:
        accelerator: from `accelerating`.
        tracker: name of the tracker; None logs nothing.

    Yields:
        The function. Everything is written out when the context closes.
    """
    if tracker is None:
        yield lambda epoch, number: None
        return

    def log(epoch: Epoch, number: int) -> None:
        values = {f"{epoch.phase}/{name}": value for name, value in epoch.figures.items()}
        accelerator.log(values, step=number)

    accelerator.init_trackers("offramp")
    try:
        yield log
    finally:
        # Accelerate's end_training would also end the process group.
        for open_tracker in accelerator.trackers:
            open_tracker.finish()


def _require_tracker(tracker: str | None, folder: Path | None) -> None:
    """Raise for a tracker without a folder, or that is not installed."""
    if tracker is not None and folder is None:
        raise InvalidArgument(f"folder must be set for track={tracker!r}, got None")
    if tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as problem:
            raise MissingExtra("tensorboard", "tensorboard", "track='tensorboard'") from problem


def _require_precision(precision: str, phases: tuple[Phase, ...], network: Network) -> None:
    """Raise InvalidArgument for a precision that these phases or this device cannot use."""
    if precision not in PRECISIONS:
        raise InvalidArgument(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    if precision == "no":
        return
    for phase in phases:
        # such a recipe has its own backward pass, which does not go through Accelerate
        if phase.by == "update":
            raise InvalidArgument(
                f"precision must be 'no', because the recipe makes its own steps in phase "
                f"{phase.name!r}, got {precision!r}"
            )
    device = network.device()
    if precision == "fp16" and device.type != "cuda":
        raise InvalidArgument(
            f"the network must be on a CUDA device for precision 'fp16', got {device}. Use 'bf16' "
            f"or 'no'"
        )
