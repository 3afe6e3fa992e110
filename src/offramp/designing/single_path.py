"""Training of a supernet by single paths, and the batch norms of one of its networks.

Every step draws a few networks uniformly and averages their gradients (RSBNet's ensemble of single
paths). Single Path One-Shot draws one network a step: Guo et al., 2020, arXiv 1904.00420. As in the
authors' code: SGD with momentum 0.9, weight decay 4e-5, label smoothing 0.1. The rate falls
linearly.
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

from offramp._support.arguments import require_count
from offramp._support.progress import track
from offramp.data.rows import Rows, rows
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import BadData, Diverged, InvalidArgument
from offramp.fitting.interrupting import interruptible
from offramp.fitting.loader import index_of
from offramp.networks.trained import remember, snapshot
from offramp.plans.provenance import SeenRows

TRIES = 100  # draws for a network within the limit
KEEP_EVERY = 60.0  # seconds between two saved states


@dataclass(frozen=True)
class Labelled:
    """Labelled rows of one task.

    Args:
        source: the rows.
        y: their labels [N].
        seen: their digests, which recognise the rows later.
    """

    source: Rows
    y: np.ndarray
    seen: SeenRows

    def batch(self, positions: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """x [B, ...] and y [B] of the rows at some positions [B]."""
        x = torch.as_tensor(np.asarray(self.source.take_x(positions)))
        y = torch.as_tensor(self.y[positions]).long()
        return x.to(device), y.to(device)


def labelled(task: str, data: object, *, progress: bool = False) -> Labelled:
    """Read the labels and the digests of the rows of a task.

    Args:
        task: its name, for the message.
        data: as `offramp.data.rows` takes it.
        progress: whether to show progress.

    Raises:
        BadData: the rows have no labels, or are a stream.
    """
    source = rows(data)
    index = index_of(source, progress=progress)
    if index.y is None:
        raise BadData(f"the rows of the task {task!r} must have labels. Use (x, y)")
    return Labelled(source, np.asarray(index.y), index.seen)


@dataclass(frozen=True)
class TrainingState:
    """The state of the training of a supernet, without its weights.

    Args:
        step: the next step.
        losses: by task, the losses of its steps so far.
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
    """Train all options, heads and exits of a supernet, in place. It ends in eval mode.

    Args:
        supernet: the supernet.
        data: labelled rows for every task, as `offramp.data.rows` takes them, or `Labelled`. Each
            step trains one task, in turn.
        steps: of SGD.
        paths: networks that are drawn for a step; their gradients are averaged.
        batch_size: rows of a step.
        rate: learning rate of SGD at the first step; it falls linearly to 0.
        decay: weight decay.
        smoothing: of the labels.
        within: whether a network may be drawn for a task, such as one within a budget; None for
            all.
        augment: a function of a batch x, such as `crop_flip` of the shelf `augments`.
        seed: of the draws.
        begin: the state that an earlier run saved, together with the weights that the supernet has
            now; None begins at the first step. The result is that of a run without a break.
        keep: called with the state now and then, at the end, and when the run is interrupted.
        progress: whether to show progress.

    Returns:
        By task, the loss of each of its steps, averaged over the drawn networks.

    Raises:
        InvalidArgument: a number is out of range, a task has no rows, or no drawn network is
            `within` the limit.
        BadData: rows have no labels, or a label is not a class of the task.
        Diverged: a loss is no longer finite.
    """
    require_count("steps", steps)
    require_count("paths", paths)
    require_count("batch_size", batch_size)
    if set(data) != set(supernet.heads):
        raise InvalidArgument(
            f"data must have rows for each of the tasks {sorted(supernet.heads)}, got "
            f"{sorted(data)}"
        )
    weights_before = snapshot(supernet)
    tasks = dict[str, Labelled]()
    for task, task_data in data.items():
        if isinstance(task_data, Labelled):
            training_rows = task_data
        else:
            training_rows = labelled(task, task_data)
        _require_labels(task, training_rows.y, supernet.classes[task])
        tasks[task] = training_rows
    device = next(supernet.parameters()).device
    optimizer = torch.optim.SGD(supernet.parameters(), rate, momentum=0.9, weight_decay=decay)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # of augmentation and dropout
    losses: dict[str, list[float]] = {task: [] for task in tasks}
    first = 0
    if begin is not None:
        first = begin.step
        _resume(supernet, optimizer, rng, losses, begin)
    last_kept = time.monotonic()
    steps_left = track(range(first, steps), what="supernet", total=steps - first, show=progress)
    supernet.train()
    try:
        with interruptible() as interrupted:
            for step in steps_left:
                # 1. Draw a batch of the task whose turn it is.
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / steps)
                task = list(tasks)[step % len(tasks)]
                positions = rng.integers(0, len(tasks[task].y), batch_size)
                x, y = tasks[task].batch(positions, device)
                if augment is not None:
                    x = augment(x)

                # 2. Add up the gradients of a few drawn networks, and make a step of SGD.
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
                        f"{step + 1}. Use a smaller rate",
                        step=step + 1,
                    )
                optimizer.step()
                losses[task].append(total)

                # 3. Save the state now and then, and at the end of the run, whatever ends it.
                ends = step + 1 == steps or interrupted.is_set()
                due = ends or time.monotonic() - last_kept > KEEP_EVERY
                if keep is not None and due:
                    keep(_state_of(supernet, optimizer, rng, losses, step + 1))
                    last_kept = time.monotonic()
                if interrupted.is_set():
                    break
            if interrupted.is_set():  # also if Ctrl-C came while the last state was saved
                raise KeyboardInterrupt
    finally:
        supernet.eval()
        for training_rows in tasks.values():
            remember(supernet, training_rows.seen, weights_before)
    return losses


def _state_of(
    supernet: Supernet,
    optimizer: torch.optim.SGD,
    rng: np.random.Generator,
    losses: Mapping[str, list[float]],
    step: int,
) -> TrainingState:
    """The state before a step."""
    # SGD keeps its momentum by parameter; a file needs it by name
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
    """Set momentum, losses and generators to those of a saved state."""
    for name, parameter in supernet.named_parameters():
        if name in state.momentum:
            buffer = state.momentum[name].to(parameter.device)
            optimizer.state[parameter]["momentum_buffer"] = buffer
    for task in losses:
        losses[task] += state.losses[task]
    rng.bit_generator.state = dict(state.draws)
    torch.set_rng_state(state.torch_draws)


def loss_of(logits: tuple[Tensor, ...], y: Tensor, smoothing: float) -> Tensor:
    """Compute the loss of a batch: the cross-entropy at the head, plus its mean over the exits.

    Args:
        logits: [B, C] of every exit and, last, of the head.
        y: labels [B].
        smoothing: of the labels.
    """
    losses = [cross_entropy(output, y, label_smoothing=smoothing) for output in logits]
    *exits, last = losses
    if not exits:
        return last
    return last + torch.stack(exits).mean()


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running statistics of a model's batch norms anew, in place.

    In a supernet they mix the statistics of all networks, so no single network can be judged with
    them.

    Args:
        model: such as one from `Supernet.extract`; it ends in eval mode.
        batches: rows [B, ...] without labels. Every batch has the same weight.
    """
    norms = list[_BatchNorm]()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            norms.append(module)
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
    """A random network within the limit."""
    for _ in range(TRIES):
        subnet = supernet.drawn(rng)
        if within is None or within(subnet, task):
            return subnet
    raise InvalidArgument(
        f"within must allow some networks of {task!r}, got none of {TRIES} that were drawn"
    )


def _require_labels(task: str, labels: np.ndarray, classes: int) -> None:
    """Raise BadData for a label that is not a class of the task."""
    if labels.min() < 0 or labels.max() >= classes:
        raise BadData(
            f"labels of the task {task!r} must be 0 to {classes - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )
