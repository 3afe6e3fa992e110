"""The losses of a step as numbers, and the checks before and after a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offramp.errors import BadData, Diverged
from offramp.fitting.loader import BatchLoader
from offramp.networks.recipe import Losses, Phase, TrainingOutputs


def numbers_of(losses: Losses) -> dict[str, float]:
    """The losses of a step as numbers.

    Args:
        losses: a scalar tensor, or scalar tensors by exit.

    Returns:
        The sum as `loss`, and its summands as `loss/<exit>`.
    """
    if isinstance(losses, Tensor):
        return {"loss": float(losses.detach())}
    # One read for all of them, because every read waits for the device.
    numbers: list[float] = torch.stack([value.detach() for value in losses.values()]).tolist()
    figures = {"loss": sum(numbers)}
    for name, number in zip(losses, numbers, strict=True):
        figures[f"loss/{name}"] = number
    return figures


def require_finite(
    figures: Mapping[str, float],
    outputs: TrainingOutputs,
    phase: Phase,
    step: int,
    home: Path | None,
) -> None:
    """Raise Diverged if a loss is NaN or infinite.

    Args:
        figures: losses by name, from `numbers_of`.
        outputs: of the step, to find the exit whose logits are not finite.
        phase: for the message.
        step: for the message.
        home: folder of the run, for the message; None without one.
    """
    if all(map(math.isfinite, figures.values())):
        return
    # The first exit with such a loss, or with such logits if only the sum is not finite.
    exits = list[str]()
    for name, value in figures.items():
        if name != "loss" and not math.isfinite(value):
            exits.append(name.removeprefix("loss/"))
    for name, logits in outputs.logits.items():
        if not logits.isfinite().all():
            exits.append(name)
    where = f"at exit {exits[0]!r}" if exits else "over all exits"
    kept = "There is no checkpoint (use folder=)"
    if home is not None and (home / "checkpoint").is_dir():
        kept = f"The last good checkpoint is {home / 'checkpoint'}"
    raise Diverged(
        f"the loss {where} must be finite, got NaN or infinity in phase {phase.name!r} at step "
        f"{step}. {kept}. Lower the learning rate, or look for rows that are not finite",
        step=step,
    )


def require_rows(loader: BatchLoader, network: nn.Module) -> None:
    """Raise BadData for batches with fewer rows than processes, or too small for batch norm."""
    if loader.smallest < loader.processes.count:
        raise BadData(
            f"every batch must have a row for each of the {loader.processes.count} processes, got "
            f"a batch of {loader.smallest}. Use a larger batch_size, or start fewer processes"
        )
    if loader.smallest < 2 and _has_training_norm(network):
        raise BadData(
            "every batch must have at least 2 rows while batch norm is in training mode, got a "
            "batch of 1. Use a batch_size of 2 or more and as many rows"
        )


def _has_training_norm(network: nn.Module) -> bool:
    """Whether any batch norm of a network is in training mode."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.training:
            return True
    return False
