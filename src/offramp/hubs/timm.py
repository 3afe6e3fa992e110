"""Models of timm, `timm:NAME`: R. Wightman, PyTorch Image Models, 2019,
github.com/huggingface/pytorch-image-models.

    timm:resnet18
    timm:vit_tiny_patch16_224.augreg_in21k
    timm:resnet18?num_classes=10&pretrained=no

Weights come from the Hugging Face hub (or its cache) unless a file is given or `pretrained=no` is
said.
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
    """The model; with `fetch` its pretrained weights too. Raises UnknownName, InvalidArgument,
    MissingExtra.

    Only names that timm lists: `hf-hub:` and `local-dir:` names of timm would read configurations
    from elsewhere.
    """
    timm = _known(name)
    given = read(options, KINDS, "timm")
    spec = f"timm:{name}"
    fetch = given.pop("pretrained", True) and fetch
    model = built(spec, lambda: timm.create_model(name, pretrained=False, **given))
    if not fetch:
        return model
    try:
        made: nn.Module = timm.create_model(name, pretrained=True, **given)
    # no network, no such file, a model without weights: each library its own kind
    except Exception as problem:
        raise unfetched(spec, problem) from problem
    return made


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """What timm resolves for the model: cast, resize to its input size (with its crop),
    normalise.
    """
    timm = _known(name)
    given = read(options, KINDS, "timm")
    cfg = timm.get_pretrained_cfg(name)
    found = timm.data.resolve_data_config({}, pretrained_cfg={} if cfg is None else cfg.to_dict())
    side = given.get("img_size")
    size = (side, side) if side else tuple(found["input_size"][1:])
    means = _channels(found["mean"], given)
    deviations = _channels(found["std"], given)
    central = found["crop_mode"] == "center" and size[0] == size[1]
    short = int(size[0] / found["crop_pct"]) if central else None
    kind = found["interpolation"]
    return Preprocess(
        means,
        deviations,
        size=size,
        short=short,
        interpolation=kind if kind in INTERPOLATIONS else "bicubic",
    )


def _channels(values: Any, given: Mapping[str, Any]) -> tuple[float, ...]:
    """A mean or deviation per channel; for another number of channels than it was measured on, that
    of all.
    """
    count = given.get("in_chans", len(values))
    return tuple(values) if count == len(values) else (sum(values) / len(values),)


def _known(name: str) -> Any:
    timm = library("timm", f"timm:{name}")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise unknown(base, timm.list_models(), "model of timm")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        if not tags:
            raise InvalidArgument(
                f"{name!r} names weights, and timm has none of {base!r}; leave {tag!r} out"
            )
        raise unknown(tag, tags, f"set of weights of {base!r}")
    return timm
