"""Models of timm, `timm:NAME`: R. Wightman, PyTorch Image Models, 2019,
github.com/huggingface/pytorch-image-models.

    timm:resnet18
    timm:vit_tiny_patch16_224.augreg_in21k
    timm:resnet18?num_classes=10&pretrained=no

Weights come from the Hugging Face hub (or its cache), except with a file of weights or
`pretrained=no`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from offramp._support.find import unknown
from offramp.errors import InvalidArgument
from offramp.hubs._options import Kinds, built, library, number, read, unfetched, yes_no
from offramp.layers.preprocess import INTERPOLATIONS, Preprocess

__all__ = ["build", "preprocess"]

KINDS: Kinds = {"pretrained": yes_no, "num_classes": number, "in_chans": number, "img_size": number}


def build(name: str, options: Mapping[str, str], fetch: bool) -> nn.Module:
    """Build a model of timm.

    Args:
        name: a name that timm lists. `hf-hub:` and `local-dir:` names of timm are refused, because
            they read configurations from elsewhere.
        options: texts by name, see `KINDS`.
        fetch: whether to fetch its pretrained weights.

    Raises:
        UnknownName: timm does not have the model, the weights or the option.
        InvalidArgument: an option has a wrong value, or the weights cannot be fetched.
        MissingExtra: timm is not installed.
    """
    timm = _library_with(name)
    arguments = read(options, KINDS, "timm")
    spec = f"timm:{name}"
    fetch = arguments.pop("pretrained", True) and fetch
    # first without weights, so that an error here is one of the options
    model = built(spec, lambda: timm.create_model(name, pretrained=False, **arguments))
    if not fetch:
        return model
    try:
        pretrained: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    # no network, a missing file, a model without weights: each library has its own exceptions
    except Exception as problem:
        raise unfetched(spec, problem) from problem
    return pretrained


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """Make the preprocessing that timm has for a model: cast, resize to its input size (with its
    crop), normalise. Arguments and errors as for `build`.
    """
    timm = _library_with(name)
    arguments = read(options, KINDS, "timm")
    config = timm.get_pretrained_cfg(name)
    config_fields = {}
    if config is not None:
        config_fields = config.to_dict()
    found = timm.data.resolve_data_config({}, pretrained_cfg=config_fields)
    size = tuple(found["input_size"][1:])  # of [C, H, W]
    if arguments.get("img_size"):
        size = (arguments["img_size"], arguments["img_size"])
    short = None
    if found["crop_mode"] == "center" and size[0] == size[1]:
        short = int(size[0] / found["crop_pct"])
    interpolation = found["interpolation"]
    if interpolation not in INTERPOLATIONS:  # such as "random", which is for training
        interpolation = "bicubic"
    return Preprocess(
        _channels(found["mean"], arguments),
        _channels(found["std"], arguments),
        size=size,
        short=short,
        interpolation=interpolation,
    )


def _channels(values: Any, arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """The mean or the deviation of each channel. If the model has another number of channels, it is
    one number for all, their average.
    """
    count = arguments.get("in_chans", len(values))
    if count == len(values):
        return tuple(values)
    return (sum(values) / len(values),)


def _library_with(name: str) -> Any:
    """The package timm, after a check that it has a model and its weights."""
    timm = library("timm", f"timm:{name}")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise unknown(base, timm.list_models(), "model of timm")
    tags = list[str]()
    for pretrained_name in timm.list_pretrained(f"{base}.*"):
        tags.append(pretrained_name.partition(".")[2])
    if tag and tag not in tags:
        if not tags:
            raise InvalidArgument(
                f"{name!r} names weights, but timm has no weights for {base!r}. Leave {tag!r} out"
            )
        raise unknown(tag, tags, f"set of weights of {base!r}")
    return timm
