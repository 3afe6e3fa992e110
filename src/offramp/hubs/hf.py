"""Classifiers of Hugging Face transformers, of images or texts: `hf:FOLDER` or `hf:OWNER/NAME`.

    hf:my-model/
    hf:textattack/bert-base-uncased-SST-2
    hf:google/vit-base-patch16-224?revision=main

A folder has config.json and safetensors; a name is fetched from the hub (or its cache). Code that
comes with a model is never run, and pickles are never read. The tokenizer belongs to the data:
`tsv:PATH?tokenizer=FOLDER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from offramp._support.files import from_home
from offramp.errors import BadFile, InvalidArgument
from offramp.hubs._options import RANDOM, Kinds, built, library, number, read, root_cause, yes_no
from offramp.layers.preprocess import Preprocess

__all__ = ["build", "preprocess"]

KINDS: Kinds = {"pretrained": yes_no, "num_classes": number, "revision": str}
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
CODE = "Code that comes with a model is not run. Build the model yourself, with my.module:factory"


class _Source(NamedTuple):
    """Where a model comes from.

    Args:
        name: a folder, or OWNER/NAME of the hub.
        spec: the same as a name of offramp, for messages.
        transformers: the package.
        values: the options, read.
        location: arguments of transformers that say where its files are.
        config: of the model.
    """

    name: str
    spec: str
    transformers: Any
    values: dict[str, Any]
    location: dict[str, Any]
    config: Any


def build(name: str, options: Mapping[str, str], fetch: bool) -> nn.Module:
    """Build a classifier of transformers.

    Weights without a classifier are refused, except if `num_classes` asks for a new one.

    Args:
        name: a folder, or OWNER/NAME of the hub.
        options: texts by name, see `KINDS`.
        fetch: whether to load its weights.

    Returns:
        A model whose output has class logits.

    Raises:
        UnknownName: there is no such option.
        InvalidArgument: an option has a wrong value, the model is not a classifier, or its files
            cannot be loaded.
        MissingExtra: transformers is not installed.
    """
    source = _source(name, options)
    auto_class = _auto_class(source.transformers, source.config, source.spec)
    if not fetch or not source.values.get("pretrained", True):
        return built(
            source.spec, lambda: auto_class.from_config(source.config, trust_remote_code=False)
        )
    arguments = {
        "config": source.config,
        "use_safetensors": True,
        "ignore_mismatched_sizes": "num_classes" in source.values,
    }

    def load() -> Any:
        return auto_class.from_pretrained(
            source.name, **source.location, **arguments, output_loading_info=True
        )

    model, info = _fetched(source.spec, "weights", load)
    missing = info["missing_keys"]
    if missing and "num_classes" not in source.values:
        raise InvalidArgument(
            f"{source.spec!r} must be a model that was trained to classify, but it has no weights "
            f"for {len(missing)} tensors (such as {min(missing)})"
        )
    classifier: nn.Module = model
    return classifier


def preprocess(name: str, options: Mapping[str, str]) -> Preprocess | None:
    """Make the preprocessing of preprocessor_config.json: cast, resize and crop, scale, normalise.
    Arguments and errors as for `build`.

    Returns:
        None for texts.

    Raises:
        BadFile: the file does not have the known fields.
    """
    source = _source(name, options)
    if not _mapped(source.transformers, "IMAGE", source.config):
        return None
    cached_file = source.transformers.utils.cached_file
    file = _fetched(
        source.spec,
        "preprocessor_config.json",
        lambda: cached_file(source.name, "preprocessor_config.json", **source.location),
    )
    try:
        return _preprocess(json.loads(Path(file).read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError, AttributeError) as problem:
        raise BadFile(
            f"{file} must have a size, a mean and a deviation in known fields, got {problem!r}. "
            f"Use --preprocess my.module:preprocess"
        ) from problem


def _source(name: str, options: Mapping[str, str]) -> _Source:
    """Read the options and the configuration of a model. Errors as for `build`."""
    name = _expanded(name)
    spec = f"hf:{name}"
    transformers = library("transformers", spec)
    values = read(options, KINDS, "hf")
    location = _location(name, values)
    config = _config(transformers, spec, location, values)
    return _Source(name, spec, transformers, values, location, config)


def _preprocess(fields: Mapping[str, Any]) -> Preprocess:
    """Preprocessing from the fields of an image processor."""
    # 1. Scale and normalisation.
    mean = (0.0,)
    std = (1.0,)
    if fields.get("do_normalize", True):
        mean = tuple(fields["image_mean"])
        std = tuple(fields["image_std"])
    scale = 1.0
    if fields.get("do_rescale", True):
        scale = 1 / fields.get("rescale_factor", 1 / 255)

    # 2. Sizes. `short` is the length of the shorter side after the resize, and `size` is the part
    # that is cut out of the middle. Processors write them in several ways.
    size: tuple[int, int] | None = None
    short: int | None = None
    cropped = bool(fields.get("do_center_crop")) and fields.get("crop_size") is not None
    if cropped:
        size = _pair(fields["crop_size"])
    wanted = fields.get("size")
    if isinstance(wanted, Mapping) and "shortest_edge" in wanted:
        edge = int(wanted["shortest_edge"])
        short = edge
        if size is None:
            # Without a crop nothing says how long the other side is. ConvNeXt's processor means a
            # square of this edge: below 384 pixels it is cut out of a larger image, whose size
            # follows from `crop_pct`; from 384 on, images are stretched to it.
            size = (edge, edge)
            short = None
            if edge < 384:
                short = int(edge / fields.get("crop_pct", 1.0))
    elif wanted is not None and size is None:
        size = _pair(wanted)

    # 3. Without a resize, images are only cropped.
    if not fields.get("do_resize", True):
        short = None
        if not cropped:
            size = None
    return Preprocess(
        mean,
        std,
        scale=scale,
        size=size,
        short=short,
        interpolation=RESAMPLING[fields.get("resample", 2)],
    )


def _pair(size: Any) -> tuple[int, int]:
    """Height and width from one number or from names."""
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"]))
    return (int(size), int(size))


def _expanded(name: str) -> str:
    """A name with `~` replaced by the home folder."""
    if name.startswith("~"):
        return str(from_home(name))
    return name


def _location(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the library that say where to look. A folder on this machine is never looked up
    on the hub.
    """
    if Path(name).is_dir():
        return {"local_files_only": True}
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InvalidArgument(
            f"hf: must be followed by a folder, or by OWNER/NAME of the hub, got {name!r}"
        )
    if "revision" in values:
        return {"revision": values["revision"]}
    return {}


def _config(
    transformers: Any, spec: str, location: Mapping[str, Any], values: Mapping[str, Any]
) -> Any:
    """The configuration of a model, with the number of classes from the options."""
    name = spec.removeprefix("hf:")
    labels = dict[str, Any]()
    if "num_classes" in values:
        labels["num_labels"] = values["num_classes"]

    def load() -> Any:
        return transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False, **location, **labels
        )

    return _fetched(spec, "config.json", load)


def _fetched(spec: str, what: str, load: Callable[[], Any]) -> Any:
    """Load something with the library. Raises InvalidArgument with the library's reason."""
    try:
        return load()
    # no network, an unknown name, a damaged file, a kind that only remote code knows
    except Exception as problem:
        if "trust_remote_code" in str(problem):
            raise InvalidArgument(
                f"{spec!r} must be a model that transformers itself has. {CODE}"
            ) from problem
        way = "Check the name and the network, or use a folder with this file"
        if what == "weights":
            way = RANDOM
        raise InvalidArgument(
            f"the {what} of {spec!r} cannot be loaded ({root_cause(problem)}). {way}"
        ) from problem


def _auto_class(transformers: Any, config: Any, spec: str) -> Any:
    """The class of transformers that builds a classifier for a configuration."""
    for task, auto_class in (
        ("IMAGE", "AutoModelForImageClassification"),
        ("SEQUENCE", "AutoModelForSequenceClassification"),
    ):
        if _mapped(transformers, task, config):
            return getattr(transformers, auto_class)
    raise InvalidArgument(
        f"{spec!r} must be a classifier of images or texts in transformers, got a "
        f"{config.model_type}"
    )


def _mapped(transformers: Any, task: str, config: Any) -> bool:
    """Whether transformers has a classifier of a kind for a configuration."""
    known = getattr(transformers, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING")
    return type(config) in known
