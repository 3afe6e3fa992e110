"""Gradient equilibrium: the gradients of exits into a shared piece of the model are averaged, not
summed.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks, 2019, arXiv
1908.06294; also used by BoostNet (arXiv 2211.16726). With N exits, at tap i (from 0) the gradient
becomes

    g = (g_exit + (N - i - 1) g_deeper) / (N - i),

so a parameter before tap i gets the mean over the N - i exits behind it. The gradients of the
exits' own parameters do not change. If a tapped module returns several tensors, only the first is
rescaled, as in the authors' code, which rescales only the coarsest scale; MSDNet and RANet here
return that one first. Values do not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.network import Network
from offramp.networks.nodes import Seen
from offramp.networks.taps import tensors_of


def require_one_model(network: Network, what: str) -> None:
    """Raise BadNetwork for a ladder: its members share nothing between their exits."""
    if len(network.members) > 1:
        raise BadNetwork(
            f"{what} needs exits inside one model, but this is a ladder of "
            f"{len(network.members)}. Use cut"
        )


@contextlib.contextmanager
def equilibrium(network: Network, *, without: Collection[str] = ()) -> Iterator[None]:
    """Inside this context, gradients through the taps of a cut model are averaged.

    Args:
        network: one model that was cut.
        without: nodes whose exits do not count.
    """
    member = network.members[0]
    handles = []
    cuts = [cut for cut in member.cuts if member.node(cut) not in without]
    try:
        for index, cut in enumerate(cuts):
            after = len(cuts) - index
            tap = network.model_of(member).get_submodule(cut)
            exit_ = network.exit_of(member.node(cut))
            # The tapped tensor gets the sum of both gradients, the exit's copy of it only that of
            # the exit. The two factors together give the average.
            handles.append(tap.register_forward_hook(_scaling_tap(after / (after + 1))))
            handles.append(exit_.register_forward_pre_hook(_scaling_exit(1 / after)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaling_tap(factor: float) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that scales the gradient of a tapped module's first tensor."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = list(tensors_of(output, "tap").values())
        if tensors:
            _scale(tensors[0], factor)

    return hook


def _scaling_exit(factor: float) -> Callable[[nn.Module, Any], None]:
    """A forward pre-hook that scales the gradient of an exit's input."""

    def hook(_module: nn.Module, inputs: tuple[Seen, ...]) -> None:
        _scale(inputs[0].features, factor)

    return hook


def _scale(value: Tensor, factor: float) -> None:
    """Multiply the gradient that arrives at a tensor."""
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
