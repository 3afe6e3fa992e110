"""Training a supernet by single paths, and the batch norms of one of its networks.

Every step draws a few networks, uniformly, and averages their gradients (RSBNet's ensemble of
single paths; one network a step is Single Path One-Shot's way). Guo et al., 2020, arXiv 1904.00420,
as in the authors' code: SGD with momentum 0.9, weight decay 4e-5, label smoothing 0.1. The rate
falls linearly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from offramp._support.progress import track
from offramp.data.rows import Rows, rows
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import BadData, Diverged, InvalidArgument
from offramp.fitting.interrupting import interruptible
from offramp.fitting.loader import index_of
from offramp.networks.trained import remember, snapshot
from offramp.plans.provenance import SeenRows

TRIES = 100  # draws until one is within the limit
KEEP_EVERY = 60.0  # seconds between two states that are kept


@dataclass(frozen=True)
class Labelled:
    """Rows of one task, as they are drawn in training.

    Args:
        source: the rows.
        y: their labels [N].
        seen: their digests, to recognise them later.
    """

    source: Rows
    y: np.ndarray
    seen: SeenRows

    def batch(self, positions: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """x [B, ...] and y [B] of some rows."""
        x = torch.as_tensor(np.asarray(self.source.take_x(positions)))
        return x.to(device), torch.as_tensor(self.y[positions]).long().to(device)


def labelled(task: str, data: object, *, progress: bool = False) -> Labelled:
    """Read labels and digests of the rows of a task.

    Args:
        task: its name, for the message.
        data: as `offramp.data.rows` takes it.
        progress: whether to show how far it is.

    Raises:
        BadData: the rows have no labels, or are a stream.
    """
    source = rows(data)
    index = index_of(source, progress=progress)
    if index.y is None:
        raise BadData(f"the rows of the task {task!r} must have labels. Give (x, y)")
    return Labelled(source, np.asarray(index.y), index.seen)


@dataclass(frozen=True)
class TrainingState:
    """Where the training of a supernet is, besides its weights.

    Args:
        step: the next step.
        losses: by task, those of its steps so far.
        momentum: of SGD, by the name of the parameter.
        draws: the state of the generator that draws rows and networks.
        torch_draws: the state of torch's generator, uint8 [5056], for augmentation and dropout.
    """

    step: int
    losses: Mapping[str, list[float]]
    momentum: Mapping[str, Tensor]
    draws: Mapping[str, Any]
    torch_draws: Tensor


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
    begin: TrainingState | None = None,
    keep: Callable[[TrainingState], None] | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train all options, heads and exits of a supernet, in place; it ends in eval mode.

    Args:
        supernet: what is trained.
        data: labelled rows for every task, as `offramp.data.rows` takes them, or `Labelled`. Tasks
            take turns.
        steps: of SGD.
        paths: networks that are drawn for a step; their gradients are averaged.
        batch_size: rows of a step.
        rate: of SGD at the start; it falls to 0 along a line.
        decay: weight decay.
        smoothing: of labels.
        within: whether a network and a task may be drawn, such as one within a budget; None: all.
        augment: a function of a batch x, such as `crop_flip` of the shelf `augments`.
        seed: of the draws.
        begin: the state that an earlier run kept, whose weights the supernet has; None begins at
            the first step. The same steps then follow as without a break.
        keep: called with the state now and then, at the end, and when the run is interrupted.
        progress: whether to show how far it is.

    Returns:
        By task the mean loss of each of its steps.

    Raises:
        InvalidArgument: a number out of range, a task without rows, or a limit that nothing keeps.
        BadData: rows without labels, or with labels that are no classes of their task.
        Diverged: a loss is no longer finite.
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
    for task, given in data.items():
        read = given if isinstance(given, Labelled) else labelled(task, given)
        _require_labels(task, read.y, supernet.classes[task])
        tasks[task] = read
    device = next(supernet.parameters()).device
    optimizer = torch.optim.SGD(supernet.parameters(), rate, momentum=0.9, weight_decay=decay)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # of augmentation and dropout
    losses: dict[str, list[float]] = {task: [] for task in tasks}
    first = 0
    if begin is not None:
        first = begin.step
        _resume(supernet, optimizer, rng, losses, begin)
    kept = time.monotonic()
    steps_left = track(range(first, steps), what="supernet", total=steps - first, show=progress)
    supernet.train()
    try:
        with interruptible() as interrupted:
            for step in steps_left:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / steps)
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
                if not math.isfinite(total):
                    raise Diverged(
                        f"the supernet's loss for {task!r} must be finite, got {total} at step "
                        f"{step + 1}. Lower the rate",
                        step=step + 1,
                    )
                optimizer.step()
                losses[task].append(total)
                # keep the state now and then, and where the run ends, for whatever reason
                ends = step + 1 == steps or interrupted.is_set()
                due = ends or time.monotonic() - kept > KEEP_EVERY
                if keep is not None and due:
                    keep(_state_of(supernet, optimizer, rng, losses, step + 1))
                    kept = time.monotonic()
                if interrupted.is_set():
                    break
            if interrupted.is_set():  # also where Ctrl-C came while the last state was kept
                raise KeyboardInterrupt
    finally:
        supernet.eval()
        for read in tasks.values():
            remember(supernet, read.seen, before)
    return losses


def _state_of(
    supernet: Supernet,
    optimizer: torch.optim.SGD,
    rng: np.random.Generator,
    losses: Mapping[str, list[float]],
    step: int,
) -> TrainingState:
    """The state before a step."""
    momentum = dict[str, Tensor]()
    for name, parameter in supernet.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            momentum[name] = buffer
    draws = dict(rng.bit_generator.state)
    return TrainingState(step, losses, momentum, draws, torch.get_rng_state())


def _resume(
    supernet: Supernet,
    optimizer: torch.optim.SGD,
    rng: np.random.Generator,
    losses: dict[str, list[float]],
    state: TrainingState,
) -> None:
    """Put momentum, losses and generators back to what they were."""
    for name, parameter in supernet.named_parameters():
        if name in state.momentum:
            buffer = state.momentum[name].to(parameter.device)
            optimizer.state[parameter]["momentum_buffer"] = buffer
    for task in losses:
        losses[task] += state.losses[task]
    rng.bit_generator.state = dict(state.draws)
    torch.set_rng_state(state.torch_draws)


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


def _require_labels(task: str, labels: np.ndarray, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise BadData(
            f"labels of the task {task!r} must be 0 to {classes - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )
