"""Parts that the recipes share which train models and exits together: parameters, a trial run, a
teacher, and its loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.inputs import given
from offramp.networks.network import Network, last_model, plain_network, trial_rows
from offramp.networks.nodes import Seen
from offramp.networks.recipe import trainable_exits
from offramp.networks.taps import listening
from offramp.networks.wrappers import deep_copy, unwrapped


def parameters_of(network: Network) -> tuple[nn.Parameter, ...]:
    """The parameters of the models and of the exits."""
    return (*network.backbone.parameters(), *network.exits.parameters())


def exit_parameters(network: Network, names: Iterable[str]) -> tuple[nn.Parameter, ...]:
    """The parameters of some exits."""
    parameters = list[nn.Parameter]()
    for name in names:
        parameters.extend(network.exit_of(name).parameters())
    return tuple(parameters)


def students_of(network: Network) -> tuple[str, ...]:
    """The exits that can learn the last one's outputs.

    Args:
        network: with exits.

    Returns:
        The trainable exits before the last, from shallow to deep.

    Raises:
        BadNetwork: there are none.
    """
    names = trainable_exits(network)
    last = network.topology.exits[-1]
    if names == (last,):
        raise BadNetwork(
            f"The last exit, {last!r}, has all parameters and would train itself. Add exits "
            "before it"
        )
    return tuple(name for name in names if name != last)


def seen_of(network: Network, rows: int = 2) -> dict[str, Seen]:
    """The features and logits at the nodes of a cut model, for seeded rows.

    The rows have the shapes of the model's example.
    """
    with torch.no_grad():
        return dict(network.look(given(trial_rows(network, network.members[0], rows))))


def last_layer(network: Network) -> nn.Module | None:
    """The layer with parameters that runs last in a cut model.

    Args:
        network: whose last model was cut.

    Returns:
        The layer, or None if no layer runs behind the last cut.
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
    """Raise BadNetwork unless all exits of a cut model have the same number of classes."""
    widths = dict[str, int]()
    for name, seen in seen_of(network).items():
        if seen.own is not None:  # logits [b, C] of the node's exit
            widths[name] = seen.own.shape[1]
    if len(set(widths.values())) > 1:
        raise BadNetwork(f"all exits must have the same number of classes, got {widths}")


def teacher_network(teacher: nn.Module, student: Network) -> Network:
    """A frozen copy of a teacher as a network of one node, on the student's device.

    Args:
        teacher: a model, which gets the student's preprocessing, or a network with its own.
        student: the network that learns from it.

    Returns:
        The network, in eval mode and without gradients.
    """
    if isinstance(teacher, Network):
        network = last_model(teacher, copied=True)
    else:
        member = student.members[0]
        preprocess = deep_copy(student.preprocess_of(member))
        model = deep_copy(unwrapped(teacher)[0])
        network = plain_network(model, replace(member, spec=None), preprocess)
    return network.eval().requires_grad_(False).to(student.device())


def require_same_classes(logits: Tensor, teacher: Tensor) -> None:
    """Raise BadNetwork unless the logits [b, C] of student and teacher have the same classes."""
    if teacher.shape[-1] != logits.shape[-1]:
        raise BadNetwork(
            f"the teacher must have the student's {logits.shape[-1]} classes, got "
            f"{teacher.shape[-1]}"
        )


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean over rows of -sum_c q_c log p_c, with p and q the softmax of logits and teacher.

    Args:
        logits: of the student, [b, C].
        teacher: logits of the teacher, [b, C].
        temperature: of both softmaxes.

    Raises:
        BadNetwork: the teacher has another number of classes.
    """
    require_same_classes(logits, teacher)
    q = (teacher / temperature).softmax(-1)
    return -(q * (logits / temperature).log_softmax(-1)).sum(-1).mean()
