"""`halting`: a copy of a model whose residual stages stop early (adaptive computation time)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from offramp._support.arguments import in_order
from offramp._support.find import find, unknown
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.wrappers import deep_copy


def halting(
    model: nn.Module, stages: Sequence[str], *, per: str = "position", **options: Any
) -> nn.Module:
    """Make a copy of a model whose residual stages run as many units as each position, or each
    sample, needs.

    The copy has the weights of the model. Its halting scores are untrained: train them with the
    recipe `pondered`, or in a loop of your own with `offramp.recipes.pondered.priced`. Until then
    its answers are close to those of the model.

    Args:
        model: any module; it is not changed.
        stages: names of its stages, each a Sequential of at least two units, such as ["layer1",
            "layer2", "layer3"].
        per: "position" (SACT) or "sample" (ACT).
        options: of `offramp.layers.adaptive_depth.AdaptiveDepth.from_layer`: eps, bias, break_even,
            tile, width.

    Returns:
        The copy, in the mode of the model.

    Raises:
        InvalidArgument: `stages` is empty, or has a stage twice or within another one.
        UnknownName: there is no module with this name.
        BadNetwork: a stage is not a Sequential of units.

    Example:
        >>> from offramp.models.cifar_resnet import resnet20
        >>> adaptive = halting(resnet20().eval(), ["layer1", "layer2", "layer3"], per="sample")
        >>> type(adaptive.layer1).__name__
        'AdaptiveDepth'
    """
    names = [stages] if isinstance(stages, str) else in_order(stages or ())
    if not names or len(set(names)) != len(names):
        raise InvalidArgument(f"stages must be names of stages, each once, got {names}")
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            known.pop("", None)  # the model itself is not offered
            raise unknown(name, [*known], "module of this model")
        for other in names:
            if other.startswith(name + "."):
                raise InvalidArgument(f"the stage {other!r} lies within {name!r}; name one of them")

    # Replace each stage in the copy by one that halts, made from the model's own stage.
    changed = deep_copy(model)
    for name in names:
        try:
            stage = find("layers", "AdaptiveDepth").from_layer(known[name], per=per, **options)
        except TypeError as problem:
            raise InvalidArgument(
                f"{problem}; options are width, eps, bias, break_even and tile"
            ) from problem
        except BadNetwork as problem:
            raise BadNetwork(f"{name!r}: {problem}") from problem
        above, _, last = name.rpartition(".")
        changed.get_submodule(above).register_module(last, stage)
    return changed
