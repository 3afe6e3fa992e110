"""Classifiers of torchvision, `torchvision:NAME`.

    torchvision:resnet18
    torchvision:resnet50?weights=IMAGENET1K_V1
    torchvision:resnet18?num_classes=10

Weights come from download.pytorch.org (or torch's cache), except with a file of weights,
`pretrained=no` or another number of classes. They are read with `weights_only=True` and checked
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
# Models with heads that only training uses. Their pretrained weights expect a transformed input.
AUXILIARY = ("googlenet", "inception_v3")
# names in old weight files, from a time when names of modules could have dots
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def build(name: str, options: Mapping[str, str], fetch: bool) -> nn.Module:
    """Build a classifier of torchvision.

    Args:
        name: of the classifier.
        options: texts by name, see `KINDS`.
        fetch: whether to fetch its pretrained weights.

    Raises:
        UnknownName: torchvision does not have the classifier, the weights or the option.
        InvalidArgument: an option has a wrong value, or the weights cannot be fetched.
        MissingExtra: torchvision is not installed.
    """
    models = _models_with(name)
    values = read(options, KINDS, "torchvision")
    weights = _weights(models, name, values)
    pretrained = values.get("pretrained", True)
    # some models need arguments that otherwise follow from their weights
    arguments = dict[str, Any]()
    if "num_classes" in values:
        arguments["num_classes"] = values["num_classes"]
    if name in AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": False, "transform_input": pretrained}
    if name.startswith("vit_") and weights is not None:
        arguments["image_size"] = weights.meta["min_size"][0]
    spec = f"torchvision:{name}"
    model = built(spec, lambda: models.get_model(name, weights=None, **arguments))
    if not fetch or not pretrained:
        return model
    if weights is None or "num_classes" in values:
        if weights is None:
            why = "torchvision has none"
        else:
            why = "they are for the classes of ImageNet"
        raise InvalidArgument(f"{spec!r} has no pretrained weights ({why}). {RANDOM}")
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as problem:  # no network, a full disk, a damaged file
        raise unfetched(spec, problem) from problem
    _load(model, tensors)
    return model


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """Make the preprocessing of the weights' own transforms: cast, resize and crop to their size,
    normalise. Arguments and errors as for `build`.

    Returns:
        None for a model without weights.
    """
    models = _models_with(name)
    values = read(options, KINDS, "torchvision")
    weights = _weights(models, name, values)
    if weights is None:
        return None
    transforms = weights.transforms()
    (side,) = transforms.crop_size
    (short,) = transforms.resize_size
    return Preprocess(
        tuple(transforms.mean),
        tuple(transforms.std),
        size=(side, side),
        short=max(short, side),
        interpolation=str(transforms.interpolation.value),
    )


def _load(model: nn.Module, tensors: Any) -> None:
    """Load downloaded weights into a model, without auxiliary heads and under today's names.

    The dictionary is changed in place, because it has the versions of modules in an attribute.
    """
    for key in list(tensors):
        value = tensors.pop(key)
        if not key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            tensors[OLD_DENSENET.sub(r"\1\2", key)] = value
    model.load_state_dict(tensors)


def _weights(models: Any, name: str, values: Mapping[str, Any]) -> Any:
    """The weights of the option `weights`, or torchvision's default ones; None if it has none."""
    known = models.get_model_weights(name)
    if not len(known):
        return None
    wanted = values.get("weights", "DEFAULT")
    if wanted not in known.__members__:
        raise unknown(wanted, known.__members__, f"set of weights of {name!r}")
    return known[wanted]


def _models_with(name: str) -> Any:
    """The module torchvision.models, after a check that it has a classifier."""
    models = library("torchvision", f"torchvision:{name}").models
    names = models.list_models(module=models)
    if name not in names:
        raise unknown(name, names, "classifier of torchvision")
    return models
