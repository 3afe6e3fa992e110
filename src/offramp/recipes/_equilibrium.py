"""Gradient equilibrium: what exits send back into a shared piece of the model is averaged, not
summed.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks, 2019, arXiv
1908.06294; also used by BoostNet (arXiv 2211.16726). With N exits, at tap i (from 0) the gradient
becomes

    g = (g_exit + (N - i - 1) g_deeper) / (N - i),

so that a parameter before tap i gets the mean over the N - i exits behind it; the exits' own
parameters get what they always do. Of several tensors that a tapped module gives the first alone is
rescaled, as in the authors' code, which rescales the coarsest scale and no other: MSDNet and RANet
here give that one first. Values are not touched.
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
            f"{what} is for exits inside one model, and this is a ladder of "
            f"{len(network.members)}; use cut"
        )


@contextlib.contextmanager
def equilibrium(network: Network, *, without: Collection[str] = ()) -> Iterator[None]:
    """While it lasts, gradients through the taps of a cut model are averaged.

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
            # the tapped tensor gets the sum of both ways, the exit's copy of it its own alone
            handles.append(tap.register_forward_hook(_scaling_tap(after / (after + 1))))
            handles.append(exit_.register_forward_pre_hook(_scaling_exit(1 / after)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaling_tap(factor: float) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        leaves = [*tensors_of(output, "tap").values()]
        if leaves:
            _scale(leaves[0], factor)

    return hook


def _scaling_exit(factor: float) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, inputs: tuple[Seen, ...]) -> None:
        _scale(inputs[0].features, factor)

    return hook


def _scale(value: Tensor, factor: float) -> None:
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
