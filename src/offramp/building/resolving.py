"""`resolutions`: a model that reads each image in the size that it needs (DRNet; Zhu et al., 2021,
arXiv 2106.02898).

A fork at the entrance chooses a size. Its arms are the same model with the same convolutions, and
with separate batch norms for each size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offramp._support.find import find
from offramp.building.routing import Fork, GateLike, route
from offramp.errors import InvalidArgument
from offramp.networks.ambient import without_autocast
from offramp.networks.inputs import as_inputs
from offramp.networks.network import Network, require_eval
from offramp.networks.wrappers import require_plain


@without_autocast()
def resolutions(
    model: nn.Module,
    example: Any,
    sizes: Sequence[int],
    *,
    gate: GateLike = "predictor",
    preprocess: nn.Module | None = None,
    spec: str | None = None,
) -> Network:
    """Make a network of one model at several resolutions, with a gate that chooses by the image.

    Args:
        model: takes images [B, C, H, W] of any of these sizes, and has batch norms. It is copied
            and not changed.
        example: some images, as the model (or `preprocess`) takes them.
        sizes: heights (and widths) in pixels, at least two that differ. The largest is the
            reference.
        gate: scores the sizes by the raw images: the name of a gate that is made for them, or a
            Gate.
        preprocess: the preprocessing of the model. It gives floats, which are then resized.
        spec: how the model is built again, such as "offramp:resnet56".

    Returns:
        A network with a fork called `resolution`, whose arms `r16`, `r24`, ... answer, the smallest
        first. Train it with the recipe `drnet`.

    Raises:
        InvalidArgument: sizes is not a list of at least two that differ, or the example is not a
            batch of images.
        BadNetwork: the model has no batch norms, or is in training mode.
        BadData: the model fails at one of the sizes.
    """
    require_plain(model, "model")
    require_eval(model, "model", "model.eval()")
    if isinstance(sizes, (int, str)) or len(set(sizes)) < 2:
        raise InvalidArgument(
            f"sizes must be at least two that differ, such as [16, 24, 32], got {sizes!r}"
        )
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InvalidArgument(f"sizes must be whole numbers of pixels, got {sizes!r}")
    inputs = as_inputs(example)
    images = next(iter(inputs.values()))
    if len(inputs) > 1 or images.dim() != 4:
        raise InvalidArgument(
            f"the example must be images [B, C, H, W], got rows of shape {list(images.shape[1:])}"
        )
    ordered = sorted(set(sizes))  # cheap arms first
    # One copy of the model holds the batch norms of all sizes; each arm is a way through it.
    resize = find("layers", "AtSize")
    switchable = find("layers", "with_switchable_norms")(model, len(ordered))
    arms: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for number, size in enumerate(ordered):
        name = f"r{size}"
        model_at_size = find("layers", "route_of")(switchable, number)
        arm = nn.Sequential(resize(size), model_at_size).eval()
        arms[name] = arm if preprocess is None else (arm, preprocess)
        if spec is not None and spec.startswith("offramp:"):
            model_name, _, arguments = spec.removeprefix("offramp:").partition("?")
            sources[name] = f"offramp:at_size?model={model_name}&size={size}"
            if arguments:
                sources[name] += f"&{arguments}"
    with torch.no_grad():
        return route([Fork("resolution", arms, gate)], example=example, sources=sources)
