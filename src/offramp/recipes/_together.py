"""What the recipes that train models and exits together share: their parameters, a trial run, a
teacher's loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.inputs import given
from offramp.networks.network import Network, trial_rows
from offramp.networks.nodes import Seen
from offramp.networks.recipe import trainable_exits
from offramp.networks.taps import listening


def parameters_of(network: Network) -> tuple[nn.Parameter, ...]:
    """Those of the models and of the exits."""
    return (*network.backbone.parameters(), *network.exits.parameters())


def exit_parameters(network: Network, names: Iterable[str]) -> tuple[nn.Parameter, ...]:
    """The parameters of some exits."""
    parameters = list[nn.Parameter]()
    for name in names:
        parameters.extend(network.exit_of(name).parameters())
    return tuple(parameters)


def students_of(network: Network) -> tuple[str, ...]:
    """The exits that the last one can train by its answers. Raises BadNetwork when there are
    none.
    """
    names = trainable_exits(network)
    last = network.topology.exits[-1]
    if names == (last,):
        raise BadNetwork(
            f"the last exit, {last!r}, has all parameters and would train itself; hang exits "
            f"before it"
        )
    return tuple(name for name in names if name != last)


def seen_of(network: Network, rows: int = 2) -> dict[str, Seen]:
    """What stands at the nodes of a model that was cut, for seeded rows of the shapes that it was
    tried on.
    """
    with torch.no_grad():
        return dict(network.look(given(trial_rows(network, network.members[0], rows))))


def last_layer(network: Network) -> nn.Module | None:
    """Of a model that was cut, the layer with parameters that ran last; None where that stands
    before the last cut.
    """
    member = network.members[-1]
    rows = trial_rows(network)
    model = network.model_of(member)
    # Layers that hold parameters themselves, not only through their children.
    layers = dict[str, nn.Module]()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            layers[name] = module
    # The cuts are watched too: if a cut runs last, no layer comes after it.
    watched = {name: model.get_submodule(name) for name in member.cuts}
    watched.update(layers)
    ran = list[str]()
    if not rows:
        return None
    with torch.no_grad(), listening(watched, lambda name, _: ran.append(name)):
        for _ in network.look(given(rows)):
            pass
    if not ran or ran[-1] in member.cuts:
        return None
    return layers.get(ran[-1])


def require_one_width(network: Network) -> None:
    """Raise BadNetwork unless all exits of a model that was cut answer with one number of
    classes.
    """
    widths = dict[str, int]()
    for name, seen in seen_of(network).items():
        if seen.own is not None:  # logits [b, C] of the node's exit
            widths[name] = seen.own.shape[1]
    if len(set(widths.values())) > 1:
        raise BadNetwork(f"all exits must have the same number of classes, got {widths}")


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -sum_c q_c log p_c, p and q the softmax of logits and teacher [b, C] at a
    temperature.
    """
    q = (teacher / temperature).softmax(-1)
    return -(q * (logits / temperature).log_softmax(-1)).sum(-1).mean()
