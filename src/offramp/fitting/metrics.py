"""The figures of a step: losses as numbers, and what is refused before or after it."""

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
    """`loss`, and its summands as `loss/<exit>`: read at once, because every read waits for the
    device.
    """
    if isinstance(losses, Tensor):
        return {"loss": float(losses.detach())}
    numbers: list[float] = torch.stack([value.detach() for value in losses.values()]).tolist()
    return {
        "loss": sum(numbers),
        **{f"loss/{name}": value for name, value in zip(losses, numbers, strict=True)},
    }


def require_finite(
    figures: Mapping[str, float],
    outputs: TrainingOutputs,
    phase: Phase,
    step: int,
    home: Path | None,
) -> None:
    """Raise Diverged when a loss is no number."""
    if all(map(math.isfinite, figures.values())):
        return
    named = [
        n.removeprefix("loss/")
        for n, value in figures.items()
        if n != "loss" and not math.isfinite(value)
    ]
    named += [name for name, logits in outputs.logits.items() if not logits.isfinite().all()]
    where = f"at exit {named[0]!r}" if named else "over all exits"
    folder = home and home / "checkpoint"
    kept = "there is no checkpoint (give folder=)"
    if folder is not None and folder.is_dir():
        kept = f"the last good checkpoint is {folder}"
    raise Diverged(
        f"the loss {where} is not finite in phase {phase.name!r} at step {step}, expected a "
        f"number; {kept}: lower "
        "the learning rate, or look for rows that are not finite",
        step=step,
    )


def require_rows(loader: BatchLoader, network: nn.Module) -> None:
    """Raise BadData for batches too small for batch norm, or for a share in every process."""
    if loader.smallest < loader.processes.count:
        raise BadData(
            f"a batch would hold {loader.smallest} rows for {loader.processes.count} processes, "
            f"expected one for "
            "each; give a larger batch_size, or launch fewer"
        )
    if loader.smallest < 2 and any(
        isinstance(part, _BatchNorm) and part.training for part in network.modules()
    ):
        raise BadData(
            "a batch would hold a single row while batch norm is in training mode, where it has "
            "no variance; give a "
            "batch_size of 2 or more and as many rows"
        )
