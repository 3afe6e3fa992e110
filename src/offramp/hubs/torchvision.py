"""Classifiers of torchvision, `torchvision:NAME`.

    torchvision:resnet18
    torchvision:resnet50?weights=IMAGENET1K_V1
    torchvision:resnet18?num_classes=10

Weights come from download.pytorch.org (or torch's cache) unless a file is given, `pretrained=no` is
said, or the number of classes is another one. They are read with `weights_only=True` and checked
against the hash in their name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from offramp._support.find import unknown
from offramp.errors import InvalidArgument
from offramp.hubs._options import RANDOM, Kinds, built, library, number, read, unfetched, yes_no
from offramp.layers.preprocess import Preprocess

__all__ = ["build", "preprocess"]

KINDS: Kinds = {"pretrained": yes_no, "num_classes": number, "weights": str}
AUXILIARY = (
    "googlenet",
    "inception_v3",
)  # with heads that only training uses, and an input that weights transform
# names of a time when dots were allowed
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def build(name: str, options: Mapping[str, str], fetch: bool) -> nn.Module:
    """The model; with `fetch` its pretrained weights too. Raises UnknownName, InvalidArgument,
    MissingExtra.
    """
    models = _known(name)
    given = read(options, KINDS, "torchvision")
    weights = _weights(models, name, given)
    pretrained = given.get("pretrained", True)
    arguments: dict[str, Any] = {key: given[key] for key in ("num_classes",) if key in given}
    if name in AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": False, "transform_input": pretrained}
    if name.startswith("vit_") and weights is not None:
        arguments["image_size"] = weights.meta["min_size"][0]
    spec = f"torchvision:{name}"
    model = built(spec, lambda: models.get_model(name, weights=None, **arguments))
    if not fetch or not pretrained:
        return model
    if weights is None or "num_classes" in given:
        if weights is None:
            why = "torchvision has none"
        else:
            why = "they are for the classes of ImageNet"
        raise InvalidArgument(f"{spec!r} has no pretrained weights ({why}); {RANDOM}")
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as problem:  # no network, a full disk, a damaged file
        raise unfetched(spec, problem) from problem
    _load(model, tensors)
    return model


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """What the weights' own transforms do: cast, resize and crop to their size, normalise; None for
    a model without.
    """
    models = _known(name)
    given = read(options, KINDS, "torchvision")
    weights = _weights(models, name, given)
    if weights is None:
        return None
    found = weights.transforms()
    (side,), (short,) = found.crop_size, found.resize_size
    kind = str(found.interpolation.value)
    return Preprocess(
        tuple(found.mean),
        tuple(found.std),
        size=(side, side),
        short=max(short, side),
        interpolation=kind,
    )


def _load(model: nn.Module, tensors: Any) -> None:
    """Put downloaded weights in, changed in place: their versions stand in an attribute."""
    for key in list(tensors):
        value = tensors.pop(key)
        if not key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            tensors[OLD_DENSENET.sub(r"\1\2", key)] = value
    model.load_state_dict(tensors)


def _weights(models: Any, name: str, given: Mapping[str, Any]) -> Any:
    """The weights that are asked for, or the library's default ones; None where it has none."""
    known = models.get_model_weights(name)
    if not len(known):
        return None
    asked = given.get("weights", "DEFAULT")
    if asked not in known.__members__:
        raise unknown(asked, known.__members__, f"set of weights of {name!r}")
    return known[asked]


def _known(name: str) -> Any:
    models = library("torchvision", f"torchvision:{name}").models
    names = models.list_models(module=models)
    if name not in names:
        raise unknown(name, names, "classifier of torchvision")
    return models
