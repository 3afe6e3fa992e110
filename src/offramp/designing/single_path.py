"""Training a supernet by single paths, and the batch norms of one of its networks.

Every step draws a few networks, uniformly, and averages their gradients (RSBNet's ensemble of
single paths; one network a step is Single Path One-Shot's way). Guo et al., 2020, arXiv 1904.00420,
as in the authors' code: SGD with momentum 0.9, weight decay 4e-5, label smoothing 0.1. The rate
falls linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from offramp._support.progress import track
from offramp.data.rows import Rows, rows
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import BadData, InvalidArgument
from offramp.fitting.loader import index_of
from offramp.networks.trained import remember, snapshot

TRIES = 100  # draws until one is within the limit


@dataclass(frozen=True)
class Labelled:
    """Rows of one task with their labels [N], as they are drawn in training."""

    source: Rows
    y: np.ndarray

    def batch(self, positions: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """x [B, ...] and y [B] of some rows."""
        x = torch.as_tensor(np.asarray(self.source.take_x(positions)))
        return x.to(device), torch.as_tensor(self.y[positions]).long().to(device)


def train_supernet(
    supernet: Supernet,
    data: Mapping[str, object],
    *,
    steps: int,
    paths: int = 2,
    batch_size: int = 128,
    rate: float = 0.1,
    decay: float = 4e-5,
    smoothing: float = 0.1,
    within: Callable[[Subnet, str], bool] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train all options, heads and exits of a supernet, in place; it ends in eval mode.

    Args:
        supernet: what is trained.
        data: labelled rows for every task, as `offramp.data.rows` takes them. Tasks take turns.
        steps: of SGD.
        paths: networks that are drawn for a step; their gradients are averaged.
        batch_size: rows of a step.
        rate: of SGD at the start; it falls to 0 along a line.
        decay: weight decay.
        smoothing: of labels.
        within: whether a network and a task may be drawn, such as one within a budget; None: all.
        augment: a function of a batch x, such as `crop_flip` of the shelf `augments`.
        seed: of the draws.
        progress: whether to show how far it is.

    Returns:
        By task the mean loss of each of its steps.

    Raises:
        InvalidArgument: a number out of range, a task without rows, or a limit that nothing keeps.
        BadData: rows without labels, or with labels that are no classes of their task.
    """
    if min(steps, paths, batch_size) < 1:
        raise InvalidArgument(
            f"steps, paths and batch_size must be 1 or more, got {steps}, {paths} and {batch_size}"
        )
    if set(data) != set(supernet.heads):
        raise InvalidArgument(
            f"there must be rows for each of the tasks {sorted(supernet.heads)}, got {sorted(data)}"
        )
    before = snapshot(supernet)
    tasks = dict[str, Labelled]()
    seen = []
    for task, given in data.items():
        source = rows(given)
        row_index = index_of(source, progress=False)
        _require_labels(task, row_index.y, supernet.classes[task])
        tasks[task] = Labelled(source, np.asarray(row_index.y))
        seen.append(row_index.seen)
    device = next(supernet.parameters()).device
    optimizer = torch.optim.SGD(supernet.parameters(), rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # of augmentation and dropout
    losses: dict[str, list[float]] = {task: [] for task in tasks}
    supernet.train()
    try:
        for step in track(range(steps), what="supernet", total=steps, show=progress):
            task = list(tasks)[step % len(tasks)]
            positions = rng.integers(0, len(tasks[task].y), batch_size)
            x, y = tasks[task].batch(positions, device)
            if augment is not None:
                x = augment(x)
            optimizer.zero_grad()
            total = 0.0
            for _ in range(paths):
                subnet = _drawn(supernet, task, rng, within)
                loss = loss_of(supernet(x, subnet, task), y, smoothing) / paths
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
            optimizer.step()
            schedule.step()
            losses[task].append(total)
    finally:
        supernet.eval()
        for one in seen:
            remember(supernet, one, before)
    return losses


def loss_of(logits: tuple[Tensor, ...], y: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the last logits [B, C], plus the mean of that of the exits."""
    *exits, last = [cross_entropy(one, y, label_smoothing=smoothing) for one in logits]
    if not exits:
        return last
    return last + torch.stack(exits).mean()


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give the batch norms of a model the statistics of its own rows, in place.

    In a supernet they have seen all networks, so that none can be judged by them.

    Args:
        model: such as `Supernet.extract` gives it; it ends in eval mode.
        batches: rows [B, ...] without labels; all of them count alike.
    """
    norms = [
        part
        for part in model.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


def _drawn(
    supernet: Supernet,
    task: str,
    rng: np.random.Generator,
    within: Callable[[Subnet, str], bool] | None,
) -> Subnet:
    for _ in range(TRIES):
        subnet = supernet.drawn(rng)
        if within is None or within(subnet, task):
            return subnet
    raise InvalidArgument(
        f"none of {TRIES} drawn networks keeps the limit for {task!r}; allow more"
    )


def _require_labels(task: str, y: object, classes: int) -> None:
    if y is None:
        raise BadData(f"the rows of the task {task!r} must have labels. Give (x, y)")
    labels = np.asarray(y)
    if labels.min() < 0 or labels.max() >= classes:
        raise BadData(
            f"labels of the task {task!r} must be 0 to {classes - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )
