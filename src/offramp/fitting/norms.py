"""Batch norms whose statistics are those of the whole batch, where several processes hold a share
of it each.

torch's SyncBatchNorm does this on GPUs alone; here it is the same sums on any device, so that a
network learns the same whatever the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offramp._support.processes import Processes


class _Total(torch.autograd.Function):
    """The sum over processes; a gradient is that of the sum of all their losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.total(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.total(gradient), None


@contextlib.contextmanager
def shared_norms(network: nn.Module, processes: Processes) -> Iterator[None]:
    """While it lasts, batch norms in training mode see the rows of all processes, which run them in
    one order.
    """
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    if processes.count == 1 or not norms:
        yield
        return
    norms = [
        norm
        for norm in norms
        if not isinstance(norm, nn.SyncBatchNorm) and "forward" not in vars(norm)
    ]
    for norm in norms:
        vars(norm)["forward"] = partial(_shared, norm, processes)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _shared(norm: _BatchNorm, processes: Processes, x: Tensor) -> Tensor:
    """What the norm gives for these rows [b, C, ...] among those of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    axes = [0, *range(2, x.dim())]
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = processes.total(wide.new_tensor([float(x.numel() // x.shape[1])]))
        mean = _sum(wide.sum(axes), processes) / count
        apart = wide - mean.view(shape)
        variance = _sum(apart.square().sum(axes), processes) / count
        y = apart * torch.rsqrt(variance + norm.eps).view(shape)
        if norm.weight is not None:
            y = y * norm.weight.view(shape) + norm.bias.view(shape)
    _remember(norm, mean.detach(), variance.detach() * count / (count - 1))
    return y.to(x.dtype)


def _sum(value: Tensor, processes: Processes) -> Tensor:
    found: Tensor = _Total.apply(value, processes)  # type: ignore[no-untyped-call]
    return found


def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics on, as torch does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        step = 1 / float(norm.num_batches_tracked)
    else:
        step = norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), step)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), step)
