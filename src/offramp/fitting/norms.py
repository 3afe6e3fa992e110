"""Batch norms with the statistics of the complete batch, when each process holds a share of it.

torch's SyncBatchNorm does this on GPUs only. Here the same sums are taken on any device, so a
network learns the same for any number of processes.
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
    """The sum over processes. Its gradient is that of the sum of all their losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.total(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.total(gradient), None


@contextlib.contextmanager
def shared_norms(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Let batch norms in training mode use the rows of all processes while the context is open.

    All processes must run the norms in one order.

    Args:
        network: its batch norms get another `forward`; SyncBatchNorm and norms that already have
            one of their own stay.
        processes: that hold a share of each batch. Nothing changes for a single one.
    """
    norms = list[_BatchNorm]()
    if processes.count > 1:
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm) or "forward" in vars(module):
                continue
            if isinstance(module, _BatchNorm):
                norms.append(module)
    for norm in norms:
        vars(norm)["forward"] = partial(_shared, norm, processes)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _shared(norm: _BatchNorm, processes: Processes, x: Tensor) -> Tensor:
    """The output [b, C, ...] of a norm for the rows of this process among those of all."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    shape = [1, -1, *[1] * (x.dim() - 2)]  # of one number per channel, to broadcast with x
    axes = [0, *range(2, x.dim())]  # all but the channels
    with torch.autocast(x.device.type, enabled=False):
        # statistics are float32 even where activations have 16 bits
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = processes.total(wide.new_tensor([float(x.numel() // x.shape[1])]))  # [1]
        mean = _sum(wide.sum(axes), processes) / count  # [b, C, ...] -> [C]
        centered = wide - mean.view(shape)
        variance = _sum(centered.square().sum(axes), processes) / count  # [C]
        y = centered * torch.rsqrt(variance + norm.eps).view(shape)
        if norm.weight is not None:
            y = y * norm.weight.view(shape) + norm.bias.view(shape)
    # torch keeps the unbiased variance
    _update_statistics(norm, mean.detach(), variance.detach() * count / (count - 1))
    return y.to(x.dtype)


def _sum(value: Tensor, processes: Processes) -> Tensor:
    """The sum over processes, with gradient."""
    total: Tensor = _Total.apply(value, processes)  # type: ignore[no-untyped-call]
    return total


def _update_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running mean and variance [C] towards those of a batch, as torch does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:  # a plain average over all batches
        step = 1 / float(norm.num_batches_tracked)
    else:
        step = norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), step)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), step)
