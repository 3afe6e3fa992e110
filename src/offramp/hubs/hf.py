"""Classifiers of Hugging Face transformers, of images or texts: `hf:FOLDER` or `hf:OWNER/NAME`.

    hf:my-model/
    hf:textattack/bert-base-uncased-SST-2
    hf:google/vit-base-patch16-224?revision=main

A folder holds config.json and safetensors; a name is fetched from the hub (or its cache). No code
that comes with a model is run, and no pickles are read. What turns texts into numbers belongs to
the data: `tsv:PATH?tokenizer=FOLDER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from offramp.errors import BadFile, InvalidArgument
from offramp.hubs._options import RANDOM, Kinds, built, first_line, library, number, read, yes_no
from offramp.layers.preprocess import Preprocess

__all__ = ["build", "preprocess"]

KINDS: Kinds = {"pretrained": yes_no, "num_classes": number, "revision": str}
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
CODE = "and code that comes with a model is not run; build the model yourself: my.module:factory"


def build(name: str, options: Mapping[str, str], fetch: bool) -> nn.Module:
    """The model that answers with class logits; with `fetch` its weights too. Raises
    InvalidArgument, MissingExtra.

    Weights without a classifier are refused, unless `num_classes` asks for a new one.
    """
    name, transformers, given = (
        _place(name),
        library("transformers", f"hf:{name}"),
        read(options, KINDS, "hf"),
    )
    spec = f"hf:{name}"
    where = _where(name, given)
    config = _config(transformers, spec, where, given)
    kind = _kind(transformers, config, spec)
    if not fetch or not given.get("pretrained", True):
        return built(spec, lambda: kind.from_config(config, trust_remote_code=False))
    more = {
        "config": config,
        "use_safetensors": True,
        "ignore_mismatched_sizes": "num_classes" in given,
    }

    def load() -> Any:
        return kind.from_pretrained(name, **where, **more, output_loading_info=True)

    model, said = _fetched(spec, "weights", load)
    if said["missing_keys"] and "num_classes" not in given:
        raise InvalidArgument(
            f"{spec!r} has no weights for {len(said['missing_keys'])} tensors (such as "
            f"{min(said['missing_keys'])}), "
            "expected a model that was trained to classify; name one"
        )
    made: nn.Module = model
    return made


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """What preprocessor_config.json says of images: cast, resize and crop, scale, normalise; None
    for texts.
    """
    name, transformers, given = (
        _place(name),
        library("transformers", f"hf:{name}"),
        read(options, KINDS, "hf"),
    )
    where = _where(name, given)
    config = _config(transformers, f"hf:{name}", where, given)
    if not _mapped(transformers, "IMAGE", config):
        return None
    find = transformers.utils.cached_file
    file = _fetched(
        f"hf:{name}",
        "preprocessor_config.json",
        lambda: find(name, "preprocessor_config.json", **where),
    )
    try:
        return _preprocess(json.loads(Path(file).read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError, AttributeError) as problem:
        raise BadFile(
            f"{file} says no size, mean and deviation that we know ({problem!r}); give "
            f"--preprocess "
            "my.module:preprocess"
        ) from problem


def _preprocess(said: Mapping[str, Any]) -> Preprocess:
    """Preprocessing from the fields of an image processor; those that differ by model are sizes."""
    normal = said.get("do_normalize", True)
    resized = said.get("do_resize", True)
    mean, std = (said["image_mean"], said["image_std"]) if normal else ((0.0,), (1.0,))
    if said.get("do_rescale", True):
        scale = 1 / said.get("rescale_factor", 1 / 255)
    else:
        scale = 1.0
    size = said.get("size")
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    short = None
    kept = _pair(crop) if crop is not None else None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        if (
            kept is None
            # ConvNeXt's way: a share of what is resized stays; else nothing says how long the other
            # side is
        ):
            kept = (short, short)
            short = int(short / said.get("crop_pct", 1.0)) if short < 384 else None
    elif size is not None and kept is None:
        kept = _pair(size)
    return Preprocess(
        tuple(mean),
        tuple(std),
        scale=scale,
        size=kept if resized or crop is not None else None,
        short=short if resized else None,
        interpolation=RESAMPLING[said.get("resample", 2)],
    )


def _pair(size: Any) -> tuple[int, int]:
    """Height and width from one number or from names."""
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"]))
    return (int(size), int(size))


def _place(name: str) -> str:
    """A folder as it is found from anywhere, else the name."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _where(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """How the library is to look: a folder on this machine is never asked for on the hub."""
    if Path(name).is_dir():
        return {"local_files_only": True}
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InvalidArgument(
            f"hf: must be followed by a folder, or by OWNER/NAME of the hub, got {name!r}"
        )
    return {"revision": given["revision"]} if "revision" in given else {}


def _config(
    transformers: Any, spec: str, where: Mapping[str, Any], given: Mapping[str, Any]
) -> Any:
    name = spec.removeprefix("hf:")
    labels = {"num_labels": given["num_classes"]} if "num_classes" in given else {}

    def load() -> Any:
        return transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False, **where, **labels
        )

    return _fetched(spec, "config.json", load)


def _fetched(spec: str, what: str, load: Callable[[], Any]) -> Any:
    """What a library loads. Raises InvalidArgument with the reason, in a sentence."""
    try:
        return load()
    # no network, no such name, a damaged file, a kind that only remote code knows
    except Exception as problem:
        said = first_line(problem)
        if "trust_remote_code" in str(problem):
            raise InvalidArgument(
                f"{spec!r} is no model that transformers has itself, {CODE}"
            ) from problem
        if what == "weights":
            way = RANDOM
        else:
            way = "check the name and the network, or give a folder with this file"
        raise InvalidArgument(f"cannot get the {what} of {spec!r} ({said}); {way}") from problem


def _kind(transformers: Any, config: Any, spec: str) -> Any:
    """The automatic class that has a classifier for this configuration."""
    for what, auto in (
        ("IMAGE", "AutoModelForImageClassification"),
        ("SEQUENCE", "AutoModelForSequenceClassification"),
    ):
        if _mapped(transformers, what, config):
            return getattr(transformers, auto)
    raise InvalidArgument(
        f"{spec!r} is a {config.model_type}, which has no classifier of images or texts in "
        f"transformers; expected one"
    )


def _mapped(transformers: Any, what: str, config: Any) -> bool:
    known = getattr(transformers, f"MODEL_FOR_{what}_CLASSIFICATION_MAPPING")
    return type(config) in known
